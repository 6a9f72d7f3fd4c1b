"""Warm a route up before the program gets to work.

The SDK calls a job ready after one good health check; the other paths of the same route
can still be stale. The warm-up proves the route on a path that does go through the table:
so many successes in a row, over as many fresh connections, because each connection may
end at another replica of the gateway. They are sent at the same time, so a healthy route
costs a round trip or two. A route that has refused one of them is asked twice a second.

That does not prove that every replica knows the route: no client can tell how many there
are. A 404 that comes later is replayed.
"""

from __future__ import annotations

import asyncio
import functools
import time
from typing import TYPE_CHECKING

from tenacity.asyncio import AsyncRetrying, retry_if_exception

from . import _errors, _log, _settings, events
from ._prober import light_prober
from ._waiting import RouteWait

if TYPE_CHECKING:
    from ._connecting import ConnectBudget
    from ._prober import OpenProber, Prober
    from ._route import Route

ROUND_PACE = 0.5
"""Seconds between two probes of a warm-up that has got a 404."""


async def warm_up(route: Route, open_prober: OpenProber, budget: ConnectBudget) -> None:
    """Return once the route has answered often enough in a row.

    Any other error than a 404 of the gateway ends the warm-up with a warning: the next call
    fails with it.

    Raises:
        RouteTimeoutError: The gateway still answered 404 at the end of the budget
            (``warmup_timeout``, 120 s); caused by the last 404.
        Exception: The gateway's 404 itself, where the control plane says that the job has
            ended or is gone.
    """
    if not _settings.current().warmup_successes:
        return
    failure = await _WarmUp(route, budget).run(open_prober)
    if failure is not None:
        raise failure


class _WarmUp:
    """One warm-up, and what has come of it so far."""

    def __init__(self, route: Route, budget: ConnectBudget) -> None:
        self._route = route
        self._budget = budget
        self._began = time.monotonic()
        self._rounds = 0
        self._refused = False
        """A 404 was received; what is left to see is whether it went away."""
        self._is_the_pods = False
        """A 404 has turned out to be the pod's own, which the next call fails with."""

    async def run(self, open_prober: OpenProber) -> Exception | None:
        """Warm up; what comes back is to be raised."""
        events.publish(
            events.WarmupStarted(job=str(self._route.job), gateway=self._route.job.gateway)
        )
        wait = RouteWait(self._route, light_prober(self._route, open_prober), self._budget)
        try:
            async with open_prober() as prober:
                with self._route.incident(), self._route.voice.wait(wait):
                    outcome, cause, failure = await self._outcome(prober, wait)
        except asyncio.CancelledError:
            self._publish_end("cancelled")
            raise
        except Exception as error:  # noqa: BLE001 - a failure of ours is no reason not to connect
            self._publish_end("failed", error)
            _log.own_failure("warming the route up", error, strict=_settings.current().strict)
            return None
        self._publish_end(outcome, cause)
        return failure

    async def _outcome(
        self, prober: Prober, wait: RouteWait
    ) -> tuple[events.WarmupOutcome, Exception | None, Exception | None]:
        """How it ended, with what error, and what is to be raised."""
        try:
            # A policy of its own, as tenacity keeps a call's state on it.
            await AsyncRetrying(
                retry=retry_if_exception(functools.partial(self._should_retry, prober, wait)),
                wait=lambda _: wait.next_delay(),
                stop=lambda _: wait.exhausted(),
                sleep=wait.sleep,
                reraise=True,
            )(self._round, prober)
        except Exception as error:  # noqa: BLE001 - told apart here
            if self._is_the_pods or not prober.is_refusal(error):
                self._route.voice.end(wait, "ended")
                return "error", error, None
            self._route.record_failure(wait)
            if wait.is_over():
                _errors.note_warm_up(error, wait, self._rounds)
                return "job ended", error, error
            return "timeout", error, _errors.route_timeout(error, wait, self._rounds)
        self._route.warm = True
        self._route.mark_reachable(proof=True)
        return "warm", None, None

    async def _round(self, prober: Prober) -> None:
        """So many successes in a row; a 404 among them starts the count again."""
        self._rounds += 1
        count = _settings.current().warmup_successes
        if self._rounds == 1:
            self._route.publish(events.ProbesSent, number=count)
            probes = (prober() for _ in range(count))
            outcomes = await asyncio.gather(*probes, return_exceptions=True)
            errors = [outcome for outcome in outcomes if outcome is not None]
            for error in sorted(errors, key=prober.is_refusal, reverse=True):
                raise error
            return
        for _ in range(count):
            pause = self._route.last_probe + ROUND_PACE - time.monotonic()
            await self._route.waiters.sleep(pause)
            self._route.last_probe = time.monotonic()
            self._route.publish(events.ProbesSent, number=1)
            await prober()

    async def _should_retry(self, prober: Prober, wait: RouteWait, error: BaseException) -> bool:
        """Refused, and ask: whether to wait and begin another round."""
        if not prober.is_refusal(error):
            return False
        if await prober.is_the_pods(error):
            self._is_the_pods = True
            return False
        self._refused = True
        wait.record_404()
        self._route.record_404("warm-up", self._rounds - 1)
        await wait.ask(prober.headers(error))
        return not wait.is_over()

    def _publish_end(self, outcome: events.WarmupOutcome, error: Exception | None = None) -> None:
        events.publish(
            events.WarmupEnded(
                job=str(self._route.job),
                gateway=self._route.job.gateway,
                outcome=outcome,
                rounds=self._rounds,
                refused=self._refused,
                seconds=round(time.monotonic() - self._began, 3),
                error=None if error is None else type(error).__name__,
            )
        )
