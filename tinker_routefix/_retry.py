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
from ._control_plane import NOT_ASKED, JobState

if TYPE_CHECKING:
    import tenacity

    from ._route import Route

PACE = 1.0
"""Seconds between two early releases of one request. Each is good for two replays, half of
this apart and without a probe between them: where a load balancer takes turns, one probe and
one replay would meet the same two replicas for ever."""

JITTER = 0.1
"""Waits are shortened by up to this share, so that clients that were refused together do
not come back together."""

Probe = Callable[[], Awaitable[None]]


class Waiting:
    """How one request (or one warm-up) waits for the route.

    A wait that ran its full length counts, and the next one is twice as long. A wait that
    was ended early because the route answered counts for nothing: some replicas may know
    the route while others do not. It only is paced.
    """

    def __init__(self, route: Route, probe: Probe, *, longest: float) -> None:
        self.route = route
        self.full_waits = 0
        self.refused_at = time.monotonic()
        self._began = self.refused_at
        self._probe = probe
        self._longest = longest
        self._settings = _settings.current()
        self.answer = NOT_ASKED
        """The control plane's last word."""
        self._released_at = float("-inf")
        self._second_try = False

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
                f"back, to resume from the last checkpoint; larger {self.limits} make the shim "
                "wait longer"
            )
        if self.answer.state is JobState.ON_ITS_WAY:
            return f"The job does not run yet: start again when {check} calls its route healthy"
        return (
            "Whether the job runs could not be learnt, and without that nothing is sent again for "
            f"long: {check} shows whether the control plane can be reached from here"
        )

    @property
    def limits(self) -> str:
        """The settings that bound the wait."""
        return "TINKER_ROUTEFIX_WARMUP_TIMEOUT"

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
        full: float = min(self._settings.base_delay * 2**self.full_waits, self._longest)
        return min(full * random.uniform(1 - JITTER, 1), self._left())  # noqa: S311

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
        if self._second_try:
            self._second_try = False
            await self.route.rest(min(seconds, PACE / 2))
            return
        early = await self.route.pause(
            seconds,
            since=self.refused_at,
            not_before=self._released_at + PACE,
            probe=self._probe,
        )
        if early:
            self._released_at = time.monotonic()
            self._second_try = True
        else:
            self.full_waits += 1


class Replay(Waiting):
    """One refused request and its way through.

    Args:
        route: The route that refused it.
        error: The 404 that it was refused with.
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
        headers: Mapping[str, str],
        send: Callable[[], Awaitable[Any]],
        refused: Callable[[BaseException], bool],
        uncertain: Callable[[], str | None],
        probe: Probe,
        what: str,
    ) -> None:
        settings = _settings.current()
        # Before anything has been trained there is nothing to lose by waiting, and a job
        # that is only just starting is the usual case. Fixed at the first refusal.
        self.patient = route.connecting
        super().__init__(
            route,
            probe,
            longest=settings.warmup_max_delay if self.patient else settings.max_delay,
        )
        self.error = error
        self.what = what
        self.replays = 0
        self._headers = headers
        self._send = send
        self._refused = refused
        self._uncertain = uncertain
        self._handed_in = False

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
        self._forget()
        self.route.counters.recovered += 1
        self._publish(events.Recovered, replays=self.replays, seconds=self._waited())
        return answer

    @property
    def limits(self) -> str:
        """The settings that bound the wait."""
        if self.patient:
            return super().limits
        return "TINKER_ROUTEFIX_MAX_REPLAYS and TINKER_ROUTEFIX_RETRY_BUDGET"

    def _left(self) -> float:
        if self.patient:
            return self._settings.warmup_timeout - self.route.connect_spent()
        return self._settings.retry_budget - self.elapsed

    def _spent(self) -> bool:
        full = not self.patient and self.full_waits >= self._settings.max_replays
        return full or super()._spent()

    async def _attempt(self) -> Any:
        if not self._handed_in:
            # The first attempt was made before there was a policy: hand in its outcome.
            self._handed_in = True
            raise self.error
        if not self.patient and not await self._runs():
            raise self.error
        self.replays += 1
        self.route.counters.replays += 1
        self._publish(events.Replayed, replays=self.replays, seconds=round(self.elapsed, 3))
        return await self._send()

    async def _may_go_on(self, error: BaseException) -> bool:
        if not isinstance(error, Exception) or not self._refused(error):
            return False
        if error is not self.error:
            self._met(error)
        self.refused_at = time.monotonic()
        # A 404 says nothing about earlier tries: what may have been carried out is not repeated.
        return self._uncertain() is None and await self._runs()

    async def _runs(self) -> bool:
        """Whether the control plane's word allows to send again."""
        self.answer = await self.route.control_plane.ask(self._headers)
        # The answer reaches all who asked at once.
        await self.route.turn()
        return self._allowed()

    def _allowed(self) -> bool:
        if self.patient:
            return self.answer.state is not JobState.OVER
        return self.answer.state is JobState.RUNNING

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
        if self._allowed():
            counters.given_up += 1
        else:
            kind = events.FailedFast
            counters.failed_fast += 1
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
