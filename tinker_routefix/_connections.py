"""Fresh connections: which client of a pool is lent, and what replaces it.

The gateway's replicas differ, and a kept-alive connection stays with the replica it was
opened to. Sending a refused request again over the same connection would ask the same
stale replica. So a client over which a 404 came is *stale*: the first request that needs
a fresh connection has it replaced in its pool, everyone else shares the replacement, and
the retired client is closed once nobody uses it any more. With 100 requests waiting, a
client for each of them was measured at 520 connections and a loop that stood still for 2 s;
so there are at most two replacements of a client a second, however many requests it has lost, and
a replay waits for one of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from . import _log, _settings, _threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._clients import Pool


MARK = "_tinker_routefix"
"""The attribute of live pools and clients that holds what is known of them: it goes with them."""

UNREACHABLE_AFTER = 2.0
"""Seconds of waiting, and so of probes, without an answer: the route is lost everywhere."""


class _Pace:
    """At most two replacements of a client and what comes after it within a second.

    Two, because a request that is released early has two tries within that.
    """

    def __init__(self) -> None:
        self._taken: deque[float] = deque((float("-inf"),) * 2, maxlen=2)

    def take(self) -> float:
        """Take a turn, or say in how many seconds there is one."""
        now = time.monotonic()
        wait = self._taken[0] + 1.0 - now
        if wait <= 0:
            self._taken.append(now)
        return wait


class PooledClient:
    """One client of a pool: who uses it, and what has replaced it."""

    def __init__(
        self, client: Any, pool: Pool, slot: int | None, pace: _Pace | None = None
    ) -> None:
        self.client = client
        self.pool = pool
        self.slot = slot
        """Its place in the pool, which its successor takes."""
        self.stale = False
        self.successor: PooledClient | None = None
        self._reentrant_tasks: set[asyncio.Task[Any] | None] = set()
        """Tasks that send for the shim: their requests are not guarded again."""
        self._users = 0
        self._pace = pace or _Pace()
        self._replacing: asyncio.Task[None] | None = None

    def latest(self) -> PooledClient:
        """This client, or what has taken its place."""
        pooled = self
        while pooled.successor is not None:
            pooled = pooled.successor
        return pooled

    async def fresh(self) -> PooledClient:
        """A client over which no 404 has come; one replacement is made for all who ask.

        Where two have been made within the last second already, it is waited for the next: a
        replay over a connection that has just refused would ask the same stale replica.
        """
        while (pooled := self.latest()).stale:
            if pooled._replacing is None:
                wait = pooled._pace.take()
                if wait > 0:
                    await asyncio.sleep(wait)
                    continue
                pooled._replacing = asyncio.get_running_loop().create_task(
                    # In a context of its own: a task keeps its context, and that what it holds.
                    pooled._replace(),
                    context=contextvars.Context(),
                )
            await asyncio.shield(pooled._replacing)
            # Not one after the other, although 100 at once hold the loop for 50 ms: the first of
            # them that is refused would send all others back to wait for the next replacement.
        return pooled

    def renew(self) -> None:
        """Have it replaced in the background, for a request that is not replayed."""
        _threads.in_background(self.fresh)

    def __enter__(self) -> None:
        """The client is in use, and must stay open meanwhile."""
        self._users += 1

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        self._close_if_retired()

    def sends_for_the_shim(self) -> bool:
        """Whether the running task does."""
        return bool(self._reentrant_tasks) and asyncio.current_task() in self._reentrant_tasks

    async def send(self, send: Callable[[Any], Any]) -> Any:
        """Send something over this client without the shim guarding it a second time."""
        task = asyncio.current_task()
        with self:
            self._reentrant_tasks.add(task)
            try:
                return await send(self.client)
            finally:
                self._reentrant_tasks.discard(task)

    async def _replace(self) -> None:
        try:
            successor = self.pool.in_place_of(self)
            ours = successor is self and self.slot is not None
            client = await self._new_client() if ours else None
            if client is not None:
                new = PooledClient(client, self.pool, self.slot, self._pace)
                successor = self.pool.swap(self, new)
                if successor is not new:
                    _close_later(self.pool, client)
            if successor is self:
                # Not ours to replace: the user's own HTTP client, a copy of one, a closed pool's.
                self.stale = False
                return
        except Exception as error:  # noqa: BLE001 - a connection is never worth a new error
            # Go on with the old client: it may have a stale connection, but it works.
            self.stale = False
            _log.own_failure("opening a fresh connection", error, strict=_settings.current().strict)
            return
        finally:
            self._replacing = None
        self.successor = successor
        self._close_if_retired()

    async def _new_client(self) -> Any:
        """One whose connection has answered, if two tries find one.

        Where some replicas know the route, its connection leads to one of them. Two tries at once,
        because a load balancer that takes turns leads the second one elsewhere.
        """
        make = self.pool.replacement()
        if make is None:
            return None
        # Off the loop: a new client reads the certificates, 5 to 25 ms.
        client = await _threads.run(make)
        if await self.pool.answers(client):
            return client
        route = self.pool.route
        if route.waiters.count and time.monotonic() - route.answered_at > UNREACHABLE_AFTER:
            # No replica knows the route: a second connection would be one more for nothing.
            return client
        _close_later(self.pool, client)
        client = await _threads.run(make)
        await self.pool.answers(client)
        return client

    def _close_if_retired(self) -> None:
        if self.successor is not None and not self._users:
            _close_later(self.pool, self.client)


def _close_later(pool: Pool, client: Any) -> None:
    _threads.in_background(functools.partial(_close, pool, client))


async def _close(pool: Pool, client: Any) -> None:
    try:
        await pool.close(client)
    except Exception as error:  # noqa: BLE001 - nobody uses it any more
        _log.event(
            logging.DEBUG,
            "connection.close_failed",
            f"closing a retired connection failed with {type(error).__name__}",
            job=str(pool.route.job),
        )
