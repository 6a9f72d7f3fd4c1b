"""Send a refused request again, once it is known that its job runs.

What the gateway refuses never reached the pod, so the very same request can be sent again without
training anything twice.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from tenacity.asyncio import AsyncRetrying, retry_if_exception

from . import _errors, events
from ._job_state import Told
from ._waiting import CONFIRM_AFTER, RouteWait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ._connecting import ConnectBudget
    from ._route import Route


SELDOM_AFTER, SELDOM = 2, 4.0
"""After so many waits that ended early, seconds between two questions."""


class Request(Protocol):
    """A request that was refused, as the SDK's side knows it."""

    name: str
    """For the log."""
    headers: Mapping[str, str]
    """Their credentials go to the control plane."""

    async def send_again(self, replay: Replay) -> Any:
        """Send it again, over a fresh connection; count each time."""

    def is_refusal(self, error: BaseException) -> bool:
        """Whether an error is again a 404 that may be the gateway's."""

    def uncertain(self) -> str | None:
        """How an earlier try ended that may have been carried out; None: none was."""


class Replay:
    """One refused request and its way through.

    Args:
        route: The route that refused it.
        request: The request.
        error: The 404 that it was refused with.
        budget: Where it is part of connecting, what is left for that; None where it is not.
        probe: Makes the light prober.
    """

    def __init__(
        self,
        route: Route,
        request: Request,
        error: Exception,
        *,
        budget: ConnectBudget | None,
        probe: Callable[[], Awaitable[None]],
    ) -> None:
        self.error = error
        """Its last 404."""
        self.replays = 0
        self.wait = RouteWait(route, probe, budget)
        self._route = route
        self._request = request
        self._published = 0
        self.wait.record_404()

    async def run(self) -> Any:
        """The request's answer.

        Raises:
            Exception: What it was answered with in the end.
        """
        with self._route.incident(), self._route.voice.wait(self.wait):
            try:
                await self._route.waiters.stagger()
                self._record_404(self.error)
                answer = await self._until_answered()
            except asyncio.CancelledError:
                self._leave()
                self._publish(events.Cancelled)
                raise
            except Exception as error:
                if error is self.error:
                    self._give_up()
                else:
                    self._leave()
                raise
        self.answered()
        return answer

    async def _until_answered(self) -> Any:
        """Refused: ask, wait, ask, send. Each attempt of the policy is one round of it."""
        if not await self._should_retry(self.error) or self.wait.exhausted():
            raise self.error
        # Its own policy: tenacity keeps a call's state there, a cycle that must not hold a batch.
        me = weakref.proxy(self)
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: me._should_retry(error)),
            stop=lambda _: me.wait.exhausted(),
            sleep=asyncio.sleep,
            reraise=True,
        ):
            await self.wait.sleep(self.wait.next_delay())
            if not await self._verify_running():
                raise self.error
            with attempt:
                answer = await self._request.send_again(self)
        return answer

    async def _should_retry(self, error: BaseException) -> bool:
        """Refused, and ask: whether to wait and send it again after an error."""
        if error is not self.error:
            if not isinstance(error, Exception) or not self._request.is_refusal(error):
                return False
            self._record_404(error)
        self.wait.record_404()
        # A 404 says nothing about earlier tries: what may have been carried out is not repeated.
        if self._request.uncertain() is not None:
            return False
        # Later, answered probes tell as much.
        if self.wait.backoff.early_in_a_row <= 1 or self.wait.unconfirmed_for() is not None:
            await self.wait.ask(self._request.headers)
        return not self.wait.is_over()

    async def _verify_running(self) -> bool:
        """Ask: wait for proof that the job runs; False where there is none in time, or it ended."""
        wait = self.wait
        if not wait.backoff.early_in_a_row:
            await wait.ask(self._request.headers)
        while not wait.is_over() and self._request.uncertain() is None:
            if wait.connecting or self._is_proven():
                return True
            left = wait.remaining()
            if left <= 0:
                return False
            pause = max(wait.answer.ask_again_at - time.monotonic(), CONFIRM_AFTER / 10)
            if wait.backoff.early_in_a_row > SELDOM_AFTER and wait.unconfirmed_for() is None:
                pause = max(pause, min(SELDOM, left - CONFIRM_AFTER))
            await self._wait_for_proof(min(pause, left))
            await wait.ask(self._request.headers)
        return False

    async def _wait_for_proof(self, seconds: float) -> None:
        """Wait for a success of the pod."""
        ends = time.monotonic() + seconds
        while not self._is_proven() and (left := ends - time.monotonic()) > 0:
            await self.wait.until_reachable(left, since=time.monotonic())

    def _is_proven(self) -> bool:
        """Whether it is known that the job runs, and since after the refusal."""
        answer, refused_at = self.wait.answer, self.wait.refused_at
        running = answer.told is Told.RUNNING and answer.answered_at >= refused_at
        return running or self._route.proven_at >= refused_at

    # --- What is told --------------------------------------------------------------------

    def count(self) -> None:
        """One more replay."""
        # A poll that the pod holds is no wait of ours.
        self.wait.waits = False
        self.replays += 1
        self._publish(events.Replayed)

    def answered(self) -> None:
        """A replay got through."""
        self._leave()
        self._route.mark_reachable(proof=True)
        self._publish(events.Recovered)

    def _record_404(self, error: Exception) -> None:
        if error is not self.error:
            self._break_cycle()
            self.error = error
        self._publish_404s(self.replays + 1)

    def _publish_404s(self, number: int) -> None:
        # One try can be several replays.
        for replays in range(self._published, number):
            self._route.record_404(self._request.name, replays)
            self._published += 1

    def _leave(self) -> None:
        self._publish_404s(self.replays or 1)
        self._break_cycle()

    def _break_cycle(self) -> None:
        # Break exception -> traceback -> frame -> self, so that refcounting frees it; the cyclic
        # garbage collector was measured to stall the loop.
        self.error.__traceback__ = None

    def _give_up(self) -> None:
        self._route.record_failure(self.wait)
        doubt, answer = self._request.uncertain(), self.wait.answer
        if doubt is not None:
            _errors.note_uncertain(self.error, self._publish(events.Uncertain, earlier=doubt))
            return
        event = self._publish(
            events.FailedFast if self.wait.is_over() else events.GivenUp,
            state=answer.state.value,
            control_plane_said=answer.message,
            age_seconds=round(time.monotonic() - answer.answered_at, 3),
        )
        _errors.note_given_up(self.error, event, self.wait)

    def _publish(self, kind: type[events.RequestEvent], **facts: Any) -> events.RequestEvent:
        seconds = round(self.wait.elapsed, 3)
        return self._route.publish(
            kind, request=self._request.name, replays=self.replays, seconds=seconds, **facts
        )
