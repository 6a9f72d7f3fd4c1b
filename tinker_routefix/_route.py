"""A job's route: whose it is, what has been seen of it, who waits for it.

All clients of a job share one gateway route, so they share one :class:`Route`: the first
request that is refused opens an *incident*, later ones join it, and the first answer that
comes through releases them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from . import _report
from ._control_plane import ControlPlane, JobState
from ._counters import Counters
from ._log import RateLimit
from ._submissions import RaisedSteps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ._job import Job
    from ._verdict import Cure

DRAIN = 30.0
"""Seconds that tinker before 0.38 holds a fatal exception back while telemetry is refused."""

REMEMBERED = 256
"""Jobs whose counters are kept when no client uses them any more."""

AT_ONCE = 4
"""Requests that stop waiting in one turn of the event loop. Making and sending one again takes
up to a millisecond: with 1,000 at once, the loop was measured to stand still for 3 s."""


class ConnectBudget:
    """How long one client may wait for the route while it connects.

    A service client (config, token, session) has one, and so has each training client (the
    checkpoint's weights_info, model, warm-up). It runs from the first 404, and no other client
    makes it longer or shorter.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self.ended = False
        """Connecting is over; what was started meanwhile and goes on is something else."""

    def start(self) -> None:
        """Note that a 404 was received."""
        if self._began is None:
            self._began = time.monotonic()

    def left(self, budget: float) -> float:
        """Seconds that are left of a budget."""
        return budget if self._began is None else budget - (time.monotonic() - self._began)

    @property
    def used(self) -> bool:
        """Whether a 404 was received."""
        return self._began is not None


class Route:
    """What one event loop knows of the route to one job."""

    def __init__(
        self, job: Job, control_plane: ControlPlane, counters: Counters | None = None
    ) -> None:
        self.job = job
        self.control_plane = control_plane
        self.counters = counters or Counters()
        self.limit = RateLimit(seconds=5.0)
        self.raised = RaisedSteps()
        self.warm = False
        """A warm-up has succeeded, and the job has not been said to have ended since."""
        self.model_id: str | None = None
        self.given_up = False
        """A program was handed a 404 and nothing has come through since."""
        self._given_up_at = float("-inf")
        self.answered_at = float("-inf")
        self.proven_at = float("-inf")
        """When the pod last answered a request through the route with success."""
        self.last_probe = float("-inf")
        self.probe_refused_at = float("-inf")
        """When a probe beside a request last got a 404: what has failed since failed with it."""
        self._troubled = 0
        self._sleepers: set[asyncio.Future[None]] = set()
        self._paced = 0
        self._leaving: deque[asyncio.Future[None]] = deque()
        self._prober: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """The control plane has said that the job is over, and the pod has not answered since.

        A job that is resumed shows its old state for a while.
        """
        last = self.control_plane.last_answer
        return last.state is JobState.OVER and last.at > self.proven_at

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
        return len(self._sleepers) + self._paced

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

    def answered(self, *, proof: bool) -> None:
        """Note that something came through the route, and release all who wait for it.

        Args:
            proof: Whether it proves that the pod is at work: a success of ``get_info`` or of a
                request of the program's.
        """
        self.answered_at = time.monotonic()
        if proof:
            self.proven_at = self.answered_at
        self.given_up = False
        for sleeper in self._sleepers:
            self._leave(sleeper)
        self._sleepers.clear()

    @contextlib.contextmanager
    def incident(self) -> Iterator[None]:
        """A request has been refused and is not through yet."""
        self._troubled += 1
        try:
            yield
        finally:
            self._troubled -= 1
            if not self._troubled and self._prober is not None:
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
            # In a context of its own: a task keeps its context, and that what it holds.
            self._prober = asyncio.get_running_loop().create_task(
                _run(probe), context=contextvars.Context()
            )
        ends = time.monotonic() + seconds
        if self.answered_at < since:
            sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers.add(sleeper)
            timer = self._wake(sleeper, seconds)
            try:
                await sleeper
            finally:
                timer.cancel()
                self._sleepers.discard(sleeper)
        early = self.answered_at >= since
        if early:
            # It counts as a waiter still: were there no probes meanwhile, probes and replays would
            # take turns, and behind a balancer that does so too meet the same replicas for ever.
            self._paced += 1
            try:
                await self.rest(min(not_before, ends) - time.monotonic())
            finally:
                self._paced -= 1
        return early

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


async def _run(probe: Callable[[], Awaitable[None]]) -> None:
    await probe()


_lock = threading.Lock()
_routes: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, weakref.WeakValueDictionary[Job, Route]
] = weakref.WeakKeyDictionary()
"""Those that a client uses; a route goes with the last pool of clients that leads to it."""
_counters: OrderedDict[Job, Counters] = OrderedDict()
"""By job, the last used one last. They outlive the routes: that a process has not needed the shim
for a month is what its removal is decided by."""


def route_to(job: Job) -> Route:
    """The running loop's route to a job; made when it is first asked for."""
    loop = asyncio.get_running_loop()
    with _lock:
        routes = _routes.setdefault(loop, weakref.WeakValueDictionary())
        route = routes.get(job)
        if route is None:
            counters = _counters.setdefault(job, Counters())
            _counters.move_to_end(job)
            route = routes[job] = Route(job, ControlPlane(job, counters), counters)
            _forget_unused()
        return route


def _forget_unused() -> None:
    used = {job for routes in _routes.values() for job in routes}
    for job in [job for job in _counters if job not in used][:-REMEMBERED]:
        dropped = _counters.pop(job).last_intervention
        # Not when the process last needed the shim.
        if dropped is not None:
            _dropped.last_intervention = max(_dropped.last_intervention or 0.0, dropped)


_dropped = Counters()
"""What is left of counters that were dropped."""


def all_routes() -> list[Route]:
    """Every route that any loop of this process has."""
    with _lock:
        return [route for routes in _routes.values() for route in routes.values()]


def all_counters() -> dict[Job, Counters]:
    """What was met and done for each job, also for those that no client uses any more."""
    with _lock:
        return dict(_counters)


def last_intervention() -> float | None:
    """When any job last needed help (seconds since the epoch); None: never."""
    moments = [one.last_intervention for one in (*all_counters().values(), _dropped)]
    return max((moment for moment in moments if moment is not None), default=None)


def _forget() -> None:
    """In a forked child: neither the parent's loops nor its lock live on."""
    global _lock, _routes, _counters, _dropped
    _lock = threading.Lock()
    _routes = weakref.WeakKeyDictionary()
    _counters = OrderedDict()
    _dropped = Counters()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
