"""Warm a route up before the program gets to work, and watch it while someone waits.

The SDK calls a job ready after one good health check; the other paths of the same route
can still be stale. The warm-up proves the route on a path that does go through the table:
so many successes in a row, over as many fresh connections, because each connection may
end at another replica of the gateway. They are sent at the same time, so a healthy route
costs a round trip or two. A route that has refused one of them is asked twice a second.

That does not prove that every replica knows the route: no client can tell how many there
are. A 404 that comes later is replayed.

While requests wait for a route, one light prober per job asks in their place.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from . import _log, _settings, events
from ._retry import Probe, Waiting

if TYPE_CHECKING:
    from ._route import ConnectBudget, Route


class Prober(Protocol):
    """Sends a light request of our own through the route."""

    async def __call__(self) -> None:
        """Send one over a fresh connection; raises what it was answered with."""

    @property
    def proves(self) -> bool:
        """Whether a success shows that the pod is at work."""

    def refused(self, error: BaseException) -> bool:
        """Whether an error is a 404 that may be the gateway's."""

    async def is_the_pods(self, error: BaseException) -> bool:
        """Whether a 404 of unknown shape turns out to be the pod's own."""

    def headers(self, error: BaseException) -> Mapping[str, str]:
        """The headers of the request that an error answers."""

    def answered(self, error: BaseException) -> bool:
        """Whether an error is an answer of the other side, and not the lack of one."""


class RouteTimeoutError(TimeoutError):
    """The route was still not there at the end of the warm-up's budget.

    A class of its own because asyncio makes a new exception, without cause and notes, of
    a plain :class:`TimeoutError` on its way from the loop's thread to the caller's.
    """


OpenProber = Callable[[], contextlib.AbstractAsyncContextManager[Prober]]


ROUND_PACE = 0.5
"""Seconds between two probes of a warm-up that has met a 404."""


class _WarmUp(Waiting):
    def __init__(self, route: Route, prober: Prober, probe: Probe, budget: ConnectBudget) -> None:
        longest = _settings.current().warmup_max_delay
        super().__init__(route, probe, longest=longest, connecting=True)
        self._prober = prober
        self._budget = budget
        self.rounds = 0
        self.refused = False
        """A 404 was met; what is left to see is whether it went away."""
        self.is_the_pods = False
        """A 404 has turned out to be the pod's own, which is for the next call to meet."""

    async def run(self) -> None:
        await self.policy()(self._round)

    def _left(self) -> float:
        return self._budget.left(self._settings.warmup_timeout)

    async def _round(self) -> None:
        """So many successes in a row; a 404 among them starts the count again."""
        self.rounds += 1
        count = self._settings.warmup_successes
        if self.rounds == 1:
            self.route.counters.probes += count
            outcomes = await asyncio.gather(
                *(self._prober() for _ in range(count)), return_exceptions=True
            )
            errors = [outcome for outcome in outcomes if outcome is not None]
            for error in sorted(errors, key=self._prober.refused, reverse=True):
                raise error
            return
        for _ in range(count):
            await self.route.rest(self.route.last_probe + ROUND_PACE - time.monotonic())
            self.route.last_probe = time.monotonic()
            self.route.counters.probes += 1
            await self._prober()

    async def _may_go_on(self, error: BaseException) -> bool:
        if not self._prober.refused(error):
            return False
        if await self._prober.is_the_pods(error):
            self.is_the_pods = True
            return False
        self.refused = True
        self.refused_at = time.monotonic()
        self._budget.start()
        self.route.refused()
        await self.ask(self._prober.headers(error))
        return not self.ended()

    def note(self) -> str:
        """What was seen, for the exception that ends the warm-up."""
        ago = time.monotonic() - self.answer.at
        return (
            f"job {self.route.job}: the gateway still answered 404 after {self.elapsed:.1f} s "
            f"and {self.rounds} rounds; the control plane's word on the job, {ago:.1f} s before: "
            f"{self.answer.said}. {self.advice()}"
        )


