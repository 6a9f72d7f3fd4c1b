"""One light prober a job: it asks the route in the place of all who wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from . import _log, _settings, events

if TYPE_CHECKING:
    from ._route import Route

FIRST_SECOND = 1.0
FIRST_HALF_MINUTE = 30.0
GAP = 0.9
"""The share of its wait that must have passed since the route's last probe, whoever sent it."""

PROBES_AT_ONCE = 3
"""Probes that may be under way at a time: one that hangs must not keep the others back."""


class Prober(Protocol):
    """Sends a light request of our own through the route."""

    async def __call__(self) -> None:
        """Send one over a fresh connection; raises what it was answered with."""

    @property
    def proves(self) -> bool:
        """Whether a success shows that the pod is at work."""

    def is_refusal(self, error: BaseException) -> bool:
        """Whether an error is a 404 that may be the gateway's."""

    def is_answer(self, error: BaseException) -> bool:
        """Whether an error is an answer that shows that the route is there."""

    async def is_the_pods(self, error: BaseException) -> bool:
        """Whether a 404 of unknown shape turns out to be the pod's own."""

    def headers(self, error: BaseException) -> Mapping[str, str]:
        """The headers of the request that an error answers."""


OpenProber = Callable[[], AbstractAsyncContextManager[Prober]]


async def probe_once(route: Route, prober: Prober) -> bool:
    """Send one probe and note what it says of the route; whether that was reachable."""
    try:
        await prober()
    except Exception as error:  # noqa: BLE001 - it only matters whether it is an answer
        if not prober.is_answer(error):
            return False
        route.mark_reachable(proof=False)
    else:
        route.mark_reachable(proof=prober.proves)
    return True


def light_prober(route: Route, open_prober: OpenProber) -> Callable[[], Awaitable[None]]:
    """What probes a route while someone waits for it, until it is cancelled."""

    async def probe() -> None:
        try:
            async with open_prober() as prober:
                await _probe_for_ever(route, prober)
        except Exception as error:  # noqa: BLE001 - without a prober, waits run their length
            _log.own_failure("probing the route", error, strict=_settings.current().strict)

    return probe


async def _probe_for_ever(route: Route, prober: Prober) -> None:
    began = time.monotonic()
    under_way: set[asyncio.Task[bool]] = set()
    try:
        while True:
            cadence = _cadence(time.monotonic() - began)
            waited = time.monotonic() - route.last_probe
            # Somebody else's probe, a warm-up's, is as good.
            if waited < GAP * cadence:
                await asyncio.sleep(cadence - waited)
                continue
            if route.waiters.count and len(under_way) < PROBES_AT_ONCE:
                route.last_probe = time.monotonic()
                route.publish(events.ProbesSent, number=1)
                task = asyncio.ensure_future(probe_once(route, prober))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.sleep(cadence)
    finally:
        for task in under_way.copy():
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _cadence(elapsed: float) -> float:
    """Four times a second at first, when most races end; then ever less of a burden."""
    if elapsed < FIRST_SECOND:
        return 0.25
    return 0.5 if elapsed < FIRST_HALF_MINUTE else 1.0
