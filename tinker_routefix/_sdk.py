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
import sys
import weakref
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import httpx

from . import _control_plane, _log, _seams, _settings, _submissions, _verdict, events
from ._connections import Lending
from ._job import Job
from ._retry import Replay
from ._route import Route, route_to
from ._verdict import Cure, Verdict
from ._warmup import light_prober, warm_up

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

_MARK = "_tinker_routefix"
_UNSEEN = object()

_API = "/api/v1/"
_TELEMETRY = _API + "telemetry"
_LEFT_ALONE = (_API + "session_heartbeat", _TELEMETRY)
"""Background calls that nobody waits for and that tinker repeats by itself."""
_WORK = frozenset(
    _API + name
    for name in (
        "forward",
        "forward_backward",
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "save_weights_external",
        "asample",
    )
)
"""Submissions that mean that connecting is over: from here on there is work to lose."""

_CREATES_MODEL = frozenset({"CreateModel", "CreateBaseModel"})
"""The second is the Fireworks SDK's, for reference models."""
_LOADS_WEIGHTS = "LoadWeights"
"""How 0.38 creates a training client from a checkpoint: without a ``CreateModel``."""

PROBE_TIMEOUT = 10.0
"""Seconds that a probe may take; the pod answers one in milliseconds."""


# --- Pools and their clients -------------------------------------------------------------


class _Pool:
    """A ``ClientConnectionPool`` whose clients lead to a trainer job."""

    def __init__(self, pool: Any, client_type: type, route: Route) -> None:
        self.route = route
        self._pool = pool
        self._client_type = client_type

    @property
    def _kwargs(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._pool._constructor_kwargs)

    @property
    def has_own_http(self) -> bool:
        """The user passed an HTTP client in: every client of the pool shares it."""
        return self._kwargs.get("http_client") is not None

    def replacement(self) -> Callable[[], Any] | None:
        # The way in which tinker itself replaces a client that it suspects.
        return None if self.has_own_http else functools.partial(self._client_type, **self._kwargs)

    def on_one_way_connections(self, tls: ssl.SSLContext | bool) -> Any:
        """A client that opens a connection for each request and keeps none."""
        http = httpx.AsyncClient(
            limits=httpx.Limits(max_keepalive_connections=0), follow_redirects=False, verify=tls
        )
        client = self._client_type(**{**self._kwargs, "http_client": http})
        url = client.base_url
        if url.userinfo:
            # httpx and tinker log whole URLs: these requests are ours, and so is the log line.
            http.auth = (url.username, url.password)
            client.base_url = url.copy_with(userinfo=b"")
        return client

    def swap(self, old: Any, new: Lending) -> None:
        setattr(new.client, _MARK, new)
        clients: list[Any] = self._pool._clients
        for index, client in enumerate(clients):
            if client is old:
                clients[index] = new.client

    async def close(self, client: Any) -> None:
        await client.close()


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
    if awaited is not None:
        awaited.lending = lending
    if not route.warm and _path(args, kwargs) in _WORK:
        route.worked = True
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
        if not _is_refused(error, route.job):
            _record_try(error, args, kwargs)
            if _is_answer(error):
                _tell_if_answered(error, route)
            raise
        if _note(error) is not None:
            # Refused and given up on below us: whoever replaced a seam calls our
            # first wrapper, and it has done its work.
            raise
        path = _path(args, kwargs)
        if path in _LEFT_ALONE:
            if path == _TELEMETRY and route.drained:
                # Until 0.38 tinker re-sends a refused batch every second, and a fatal
                # exception waits 30 s for it. It discards what this returns.
                route.counters.telemetry_dropped += 1
                return None
            raise
        lending.spoiled = True
        refused = _Refused(lending, args, kwargs, awaited)
        replay = refused.replay(error)
        if replay is None:
            raise
    else:
        if route.watched:
            route.answered()
        return answer
    # Out here, so that what a replay meets does not carry the first 404 as its context.
    try:
        answer = await replay.run()
    except Exception as error:
        if _is_refused(error, route.job):
            refused.remember_raised()
        raise
    # Only now is it known that the route was stale and the job not gone.
    cure = _cure_in(replay.error)
    if cure is not None:
        route.show(cure)
    return answer


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
        # Not into a model: it makes one of a checkpoint (0.24.1 and later).
        body = options.json_data
        return isinstance(body, dict) and body.get("model_seq_id") is not None
    if endpoint == "forward_backward":
        message = _message(options, client)
        return message is not None and bool(message.forward_only)
    return endpoint in _seams.REPEATABLE


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
        route.answered()


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
    ) -> None:
        self._lending = lending
        self._route: Route = lending.pool.route
        self._args = args
        self._kwargs = kwargs
        self._awaited = awaited

    def replay(self, error: Exception) -> Replay | None:
        """Its way through, or None where the shim itself is at fault."""
        try:
            return self._prepare(error)
        except Exception as failure:  # noqa: BLE001 - then the caller gets tinker's own 404
            _log.own_failure("preparing a replay", failure, strict=_settings.current().strict)
            return None

    def _prepare(self, error: Exception) -> Replay:
        headers = _headers(error)
        self._keep_idempotency_key(headers)
        route = self._route
        return Replay(
            route,
            error,
            headers=headers,
            send=self._send_fresh,
            refused=lambda other: _is_refused(other, route.job),
            uncertain=self._uncertain,
            probe=light_prober(route, functools.partial(_open_prober, self._lending)),
            what=self._name(),
        )

    async def _send_fresh(self) -> Any:
        target = await self._lending.fresh()
        try:
            return await target.send(lambda client: client.request(*self._args, **self._kwargs))
        except BaseException as error:
            target.spoiled = _is_refused(error, self._route.job)
            if not target.spoiled:
                _record_try(error, self._args, self._kwargs)
            raise

    def _uncertain(self) -> str | None:
        """How an earlier try ended that may have been carried out, if that matters here."""
        submission = _submissions.current()
        options = _options(self._args, self._kwargs)
        doubt = None if submission is None else submission.uncertain(str(options.url))
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
    return isinstance(getattr(error, "response", None), httpx.Response)


