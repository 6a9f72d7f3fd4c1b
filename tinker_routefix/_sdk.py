"""What the wrappers do at the seams, and all that is known of the SDK's objects.

Everything the shim takes from a pool, a client, a request or a future of tinker is taken
here; the modules below know routes, waits and answers only. The marks that this module
leaves are attributes of live pools and clients (so they go with them) and mean nothing to
tinker.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import json
import random
import re
import sys
import time
import weakref
from collections.abc import Callable
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import httpx

from . import (
    _control_plane,
    _log,
    _seams,
    _settings,
    _submissions,
    _threads,
    _verdict,
    events,
)
from ._connections import Lending
from ._job import Job
from ._retry import Replay
from ._route import ConnectBudget, Route, route_to
from ._verdict import Cure, Verdict
from ._warmup import light_prober, warm_up

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Coroutine, Mapping

_MARK = "_tinker_routefix"
_UNSEEN = object()

_API = "/api/v1/"
_TELEMETRY = _API + "telemetry"
_POLL = _API + "retrieve_future"
_HEARTBEAT = _API + "session_heartbeat"
_DYNAMIC_CONFIG = _API + "client/dynamic_config"
_WEIGHTS_INFO = _API + "weights_info"
_LOAD_WEIGHTS = _API + "load_weights"
_LEFT_ALONE = frozenset({_HEARTBEAT, _TELEMETRY, _API + "cancel_future"})
"""Background calls that nobody waits for and that tinker repeats, or does without."""
_FINISH = re.compile(rf"{_API}sessions/[^/]+/finish")
_CONNECTS = frozenset(
    {_WEIGHTS_INFO, _LOAD_WEIGHTS, _API + "create_model", _API + "create_sampling_session"}
)
"""Requests that create a client, so that there is nothing to lose by waiting (of
``load_weights`` only the one that creates a model)."""

_CREATES_MODEL = frozenset({"CreateModel", "CreateBaseModel"})
"""The second is the Fireworks SDK's, for reference models."""
_LOADS_WEIGHTS = "LoadWeights"
"""How 0.38 creates a training client from a checkpoint: without a ``CreateModel``."""

_ANSWERS_WITHIN = 2.0
"""Seconds in which a new connection has to answer, or another one is opened."""

_SAME_CLIENT_WITHIN = 5.0
"""Seconds between a checkpoint's ``weights_info`` and the model that is created from it."""

PROBE_TIMEOUT = 10.0
"""Seconds that a probe may take; the pod answers one in milliseconds."""


# --- Pools and their clients -------------------------------------------------------------


