"""The report of ``tinker-routefix check``, a public interface.

``docs/check.schema.json`` describes it, and tests hold it to that.
"""

from __future__ import annotations

import dataclasses
import enum

from tinker_routefix._job_state import JobState


class Exit(enum.IntEnum):
    """Exit codes of the command."""

    HEALTHY = 0
    USAGE = 2
    RACING = 3
    GONE = 4
    WRONG_KEY = 5
    UNREACHABLE = 6
    UNCLEAR = 7
    INTERRUPTED = 130
    TERMINATED = 143


@dataclasses.dataclass(slots=True)
class Change:
    """From when on the route or the control plane said something else."""

    at: float
    """A Unix timestamp, as all moments here."""
    route: str
    control_plane: str


@dataclasses.dataclass(slots=True)
class Report:
    """All that was seen, as ``--json`` prints it; the page of the command line explains it."""

    account: str
    job: str
    gateway: str
    started: float
    verdict: str = "unclear"
    message: str = ""
    advice: str = ""
    exit_code: int = Exit.UNCLEAR
    interrupted: bool = False
    seconds: float = 0.0
    probes: int = 0
    answered: int = 0
    refused: int = 0
    not_ready: int = 0
    denied: int = 0
    failed: int = 0
    other: int = 0
    raced: int = 0
    """Probes that were not let through while the control plane answered RUNNING."""
    race_seconds: float = 0.0
    """From the first to the last of them."""
    slowest: float | None = None
    """Of the answers; None: there were none."""
    proxy: str | None = None
    fault: str | None = None
    control_plane: str = "not asked"
    """Its last response."""
    control_plane_state: str = JobState.UNKNOWN.value
    questions: int = 0
    route: str = "not probed"
    """What the latest probes got."""
    start_seen: bool = False
    """Whether the job was seen before it was RUNNING, and then RUNNING."""
    gateway_fix: str | None = None
    gateway_fix_message: str | None = None
    changes: list[Change] = dataclasses.field(default_factory=list)
