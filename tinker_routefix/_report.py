"""The final report of a process: whether it needed the shim, and whether the shim can go.

One line each, at INFO, and none for a process that got no 404: what is read at the end of a
run is read. Nothing is registered before there is something to tell.
"""

from __future__ import annotations

import atexit
import functools
import logging
from typing import TYPE_CHECKING

from . import _log, _routes, events
from .events import counted

if TYPE_CHECKING:
    from ._counters import Counters

_HOW = (
    "delete the import of tinker_routefix, or unset TINKER_ROUTEFIX_AUTOLOAD, and uninstall the "
    "package"
)


def note(event: events.Event) -> None:
    """Have the report made at the end of this process, once there is something to tell."""
    if isinstance(event, events.Refused | events.FixSeen):
        _at_exit()


@functools.cache
def _at_exit() -> None:
    atexit.register(_say)


def _say() -> None:
    for route in _routes.all_routes():
        route.voice.tell_at_exit()
    counters = _routes.all_counters().values()
    needed = [one for one in counters if one.refused]
    if needed:
        _log.event(logging.INFO, "process.report", report(needed))
    if any(one.gateway_fix for one in counters):
        _log.event(logging.INFO, "process.retire", retirement(needed=bool(needed)))


def report(counters: list[Counters]) -> str:
    """How many 404s there were, and what came of them."""
    refused = sum(route.refused for route in counters)
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
        f"requests got {counted(refused, 'gateway 404')} on {counted(len(counters), 'job')}, "
        f"{outcome or 'none recovered'}, longest wait {longest:.1f} s"
    )


def retirement(*, needed: bool) -> str:
    """Whether the shim can go, and how."""
    until = "once it does so for all, so that no 404 is received any more: " if needed else "now: "
    return (
        "the gateway answers 503 route_not_ready for a stale route: the SDK repeats that; "
        f"tinker_routefix can go {until}{_HOW}"
    )


events.listen(note)
