"""What the shim is, where it sits and what it has done: ``status()``.

It must be easy to say "it has done nothing for a month: remove it", in any process and
without a key in what is shown.
"""

from __future__ import annotations

import dataclasses
import sys

from . import _seams, _settings, _switch
from ._version import __version__


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
class JobStatus:
    """One job's route and what has been met on it; durations in seconds."""

    account: str
    name: str
    gateway: str
    route: str
    """``connecting``, ``warm``, ``waiting`` (a request waits for it) or ``given up``."""
    refused: int
    """404s of the gateway, or of unknown origin, met by the program's requests."""
    questions: int
    """Questions put to the control plane."""
    probes: int
    """Requests of the shim's own."""
    replays: int
    recovered: int
    given_up: int
    failed_fast: int
    telemetry_dropped: int
    warmups: int
    warmup_seconds: float
    last_intervention: float | None
    """When a 404 was last met, in seconds since the epoch; None: never needed."""


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

    @property
    def last_intervention(self) -> float | None:
        """When any job last needed help, in seconds since the epoch; None: never."""
        return max(
            (job.last_intervention for job in self.jobs if job.last_intervention), default=None
        )


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
    )


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
    routes = sys.modules.get(f"{__package__}._route")
    if routes is None:
        return ()
    return tuple(
        JobStatus(
            account=route.job.account,
            name=route.job.name,
            gateway=route.job.gateway,
            route=(
                "waiting"
                if route.sleepers
                else "given up"
                if route.given_up
                else "warm"
                if route.warm
                else "connecting"
            ),
            questions=route.control_plane.questions,
            **dataclasses.asdict(route.counters),
        )
        for route in routes.all_routes()
    )