def _is_refused(error: BaseException, job: Job) -> bool:
    """Whether an error is a 404 that the gateway gave, or may have given; never raises."""
    response = getattr(error, "response", None)
    if not isinstance(response, httpx.Response) or response.status_code != httpx.codes.NOT_FOUND:
        return False
    try:
        if not job.owns(str(response.url)):
            return False
        verdict = _verdict.of_body(response.content)
    except (RuntimeError, httpx.HTTPError):
        # No request attached, or a body that was never read.
        return False
    return verdict is not Verdict.POD or _settings.current().match == "any"


def _cure_in(error: BaseException) -> Cure | None:
    """The cure of the gateway that an answer shows, if it met a stale route; never raises."""
    response = cast("httpx.Response", cast("Any", error).response)
    try:
        return _verdict.cure_in(response.status_code, response.content)
    except httpx.StreamError:  # a body that was never read
        return None


def _is_not_ready(error: BaseException) -> bool:
    """Whether an error is an answer of a cured gateway that says that the route is not there."""
    return _is_answer(error) and _cure_in(error) is Cure.ROUTE_NOT_READY


def _headers(error: BaseException) -> Mapping[str, str]:
    return cast("httpx.Response", cast("Any", error).response).request.headers


# --- Probes of our own -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Prober:
    route: Route
    send: Callable[[Callable[[Any], Any]], Any]

    async def __call__(self) -> None:
        try:
            await self.send(self._request)
        except Exception as error:
            if _is_not_ready(error):
                self.route.show(Cure.ROUTE_NOT_READY)
            raise

    def _request(self, client: Any) -> Any:
        options = {"timeout": PROBE_TIMEOUT, "max_retries": 0}
        if self.route.model_id is None:
            path = f"{_API}get_server_capabilities"
            return client.get(path, cast_to=httpx.Response, options=options)
        body = {"model_id": self.route.model_id, "type": "get_info"}
        return client.post(f"{_API}get_info", cast_to=httpx.Response, body=body, options=options)

    def refused(self, error: BaseException) -> bool:
        return _is_refused(error, self.route.job)

    def headers(self, error: BaseException) -> Mapping[str, str]:
        return _headers(error)

    def answered(self, error: BaseException) -> bool:
        return _is_answer(error) and not _is_not_ready(error)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Like tinker's own connections it follows the environment (certificates, proxies).
    return httpx.create_ssl_context(trust_env=True)


@contextlib.asynccontextmanager
async def _open_prober(lending: Lending) -> AsyncIterator[_Prober]:
    pool = cast("_Pool", lending.pool)
    if pool.has_own_http:
        yield _Prober(pool.route, lending.send)
        return

    def make() -> Any:
        secure = pool.route.job.gateway.startswith("https:")
        return pool.on_one_way_connections(_tls_context() if secure else False)

    # Off the loop: it reads the certificates.
    client = await asyncio.to_thread(make)
    try:
        yield _Prober(pool.route, lambda request: request(client))
    finally:
        await client.close()


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
        address = functools.partial(
            _address_of, weakref.ref(instance), root, verify is None or bool(verify(root))
        )
        _control_plane.learn(str(gateway).rstrip("/"), address)
    except Exception as error:  # noqa: BLE001 - then the gateway's own origin is asked
        _log.own_failure("noting a job manager", error, strict=_settings.current().strict)


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
    try:
        result = await wrapped(*args, **kwargs)
    except Exception as error:
        _carry_note(error)
        raise
    finally:
        # A coroutine that is thrown away unfinished ends in another context.
        with contextlib.suppress(ValueError):
            _awaited.reset(token)
    # None where nothing was polled on a trainer job's route.
    if awaited.lending is not None:
        await _warm_up_if_new_model(awaited, awaited.lending, instance, result)
    return result


async def _warm_up_if_new_model(
    awaited: _Awaited, lending: Lending, instance: Any, result: Any
) -> None:
    route = lending.pool.route
    creates = awaited.request_type in _CREATES_MODEL
    if not creates and not (awaited.request_type == _LOADS_WEIGHTS and not route.warm):
        return
    future = getattr(instance, "untyped_future", None)
    model_id = getattr(result, "model_id", None) or getattr(future, "model_id", None)
    if isinstance(model_id, str):
        route.model_id = model_id
    _seams.verify()
    await warm_up(route, functools.partial(_open_prober, lending))


def _carry_note(error: BaseException) -> None:
    """Put our note on what the caller gets: tinker raises its own error from the 404."""
    cause = error.__cause__
    while cause is not None:
        note = _note(cause)
        if note is not None:
            error.add_note(note)
            return
        cause = cause.__cause__


def _note(error: BaseException) -> str | None:
    """Our note on an error, where it has one."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith("tinker_routefix:")), None)
