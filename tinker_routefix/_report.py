"""A process's last words: whether it needed the shim, and whether the shim can go.

One line each, at INFO, and none for a process that met nothing: what is read at the end of a
run is read. Nothing is registered before there is something to tell.
"""

from __future__ import annotations

import atexit
import functools
import logging
from typing import TYPE_CHECKING

from . import _log
from .events import counted

if TYPE_CHECKING:
    from ._counters import Counters

_HOW = (
    "delete the import of tinker_routefix, or unset TINKER_ROUTEFIX_AUTOLOAD, and uninstall the "
    "package"
)


@functools.cache
def at_exit() -> None:
    """Have the last words said at the end of this process; harmless when repeated."""
    atexit.register(_say)


def _say() -> None:
    from . import _route  # which imports this module

    counters = _route.all_counters().values()
    needed = [one for one in counters if one.refused]
    if needed:
        _log.event(logging.INFO, "process.report", report(needed))
    if any(one.cure for one in counters):
        _log.event(logging.INFO, "process.retire", retirement(needed=bool(needed)))


def report(counters: list[Counters]) -> str:
    """What was met on the routes that needed help, and what came of it."""
    met = sum(route.refused for route in counters)
    ends = {
        "recovered": sum(route.recovered for route in counters),
        "given up": sum(route.given_up for route in counters),
        "uncertain": sum(route.uncertain for route in counters),
        "failed fast": sum(route.failed_fast for route in counters),
        "cancelled": sum(route.cancelled for route in counters),
    }
    came = [f"{count} {end}" for end, count in ends.items() if count]
    outcome = "all recovered" if came == [f"{ends['recovered']} recovered"] else ", ".join(came)
    longest = max(route.longest_wait for route in counters)
    return (
        f"met {counted(met, 'gateway 404')} on {counted(len(counters), 'job')}, "
        f"{outcome or 'none recovered'}, longest wait {longest:.1f} s"
    )


def retirement(*, needed: bool) -> str:
    """Whether the shim can go, and how."""
    until = "once it does so for all, so that no 404 is met any more: " if needed else "now: "
    return (
        "the gateway answers 503 route_not_ready for a stale route: the SDK repeats that; "
        f"tinker_routefix can go {until}{_HOW}"
    )
