"""The request's seam: what a request's 404 comes to, and what may be sent again."""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import TYPE_CHECKING, Any

import httpx

from . import (
    _answers,
    _background,
    _connecting,
    _endpoints,
    _errors,
    _log,
    _probes,
    _raised,
    _settings,
    _submissions,
)
from ._call import Call
from ._connections import MARK, PooledClient
from ._refused import ReplayableRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


# --- The seams -----------------------------------------------------------------------------


def guard_request(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Coroutine[Any, Any, Any]:
    """``AsyncTinker.request``: let it through, and look only at what comes back as a 404."""
    pooled: PooledClient | None = getattr(instance, MARK, None)
    if pooled is None or pooled.sends_for_the_shim():
        return wrapped(*args, **kwargs)
    if _submissions.current() is None:
        # A poll, say: a request that nothing around it repeats is a submission of its own.
        return _submissions.follow(_send, wrapped, pooled, args, kwargs)
    return _send(wrapped, pooled, args, kwargs)


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
    instance: Any,
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
        pooled: PooledClient | None = getattr(instance, MARK, None)
        job = None if pooled is None else pooled.pool.route.job
        submission.record_try(str(getattr(options, "url", "")), outcome, job)
    return wrapped(*args, **kwargs)


# --- One request ---------------------------------------------------------------------------


async def _send(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    pooled: PooledClient,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    call = Call(pooled, args, kwargs)
    if call.route.raised:
        _raised.warn_if_repeated(call.route, call.options, pooled.client)
    try:
        if pooled.successor is None:
            answer = await wrapped(*args, **kwargs)
        else:
            # Stale, and replaced while it was lent.
            call.pooled = pooled.latest()
            answer = await call.pooled.send(call.send_with)
    except asyncio.CancelledError as error:
        # Whoever has cancelled it may repeat it: under `wait_for`, say.
        call.record(error)
        raise
    except Exception as error:
        settle = _settlement(call, error)
        if settle is None:
            raise
    else:
        _note_success(call)
        return answer
    # Out here, so that what a replay gets does not carry the first 404 as its context.
    settling = settle()
    del settle  # It holds the 404, which leads to this frame.
    return await settling


def _settlement(call: Call, error: Exception) -> Callable[[], Coroutine[Any, Any, Any]] | None:
    """What settles a request that has failed; None: the program gets the error."""
    if call.path == _endpoints.TELEMETRY and _answers.is_404(error):
        # The pod's own as well: it may not know telemetry.
        refused = _answers.kind_of(error, call.route.job).is_refusal
        if refused or call.route.drops_telemetry:
            return functools.partial(
                _background.settle_telemetry, call.pooled, call.send_with, error
            )
    kind = call.record(error)
    if not kind.is_refusal:
        return None
    # By our own wrapper, left below a foreign one.
    was_replayed = _errors.note_on(error) is not None
    if was_replayed or _background.is_background(
        call.path, call.route, connecting=call.budget is not None
    ):
        _background.renew_if_heartbeat(call.path, call.pooled)
        return None
    call.pooled.stale = True
    try:
        request = ReplayableRequest(call, error, kind)
        return functools.partial(request.settle, request.replay(error))
    except Exception as failure:  # noqa: BLE001 - then the caller gets tinker's own 404
        _log.own_failure("preparing a replay", failure, strict=_settings.current().strict)
        return None


def _note_success(call: Call) -> None:
    if call.route.needs_notice:
        # Telemetry is not the program's, and need not be the pod's.
        call.route.mark_reachable(proof=call.path != _endpoints.TELEMETRY)
    if call.budget is None:
        return
    pool = call.pooled.pool
    if call.path == _endpoints.WEIGHTS_INFO and call.budget.used:
        _connecting.keep_for_model(pool, call.budget)
    elif call.path in _endpoints.CREATES and pool.secure and not pool.has_own_http:
        call.budget.ahead = _probes.ConnectionsAhead(call.pooled)