async def warm_up(route: Route, open_prober: OpenProber, budget: ConnectBudget) -> None:
    """Return once the route has answered often enough in a row.

    Any other error than a 404 of the gateway ends the warm-up with a warning: it is for
    the next call to meet it.

    Raises:
        RouteTimeoutError: The gateway still answered 404 at the end of the budget
            (``warmup_timeout``, 120 s); caused by the last 404.
        Exception: The gateway's 404 itself, where the control plane says that the job is
            over or gone.
    """
    settings = _settings.current()
    if not settings.warmup_successes:
        return
    began = time.monotonic()
    route.counters.warmups += 1
    events.publish(events.WarmupStarted(job=str(route.job)))
    try:
        async with open_prober() as prober:
            warm = _WarmUp(route, prober, light_prober(route, open_prober), budget)
            with route.incident():
                failure = await _run(route, warm, prober)
    except Exception as error:  # noqa: BLE001 - a failure of ours is no reason not to connect
        _log.own_failure("warming the route up", error, strict=settings.strict)
        return
    finally:
        route.counters.warmup_seconds += time.monotonic() - began
    if failure is not None:
        raise failure


async def _run(route: Route, warm: _WarmUp, prober: Prober) -> Exception | None:
    """Warm up; what comes back is to be raised."""
    failure: Exception | None = None
    outcome, met = "warm", None
    try:
        await warm.run()
    except asyncio.CancelledError:
        route.counters.cancelled += warm.refused
        raise
    except Exception as error:  # noqa: BLE001 - told apart below
        met = type(error).__name__
        if warm.is_the_pods or not prober.refused(error):
            outcome = "error"
        else:
            outcome = "over" if warm.ended() else "timeout"
            failure = _failure(route, warm, error)
    else:
        route.warm = True
        route.answered(proof=True)
    if warm.refused:
        route.counters.longest_wait = max(route.counters.longest_wait, warm.elapsed)
        route.counters.recovered += outcome == "warm"
    events.publish(
        events.WarmupEnded(
            job=str(route.job),
            outcome=outcome,
            rounds=warm.rounds,
            seconds=round(warm.elapsed, 3),
            error=met,
        )
    )
    return failure


def _failure(route: Route, warm: _WarmUp, error: Exception) -> Exception:
    route.give_up()
    note = f"tinker_routefix: {warm.note()}"
    if warm.ended():
        route.counters.failed_fast += 1
        error.add_note(note)
        return error
    route.counters.given_up += 1
    timeout = RouteTimeoutError(note)
    timeout.__cause__ = error
    return timeout


FIRST_SECOND = 1.0
FIRST_HALF_MINUTE = 30.0
GAP = 0.9
"""The share of its wait that must have passed since the route's last probe, whoever sent it."""

PROBES_AT_ONCE = 3
"""Probes that may be under way at a time: one that hangs must not keep the others back."""


def _cadence(elapsed: float) -> float:
    """Four times a second at first, when most races end; then ever less of a burden."""
    if elapsed < FIRST_SECOND:
        return 0.25
    return 0.5 if elapsed < FIRST_HALF_MINUTE else 1.0


def light_prober(route: Route, open_prober: OpenProber) -> Probe:
    """What asks in the place of all who wait for a route, until it is cancelled."""

    async def once(prober: Prober) -> None:
        try:
            await prober()
        except Exception as error:  # noqa: BLE001 - it only matters whether it is an answer
            if not prober.refused(error) and prober.answered(error):
                route.answered(proof=False)
        else:
            route.answered(proof=prober.proves)

    async def probe() -> None:
        began = time.monotonic()
        under_way: set[asyncio.Task[None]] = set()
        try:
            async with open_prober() as prober:
                try:
                    while True:
                        cadence = _cadence(time.monotonic() - began)
                        waited = time.monotonic() - route.last_probe
                        # Somebody else's probe, a warm-up's, is as good.
                        if waited < GAP * cadence:
                            await asyncio.sleep(cadence - waited)
                            continue
                        if route.sleepers and len(under_way) < PROBES_AT_ONCE:
                            route.last_probe = time.monotonic()
                            route.counters.probes += 1
                            task = asyncio.ensure_future(once(prober))
                            under_way.add(task)
                            task.add_done_callback(under_way.discard)
                        await asyncio.sleep(cadence)
                finally:
                    for task in under_way.copy():
                        task.cancel()
                    await asyncio.gather(*under_way, return_exceptions=True)
        except Exception as error:  # noqa: BLE001 - without a prober, waits run their length
            _log.own_failure("probing the route", error, strict=_settings.current().strict)

    return probe
