"""Whether a submission may have been carried out by an earlier try.

A 404 of the gateway says that *this* try never reached the pod. It says nothing about the tries
before it: tinker repeats a submission whose answer was lost, inside of a request (a new HTTP
request, the same idempotency key) and around it (a new call of ``request``, in most releases with
a new key). Where such a repeat gets the stale route's 404, sending it once more could train
twice. So all tries of one submission are followed, from its first to its end, tinker's own as
well as the shim's replays, and one whose outcome is not known for certain ends the replays.
"""

from __future__ import annotations

import contextlib
import contextvars
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import _answers, _errors, _verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ._job import Job

_T = TypeVar("_T")

_NEVER_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
"""The connection was never made, so nothing was sent. A ``ProxyError`` is a refused CONNECT."""


class Submission:
    """One submission and its tries.

    By path, because a submission can send another request on its way: for a token, say.
    """

    __slots__ = ("_uncertain", "ended")

    def __init__(self) -> None:
        self.ended = False
        """What still runs in its context (a task that it has started) is no try of it."""
        self._uncertain: dict[str, str] = {}

    def record_try(
        self, path: str, outcome: httpx.Response | BaseException | None, job: Job | None
    ) -> None:
        """Note how a try has ended; an outcome that tells nothing stays noted."""
        doubt = _doubt(outcome, job)
        if doubt is not None:
            self._uncertain.setdefault(path, doubt)

    def uncertain(self, path: str) -> str | None:
        """How the first try ended that may have been carried out; None: none was."""
        return self._uncertain.get(path)


def _doubt(outcome: httpx.Response | BaseException | None, job: Job | None) -> str | None:
    """Why a try may have been carried out, for a sentence; None where it surely was not."""
    response = outcome
    if isinstance(outcome, BaseException):
        response = _answers.response_of(outcome)
    if isinstance(response, httpx.Response):
        return None if _was_turned_away(response) else f"was answered HTTP {response.status_code}"
    # tinker raises an error of its own from the one of the connection.
    for error in (outcome, getattr(outcome, "__cause__", None)):
        if isinstance(error, _NEVER_CONNECTED):
            if job is None or not _was_redirected(error, job):
                return None
            break
        # ... and one for a bare 400, when the client is given back.
        if isinstance(error, BaseException) and _answers.response_of(error) is not None:
            return _doubt(error, job)
    return f"got no answer ({type(outcome).__name__})"


def _was_redirected(error: httpx.HTTPError, job: Job) -> bool:
    """Whether the address that could not be connected to is another one than the job's.

    Who has redirected the request has had it. pyqwest follows redirects by itself and names the
    first address, so that there it cannot be told.
    """
    request = getattr(error, "_request", None)
    return request is not None and not job.owns(str(request.url))


def _was_turned_away(response: httpx.Response) -> bool:
    """Whether an answer was given before the pod, so that nothing can have been carried out."""
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        return True
    if response.status_code == HTTPStatus.BAD_REQUEST:
        # An edge that refuses a connection; tinker opens another one and repeats the request.
        return bool(response.headers.get("content-length", "0") == "0")
    try:
        body = response.content
    except httpx.StreamError:  # a body that was never read
        return False
    return _verdict.is_route_not_ready(response.status_code, body)


_current: contextvars.ContextVar[Submission | None] = contextvars.ContextVar(
    "tinker_routefix_submission", default=None
)


def current() -> Submission | None:
    """The submission that the running code is a part of."""
    submission = _current.get()
    return None if submission is None or submission.ended else submission


async def follow(call: Callable[..., Coroutine[Any, Any, _T]], *args: Any, **kwargs: Any) -> _T:
    """Make a call that is one submission, from its first try to its end."""
    submission = Submission()
    token = _current.set(submission)
    try:
        return await call(*args, **kwargs)
    except Exception as error:
        _errors.trim(error)
        raise
    finally:
        submission.ended = True
        # A collected coroutine runs this in another context, where `reset` raises.
        with contextlib.suppress(ValueError):
            _current.reset(token)
