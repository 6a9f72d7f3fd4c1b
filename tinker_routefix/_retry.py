"""Send a refused request again, once the control plane says that its job runs.

What the gateway refuses never reached the pod, so the very same request (same body, same
``seq_id``, same idempotency key) can be sent again without training anything twice. An
accepted request is not seen here at all: polls are requests of their own.

Every call builds a policy of its own: tenacity keeps the state of a call on the policy
object, and coroutines that share one get each other's exceptions.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from tenacity.asyncio import AsyncRetrying, retry_if_exception

from . import _errors, _log, _settings, events
from ._control_plane import NOT_ASKED, JobState, Told

if TYPE_CHECKING:
    import tenacity

    from ._route import ConnectBudget, Route

PACE = (0.5, 1.0)
"""Seconds between two replays of one request that were released early, at random. In step with the
prober they could meet the same two replicas for ever, where a load balancer takes turns."""

SLOWER_AFTER, SLOWER_PACE = 5, (0.8, 1.6)
"""After so many of them, less often: a route that answers probes and refuses a request may do so
for long."""

CONFIRM_AFTER = 1.0
"""Seconds between two answers of the control plane that are believed together, not alone."""

ENDED_AT_CONNECT = 2.0
"""The same for a terminal state at connect: a job that is resumed shows the old one for a while."""

ASKED_AT_LEAST = 0.5
"""Seconds that a question is waited for before anything else may end the wait."""

JITTER = 0.1
"""Waits are shortened by up to this share, so that clients that were refused together do
not come back together."""

LARGEST_DOUBLING = 30
"""Doublings of a delay after which it is surely the longest; a float ends at 1,024."""

Probe = Callable[[], Awaitable[None]]


class Waiting:
    """How one request (or one warm-up) waits for the route.

    A wait that ran its full length counts, and the next one is twice as long. A wait that
    was ended early because the route answered counts for nothing: some replicas may know
    the route while others do not. It only is paced.
    """

    def __init__(self, route: Route, probe: Probe, *, longest: float, connecting: bool) -> None:
        self.route = route
        self.connecting = connecting
        """Before anything has been trained there is nothing to lose by waiting."""
        self.full_waits = 0
        self.refused_at = time.monotonic()
        self._began = self.refused_at
        self._probe = probe
        self._longest = longest
        self._settings = _settings.current()
        self.answer = NOT_ASKED
        """The control plane's last word."""
        self._not_before = float("-inf")
        self._released = 0
        """How many waits in a row were ended early."""

    @property
    def elapsed(self) -> float:
        """Seconds since the first refusal."""
        return time.monotonic() - self._began

    def policy(self) -> AsyncRetrying:
        """A policy for this request alone."""
        return AsyncRetrying(
            retry=retry_if_exception(self._may_go_on),
            wait=self._next,
            stop=lambda _: self._spent(),
            sleep=self.sleep,
            before_sleep=self._say_progress,
            reraise=True,
        )

    def advice(self) -> str:
        """What to do once the 404 is handed on; for people."""
        check = f"`tinker-routefix check {self.route.job.url}`"
        if self.answer.state is JobState.OVER:
            return (
                "The job is over, asleep or not visible with this key: see what ended it, and "
                "resume from its last checkpoint on one that runs"
            )
        if self.answer.state is JobState.RUNNING:
            return (
                f"The job runs, but its route did not come back in time: {check} tells when it is "
                f"back, to resume from the last checkpoint; {self.limits} set how long the shim "
                "waits"
            )
        if self.answer.state is JobState.ON_ITS_WAY:
            return f"The job does not run yet: start again when {check} calls its route healthy"
        return (
            "Whether the job runs could not be learnt, and without that a request is not replayed: "
            f"{check} shows whether the control plane can be reached from here"
        )

    @property
    def limits(self) -> str:
        """The settings that bound the wait."""
        return "TINKER_ROUTEFIX_WARMUP_TIMEOUT"

    def ended(self) -> bool:
        """Whether the control plane has said what ends the wait, often enough to be believed."""
        told = self.answer.told
        if told is Told.GONE:
            return self.answer.heard_for(CONFIRM_AFTER)
        if told is Told.ENDED:
            return not self.connecting or self.answer.heard_for(ENDED_AT_CONNECT)
        if self.connecting:
            return False
        if told is Told.QUESTION_REFUSED:
            return self.answer.heard_for(CONFIRM_AFTER)
        return told is Told.STARTING

    def _unconfirmed(self) -> float | None:
        """Seconds until what would end the wait can be confirmed; None: nothing is to be."""
        told = self.answer.told
        if told is Told.GONE or (told is Told.QUESTION_REFUSED and not self.connecting):
            after = CONFIRM_AFTER
        elif told is Told.ENDED and self.connecting:
            after = ENDED_AT_CONNECT
        else:
            return None
        return max(self.answer.since + after - time.monotonic(), CONFIRM_AFTER / 10)

    async def _may_go_on(self, error: BaseException) -> bool:
        """Whether to wait and try again after an error."""
        raise NotImplementedError

    def _left(self) -> float:
        """Seconds of the budget that are left."""
        raise NotImplementedError

    def _spent(self) -> bool:
        """Whether nothing more may be tried."""
        return self._left() <= 0

    def _next(self, _: tenacity.RetryCallState) -> float:
        """How long the next wait may be."""
        doubled = self._settings.base_delay * 2 ** min(self.full_waits, LARGEST_DOUBLING)
        full: float = min(doubled, self._longest) * random.uniform(1 - JITTER, 1)  # noqa: S311
        return min(full, self._left())

    def _say_progress(self, _: tenacity.RetryCallState) -> None:
        """Log that the wait goes on."""
        _log.event(
            logging.INFO,
            "route.waiting",
            f"the route to job {self.route.job} is not there yet after {self.elapsed:.1f} s",
            limit=self.route.limit,
            job=str(self.route.job),
            seconds=round(self.elapsed, 3),
        )

    async def sleep(self, seconds: float) -> None:
        """Wait; the ``sleep`` of a tenacity policy."""
        confirm = self._unconfirmed()
        if confirm is not None:
            seconds = min(seconds, confirm)
        if await self._pause(seconds, since=self.refused_at):
            self._released += 1
            pace = PACE if self._released < SLOWER_AFTER else SLOWER_PACE
            self._not_before = time.monotonic() + random.uniform(*pace)  # noqa: S311
        else:
            self._released = 0
            self.full_waits += confirm is None

    async def _pause(self, seconds: float, *, since: float) -> bool:
        return await self.route.pause(
            seconds, since=since, not_before=self._not_before, probe=self._probe
        )

    async def ask(self, headers: Mapping[str, str]) -> None:
        """Ask the control plane; an answer of the pod through the route ends the wait for it."""
        asking = asyncio.ensure_future(self.route.control_plane.ask(headers))
        try:
            await asyncio.wait((asking,), timeout=ASKED_AT_LEAST)
            if not asking.done():
                released = asyncio.ensure_future(self._pause(self._left(), since=self.refused_at))
                try:
                    both = (asking, released)
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    released.cancel()
            if asking.done():
                self.answer = asking.result()
                if self.answer.state in (JobState.OVER, JobState.ON_ITS_WAY):
                    self.route.warm = False
        finally:
            asking.cancel()
        # The answer reaches all who asked at once.
        await self.route.turn()


