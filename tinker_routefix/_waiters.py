"""Who waits for a route, and in which order they go on.

Making and sending a request again takes up to a millisecond: with 1,000 at once, the loop was
measured to stand still for 3 s. So all who go on, pass one queue.
"""

from __future__ import annotations

import asyncio
from collections import deque

WAKEUPS_PER_TICK = 4
"""Requests that stop waiting in one iteration of the event loop."""


class Waiters:
    """The requests that wait for one route."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._paced = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def count(self) -> int:
        """How many wait for the route at this moment."""
        return len(self._waiters) + self._paced

    def release(self) -> None:
        """Let all go on who wait for the route, in order."""
        for waiter in self._waiters:
            self._enqueue(waiter)
        self._waiters.clear()

    async def wait(self, seconds: float) -> None:
        """Wait to be released, for so long at most."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await self._sleep(waiter, seconds)
        finally:
            self._waiters.pop(waiter, None)

    async def pace(self, seconds: float) -> None:
        """Wait for so long, and count as one who waits.

        Were there no probes meanwhile, probes and replays would take turns, and behind a balancer
        that does so too get the same replicas for ever.
        """
        self._paced += 1
        try:
            await self.sleep(seconds)
        finally:
            self._paced -= 1

    async def sleep(self, seconds: float) -> None:
        """Wait for so long, whatever happens on the route."""
        await self._sleep(asyncio.get_running_loop().create_future(), seconds)

    async def stagger(self) -> None:
        """Resume at most so many requests per loop iteration, in order."""
        waiter = asyncio.get_running_loop().create_future()
        self._enqueue(waiter)
        await waiter

    async def _sleep(self, waiter: asyncio.Future[None], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(seconds, 0.0), self._enqueue, waiter)
        try:
            await waiter
        finally:
            timer.cancel()

    def _enqueue(self, waiter: asyncio.Future[None]) -> None:
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._drain_queue)
        self._queue.append(waiter)

    def _drain_queue(self) -> None:
        woken = 0
        while self._queue and woken < WAKEUPS_PER_TICK:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                woken += 1
        if self._queue:
            asyncio.get_running_loop().call_soon(self._drain_queue)