class _Pool:
    """A ``ClientConnectionPool`` whose clients lead to a trainer job."""

    def __init__(self, pool: Any, client_type: type, route: Route) -> None:
        self.route = route
        self._pool = pool
        self._client_type = client_type
        self._last_weights_info: tuple[ConnectBudget, float] | None = None

    @property
    def closed(self) -> bool:
        """Whether the program has closed it."""
        return bool(getattr(self._pool, "_closed", False))

    def took_weights_info(self, budget: ConnectBudget) -> None:
        """Note what is left of a client's budget, which its model is created with next."""
        self._last_weights_info = (budget, time.monotonic())

    def connect_budget(self) -> ConnectBudget:
        """The budget of a training client that is being created."""
        before, self._last_weights_info = self._last_weights_info, None
        if before is not None and time.monotonic() - before[1] < _SAME_CLIENT_WITHIN:
            return before[0]
        return ConnectBudget()

    @property
    def _kwargs(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._pool._constructor_kwargs)

    @property
    def has_own_http(self) -> bool:
        """The user passed an HTTP client in: every client of the pool shares it."""
        return self._kwargs.get("http_client") is not None

    def replacement(self) -> Callable[[], Any] | None:
        # The way in which tinker itself replaces a client that it suspects.
        if self.has_own_http or self.closed:
            return None
        return functools.partial(self._new_client, self._kwargs)

    def _new_client(self, kwargs: dict[str, Any]) -> Any:
        client = self._client_type(**kwargs)
        # Its first request would find the platform out, in the loop's default executor. The
        # program shares that, and where it is busy a wait of a second was measured to take 45.
        for known in self._pool._clients:
            if getattr(known, "_platform", None) is not None:
                client._platform = known._platform
                break
        return client

    def client_with(self, limits: httpx.Limits, tls: ssl.SSLContext | bool) -> Any:
        """A client of our own, with its connections limited."""
        http = httpx.AsyncClient(limits=limits, follow_redirects=False, verify=tls)
        client = self._new_client({**self._kwargs, "http_client": http})
        url = client.base_url
        if url.userinfo:
            # httpx and tinker log whole URLs: these requests are ours, and so is the log line.
            http.auth = (url.username, url.password)
            client.base_url = url.copy_with(userinfo=b"")
        return client

    def swap(self, old: Any, new: Lending) -> bool:
        if self.closed:
            return False
        setattr(new.client, _MARK, new)
        clients: list[Any] = self._pool._clients
        for index, client in enumerate(clients):
            if client is old:
                clients[index] = new.client
                return True
        # tinker itself has put another one there.
        return False

    async def answers(self, client: Any) -> bool:
        if client.base_url.userinfo:
            # httpx logs whole URLs, and this request would be ours.
            return True
        route = self.route
        route.counters.probes += 1
        try:
            async with asyncio.timeout(_ANSWERS_WITHIN):
                await _probe(route, client)
        except Exception as error:  # noqa: BLE001 - it only matters whether it is an answer
            answered = _is_answer(error) and not (
                _is_refused(error, route.job) or _is_not_ready(error)
            )
            if answered:
                route.answered(proof=False)
            return answered
        route.answered(proof=route.model_id is not None)
        return True

    async def close(self, client: Any) -> None:
        await client.close()
        # The adapter from pyqwest to httpx has no `aclose`: its connections would stay open until
        # they have been idle for 90 s. Its own transport has one; what is in flight goes on.
        transport = getattr(getattr(client, "_client", None), "_transport", None)
        aclose = getattr(getattr(transport, "_transport", None), "aclose", None)
        if aclose is not None:
            await aclose()


