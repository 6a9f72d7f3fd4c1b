"""Requests of our own to the pod, and the clients that they are sent with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from . import _answers, _question, _settings, _threads, _verdict, events
from ._answers import Kind
from ._endpoints import API
from ._verdict import Fix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from ._connections import PooledClient
    from ._route import Route

PROBE_TIMEOUT = 10.0
"""Seconds that a probe may take; the pod answers one in milliseconds."""

ANSWERS_WITHIN = 2.0
"""Seconds in which a connection has to answer a probe that a request waits for."""

_GET_INFO = API + "get_info"
_OPTIONS: Any = {"timeout": PROBE_TIMEOUT, "max_retries": 0}

Send = Callable[[Callable[[Any], Any]], Any]
"""Sends a request, given as a function of the client."""


async def get_info(client: Any, model_id: str) -> Any:
    """The probe that proves that the pod is at work."""
    body = {"model_id": model_id, "type": "get_info"}
    return await client.post(_GET_INFO, cast_to=httpx.Response, body=body, options=_OPTIONS)


async def get_capabilities(client: Any, **options: Any) -> Any:
    """The probe where there is no model yet."""
    path = f"{API}get_server_capabilities"
    return await client.get(path, cast_to=httpx.Response, options={**_OPTIONS, **options})


async def is_answered(route: Route, send: Send) -> bool:
    """Whether the pod answers a probe over a connection with success: proof that it is at work."""
    probes: list[Callable[[Any], Any]] = [get_capabilities]
    if route.model_id is not None:
        probes.insert(0, functools.partial(get_info, model_id=route.model_id))
    for probe in probes:
        # One that hangs would hold the request back: it can be replayed without.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(ANSWERS_WITHIN):
                await send(probe)
            return True
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class Prober:
    """Sends probes for a warm-up, for the light prober, or over a connection that is new."""

    route: Route
    send: Send
    pooled: PooledClient | None = None
    """Whose job's clients it stands for; needed where a 404 may be the pod's."""

    async def __call__(self) -> None:
        """Send one; raises what it was answered with."""
        try:
            await self.send(self._request)
        except Exception as error:
            if self._kind_of(error) is Kind.NOT_READY:
                self.route.record_fix(Fix.ROUTE_NOT_READY)
            raise

    async def _request(self, client: Any) -> Any:
        if self.route.model_id is None:
            return await get_capabilities(client)
        return await get_info(client, self.route.model_id)

    @property
    def proves(self) -> bool:
        """Whether a success shows that the pod is at work."""
        return self.route.model_id is not None

    def is_refusal(self, error: BaseException) -> bool:
        """Whether an error is a 404 that may be the gateway's."""
        return self._kind_of(error).is_refusal

    def is_answer(self, error: BaseException) -> bool:
        """Whether an error is an answer that shows that the route is there."""
        return self._kind_of(error) is Kind.ANSWER

    async def is_the_pods(self, error: BaseException) -> bool:
        """Whether a 404 of unknown shape turns out to be the pod's own."""
        if self._kind_of(error) is not Kind.UNKNOWN_404 or self.pooled is None:
            return False
        async with one_connection(self.pooled) as send:

            async def is_probe_answered() -> bool:
                with contextlib.suppress(Exception):
                    await send(get_capabilities)
                    return True
                return False

            async def is_refused() -> bool:
                try:
                    await send(self._request)
                except Exception as other:  # noqa: BLE001 - told apart here
                    if self._kind_of(other) is not Kind.UNKNOWN_404:
                        return False
                    return _answers.request_of(other).url.path.endswith(_GET_INFO)
                return False

            return await _verdict.is_the_pods(is_probe_answered, is_refused)

    def headers(self, error: BaseException) -> Mapping[str, str]:
        """The headers of the request that an error answers."""
        return _answers.headers_of(error)

    def _kind_of(self, error: BaseException) -> Kind:
        return _answers.kind_of(error, self.route.job)


# --- Whom they are sent with -----------------------------------------------------------------

OPEN_FOR = 4.0
"""Seconds that connections are kept that were opened ahead; servers close one that is idle for
longer, some after 5."""

_CLOSE, _KEEP = ({"headers": {"connection": how}} for how in ("close", "keep-alive"))
_ONE_WAY = {**_CLOSE, "limits": httpx.Limits(keepalive_expiry=OPEN_FOR)}
"""A connection for each request, but for those that were opened ahead."""
_ONE = {"limits": httpx.Limits(max_connections=1, max_keepalive_connections=1)}
"""The same connection for all requests."""


@contextlib.asynccontextmanager
async def _own_client(pooled: PooledClient, options: dict[str, Any]) -> AsyncIterator[Send]:
    """A client of our own to the lent one's job, or that one where it is the program's own."""
    pool = pooled.pool
    if pool.has_own_http:
        yield pooled.send
        return
    # Like tinker's own connections it follows the environment (certificates, proxies).
    tls = await _question.tls_context() if pool.secure else False
    client = await _threads.run(functools.partial(pool.client_with, tls, options))
    try:
        yield lambda request: request(client)
    finally:
        # What has been answered is not lost for that.
        with contextlib.suppress(Exception):
            await client.close()


def one_connection(pooled: PooledClient) -> contextlib.AbstractAsyncContextManager[Send]:
    """What sends all requests over one connection."""
    return _own_client(pooled, _ONE)


@contextlib.asynccontextmanager
async def open_prober(
    pooled: PooledClient, ahead: ConnectionsAhead | None = None
) -> AsyncIterator[Prober]:
    """A prober, which sends each probe over a fresh connection."""
    send = None if ahead is None else await ahead.take()
    if send is not None:
        yield Prober(pooled.pool.route, send, pooled)
        return
    async with _own_client(pooled, _ONE_WAY) as send:
        yield Prober(pooled.pool.route, send, pooled)


class ConnectionsAhead:
    """Connections for a warm-up, opened while its model is being created.

    Their handshakes take as long as the first poll, over TLS: the warm-up is left with the round
    trip of its requests. To have them open, each is sent a request whose answer does not matter.
    """

    KEPT = OPEN_FOR
    """Seconds until they are closed where no warm-up has come."""
    OPEN_WITHIN = 0.5
    """Seconds that the warm-up waits for what is not open yet, before it opens its own."""

    def __init__(self, pooled: PooledClient) -> None:
        self._send: Send | None = None
        self._taken = False
        self._opened = asyncio.Event()
        self._released = asyncio.Event()
        _threads.in_background(functools.partial(self._hold, pooled))

    async def _hold(self, pooled: PooledClient) -> None:
        count = _settings.current().warmup_successes
        # Without them the warm-up opens its own, and gets what is wrong here.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self.KEPT) as self._limit:
                async with _own_client(pooled, _ONE_WAY) as send:
                    pooled.pool.route.publish(events.ProbesSent, number=count)
                    request = functools.partial(get_capabilities, **_KEEP)
                    openings = (send(request) for _ in range(count))
                    await asyncio.gather(*openings, return_exceptions=True)
                    self._send = send
                    self._opened.set()
                    await self._released.wait()
        self._send = None
        self._opened.set()

    async def take(self) -> Send | None:
        """What sends over them, to the first who asks; None where there are none, or no longer.

        The warm-up asks first. Who probes beside it may still do so when it has ended.
        """
        taken, self._taken = self._taken, True
        if taken:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.OPEN_WITHIN):
                await self._opened.wait()
        send, self._send = self._send, None
        if send is None or self._limit.expired():
            return None
        self._limit.reschedule(None)
        return send

    def release(self) -> None:
        """Have them closed."""
        self._released.set()
