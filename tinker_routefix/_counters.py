"""What was met and done for one job, in numbers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """What the shim has met and done for one job; only ever growing."""

    refused: int = 0
    """404s of the gateway, or of unknown origin, met by the program's requests and warm-ups."""
    questions: int = 0
    """Questions put to the control plane."""
    probes: int = 0
    """Requests of our own: warm-up and light prober."""
    replays: int = 0
    recovered: int = 0
    """Requests that were refused and got through in the end."""
    given_up: int = 0
    """Requests that were refused until their budget was spent."""
    uncertain: int = 0
    """Requests that were not replayed because an earlier try may have been carried out."""
    failed_fast: int = 0
    """Requests that were handed their 404 because the control plane did not say RUNNING."""
    cancelled: int = 0
    """Requests that the program itself gave up while they waited."""
    telemetry_dropped: int = 0
    """Telemetry batches of a job that is gone, dropped instead of re-sent."""
    longest_wait: float = 0.0
    """From a request's first 404 to its end, or for a warm-up that met one."""
    warmups: int = 0
    warmup_seconds: float = 0.0
    """Time that creating training clients spent on warming up, all together."""
    last_intervention: float | None = None
    """When a 404 was last met (seconds since the epoch)."""
    cure: str | None = None
    """The cure that the gateway was seen to have: see :class:`._verdict.Cure`."""
