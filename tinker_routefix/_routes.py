"""Which routes the clients of this process lead to, and what has been counted on them."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

from ._control_plane import ControlPlane
from ._counters import Counters
from ._route import Route

if TYPE_CHECKING:
    from ._job import Job

REMEMBERED = 256
"""Jobs whose counters are kept when no client uses them any more."""

LEFT_ALONE = 8
"""Origins that are remembered of clients that lead elsewhere."""

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
        if route is not None:
            return route
        counters = _counters.setdefault(job, Counters())
        _counters.move_to_end(job)
    # Without the lock: it may warn, and a handler of the program's may ask for the status then.
    route = Route(job, ControlPlane(job, counters), counters)
    with _lock:
        routes[job] = route
        _forget_unused()
    return route


def _forget_unused() -> None:
    used = {job for routes in _routes.values() for job in routes}
    for job in [job for job in _counters if job not in used][:-REMEMBERED]:
        dropped = _counters.pop(job).last_intervention
        # Not when the process last needed the shim.
        if dropped is not None:
            _dropped.last_intervention = max(_dropped.last_intervention or 0.0, dropped)


left_alone: dict[str, None] = {}
"""The last ones, the newest last."""


def leave_alone(origin: str) -> None:
    """Note that a client is left alone, because it leads to no trainer job."""
    left_alone.pop(origin, None)
    left_alone[origin] = None
    if len(left_alone) > LEFT_ALONE:
        del left_alone[next(iter(left_alone))]


_dropped = Counters()
"""What is left of counters that were dropped."""


def all_routes() -> list[Route]:
    """Every route that any loop of this process has."""
    with _lock:
        return [route for routes in _routes.values() for route in routes.values()]


def all_counters() -> dict[Job, Counters]:
    """What has been counted for each job, also for those that no client uses any more."""
    with _lock:
        return dict(_counters)


def last_intervention() -> float | None:
    """When any job last needed help (a Unix timestamp); None: never."""
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
