"""Requests that the program does not wait for: what their 404 comes to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from . import _answers, events
from ._endpoints import DYNAMIC_CONFIG, FINISH, HEARTBEAT, PASS_THROUGH

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._connections import PooledClient
    from ._route import Route

TELEMETRY_WAITS, TELEMETRY_LOOKS = 15.0, 0.1
"""Seconds that a batch of telemetry waits at most, and how often it looks whether it may go on."""


def is_background(path: str, route: Route, *, connecting: bool) -> bool:
    """Whether a 404 to a request is tinker's to deal with: the program loses nothing by it."""
    if path in PASS_THROUGH:
        return True
    if path == DYNAMIC_CONFIG:
        # A refresh; until the next one what was known goes on to hold.
        return not connecting
    # After a give-up the program has its exception; its farewell must not wait once more.
    farewell = route.given_up or route.job_ended
    return farewell and FINISH.fullmatch(path) is not None


def renew_if_heartbeat(path: str, pooled: PooledClient) -> None:
    """Renew the client of a heartbeat: it is kept alive to a replica that may stay stale."""
    route = pooled.pool.route
    # What nobody was told, may have been a late answer of a job that goes on.
    told_gone = route.given_up and route.job_ended
    if path == HEARTBEAT and not told_gone and pooled.pool.replacement() is not None:
        route.publish(events.HeartbeatRefused)
        pooled.stale = True
        pooled.renew()


async def settle_telemetry(
    pooled: PooledClient, request: Callable[[Any], Any], error: Exception
) -> Any:
    """Hold a refused batch while the program's requests wait, as tinker prints a traceback for it.

    Dropped once one of them is given up, or after a while: until 0.38 tinker re-sends a refused
    batch every second, and a fatal exception waits 30 s for it. What is returned is discarded.
    """
    route = pooled.pool.route
    if not route.drops_telemetry:
        # Requests that were refused in the same moment begin to wait.
        await asyncio.sleep(TELEMETRY_LOOKS)
        if not (route.needs_notice or route.drops_telemetry):
            raise error
    since = began = time.monotonic()
    while not route.drops_telemetry and time.monotonic() - began < TELEMETRY_WAITS:
        await asyncio.sleep(TELEMETRY_LOOKS)
        ended = not route.needs_notice
        if ended or route.answered_at > since:
            since = time.monotonic()
            pooled.stale = True
            pooled = await pooled.fresh()
            try:
                return await pooled.send(request)
            except Exception as again:
                if ended or not _answers.kind_of(again, route.job).is_refusal:
                    raise
    route.publish(events.TelemetryDropped)
    return None
