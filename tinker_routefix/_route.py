"""A job's route: whose it is, what has been seen of it, who waits for it.

All clients of a job share one gateway route, so they share one :class:`Route`: the first
request that is refused opens an *incident*, later ones join it, and the first answer that
comes through releases them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from typing import TYPE_CHECKING, Any, TypeVar

from . import _counters, events
from ._job_state import JobState
from ._log import RateLimit
from ._raised import RaisedSteps
from ._voice import Voice
from ._waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ._control_plane import ControlPlane
    from ._counters import Counters
    from ._job import Job
    from ._verdict import Fix
    from ._voice import Waiter

_E = TypeVar("_E", bound=events.Event)

TELEMETRY_DRAIN_TIMEOUT = 30.0
"""Seconds that tinker before 0.38 holds a fatal exception back while telemetry is refused."""


class Route:
    """What one event loop knows of the route to one job."""

    def __init__(
        self, job: Job, control_plane: ControlPlane, counters: Counters | None = None
    ) -> None:
        self.job = job
        self.control_plane = control_plane
        self.counters = _counters.feed(job, counters)
        self.log_rate_limit = RateLimit(seconds=5.0)
        self.voice = Voice(job)
        self.raised = RaisedSteps()
        self.waiters = Waiters()
        self.connected = False
        """It has been told that a client leads here."""
        self.warm = False
        """A warm-up has succeeded, and the job has not been said to have ended since."""
        self.model_id: str | None = None
        self.given_up = False
        """A 404 was raised to the program and nothing has come through since."""
        self._given_up_at = float("-inf")
        self.answered_at = float("-inf")
        self.proven_at = float("-inf")
        """When the pod last answered a request through the route with success."""
        self.last_probe = float("-inf")
        self.probe_refused_at = float("-inf")
        """When a probe beside a request last got a 404: what has failed since failed with it."""
        self._open_incidents = 0
        self._prober: asyncio.Task[None] | None = None

    @property
    def job_ended(self) -> bool:
        """The control plane has said that the job has ended, and the pod has not answered since.

        A job that is resumed shows its old state for a while.
        """
        last = self.control_plane.last_answer
        return last.state is JobState.ENDED and last.answered_at > self.proven_at

    @property
    def needs_notice(self) -> bool:
        """Whether a success must be reported: a request waits, or one was given up on."""
        return self._open_incidents > 0 or self.given_up

    @property
    def drops_telemetry(self) -> bool:
        """A program may be waiting for telemetry before it gets its 404.

        Also where another client has got through meanwhile: replicas differ.
        """
        return self.given_up or time.monotonic() - self._given_up_at < TELEMETRY_DRAIN_TIMEOUT

    def publish(self, kind: Callable[..., _E], **facts: Any) -> _E:
        """Publish an event of this job's, and return it; its log lines are limited in rate."""
        event = kind(job=str(self.job), gateway=self.job.gateway, **facts)
        events.publish(event, limit=self.log_rate_limit)
        return event

    def record_404(self, request: str, replays: int) -> None:
        """Note that the program, or a warm-up in its place, got a 404 that is not the pod's."""
        self.publish(events.Refused, request=request, replays=replays)

    def record_fix(self, fix: Fix) -> None:
        """Note that the gateway was seen to tell a stale route from a job that is gone."""
        self.publish(events.FixSeen, fix=fix.value)

    def record_failure(self, waiter: Waiter) -> None:
        """Note that a 404 is raised to the program."""
        self.voice.end(waiter, "given up")
        self.given_up = True
        self._given_up_at = time.monotonic()

    def mark_reachable(self, *, proof: bool) -> None:
        """Note that something came through the route, and release all who wait for it.

        Args:
            proof: Whether it proves that the pod is at work: a success of ``get_info`` or of a
                request of the program's.
        """
        self.answered_at = time.monotonic()
        if proof:
            self.proven_at = self.answered_at
        self.given_up = False
        self.waiters.release()

    @contextlib.contextmanager
    def incident(self) -> Iterator[None]:
        """A request has been refused and is not through yet."""
        self._open_incidents += 1
        self.control_plane.connections.keeps = True
        try:
            yield
        finally:
            self._open_incidents -= 1
            if not self._open_incidents:
                self.control_plane.connections.let_go()
                if self._prober is not None:
                    self._prober.cancel()
                    self._prober = None

    async def wait_until_reachable(
        self,
        seconds: float,
        *,
        since: float,
        not_before: float,
        probe: Callable[[], Awaitable[None]],
    ) -> bool:
        """Wait until the route works again, or for ``seconds``.

        Args:
            seconds: The longest wait.
            since: When the waiting request was refused: an answer after that ends the wait,
                also one that came before the wait began.
            not_before: The wait does not end before this moment, answer or not: it paces a
                request that some replicas let through and others refuse.
            probe: Makes the light prober, which runs once for all who wait.

        Returns:
            Whether the wait ended early.
        """
        if self._prober is None or self._prober.done():
            # In a context of its own: a task keeps its context, and that what it holds.
            self._prober = asyncio.get_running_loop().create_task(
                _run(probe), context=contextvars.Context()
            )
        ends = time.monotonic() + seconds
        if self.answered_at < since:
            await self.waiters.wait(seconds)
        if self.answered_at < since:
            return False
        await self.waiters.pace(min(not_before, ends) - time.monotonic())
        return True


async def _run(probe: Callable[[], Awaitable[None]]) -> None:
    await probe()
