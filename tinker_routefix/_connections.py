"""Fresh connections: which client of a pool is lent, and what replaces it.

The gateway's replicas differ, and a kept-alive connection stays with the replica it was
opened to. Sending a refused request again over the same connection would ask the same
stale replica. So a client over which a 404 came is *spoiled*: the first request that needs
a fresh connection has it replaced in its pool, everyone else shares the replacement, and
the retired client is closed once nobody uses it any more. With 100 requests waiting, a
client for each of them was measured at 520 connections and a loop that stood still for 2 s;
so there are at most two replacements a second, however many requests are refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from . import _log, _settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._route import Route


class Pool(Protocol):
    """What this module needs of a pool of an SDK's clients."""

    route: Route

    def replacement(self) -> Callable[[], Any] | None:
        """What makes a new client of this pool, or None where the pool's must be kept."""

    def swap(self, old: Any, new: Lending) -> None:
        """Put a new client where the old one was, if it still is there."""

    async def close(self, client: Any) -> None:
        """Close a client that has been taken out of the pool."""


class _Pace:
    """At most two replacements of a client and what comes after it within a second.

    Two, because a request that is released early has two tries at once.
    """

    def __init__(self) -> None:
        self._taken: deque[float] = deque((float("-inf"),) * 2, maxlen=2)

    def take(self) -> bool:
        now = time.monotonic()
        if now - self._taken[0] < 1.0:
            return False
        self._taken.append(now)
        return True


_closing: set[asyncio.Task[None]] = set()


class Lending:
    """One client of a pool: who uses it, and what has replaced it."""

    def __init__(self, client: Any, pool: Pool, pace: _Pace | None = None) -> None:
        self.client = client
        self.pool = pool
        self.spoiled = False
        self.successor: Lending | None = None
        self.senders: set[asyncio.Task[Any] | None] = set()
        """Tasks that are sending for the shim: their requests are not guarded again."""
        self._users = 0
        self._pace = pace or _Pace()
        self._replacing: asyncio.Task[None] | None = None

    def latest(self) -> Lending:
        """This client, or what has taken its place."""
        lending = self
        while lending.successor is not None:
            lending = lending.successor
        return lending

    async def fresh(self) -> Lending:
        """A client over which no 404 has come; one replacement is made for all who ask.

        Or, where two have been made within the last second already, the newer of them.
        """
        lending = self.latest()
        if lending.spoiled:
            if lending._replacing is None and lending._pace.take():
                lending._replacing = asyncio.ensure_future(lending._replace())
            if lending._replacing is not None:
                await asyncio.shield(lending._replacing)
        return lending.latest()

    def __enter__(self) -> Lending:
        """The client is in use, and must stay open meanwhile."""
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        self._close_if_retired()

    async def send(self, send: Callable[[Any], Any]) -> Any:
        """Send something over this client without the shim guarding it a second time."""
        task = asyncio.current_task()
        with self:
            self.senders.add(task)
            try:
                return await send(self.client)
            finally:
                self.senders.discard(task)

    async def _replace(self) -> None:
        make = self.pool.replacement()
        try:
            if make is None:
                # The user's own HTTP client: not ours to replace. Go on with it.
                self.spoiled = False
                return
            # Off the loop: a new client reads the certificates, 5 to 25 ms.
            successor = Lending(await asyncio.to_thread(make), self.pool, self._pace)
            self.pool.swap(self.client, successor)
        except Exception as error:  # noqa: BLE001 - a connection is never worth a new error
            # Go on with the old client: it may have a stale connection, but it works.
            self.spoiled = False
            _log.own_failure("opening a fresh connection", error, strict=_settings.current().strict)
            return
        finally:
            self._replacing = None
        self.successor = successor
        self._close_if_retired()

    def _close_if_retired(self) -> None:
        if self.successor is not None and not self._users:
            closing = asyncio.ensure_future(self._close())
            _closing.add(closing)
            closing.add_done_callback(_closing.discard)

    async def _close(self) -> None:
        try:
            await self.pool.close(self.client)
        except Exception as error:  # noqa: BLE001 - nobody uses it any more
            _log.event(
                logging.DEBUG,
                "connection.close_failed",
                f"closing a retired connection failed with {type(error).__name__}",
                job=str(self.pool.route.job),
            )
