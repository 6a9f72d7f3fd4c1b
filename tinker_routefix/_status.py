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
from typing import TYPE_CHECKING, Any

from . import _seams, _settings, _switch
from ._version import __version__

if TYPE_CHECKING:
    from ._route import Route

_STARTUP_FILE = "tinker_routefix"
_STARTUP_MODULE = "_tinker_routefix_autoload"


@dataclasses.dataclass(frozen=True, slots=True)
class SdkStatus:
    """Something that the shim patches: which release is there, and whether it is patched."""

    name: str
    distribution: str
    release: str | None
    """None: not installed, or without metadata."""
    state: str
    """``patched``, ``not imported``, ``does not fit`` or ``replaced``: a seam of it is."""
    detail: str | None
    """Why it does not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class SeamStatus:
    """One seam: where it is, and what stands there now."""

    name: str
    """Module and attribute."""
    purpose: str
    state: str
    """One of ``not loaded``, ``original``, ``ours``, ``ours, under another wrapper``,
    ``replaced``, ``absent``."""


@dataclasses.dataclass(frozen=True, slots=True)
class SettingStatus:
    """One setting, and where its value came from."""

    name: str
    variable: str
    value: Any
    source: str
    """``default``, ``environment`` or ``configure()``."""


@dataclasses.dataclass(frozen=True, slots=True)
class AutoloadStatus:
    """The zero-line way, as this interpreter has it."""

    requested: str
    """What ``TINKER_ROUTEFIX_AUTOLOAD`` says: ``on``, ``off``, ``refused`` or ``unset``."""
    file: str | None
    """The file that this interpreter reads at its start; None: not in place."""
    in_force: bool
    """It was in place and asked for when this process began."""


@dataclasses.dataclass(frozen=True, slots=True)
class JobStatus:
    """One job's route and what has been met on it; durations in seconds."""

    account: str
    name: str
    gateway: str
    route: str
    """``connecting``, ``warm``, ``waiting`` (a request waits for it), ``given up``, or ``unused``:
    no client of this process leads to it any more."""
    refused: int
    """404s of the gateway, or of unknown origin, met by the program's requests and warm-ups."""
    questions: int
    """Questions put to the control plane."""
    probes: int
    """Requests of the shim's own."""
    replays: int
    recovered: int
    given_up: int
    uncertain: int
    """Requests that were not replayed because an earlier try may have been carried out."""
    failed_fast: int
    cancelled: int
    telemetry_dropped: int
    longest_wait: float
    """From a request's first 404 to its end, or for a warm-up that met one."""
    warmups: int
    warmup_seconds: float
    last_intervention: float | None
    """When a 404 was last met, in seconds since the epoch; None: never needed."""
    cure: str | None
    """``503 route_not_ready`` where the gateway was seen to tell a stale route from a job that is
    gone; None: it was not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The shim in this process."""

    version: str
    active: bool
    """Whether the wrappers are in force."""
    reason: str
    """Why it is active or not, in a sentence."""
    seams: tuple[SeamStatus, ...]
    jobs: tuple[JobStatus, ...]
    sdks: tuple[SdkStatus, ...]
    settings: tuple[SettingStatus, ...]
    autoload: AutoloadStatus
    last_intervention: float | None
    """When any job last needed help, in seconds since the epoch; None: never. Also of jobs that
    are not listed any more."""


def status() -> Status:
    """The shim's state in this process; safe to call from any thread at any time."""
    states = _seams.states()
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


def _sdk(sdk: _seams.Sdk, standing: set[_seams.SeamState]) -> SdkStatus:
    state = _seams.SeamState
    misfit = _seams.misfit(sdk)
    if misfit is not None:
        word = "does not fit"
    elif state.REPLACED in standing:
        word = "replaced"
    else:
        word = "patched" if standing <= {state.OURS, state.BURIED} else "not imported"
    return SdkStatus(sdk.name, sdk.distribution, _release(sdk.distribution), word, misfit)


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


def _source(field: dataclasses.Field[Any], value: Any) -> str:
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
        requested = "on" if text and _switch.parse_switch(_switch.AUTOLOAD, text) else "off"
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
    state = _seams.SeamState
    if not _seams.is_active():
        if not _settings.current().enabled:
            return False, f"switched off by {_switch.KILL_SWITCH}"
        return False, "uninstalled"
    missing = _seams.unusable()
    if missing is not None:
        return False, f"does not fit {missing}"
    standing: dict[str, set[_seams.SeamState]] = {}
    for sdk, _, found in _seams.states():
        if not sdk.optional:
            standing.setdefault(sdk.name, set()).add(found)
    if any(state.REPLACED in found for found in standing.values()):
        return False, "a seam has been replaced by another package"
    wrapped = [name for name, found in standing.items() if found <= {state.OURS, state.BURIED}]
    if wrapped:
        return True, f"all seams of {' and '.join(wrapped)} are wrapped"
    return False, "waiting for tinker to be imported"


def _jobs() -> tuple[JobStatus, ...]:
    # Where nothing was ever patched, nothing heavy is imported for an empty answer.
    route = sys.modules.get(f"{__package__}._route")
    if route is None:
        return ()
    words = {one.job: _word(one) for one in route.all_routes()}
    return tuple(
        JobStatus(
            account=job.account,
            name=job.name,
            gateway=job.gateway,
            route=words.get(job, "unused"),
            **dataclasses.asdict(counters),
        )
        for job, counters in route.all_counters().items()
    )


def _word(route: Route) -> str:
    if route.sleepers:
        return "waiting"
    if route.given_up:
        return "given up"
    return "warm" if route.warm else "connecting"


def _last_intervention() -> float | None:
    route = sys.modules.get(f"{__package__}._route")
    moment: float | None = None if route is None else route.last_intervention()
    return moment