def lend_client(
    wrapped: Callable[..., contextlib.AbstractContextManager[Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> contextlib.AbstractContextManager[Any]:
    """``ClientConnectionPool.aclient``: note which client of which job is lent."""
    loan = wrapped(*args, **kwargs)
    # None: looked at once, and no trainer job.
    return loan if getattr(instance, _MARK, _UNSEEN) is None else _Loan(loan, instance)


class _Loan:
    """A client on loan, in use meanwhile; a class, as every request of a run passes here."""

    __slots__ = ("_lending", "_loan", "_pool")

    def __init__(self, loan: contextlib.AbstractContextManager[Any], pool: Any) -> None:
        self._loan = loan
        self._pool = pool
        self._lending: Lending | None = None

    def __enter__(self) -> Any:
        client = self._loan.__enter__()
        try:
            lending = _lending_of(client, self._pool)
            if lending is not None:
                lending.__enter__()
                self._lending = lending
        except Exception as error:  # noqa: BLE001 - never worse than plain tinker
            try:
                _log.own_failure("looking at a client", error, strict=_settings.current().strict)
            except Exception as failure:
                self._loan.__exit__(type(failure), failure, failure.__traceback__)
                raise
        return client

    def __exit__(self, *outcome: Any) -> bool | None:
        try:
            return self._loan.__exit__(*outcome)
        finally:
            if self._lending is not None:
                self._lending.__exit__(*outcome)


def _lending_of(client: Any, pool: Any) -> Lending | None:
    adapter = getattr(pool, _MARK, _UNSEEN)
    if adapter is _UNSEEN:
        job = Job.from_url(str(client.base_url))
        adapter = None if job is None else _Pool(pool, type(client), route_to(job))
        setattr(pool, _MARK, adapter)
        if adapter is not None:
            _seams.verify()
    if adapter is None:
        return None
    lending = getattr(client, _MARK, None)
    if lending is None:
        lending = Lending(client, cast("_Pool", adapter))
        setattr(client, _MARK, lending)
    return cast("Lending", lending)


# --- Requests ----------------------------------------------------------------------------


def guard_request(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Coroutine[Any, Any, Any]:
    """``AsyncTinker.request``: let it through, and look only at what comes back as a 404."""
    lending: Lending | None = getattr(instance, _MARK, None)
    if lending is None or (lending.senders and asyncio.current_task() in lending.senders):
        return wrapped(*args, **kwargs)
    submission = _submissions.current()
    if submission is None:
        # A poll, say: a request that nothing around it repeats is a submission of its own.
        return _submissions.follow(_send, wrapped, lending, args, kwargs)
    return _send(wrapped, lending, args, kwargs)


def follow_submission(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    _instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Coroutine[Any, Any, Any]:
    """``InternalClientHolder.execute_with_retries``: one call is one submission."""
    return _submissions.follow(wrapped, *args, **kwargs)


def note_try(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    _instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Coroutine[Any, Any, Any]:
    """``AsyncTinker._sleep_for_retry``: how the try has ended that is about to be repeated.

    It is called from the ``except`` clause that has caught what ended it.
    """
    submission = _submissions.current()
    if submission is not None:
        options, response = kwargs.get("options"), kwargs.get("response")
        outcome = response if isinstance(response, httpx.Response) else sys.exception()
        submission.record_try(str(getattr(options, "url", "")), outcome)
    return wrapped(*args, **kwargs)


async def _send(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    lending: Lending,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    route: Route = lending.pool.route
    awaited = _awaited.get()
    path = _path(args, kwargs)
    if awaited is not None and path == _POLL:
        awaited.lending = lending
    budget = _connect_budget(lending, path, args, kwargs)
    if route.raised:
        _warn_if_step_repeated(route, lending.client, _options(args, kwargs))
    try:
        if lending.successor is None:
            answer = await wrapped(*args, **kwargs)
        else:
            # Spoiled and replaced while it was lent.
            lending = lending.latest()
            answer = await lending.send(lambda client: client.request(*args, **kwargs))
    except asyncio.CancelledError as error:
        # Whoever has cancelled it may repeat it: under `wait_for`, say.
        _record_try(error, args, kwargs)
        raise
    except Exception as error:
        if path == _TELEMETRY and route.drained and _status(error) == HTTPStatus.NOT_FOUND:
            # Until 0.38 tinker re-sends a refused batch every second, and a fatal exception
            # waits 30 s for it: also where the pod does not know telemetry. It discards what
            # this returns.
            route.counters.telemetry_dropped += 1
            return None
        if not _is_refused(error, route.job):
            _record_try(error, args, kwargs)
            if _is_answer(error):
                _tell_if_answered(error, route)
            raise
        if _note(error) is not None or _is_background(path, route, budget):
            # Refused and given up on below us: whoever replaced a seam calls our first wrapper,
            # and it has done its work. Or a call that the program does not wait for.
            if path == _HEARTBEAT and not route.over:
                # Its connection is kept alive to a replica that may stay stale for good.
                lending.spoiled = True
                lending.renew()
            raise
        lending.spoiled = True
        refused = _Refused(lending, args, kwargs, awaited, budget, error)
        replay = refused.replay()
        if replay is None:
            raise
    else:
        if route.watched:
            route.answered(proof=True)
        if path == _WEIGHTS_INFO and budget is not None and budget.used:
            cast("_Pool", lending.pool).took_weights_info(budget)
        return answer
    # Out here, so that what a replay meets does not carry the first 404 as its context.
    try:
        return await refused.settle(replay)
    except Exception as error:
        if refused.refused(error):
            refused.remember_raised()
        raise


def _connect_budget(
    lending: Lending, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ConnectBudget | None:
    """What a request may wait for as a part of connecting; None where it is not a part of it."""
    budget = _connecting.get()
    if budget is not None and not budget.ended:
        return budget
    if path not in _CONNECTS:
        return None
    if path == _LOAD_WEIGHTS and not _creates_model(_options(args, kwargs)):
        return None
    budget = cast("_Pool", lending.pool).connect_budget()
    # Left there: what creates the client goes on in this task with polls, and then ends.
    _connecting.set(budget)
    return budget


def _is_background(path: str, route: Route, budget: ConnectBudget | None) -> bool:
    """Whether a 404 to a request is tinker's to deal with: the program loses nothing by it."""
    if path in _LEFT_ALONE:
        return True
    if path == _DYNAMIC_CONFIG:
        # A refresh; until the next one what was known goes on to hold.
        return budget is None
    # After a give-up the program has its exception; its farewell must not wait once more.
    farewell = route.given_up or route.over
    return farewell and _FINISH.fullmatch(path) is not None


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return response.status_code if isinstance(response, httpx.Response) else None


def _record_try(
    outcome: httpx.Response | BaseException | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    submission = _submissions.current()
    if submission is not None:
        submission.record_try(_path(args, kwargs), outcome)


def _may_be_repeated(options: Any, client: Any) -> bool:
    """Whether a request may be sent again though an earlier try may have been carried out."""
    if str(options.method).lower() == "get":
        return True
    endpoint = str(options.url).removeprefix(_API)
    if endpoint == "load_weights":
        return _creates_model(options)
    if endpoint == "forward_backward":
        message = _message(options, client)
        return message is not None and bool(message.forward_only)
    return endpoint in _seams.REPEATABLE


def _creates_model(options: Any) -> bool:
    """Whether a ``load_weights`` makes a model of a checkpoint (0.24.1 and later)."""
    body = options.json_data
    return isinstance(body, dict) and body.get("model_seq_id") is not None


def _message(options: Any, client: Any) -> Any:
    """The message in a protobuf body, read by the SDK's own class; None for any other body."""
    body = options.json_data
    proto = sys.modules.get(f"{type(client).__module__.rpartition('.')[0]}.proto.tinker_public_pb2")
    if not isinstance(body, bytes) or proto is None:
        return None
    try:
        headers = httpx.Headers(options.headers or {})
        if headers.get("content-encoding") == "zstd":
            body = import_module("zstandard").ZstdDecompressor().decompressobj().decompress(body)
        message = proto.ForwardBackwardRequest()
        message.ParseFromString(body)
    except Exception:  # noqa: BLE001 - what cannot be read is nothing that may be repeated
        return None
    return message


def _step(options: Any, client: Any) -> bytes | None:
    """What a submission asks for, but for its place in the order; None: it cannot be told."""
    body = options.json_data
    if isinstance(body, dict):
        kept = {name: value for name, value in body.items() if not name.endswith("seq_id")}
        return json.dumps(kept, sort_keys=True, default=str).encode()
    message = _message(options, client)
    if message is None:
        return None
    message.ClearField("seq_id")
    return cast("bytes", message.SerializeToString(deterministic=True))


def _warn_if_step_repeated(route: Route, client: Any, options: Any) -> None:
    """Say it where the program submits once more what has just ended in a 404: a retry of its own.

    Other parts of that step may have been carried out, and then they are now a second time.
    """
    path = str(options.url)
    if not route.raised.recently(path):
        return
    try:
        seconds = route.raised.seconds_since(path, _step(options, client))
    except Exception as failure:  # noqa: BLE001 - a warning is not worth an error
        _log.own_failure("comparing a submission", failure, strict=_settings.current().strict)
        return
    if seconds is not None:
        events.publish(
            events.StepRepeated(
                job=str(route.job), request=path.removeprefix(_API), seconds=round(seconds, 3)
            )
        )


def _tell_if_answered(error: Exception, route: Route) -> None:
    """Any answer shows that the route is there, but one that says that it is not."""
    if _is_not_ready(error):
        route.show(Cure.ROUTE_NOT_READY)
    else:
        route.answered(proof=False)


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("options", args[1] if len(args) > 1 else None)


def _path(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return str(getattr(_options(args, kwargs), "url", ""))


class _Refused:
    """A request of the program that the gateway has refused."""

    def __init__(
        self,
        lending: Lending,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        awaited: _Awaited | None,
        budget: ConnectBudget | None,
        error: Exception,
    ) -> None:
        self._lending = lending
        self._route: Route = lending.pool.route
        self._args = args
        self._kwargs = kwargs
        self._awaited = awaited
        self._budget = budget
        self._first = error
        self._refused_at = time.monotonic()
        self._cannot_probe = False
        self._is_the_pods = False
        """The 404 has turned out to be an answer of the pod's."""
        self._sent_beside_probes = 0

    def replay(self) -> Replay | None:
        """Its way through, or None where the shim itself is at fault."""
        try:
            return self._prepare(self._first)
        except Exception as failure:  # noqa: BLE001 - then the caller gets tinker's own 404
            _log.own_failure("preparing a replay", failure, strict=_settings.current().strict)
            return None

    def _prepare(self, error: Exception) -> Replay:
        headers = _headers(error)
        self._keep_idempotency_key(headers)
        return Replay(
            self._route,
            error,
            budget=self._budget,
            headers=headers,
            send=(self._send_fresh if _is_gateways(error) else self._send_unknown),
            refused=self.refused,
            uncertain=self._uncertain,
            probe=light_prober(self._route, functools.partial(_open_prober, self._lending)),
            what=self._name(),
        )

    async def settle(self, replay: Replay) -> Any:
        """The request's answer in the end."""
        settings = _settings.current()
        replays = replay.connecting or settings.max_replays > 0
        if _is_gateways(replay.error) or self._uncertain() is not None or not replays:
            return await replay.run()
        # Of unknown shape: before anything else, whether it is the pod's own.
        await self._route.turn()
        try:
            answer = await self._send_beside_probes()
        except Exception as error:
            if not self.refused(error):
                raise
        else:
            replay.note_answer(self._sent_beside_probes)
            return answer
        return await replay.run()

    def refused(self, error: BaseException) -> bool:
        """Whether an error is a 404 that is not the pod's."""
        return not self._is_the_pods and _is_refused(error, self._route.job)

    async def _send_fresh(self) -> Any:
        target = await self._lending.fresh()
        try:
            return await target.send(self._request)
        except BaseException as error:
            if _is_refused(error, self._route.job):
                target.spoiled = True
            self._note_outcome(error)
            raise

    async def _send_unknown(self) -> Any:
        """Replay a 404 of unknown shape; the replay has counted it already."""
        if self._cannot_probe or self._route.probe_refused_at > self._refused_at:
            # Or the route is stale for probes as well: there is nothing to find out.
            return await self._send_fresh()
        return await self._send_beside_probes(counted=1)

    async def _send_beside_probes(self, *, counted: int = 0) -> Any:
        """Send it over a connection that answers probes.

        Args:
            counted: How many of these replays have been counted already.

        Raises:
            Exception: The request's 404. It is the pod's where the same connection has answered
                a probe and refused the request :data:`BELIEVED_AFTER` times in a row, and the
                gateway's where it refused the probe.
        """
        route, last = self._route, self._first
        if route.probe_refused_at > self._refused_at:
            raise last
        async with contextlib.AsyncExitStack() as stack:
            try:
                send = await stack.enter_async_context(_one_connection(self._lending))
            except Exception as failure:  # noqa: BLE001 - then the program's 404 is waited with
                strict = _settings.current().strict
                _log.own_failure("opening a connection", failure, strict=strict)
                self._cannot_probe = True
                raise last from None
            for _ in range(BELIEVED_AFTER):
                # A balancer that takes turns by request must not send all probes to one replica,
                # and all tries to another.
                for _ in range(random.choice((1, 2))):  # noqa: S311
                    if not await _is_probe_answered(route, send):
                        route.probe_refused_at = time.monotonic()
                        raise last
                    route.counters.probes += 1
                if counted:
                    counted -= 1
                else:
                    route.counters.replays += 1
                self._sent_beside_probes += 1
                try:
                    return await send(self._request)
                except BaseException as error:
                    self._note_outcome(error)
                    if not (isinstance(error, Exception) and self.refused(error)):
                        raise
                    last = error
                self._refused_at = time.monotonic()
                if _is_gateways(last) or self._uncertain() is not None:
                    raise last
                await route.rest(BETWEEN)
        # The program's own client may have sent each over another connection.
        self._is_the_pods = not cast("_Pool", self._lending.pool).has_own_http
        raise last

    async def _request(self, client: Any) -> Any:
        return await client.request(*self._args, **self._kwargs)

    def _note_outcome(self, error: BaseException) -> None:
        """Note what a replay was answered, where it is no 404 again."""
        if _is_refused(error, self._route.job):
            return
        _record_try(error, self._args, self._kwargs)
        if isinstance(error, Exception) and _is_answer(error):
            _tell_if_answered(error, self._route)

    def _uncertain(self) -> str | None:
        """How an earlier try ended that may have been carried out, if that matters here."""
        submission = _submissions.current()
        options = _options(self._args, self._kwargs)
        doubt = None if submission is None else submission.uncertain(str(options.url))
        if doubt is None and not _seams.follows_tries():
            doubt = "cannot be followed any more, since a wrapper of the shim was taken away"
        if doubt is None or _may_be_repeated(options, self._lending.client):
            return None
        return doubt

    def remember_raised(self) -> None:
        """Remember what was raised to the program, to notice that it submits it again."""
        options, client = _options(self._args, self._kwargs), self._lending.client
        try:
            if not _may_be_repeated(options, client):
                self._route.raised.add(str(options.url), _step(options, client))
        except Exception as failure:  # noqa: BLE001 - the program gets its 404
            _log.own_failure("noting a 404", failure, strict=_settings.current().strict)

    def _keep_idempotency_key(self, headers: Mapping[str, str]) -> None:
        # tinker makes one up in every call of `request`; the first one's has to stay.
        name = getattr(self._lending.client, "_idempotency_header", None)
        key = headers.get(name) if name else None
        options = _options(self._args, self._kwargs)
        if key is not None and options.idempotency_key is None:
            options.idempotency_key = key

    def _name(self) -> str:
        name = _path(self._args, self._kwargs).removeprefix(_API)
        return name if self._awaited is None else f"{name} ({self._awaited.request_type})"


def _is_answer(error: BaseException) -> bool:
    """Whether an error of tinker's is an HTTP answer, and not the lack of one."""
    return _status(error) is not None


def _is_refused(error: BaseException, job: Job) -> bool:
    """Whether an error is a 404 that the gateway gave, or may have given; never raises."""
    if _status(error) != HTTPStatus.NOT_FOUND:
        return False
    response = cast("httpx.Response", cast("Any", error).response)
    try:
        if not job.owns(str(response.url)):
            return False
        verdict = _verdict.of_body(response.content)
    except (RuntimeError, httpx.HTTPError):
        # No request attached, or a body that was never read.
        return False
    return verdict is not Verdict.POD


def _is_gateways(error: BaseException) -> bool:
    """Whether a 404 is surely the gateway's, and not of unknown shape."""
    response = cast("httpx.Response", cast("Any", error).response)
    return _verdict.of_body(response.content) is Verdict.GATEWAY


def _is_not_ready(error: BaseException) -> bool:
    """Whether an error is an answer of a cured gateway that says that the route is not there."""
    response = getattr(error, "response", None)
    if not isinstance(response, httpx.Response):
        return False
    try:
        return _verdict.is_route_not_ready(response.status_code, response.content)
    except httpx.StreamError:  # a body that was never read
        return False


def _headers(error: BaseException) -> Mapping[str, str]:
    return cast("httpx.Response", cast("Any", error).response).request.headers


# --- Probes of our own -------------------------------------------------------------------


_Send = Callable[[Callable[[Any], Any]], Any]
"""Sends a request, given as a function of the client."""

BELIEVED_AFTER, BETWEEN = 3, 0.5
"""404s in a row, so many seconds apart, over a connection that answers probes: the pod's."""


async def _get_info(client: Any, model_id: str) -> Any:
    body = {"model_id": model_id, "type": "get_info"}
    path = f"{_API}get_info"
    return await client.post(path, cast_to=httpx.Response, body=body, options=_PROBE_OPTIONS)


async def _get_capabilities(client: Any) -> Any:
    path = f"{_API}get_server_capabilities"
    return await client.get(path, cast_to=httpx.Response, options=_PROBE_OPTIONS)


async def _probe(route: Route, client: Any) -> Any:
    if route.model_id is None:
        return await _get_capabilities(client)
    return await _get_info(client, route.model_id)


_PROBE_OPTIONS: Any = {"timeout": PROBE_TIMEOUT, "max_retries": 0}


async def _is_probe_answered(route: Route, send: _Send) -> bool:
    """Whether the pod answers a probe over a connection with success: proof that it is at work."""
    probes: list[Callable[[Any], Any]] = [_get_capabilities]
    if route.model_id is not None:
        probes.insert(0, functools.partial(_get_info, model_id=route.model_id))
    for probe in probes:
        # One that hangs would hold the request back: it can be replayed without.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWERS_WITHIN):
                await send(probe)
            return True
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Prober:
    route: Route
    send: _Send
    lending: Lending

    async def __call__(self) -> None:
        try:
            await self.send(self._request)
        except Exception as error:
            if _is_not_ready(error):
                self.route.show(Cure.ROUTE_NOT_READY)
            raise

    async def _request(self, client: Any) -> Any:
        return await _probe(self.route, client)

    @property
    def proves(self) -> bool:
        return self.route.model_id is not None

    def refused(self, error: BaseException) -> bool:
        return _is_refused(error, self.route.job)

    async def is_the_pods(self, error: BaseException) -> bool:
        if _is_gateways(error):
            return False
        async with _one_connection(self.lending) as send:
            for _ in range(BELIEVED_AFTER):
                try:
                    await send(_get_capabilities)
                    await send(self._request)
                except Exception as other:  # noqa: BLE001 - told apart here
                    if not self.refused(other):
                        return False
                    path = httpx.URL(str(cast("Any", other).response.url)).path
                    if not path.endswith("/get_info"):
                        return False
                else:
                    return False
        return True

    def headers(self, error: BaseException) -> Mapping[str, str]:
        return _headers(error)

    def answered(self, error: BaseException) -> bool:
        return _is_answer(error) and not _is_not_ready(error)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Like tinker's own connections it follows the environment (certificates, proxies).
    return httpx.create_ssl_context(trust_env=True)


_ONE_WAY = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request."""
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)
"""The same connection for all requests."""


@contextlib.asynccontextmanager
async def _own_client(lending: Lending, limits: httpx.Limits) -> AsyncIterator[_Send]:
    """A client of our own to the lent one's job, or that one where it is the program's own."""
    pool = cast("_Pool", lending.pool)
    if pool.has_own_http:
        yield lending.send
        return

    def make() -> Any:
        secure = pool.route.job.gateway.startswith("https:")
        return pool.client_with(limits, _tls_context() if secure else False)

    # Off the loop: it reads the certificates.
    client = await _threads.run(make)
    try:
        yield lambda request: request(client)
    finally:
        # What has been answered is not lost for that.
        with contextlib.suppress(Exception):
            await client.close()


def _one_connection(lending: Lending) -> contextlib.AbstractAsyncContextManager[_Send]:
    return _own_client(lending, _ONE)


@contextlib.asynccontextmanager
async def _open_prober(lending: Lending) -> AsyncIterator[_Prober]:
    async with _own_client(lending, _ONE_WAY) as send:
        yield _Prober(lending.pool.route, send, lending)


# --- The job manager ---------------------------------------------------------------------


def note_manager(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """``TrainerJobManager.__init__``: it knows where the control plane of its gateway is."""
    wrapped(*args, **kwargs)
    try:
        root = str(instance.base_url)
        gateway = getattr(instance, "trainer_gateway_url", None) or root
        verify = getattr(instance, "_verify_for_url", None)
        manager = weakref.ref(instance)
        _control_plane.register(
            str(gateway).rstrip("/"),
            _control_plane.Manager(
                functools.partial(_address_of, manager, root, verify is None or bool(verify(root))),
                functools.partial(_account_of, manager),
            ),
        )
    except Exception as error:  # noqa: BLE001 - then the gateway's own origin is asked
        _log.own_failure("noting a job manager", error, strict=_settings.current().strict)


def _account_of(manager: weakref.ref[Any]) -> str | None:
    """Whose jobs it manages, where it knows: asking it could send a request."""
    account = getattr(manager(), "_account_id", None)
    return account if isinstance(account, str) else None


def _address_of(manager: weakref.ref[Any], root: str, verify: bool) -> _control_plane.Address:
    """Where the manager asks, with its headers for as long as the program keeps it."""
    instance = manager()
    if instance is None:
        return _control_plane.Address(root, None, verify)
    added = instance.additional_headers or {}
    headers = {
        name.lower(): value
        for name, value in instance._headers().items()
        if name.lower() in _control_plane.CREDENTIALS or name in added
    }
    return _control_plane.Address(root, headers, verify)


# --- Clients that connect ----------------------------------------------------------------


_connecting: contextvars.ContextVar[ConnectBudget | None] = contextvars.ContextVar(
    "tinker_routefix_connecting", default=None
)


def connect_service(
    wrapped: Callable[..., None], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """``InternalClientHolder.__init__``: its config, token and session share a budget.

    What it runs on tinker's loop runs in a copy of this thread's context.
    """
    budget = ConnectBudget()
    token = _connecting.set(budget)
    try:
        wrapped(*args, **kwargs)
    finally:
        # It has started heartbeats, which go on in such a copy.
        budget.ended = True
        _connecting.reset(token)


# --- Futures -----------------------------------------------------------------------------


class _Awaited:
    """A future whose result is being polled for."""

    def __init__(self, request_type: str) -> None:
        self.request_type = request_type
        self.lending: Lending | None = None


# A context variable and not the task: some SDKs poll under `wait_for`, which is a task of its
# own before Python 3.12.
_awaited: contextvars.ContextVar[_Awaited | None] = contextvars.ContextVar(
    "tinker_routefix_awaited", default=None
)


async def await_result(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``_APIFuture._result_async``: name its polls, and warm up before a model is handed out."""
    awaited = _Awaited(str(getattr(instance, "request_type", "")))
    token = _awaited.set(awaited)
    budget = _budget_of_new_model(awaited.request_type)
    try:
        result = await wrapped(*args, **kwargs)
    except Exception as error:
        _carry_note(error)
        raise
    finally:
        # None where nothing was polled on a trainer job's route. Not to be held any longer: copies
        # of this context stay in the loop with timers that were cancelled.
        lending, awaited.lending = awaited.lending, None
        # A coroutine that is thrown away unfinished ends in another context.
        with contextlib.suppress(ValueError):
            _awaited.reset(token)
    if budget is not None and lending is not None:
        await _warm_up(lending, instance, result, budget)
    return result


def _budget_of_new_model(request_type: str) -> ConnectBudget | None:
    """What the rest of creating a training client may wait for; None for all other futures."""
    budget = _connecting.get()
    if budget is not None and budget.ended:
        budget = None
    if request_type == _LOADS_WEIGHTS:
        # Sent as what creates a model, or it would not be here.
        return budget
    if request_type in _CREATES_MODEL and budget is None:
        budget = ConnectBudget()
        _connecting.set(budget)
    return budget if request_type in _CREATES_MODEL else None


async def _warm_up(lending: Lending, instance: Any, result: Any, budget: ConnectBudget) -> None:
    route = lending.pool.route
    future = getattr(instance, "untyped_future", None)
    model_id = getattr(result, "model_id", None) or getattr(future, "model_id", None)
    if isinstance(model_id, str):
        route.model_id = model_id
    _seams.verify()
    try:
        await warm_up(route, functools.partial(_open_prober, lending), budget)
    finally:
        budget.ended = True


def _carry_note(error: BaseException) -> None:
    """Put our note on what the caller gets: tinker raises its own error from the 404."""
    seen = {id(error)}
    cause = error.__cause__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        note = _note(cause)
        if note is not None:
            error.add_note(note)
            return
        cause = cause.__cause__


def _note(error: BaseException) -> str | None:
    """Our note on an error, where it has one."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith("tinker_routefix:")), None)
