"""What the shim is, where it sits and what it has done: ``status()``.

It must be easy to say "it has done nothing for a month: remove it", in any process and
without a key in what is shown.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import site
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from . import _patching, _seams, _settings, _switch
from ._version import __version__

if TYPE_CHECKING:
    from ._patching import SeamStateName
    from ._route import Route

_STARTUP_FILE = "tinker_routefix"
_STARTUP_MODULE = "_tinker_routefix_autoload"


SdkState = Literal[
    "patched",
    "not imported",
    "does not fit",
    "replaced",
    "not installed",
    "not in this release",
    "cannot be imported",
]
RouteState = Literal["connecting", "warm", "waiting", "given up", "unused"]


@dataclasses.dataclass(frozen=True, slots=True)
class SdkStatus:
    """Something that the shim patches: which release is there, and whether it is patched."""

    name: str
    """What it is called in messages."""
    distribution: str
    """The package on PyPI."""
    release: str | None
    """Its version; None: not installed, or without metadata."""
    state: SdkState
    """``patched``, ``not imported``, ``does not fit`` or ``replaced``: one of its patched
    functions is. The command ``tinker-routefix status`` also knows ``not installed``, ``not in
    this release`` and ``cannot be imported``."""
    detail: str | None
    """Why it does not fit, or cannot be imported."""


@dataclasses.dataclass(frozen=True, slots=True)
class SeamStatus:
    """One seam (patched function): where it is, and what stands there now."""

    name: str
    """Module and attribute."""
    purpose: str
    """What it is patched for."""
    state: SeamStateName
    """One of ``not loaded``, ``original``, ``ours``, ``ours, under another wrapper``,
    ``replaced``, ``absent``."""


@dataclasses.dataclass(frozen=True, slots=True)
class SettingStatus:
    """One setting, and where its value came from."""

    name: str
    """As in ``configure()``."""
    variable: str
    """The environment variable."""
    value: Any
    """The value in force; durations in seconds."""
    source: Literal["default", "environment", "configure()"]
    """``default``, ``environment`` or ``configure()``."""


@dataclasses.dataclass(frozen=True, slots=True)
class AutoloadStatus:
    """The zero-line way, as this interpreter has it."""

    requested: Literal["on", "off", "refused", "unset"]
    """What ``TINKER_ROUTEFIX_AUTOLOAD`` says: ``on``, ``off``, ``refused`` or ``unset``."""
    file: str | None
    """The file that this interpreter reads at its start; None: not in place."""
    in_force: bool
    """It was in place and asked for when this process began."""


@dataclasses.dataclass(frozen=True, slots=True)
class JobStatus:
    """One job's route and what has happened on it since the process began."""

    account: str
    """The account's name."""
    name: str
    """The job's name."""
    gateway: str
    """The gateway's URL, up to ``/training``; never a user name."""
    route: RouteState
    """``connecting``, ``warm``, ``waiting`` (a request waits for it), ``given up``, or ``unused``:
    no client of this process leads to it any more."""
    refused: int
    """How many 404s of the gateway, or of unknown origin, requests and warm-ups got."""
    questions: int
    """How many questions the control plane was asked."""
    probes: int
    """How many requests of its own the shim has sent."""
    replays: int
    """How many times a refused request was sent again."""
    recovered: int
    """How many requests and warm-ups got a 404 and then got through."""
    given_up: int
    """How many timed out: the caller got the 404."""
    uncertain: int
    """How many requests were not replayed because an earlier try may have been carried out."""
    failed_fast: int
    """How many got their 404 early, because of what the control plane says."""
    cancelled: int
    """How many the program itself stopped waiting for."""
    telemetry_dropped: int
    """How many batches of telemetry were dropped instead of sent again."""
    longest_wait: float
    """The longest time from a first 404 to the end of the request or warm-up, in seconds."""
    warmups: int
    """How many training clients were created with a warm-up."""
    warmup_seconds: float
    """How long their warm-ups took together, in seconds."""
    last_intervention: float | None
    """When the last 404 was received, a Unix timestamp in seconds; None: never."""
    gateway_fix: str | None
    """``503 route_not_ready`` where the gateway was seen to tell a stale route from a job that is
    gone; None: it was not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The shim in this process."""

    version: str
    """Of tinker_routefix."""
    active: bool
    """Whether the wrappers are in force."""
    reason: str
    """Why it is active or not, in a sentence."""
    seams: tuple[SeamStatus, ...]
    """The functions that are patched, in all SDKs."""
    jobs: tuple[JobStatus, ...]
    """The jobs that clients of this process have connected to; 256 at most of those that none uses
    any more."""
    left_alone: tuple[str, ...]
    """Origins of the last clients that the shim leaves alone, because their URLs are no trainer
    job's route; eight at most."""
    sdks: tuple[SdkStatus, ...]
    """The SDKs that can be patched."""
    settings: tuple[SettingStatus, ...]
    """The settings in force, and where each came from."""
    autoload: AutoloadStatus
    """Whether a startup file loads the shim."""
    last_intervention: float | None
    """When any job last needed help, a Unix timestamp in seconds; None: never. Also of jobs that
    are not listed any more."""


