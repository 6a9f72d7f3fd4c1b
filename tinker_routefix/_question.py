"""One question to a control plane, over HTTP.

It is put over a connection that is kept while somebody waits, over the HTTP client that the
program itself reaches the gateway with, or over a new connection as the environment says.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import _log, _threads, events
from ._job_state import Told, read_answer

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Mapping

    from ._addresses import Address
    from ._job import Job

_T = TypeVar("_T")

MAX_BODY = 64 * 1024
"""Bytes of a response that are read; a job's description has a few thousand."""

SLICES = 20
"""Of the timeout. It is counted in slices of loop time: a blocked loop, however long, uses one."""

HEDGE_AFTER = 2.0
"""Seconds after which a question without a response is put once more, over another connection.
Twice what a response stays good, so that there never are two questions within a second."""

_KEPT_FOR_A_WAIT = httpx.Limits(keepalive_expiry=30.0)
"""Of the connections to it: the longest wait between two questions is shorter."""


Response = tuple[int, bytes, str | None]
"""A response's status, its body and its ``Retry-After``."""


_tls: ssl.SSLContext | None = None


async def tls_context() -> ssl.SSLContext:
    """One TLS context for all requests of ours, built off the loop: it costs about 25 ms.

    The certificates that the environment names count, as they do for tinker.
    """
    global _tls
    if _tls is None:
        _tls = await _threads.run(functools.partial(httpx.create_ssl_context, trust_env=True))
    return _tls


async def hedged_with_timeout(seconds: float, fetch: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """What is fetched within so many seconds of loop time, with a second try beside a slow one.

    tinker makes the body of a large batch on the loop, which is blocked meanwhile, for seconds on
    a busy machine: ``asyncio.timeout`` would discard a response that has arrived.

    And one connection that hangs is not the control plane: it can even be this process that does
    not hear it any more. When a client of tinker's is garbage collected by a thread that has a
    loop, closing a reused descriptor number unregisters our reader.

    Raises:
        TimeoutError: It has not come.
    """
    slice_ = seconds / SLICES
    tries = [asyncio.ensure_future(fetch())]
    under_way = {*tries}
    try:
        for number in range(SLICES):
            if len(tries) == 1 and number * slice_ >= HEDGE_AFTER:
                tries.append(asyncio.ensure_future(fetch()))
                under_way.add(tries[-1])
            done, under_way = await asyncio.wait(
                under_way, timeout=slice_, return_when=asyncio.FIRST_COMPLETED
            )
            for one in sorted(done, key=_has_failed):
                # The failure of one says nothing while the other is under way.
                if not (under_way and _has_failed(one)):
                    return one.result()
        raise TimeoutError
    finally:
        for one in tries:
            one.cancel()
            # Whatever the other one ends with, nobody asks for it.
            one.add_done_callback(lambda done: done.cancelled() or done.exception())


def _has_failed(one: asyncio.Future[Any]) -> bool:
    return one.cancelled() or one.exception() is not None


class Connections:
    """The connections over which the questions about one job are put."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.keeps = False
        """Whether somebody waits, who will ask again soon."""
        self._kept: dict[bool, httpx.AsyncClient] = {}
        """By whether TLS is verified."""
        self._own: weakref.ref[httpx.AsyncClient] | None = None
        self._over_own = True
        """Whether the next question goes over it: not beside one that hangs, nor after a failure
        until the environment's way has failed too."""
        self._warned_of_own = False

    def use(self, client: Any) -> None:
        """Ask with the HTTP client that the program reaches the gateway with.

        The control plane may be out of reach without its proxy, certificates or authority.
        """
        if isinstance(client, httpx.AsyncClient) and not client.is_closed:
            self._own = weakref.ref(client)
        else:
            self._warn_of_own("is closed, or is no httpx.AsyncClient")

    def let_go(self) -> None:
        """Close the connections that are kept for the next question: nobody waits any more."""
        self.keeps = False
        while self._kept:
            _threads.in_background(functools.partial(_close, self._kept.popitem()[1]))

    async def fetch(self, address: Address, credentials: Mapping[str, str]) -> Response:
        """Put the question."""
        events.publish(events.QuestionAsked(job=str(self._job), gateway=self._job.gateway))
        url = self._job.control_plane_url(address.root)
        keys = credentials if address.headers is None else address.headers
        headers = {
            **keys,
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"python-httpx/{httpx.__version__}",
        }
        request = functools.partial(httpx.Request, "GET", url, headers=headers)
        secure = address.verify and url.startswith("https:")
        own = self._own() if secure and self._own is not None else None
        if own is not None and self._over_own:
            self._over_own = False
            try:
                # Not `send`: the program's hooks would see the key, and its cookies be set.
                transport = own._transport_for_url(httpx.URL(url))
                response = await _read(await transport.handle_async_request(request()))
            except Exception as error:  # noqa: BLE001 - or as it would be asked without one
                self._warn_of_own(f"failed with {type(error).__name__}")
            else:
                self._over_own = True
                return response
        # Taken out: whoever has it closes it or puts it back.
        kept = self._kept.pop(secure, None)
        if kept is not None:
            began = time.monotonic()
            try:
                return await self._send(kept, secure, request())
            except httpx.TransportError:
                # The other side may have closed it meanwhile, which is soon heard. Later, this and
                # the hedge would be two questions within a second.
                if time.monotonic() - began >= HEDGE_AFTER / 2:
                    raise
        try:
            return await self._send(await _new_client(secure), secure, request())
        except BaseException:
            # Cancelled as well: it has hung, or another try was quicker.
            self._over_own = True
            raise

    async def _send(
        self, client: httpx.AsyncClient, secure: bool, request: httpx.Request
    ) -> Response:
        keep = False
        try:
            response = await _read(await client.send(request, stream=True))
            # What would end a wait is asked for again elsewhere: another server may answer there.
            running = read_answer(*response[:2])[0] is Told.RUNNING
            keep = running and self.keeps and secure not in self._kept
            return response
        finally:
            if keep:
                self._kept[secure] = client
            else:
                await client.aclose()

    def _warn_of_own(self, why: str) -> None:
        if not self._warned_of_own:
            self._warned_of_own = True
            _log.warn(
                "control_plane.own_client",
                f"the control plane of job {self._job} cannot be asked with the http_client that "
                f"was given to the SDK: it {why}. It is asked with the proxy and the certificates "
                "of the environment instead",
                job=str(self._job),
            )


async def _new_client(secure: bool) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=await tls_context() if secure else False,
        # A redirect must not get to see the keys. A proxy from the environment does not: it
        # is a tunnel to an https control plane, and http is asked on loopback only.
        follow_redirects=False,
        trust_env=secure,
        timeout=None,  # noqa: S113 - the caller bounds the whole question
        limits=_KEPT_FOR_A_WAIT,
    )


async def _close(client: httpx.AsyncClient) -> None:
    with contextlib.suppress(Exception):
        await client.aclose()


async def _read(response: httpx.Response) -> Response:
    """What a response says, so much of it as an honest one has."""
    try:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_BODY:
                body.clear()
                break
    finally:
        await response.aclose()
    return response.status_code, bytes(body), response.headers.get("retry-after")
