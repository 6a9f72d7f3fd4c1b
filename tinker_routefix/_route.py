"""A job's route: whose it is, what has been seen of it, who waits for it.

All clients of a job share one gateway route, so they share one :class:`Route`: the first
request that is refused opens an *incident*, later ones join it, and the first answer that
comes through releases them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from . import _report
from ._control_plane import ControlPlane
from ._log import RateLimit
from ._submissions import RaisedSteps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ._job import Job
    from ._verdict import Cure

DRAIN = 30.0
"""Seconds that tinker before 0.38 holds a fatal exception back while telemetry is refused."""

FORGIVEN_AFTER = 60.0
"""Seconds without trouble after which connecting has its whole budget again; for processes
that never create a training client and so are never seen warm."""

AT_ONCE = 4
"""Requests that stop waiting in one turn of the event loop. Making and sending one again takes
up to a millisecond: with 1,000 at once, the loop was measured to stand still for 3 s."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What the shim has met and done for one job; only ever growing."""

    refused: int = 0
    """404s of the gateway, or of unknown origin, met by the program's requests and warm-ups."""
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
    """A cure that the gateway was seen to have: see :class:`._verdict.Cure`."""


class Route:
    """What one event loop knows of the route to one job."""

    def __init__(self, job: Job, control_plane: ControlPlane) -> None:
        self.job = job
        self.control_plane = control_plane
        self.counters = Counters()
        self.limit = RateLimit(seconds=5.0)
        self.raised = RaisedSteps()
        self.warm = False
        """A warm-up has succeeded."""
        self.worked = False
        """A training or sampling request has been made: from now on there is work to lose."""
        self.model_id: str | None = None
        self.given_up = False
        """A program was handed a 404 and nothing has come through since."""
        self._given_up_at = float("-inf")
        self.answered_at = float("-inf")
        self.last_probe = float("-inf")
        self._troubled = 0
        self._incident_began = 0.0
        self._incident_ended = float("-inf")
        self._connect_spent = 0.0
        self._sleepers: dict[asyncio.Future[None], float] = {}
        self._leaving: deque[asyncio.Future[None]] = deque()
        self._prober: asyncio.Task[None] | None = None

    @property
    def connecting(self) -> bool:
        """Nothing has been trained yet, and the route has not been seen warm."""
        return not self.warm and not self.worked

    @property
    def watched(self) -> bool:
        """An answer would be news to someone."""
        return self._troubled > 0 or self.given_up

    @property
    def drained(self) -> bool:
        """A program may be waiting for telemetry before it gets its 404.

        Also where another client has got through meanwhile: replicas differ.
        """
        return self.given_up or time.monotonic() - self._given_up_at < DRAIN

    @property
    def sleepers(self) -> int:
        """How many requests wait for the route at this moment."""
        return len(self._sleepers)

    def connect_spent(self) -> float:
        """Seconds that connecting has waited for the route so far."""
        running = time.monotonic() - self._incident_began if self._troubled else 0.0
        return self._connect_spent + running

    def became_warm(self) -> None:
        """Note that the warm-up succeeded, and give the next one a budget of its own."""
        self.warm = True
        self._connect_spent = 0.0
        self._incident_began = time.monotonic()

    def refused(self) -> None:
        """Note that the program, or a warm-up in its place, met a 404 that is not the pod's."""
        self.counters.refused += 1
        self.counters.last_intervention = time.time()
        _report.at_exit()

    def show(self, cure: Cure) -> None:
        """Note that the gateway was seen to tell a stale route from a job that is gone."""
        self.counters.cure = cure.value
        _report.at_exit()

    def give_up(self) -> None:
        """Note that the program is handed a 404."""
        self.given_up = True
        self._given_up_at = time.monotonic()

    def answered(self) -> None:
        """Note that something came through the route, and release all who wait for it."""
        self.answered_at = time.monotonic()
        self.given_up = False
        for sleeper, not_before in self._sleepers.items():
            self._wake(sleeper, not_before - self.answered_at)
        self._sleepers.clear()

    @contextlib.contextmanager
    def incident(self) -> Iterator[None]:
        """A request has been refused and is not through yet."""
        if not self._troubled:
            self._incident_began = time.monotonic()
            if self._incident_began - self._incident_ended > FORGIVEN_AFTER:
                self._connect_spent = 0.0
        self._troubled += 1
        try:
            yield
        finally:
            self._troubled -= 1
            if not self._troubled:
                self._incident_ended = time.monotonic()
                self._connect_spent += self._incident_ended - self._incident_began
                if self._prober is not None:
                    self._prober.cancel()
                    self._prober = None

    async def pause(
        self,
        seconds: float,
        *,
        since: float,
        not_before: float,
        probe: Callable[[], Awaitable[None]],
    ) -> bool:
        """Wait until the route is seen to answer, or for ``seconds``.

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
            self._prober = asyncio.ensure_future(probe())
        asked = time.monotonic()
        earliest = min(not_before - asked, seconds)
        if self.answered_at >= since:
            await self.rest(earliest)
            return True
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers[sleeper] = asked + earliest
        timer = self._wake(sleeper, seconds)
        try:
            await sleeper
        finally:
            timer.cancel()
            self._sleepers.pop(sleeper, None)
        return self.answered_at >= since

    async def rest(self, seconds: float) -> None:
        """Wait for so long, whatever happens on the route."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._wake(sleeper, seconds)
        try:
            await sleeper
        finally:
            timer.cancel()

    async def turn(self) -> None:
        """Wait for one's turn among all requests that go on at this moment."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leave(sleeper)
        await sleeper

    def _wake(self, sleeper: asyncio.Future[None], seconds: float) -> asyncio.TimerHandle:
        """Let a sleeper go after some seconds, in its turn."""
        loop = asyncio.get_running_loop()
        return loop.call_later(max(seconds, 0.0), self._leave, sleeper)

    def _leave(self, sleeper: asyncio.Future[None]) -> None:
        if not self._leaving:
            asyncio.get_running_loop().call_soon(self._let_go)
        self._leaving.append(sleeper)

    def _let_go(self) -> None:
        let_go = 0
        while self._leaving and let_go < AT_ONCE:
            sleeper = self._leaving.popleft()
            if not sleeper.done():
                sleeper.set_result(None)
                let_go += 1
        if self._leaving:
            asyncio.get_running_loop().call_soon(self._let_go)


_lock = threading.Lock()
_routes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Job, Route]] = (
    weakref.WeakKeyDictionary()
)


def route_to(job: Job) -> Route:
    """The running loop's route to a job; made when it is first asked for."""
    loop = asyncio.get_running_loop()
    with _lock:
        routes = _routes.setdefault(loop, {})
        if job not in routes:
            routes[job] = Route(job, ControlPlane(job))
        return routes[job]


def all_routes() -> list[Route]:
    """Every route that any loop of this process has."""
    with _lock:
        return [route for routes in _routes.values() for route in routes.values()]


def _forget() -> None:
    """In a forked child: neither the parent's loops nor its lock live on."""
    global _lock, _routes
    _lock = threading.Lock()
    _routes = weakref.WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