def status() -> Status:
    """The shim's state in this process; safe to call from any thread at any time."""
    states = _patching.states()
    active, reason = _in_force()
    return Status(
        version=__version__,
        active=active,
        reason=reason,
        seams=tuple(
            SeamStatus(f"{seam.module}.{seam.attribute}", seam.purpose, state.value)
            for _, seam, state in states
        ),
        jobs=_jobs(),
        left_alone=_left_alone(),
        sdks=tuple(
            _sdk(sdk, {state for other, _, state in states if other is sdk}) for sdk in _seams.SDKS
        ),
        settings=_settings_in_force(),
        autoload=_autoload(),
        last_intervention=_last_intervention(),
    )


@functools.cache
def _release(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _sdk(sdk: _seams.Sdk, standing: set[_patching.SeamState]) -> SdkStatus:
    state = _patching.SeamState
    incompatibility = _patching.incompatibility(sdk)
    if incompatibility is not None:
        word: SdkState = "does not fit"
    elif state.REPLACED in standing:
        word = "replaced"
    else:
        word = "patched" if standing <= {state.OURS, state.WRAPPED_OVER} else "not imported"
    return SdkStatus(sdk.name, sdk.distribution, _release(sdk.distribution), word, incompatibility)


def _settings_in_force() -> tuple[SettingStatus, ...]:
    current = _settings.current()
    return tuple(
        SettingStatus(
            field.name,
            field.metadata["variable"],
            getattr(current, field.name),
            _source(field, getattr(current, field.name)),
        )
        for field in dataclasses.fields(current)
    )


def _source(
    field: dataclasses.Field[Any], value: Any
) -> Literal["default", "environment", "configure()"]:
    variable = field.metadata["variable"]
    text = os.environ.get(variable, "").strip()
    try:
        if text and field.metadata["parse"](variable, text) == value:
            return "environment"
    except _switch.SettingError:  # set to something else after it was read
        pass
    return "default" if value == field.default else "configure()"


def _autoload() -> AutoloadStatus:
    text = os.environ.get(_switch.AUTOLOAD, "").strip()
    try:
        on = bool(text) and _switch.parse_switch(_switch.AUTOLOAD, text)
        requested: Literal["on", "off", "refused"] = "on" if on else "off"
    except _switch.SettingError:
        requested = "refused"
    started = sys.modules.get(_STARTUP_MODULE)
    return AutoloadStatus(
        requested=requested if text else "unset",
        file=_startup_file(),
        in_force=requested == "on" and getattr(started, "waiting", False),
    )


def _startup_file() -> str | None:
    """What this interpreter reads at its start; a directory of PYTHONPATH has no say."""
    if sys.flags.no_site:
        return None
    directories = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        directories.append(site.getusersitepackages())
    endings = (".start", ".pth") if sys.version_info >= (3, 15) else (".pth",)
    for directory in directories:
        for ending in endings:
            file = os.path.join(directory, _STARTUP_FILE + ending)  # noqa: PTH118 - no pathlib
            if os.path.isfile(file):  # noqa: PTH113
                return file
    return None


def _in_force() -> tuple[bool, str]:
    state = _patching.SeamState
    if not _patching.is_active():
        if not _settings.current().enabled:
            return False, f"switched off by {_switch.KILL_SWITCH}"
        return False, "uninstalled"
    missing = _patching.unusable()
    if missing is not None:
        return False, f"does not fit {missing}"
    standing: dict[str, set[_patching.SeamState]] = {}
    for sdk, _, found in _patching.states():
        if not sdk.optional:
            standing.setdefault(sdk.name, set()).add(found)
    if any(state.REPLACED in found for found in standing.values()):
        return False, "another package has replaced a function that the shim had patched"
    wrapped = [
        name for name, found in standing.items() if found <= {state.OURS, state.WRAPPED_OVER}
    ]
    if wrapped:
        return True, f"all functions that the shim needs are patched in {' and '.join(wrapped)}"
    return False, "waiting for tinker to be imported"


def _jobs() -> tuple[JobStatus, ...]:
    # Where nothing was ever patched, nothing heavy is imported for an empty answer.
    routes = sys.modules.get(f"{__package__}._routes")
    if routes is None:
        return ()
    words = {one.job: _word(one) for one in routes.all_routes()}
    return tuple(
        JobStatus(
            account=job.account,
            name=job.name,
            gateway=job.gateway,
            route=words.get(job, "unused"),
            **dataclasses.asdict(counters),
        )
        for job, counters in routes.all_counters().items()
    )


def _left_alone() -> tuple[str, ...]:
    routes = sys.modules.get(f"{__package__}._routes")
    return () if routes is None else tuple(routes.left_alone)


def _word(route: Route) -> RouteState:
    if route.waiters.count:
        return "waiting"
    if route.given_up:
        return "given up"
    return "warm" if route.warm else "connecting"


def _last_intervention() -> float | None:
    routes = sys.modules.get(f"{__package__}._routes")
    moment: float | None = None if routes is None else routes.last_intervention()
    return moment
