"""One wait for a route: a request's that was refused, or a warm-up's.

It ends early when the route works again, or when there is nothing to wait for.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from . import _settings
from ._backoff import Backoff
from ._job_state import NOT_ASKED, Answer, JobState, Told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ._connecting import ConnectBudget
    from ._route import Route

CONFIRM_AFTER = 1.0
"""Seconds between two answers of the control plane that are believed together, not alone."""

ENDED_AT_CONNECT = 2.0
"""The same for a terminal state at connect: a job that is resumed shows the old one for a while."""

ASKED_AT_LEAST = 0.5
"""Seconds that a question is waited for before anything else may end the wait."""


class RouteWait:
    """A wait for a route.

    Args:
        route: The route.
        probe: Makes the light prober, which runs once for all who wait.
        budget: Where it is part of connecting, what is left for that; None where it is not.
    """

    def __init__(
        self, route: Route, probe: Callable[[], Awaitable[None]], budget: ConnectBudget | None
    ) -> None:
        settings = _settings.current()
        self.route = route
        self.connecting = budget is not None
        """Before anything has been trained there is nothing to lose by waiting."""
        longest = settings.warmup_max_delay if self.connecting else settings.max_delay
        self.backoff = Backoff(settings.base_delay, longest)
        self.answer = NOT_ASKED
        """The control plane's last response."""
        self.waits = False
        """Whether it has received a 404 and no replay of it is in flight."""
        self.refused_at = self._began = time.monotonic()
        self._probe = probe
        self._budget = budget
        self._settings = settings

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def remaining(self) -> float:
        """Seconds of the budget that are left."""
        if self._budget is not None:
            return self._budget.left(self._settings.warmup_timeout)
        return self._settings.retry_budget - self.elapsed

    def exhausted(self) -> bool:
        """Whether nothing more may be tried."""
        full = not self.connecting and self.backoff.counted_waits >= self._settings.max_replays
        return full or self.remaining() <= 0

    def record_404(self) -> None:
        """The gateway has refused just now."""
        self.waits = True
        self.refused_at = time.monotonic()
        if self._budget is not None:
            self._budget.start()

    # --- Waiting -------------------------------------------------------------------------

    def next_delay(self) -> float:
        """How long the next wait may be."""
        return min(self.backoff.next_delay(), self.remaining())

    async def sleep(self, seconds: float) -> None:
        """Wait until the route works again, for so long at most; or to confirm an answer."""
        confirm = self.unconfirmed_for()
        if confirm is not None:
            seconds = min(seconds, confirm)
        if await self.until_reachable(seconds, since=self.refused_at):
            self.backoff.ended_early()
        else:
            self.backoff.ran_out(counts=confirm is None)

    async def until_reachable(self, seconds: float, *, since: float) -> bool:
        """Wait for so long; whether the route has worked since a moment, so that it ended early."""
        return await self.route.wait_until_reachable(
            seconds, since=since, not_before=self.backoff.not_before, probe=self._probe
        )

    # --- Asking --------------------------------------------------------------------------

    async def ask(self, headers: Mapping[str, str]) -> None:
        """Ask the control plane; stop waiting for its answer once the route works."""
        asking = asyncio.ensure_future(self.route.control_plane.ask(headers))
        asking.add_done_callback(self._record_running)
        await asyncio.wait((asking,), timeout=ASKED_AT_LEAST)
        if not asking.done():
            await self._answered_or_reachable(asking)
        if asking.done():
            self.answer = asking.result()
            if self.answer.state in (JobState.ENDED, JobState.STARTING):
                self.route.warm = False
        await self.route.waiters.stagger()

    def _record_running(self, asking: asyncio.Future[Answer]) -> None:
        # A late one is told as well, but ends no wait: the pod has answered since.
        if asking.cancelled() or asking.exception() is not None:
            return
        if asking.result().told is Told.RUNNING:
            self.answer = asking.result()

    async def _answered_or_reachable(self, asking: asyncio.Future[Answer]) -> None:
        reachable = asyncio.ensure_future(
            self.until_reachable(self.remaining(), since=self.refused_at)
        )
        try:
            await asyncio.wait((asking, reachable), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reachable.cancel()

    def is_over(self) -> bool:
        """Whether the control plane has said what ends the wait, often enough to be believed."""
        told, heard_for = self.answer.told, self.answer.heard_for
        if told is Told.GONE:
            return heard_for(CONFIRM_AFTER)
        if told is Told.ENDED:
            return not self.connecting or heard_for(ENDED_AT_CONNECT)
        if self.connecting:
            return False
        return told is Told.STARTING or (told is Told.QUESTION_REFUSED and heard_for(CONFIRM_AFTER))

    def unconfirmed_for(self) -> float | None:
        """Seconds until what would end the wait can be confirmed; None: nothing is to be."""
        told = self.answer.told
        if told is Told.GONE or (told is Told.QUESTION_REFUSED and not self.connecting):
            after = CONFIRM_AFTER
        elif told is Told.ENDED and self.connecting:
            after = ENDED_AT_CONNECT
        else:
            return None
        return max(self.answer.since + after - time.monotonic(), CONFIRM_AFTER / 10)