class Replay(Waiting):
    """One refused request and its way through.

    Args:
        route: The route that refused it.
        error: The 404 that it was refused with.
        budget: Where it is part of connecting, what is left for that; None where it is not.
        headers: The refused request's headers; their credentials go to the control plane.
        send: Sends the same request again over a fresh connection.
        refused: Whether an error is again a 404 that may be the gateway's.
        uncertain: How an earlier try ended that may have been carried out; None: none was.
        probe: Makes the light prober.
        what: The request's name, for the log.
    """

    def __init__(
        self,
        route: Route,
        error: Exception,
        *,
        budget: ConnectBudget | None,
        headers: Mapping[str, str],
        send: Callable[[], Awaitable[Any]],
        refused: Callable[[BaseException], bool],
        uncertain: Callable[[], str | None],
        probe: Probe,
        what: str,
    ) -> None:
        settings = _settings.current()
        super().__init__(
            route,
            probe,
            longest=settings.max_delay if budget is None else settings.warmup_max_delay,
            connecting=budget is not None,
        )
        self.error = error
        self.what = what
        self.replays = 0
        self._budget = budget
        self._headers = headers
        self._send = send
        self._refused = refused
        self._uncertain = uncertain
        self._handed_in = False
        self._over = False
        if budget is not None:
            budget.start()

    async def run(self) -> Any:
        """The request's answer.

        Raises:
            Exception: Whatever the request was answered with in the end: the 404, with a
                note on it, where the job is not running or the budget is spent.
        """
        await self.route.turn()
        self._met(self.error)
        with self.route.incident():
            try:
                answer: Any = await self.policy()(self._attempt)
            except asyncio.CancelledError:
                self.route.counters.cancelled += 1
                raise
            except Exception as error:
                if self._refused(error):
                    self._give_up(error)
                raise
        self._note_recovery()
        return answer

    def note_answer(self, replays: int) -> None:
        """Note that it was answered before it had come to waiting."""
        self._met(self.error)
        self.replays = replays
        self._note_recovery()

    def _note_recovery(self) -> None:
        self.route.answered(proof=True)
        self._forget()
        self.route.counters.recovered += 1
        self._publish(events.Recovered, replays=self.replays, seconds=self._waited())

    @property
    def limits(self) -> str:
        """The settings that bound the wait."""
        if self.connecting:
            return super().limits
        return "TINKER_ROUTEFIX_MAX_REPLAYS and TINKER_ROUTEFIX_RETRY_BUDGET"

    def _left(self) -> float:
        if self._budget is not None:
            return self._budget.left(self._settings.warmup_timeout)
        return self._settings.retry_budget - self.elapsed

    def _spent(self) -> bool:
        full = not self.connecting and self.full_waits >= self._settings.max_replays
        return full or super()._spent()

    async def _attempt(self) -> Any:
        if not self._handed_in:
            # The first attempt was made before there was a policy: hand in its outcome.
            self._handed_in = True
            raise self.error
        if not await self._may_replay():
            self._over = True
            raise self.error
        self.replays += 1
        self.route.counters.replays += 1
        self._publish(events.Replayed, replays=self.replays, seconds=round(self.elapsed, 3))
        return await self._send()

    async def _may_go_on(self, error: BaseException) -> bool:
        if self._over or not isinstance(error, Exception) or not self._refused(error):
            return False
        if error is not self.error:
            self._met(error)
        self.refused_at = time.monotonic()
        # A 404 says nothing about earlier tries: what may have been carried out is not repeated.
        if self._uncertain() is not None:
            return False
        # Probes that are answered tell as much, and the control plane has been asked by then.
        if self._released <= 1 or self._unconfirmed() is not None:
            await self.ask(self._headers)
        return not self.ended()

    def _proven(self) -> bool:
        """Whether it is known that the job runs, and since after the refusal."""
        running = self.answer.told is Told.RUNNING and self.answer.at >= self.refused_at
        return running or self.route.proven_at >= self.refused_at

    async def _may_replay(self) -> bool:
        """Wait for proof that the job runs; False where there is none in time, or it does not."""
        if not self._released:
            await self.ask(self._headers)
        while not self.ended() and self._uncertain() is None:
            if self.connecting or self._proven():
                return True
            left = self._left()
            if left <= 0:
                return False
            # Until it may be asked again, or the pod answers through the route.
            again = max(self.answer.ask_again_at - time.monotonic(), CONFIRM_AFTER / 10)
            await self._pause(min(again, left), since=time.monotonic())
            await self.ask(self._headers)
        return False

    def _forget(self) -> None:
        # Its frames lead back to this object: a 404 that nobody will get would wait for the
        # garbage collector, whose rounds are what makes the loop stand still.
        self.error.__traceback__ = None

    def _met(self, error: Exception) -> None:
        if error is not self.error:
            self._forget()
            self.error = error
        self.route.refused()
        self._publish(events.Refused, replays=self.replays)

    def _give_up(self, error: Exception) -> None:
        counters = self.route.counters
        self.route.give_up()
        earlier = self._uncertain()
        if earlier is not None:
            counters.uncertain += 1
            _errors.mark_uncertain(error)
            uncertain = events.Uncertain(
                job=str(self.route.job),
                request=self.what,
                earlier=earlier,
                replays=self.replays,
                seconds=self._waited(),
            )
            events.publish(uncertain, limit=self.route.limit)
            error.add_note(
                f"tinker_routefix: {uncertain}. Resume from a checkpoint, do not repeat the step: "
                "other parts of the same batch may be on their way"
            )
            return
        kind = events.GivenUp
        if self.ended():
            kind = events.FailedFast
            counters.failed_fast += 1
        else:
            counters.given_up += 1
        event = kind(
            job=str(self.route.job),
            request=self.what,
            state=self.answer.state.value,
            said=self.answer.said,
            said_ago=round(time.monotonic() - self.answer.at, 3),
            replays=self.replays,
            seconds=self._waited(),
        )
        events.publish(event, limit=self.route.limit)
        error.add_note(f"tinker_routefix: {event}. {self.advice()}")

    def _waited(self) -> float:
        seconds = self.elapsed
        self.route.counters.longest_wait = max(self.route.counters.longest_wait, seconds)
        return round(seconds, 3)

    def _publish(self, kind: type[events.RequestEvent], **facts: Any) -> None:
        event = kind(job=str(self.route.job), request=self.what, **facts)
        events.publish(event, limit=self.route.limit)
