"""The pool's seam: which client is lent, of which job, and what replaces a stale one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any, cast

import httpx

from . import (
    _log,
    _patching,
    _probes,
    _question,
    _report,  # noqa: F401 - where there are clients, there is a final report
    _settings,
    _threads,
    events,
)
from ._connections import MARK, PooledClient
from ._job import Job, origin_of
from ._prober import probe_once
from ._routes import leave_alone, route_to

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from ._connecting import ConnectBudget
    from ._route import Route

_UNSEEN: Any = object()


def lend_client(
    wrapped: Callable[..., contextlib.AbstractContextManager[Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> contextlib.AbstractContextManager[Any]:
    """``ClientConnectionPool.aclient``: note which client of which job is lent."""
    lease = wrapped(*args, **kwargs)
    # None: looked at once, and no trainer job.
    return lease if getattr(instance, MARK, _UNSEEN) is None else _Lease(lease, instance)


class _Lease:
    """A client on loan, in use meanwhile; a class, as every request of a run passes here."""

    __slots__ = ("_lease", "_pool", "_pooled")

    def __init__(self, lease: contextlib.AbstractContextManager[Any], pool: Any) -> None:
        self._lease = lease
        self._pool = pool
        self._pooled: PooledClient | None = None

    def __enter__(self) -> Any:
        client = self._lease.__enter__()
        try:
            pooled = _pooled_client(client, self._pool)
            if pooled is not None:
                pooled.__enter__()
                self._pooled = pooled
        except Exception as error:  # noqa: BLE001 - never worse than plain tinker
            try:
                _log.own_failure("looking at a client", error, strict=_settings.current().strict)
            except Exception as failure:
                self._lease.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return client

    def __exit__(self, *outcome: Any) -> bool | None:
        try:
            return self._lease.__exit__(*outcome)
        finally:
            if self._pooled is not None:
                self._pooled.__exit__(*outcome)


def _pooled_client(client: Any, pool: Any) -> PooledClient | None:
    known: Pool | None = getattr(pool, MARK, _UNSEEN)
    if known is _UNSEEN:
        known = _first_seen(client, pool)
    if known is None:
        return None
    return known.pooled(client)


def _first_seen(client: Any, pool: Any) -> Pool | None:
    """What is known of a pool from now on; None: its clients lead to no trainer job."""
    job = Job.from_url(str(client.base_url))
    known = None if job is None else Pool(pool, type(client), route_to(job))
    setattr(pool, MARK, known)
    if known is None:
        _tell_left_alone(client)
        return None
    _patching.verify()
    if known.has_own_http:
        known.route.control_plane.connections.use(known.settings["http_client"])
    if known.secure:
        _threads.in_background(_prepare_tls)
    _tell_connected(known.route, client)
    return known


class Pool:
    """A ``ClientConnectionPool`` whose clients lead to a trainer job."""

    def __init__(self, pool: Any, client_type: type, route: Route) -> None:
        self.route = route
        self.weights_info: tuple[ConnectBudget, float] | None = None
        """What is left of a client's budget, whose model is created next; and since when."""
        self._pool = pool
        self._client_type = client_type

    @property
    def secure(self) -> bool:
        """Whether the gateway is reached over TLS."""
        return self.route.job.gateway.startswith("https:")

    @property
    def closed(self) -> bool:
        """Whether the program has closed it."""
        return bool(getattr(self._pool, "_closed", False))

    @property
    def settings(self) -> dict[str, Any]:
        """What its clients are made with."""
        return cast("dict[str, Any]", self._pool._constructor_kwargs)

    @property
    def has_own_http(self) -> bool:
        """The program passed an HTTP client in: every client of the pool shares it."""
        return self.settings.get("http_client") is not None

    def replacement(self) -> Callable[[], Any] | None:
        """The way in which tinker itself replaces a client that it suspects; None: not ours to."""
        if self.has_own_http or self.closed:
            return None
        return functools.partial(self._new_client, self.settings)

    def client_with(self, tls: ssl.SSLContext | bool, options: dict[str, Any]) -> Any:
        """A client of our own."""
        http = httpx.AsyncClient(follow_redirects=False, verify=tls, **options)
        client = self._new_client({**self.settings, "http_client": http})
        url = client.base_url
        if url.userinfo:
            # httpx and tinker log whole URLs: these requests are ours, and so is the log line.
            http.auth = (url.username, url.password)
            client.base_url = url.copy_with(userinfo=b"")
        return client

    def _new_client(self, settings: dict[str, Any]) -> Any:
        client = self._client_type(**settings)
        # Its first request would find the platform out, in the loop's default executor. The
        # program shares that, and where it is busy a wait of a second was measured to take 45.
        for known in self._pool._clients:
            if getattr(known, "_platform", None) is not None:
                client._platform = known._platform
                break
        return client

    def pooled(self, client: Any) -> PooledClient:
        """What is known of one of its clients."""
        known: PooledClient | None = getattr(client, MARK, None)
        if known is None:
            clients = enumerate(self._pool._clients)
            # None: another package lends a copy of its own.
            slot = next((slot for slot, one in clients if one is client), None)
            known = PooledClient(client, self, slot)
            setattr(client, MARK, known)
        return known

    def in_place_of(self, old: PooledClient) -> PooledClient:
        """What stands where a client stood: tinker puts another one there after a bare 400."""
        if self.closed or old.slot is None:
            return old
        standing = self._pool._clients[old.slot]
        return old if standing is old.client else self.pooled(standing)

    def swap(self, old: PooledClient, new: PooledClient) -> PooledClient:
        """Put a new client where the old one stands; what stands there then."""
        standing = self.in_place_of(old)
        if standing is not old or self.closed or old.slot is None:
            return standing
        setattr(new.client, MARK, new)
        self._pool._clients[old.slot] = new.client
        return new

    async def answers(self, client: Any) -> bool:
        """Whether a new client's connection answers a probe."""
        if client.base_url.userinfo:
            # httpx logs whole URLs, and this request would be ours.
            return True
        self.route.publish(events.ProbesSent, number=1)
        prober = _probes.Prober(self.route, lambda request: request(client))
        try:
            async with asyncio.timeout(_probes.ANSWERS_WITHIN):
                return await probe_once(self.route, prober)
        except TimeoutError:
            return False

    async def close(self, client: Any) -> None:
        """Close a client that has been taken out of the pool."""
        await client.close()
        # The adapter from pyqwest to httpx has no `aclose`: its connections would stay open until
        # they have been idle for 90 s. Its own transport has one; what is in flight goes on.
        transport = getattr(getattr(client, "_client", None), "_transport", None)
        aclose = getattr(getattr(transport, "_transport", None), "aclose", None)
        if aclose is not None:
            await aclose()


async def _prepare_tls() -> None:
    # What is wrong with the certificates is said by whoever needs them.
    with contextlib.suppress(Exception):
        await _question.tls_context()


def _tell_connected(route: Route, client: Any) -> None:
    """Say once that the shim is there for the clients of a job."""
    if route.connected:
        return
    route.connected = True
    release = f"{type(client).__module__.partition('.')[0]} {getattr(client, '_version', '')}"
    with contextlib.suppress(Exception):  # a job manager of the program's
        events.publish(
            events.ClientConnected(
                job=str(route.job),
                gateway=route.job.gateway,
                release=release,
                control_plane=route.control_plane.root,
            )
        )


def _tell_left_alone(client: Any) -> None:
    """Say why a client is not helped, and remember it for ``status()``."""
    origin = origin_of(str(client.base_url)) or "an address that cannot be read"
    leave_alone(origin)
    _log.event(
        logging.DEBUG,
        "client.left_alone",
        f"a client of {origin} is left alone: its URL is not a trainer job's route "
        "(.../training/v1/rlorTrainerJobs/ACCOUNT/JOB)",
        origin=origin,
    )
