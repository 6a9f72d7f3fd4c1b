"""Tells a person that requests wait for a job's route: one set of lines for all of them.

A wait that has lasted :data:`FIRST` seconds is told, then every :data:`EVERY` seconds, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import time
from typing import TYPE_CHECKING, Protocol

from . import _log, events
from ._job_state import NOT_ASKED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._job import Job
    from ._job_state import Answer

FIRST = 2.0
"""Seconds that a wait has to last to be told."""

EVERY = 15.0
"""Seconds between two lines that a job's route is waited for. A route that comes and goes is not
told more often either."""

LOOK_AGAIN = 0.5
"""Seconds until it is looked again whether someone waits, where all replays are in flight."""


class Waiter(Protocol):
    """A request, or a warm-up, that has its way through a stale route."""

    waits: bool
    """Whether it has received a 404 and no replay of it is in flight."""
    answer: Answer
    """The control plane's last response."""

    @property
    def elapsed(self) -> float:
        """Seconds since the first 404."""

    def remaining(self) -> float:
        """Seconds that it may still wait."""


class Voice:
    """Tells of the waits for one job's route."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._waiters: dict[Waiter, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = float("-inf")
        self._told_of: float | None = None
        """When the wait began whose end is to be told."""
        self._process_ends = False

    @contextlib.contextmanager
    def wait(self, waiter: Waiter) -> Iterator[None]:
        """A request, or a warm-up, waits for the route whenever it says so."""
        self._waiters[waiter] = None
        if self._timer is None:
            self._look_in(FIRST - waiter.elapsed)
        outcome: events.WaitOutcome = "ended"
        try:
            yield
            outcome = "recovered"
        finally:
            self.end(waiter, outcome)

    def end(self, waiter: Waiter, outcome: events.WaitOutcome) -> None:
        """A wait is over; harmless when repeated."""
        if waiter not in self._waiters:
            return
        del self._waiters[waiter]
        failed = outcome == "given up" and waiter.elapsed >= FIRST
        if self._told_of is not None and (failed or not self._waiters):
            seconds = round(time.monotonic() - self._told_of, 3)
            self._told_of = None
            events.publish(
                events.WaitOver(
                    job=str(self._job),
                    gateway=self._job.gateway,
                    outcome=outcome,
                    control_plane_said=_said(waiter),
                    seconds=seconds,
                )
            )
        if not self._waiters and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tell_at_exit(self) -> None:
        """Say what is still waited for at the end of the process; called on its main thread.

        It is the last that is said: the loop goes on where a process takes long to end.
        """
        self._process_ends = True
        told, self._told_of = self._told_of, None
        waiter = next((one for one in tuple(self._waiters) if one.waits), None)
        interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
        if waiter is None or not (interrupted or told is not None):
            return
        how = "interrupted" if interrupted else "the process ends"
        _log.event(
            logging.WARNING,
            "process.waiting",
            f"{how} while a request waits for the route to job {self._job}, for "
            f"{waiter.elapsed:.0f} s (control plane: {_said(waiter)}); `tinker-routefix check "
            f"{self._job.url}` tells whether it works again",
            job=str(self._job),
            seconds=round(waiter.elapsed, 3),
        )

    def _look_in(self, seconds: float) -> None:
        seconds = max(seconds, self._told_at + EVERY - time.monotonic(), 0.0)
        # In a context of its own: a timer that was cancelled keeps its context for a while.
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self._look, context=contextvars.Context()
        )

    def _look(self) -> None:
        if self._process_ends:
            return
        waiter = next((one for one in self._waiters if one.waits), None)
        if waiter is None or waiter.elapsed < FIRST:
            self._look_in(LOOK_AGAIN)
            return
        self._told_at = time.monotonic()
        if self._told_of is None:
            self._told_of = self._told_at - waiter.elapsed
        self._look_in(EVERY)
        events.publish(
            events.Waiting(
                job=str(self._job),
                gateway=self._job.gateway,
                state=waiter.answer.state.value,
                control_plane_said=_said(waiter),
                seconds=round(waiter.elapsed, 3),
                at_most=round(max(waiter.remaining(), 0.0), 3),
            )
        )


def _said(waiter: Waiter) -> str:
    return "no answer yet" if waiter.answer is NOT_ASKED else waiter.answer.message
