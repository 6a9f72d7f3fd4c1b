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
import hashlib
import time
from collections import OrderedDict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import _verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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

    def record_try(self, path: str, outcome: httpx.Response | BaseException | None) -> None:
        """Note how a try has ended; an outcome that tells nothing stays noted."""
        doubt = _doubt(outcome)
        if doubt is not None:
            self._uncertain.setdefault(path, doubt)

    def uncertain(self, path: str) -> str | None:
        """How the first try ended that may have been carried out; None: none was."""
        return self._uncertain.get(path)


def _doubt(outcome: httpx.Response | BaseException | None) -> str | None:
    """Why a try may have been carried out, for a sentence; None where it surely was not."""
    response = outcome if isinstance(outcome, httpx.Response) else None
    if response is None:
        response = getattr(outcome, "response", None)
    if isinstance(response, httpx.Response):
        return None if _was_turned_away(response) else f"was answered HTTP {response.status_code}"
    # tinker raises an error of its own from the one of the connection.
    for error in (outcome, getattr(outcome, "__cause__", None)):
        if isinstance(error, _NEVER_CONNECTED):
            return None
        # ... and one for a bare 400, when the client is given back.
        if isinstance(getattr(error, "response", None), httpx.Response):
            return _doubt(error)
    return f"got no answer ({type(outcome).__name__})"


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
    finally:
        submission.ended = True
        # A coroutine that is thrown away unfinished ends in another context.
        with contextlib.suppress(ValueError):
            _current.reset(token)


class RaisedSteps:
    """Submissions whose 404 was raised to the program, to notice that it submits one again.

    Digests, so that no batch is kept alive; a few, and only for a while.
    """

    KEPT = 32
    FOR = 120.0
    """Seconds; retries around the SDK were seen to wait 30 s at most."""

    def __init__(self) -> None:
        self._raised: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._raised)

    def add(self, path: str, step: bytes | None) -> None:
        """Note a submission, by what it asks for but for its place in the order."""
        if step is not None:
            self._raised[path, _digest(step)] = time.monotonic()
            while len(self._raised) > self.KEPT:
                self._raised.popitem(last=False)

    def recently(self, path: str) -> bool:
        """Whether a submission to this path is among them, so that a closer look is worth it."""
        oldest = time.monotonic() - self.FOR
        for key in [key for key, at in self._raised.items() if at < oldest]:
            del self._raised[key]
        return any(raised == path for raised, _ in self._raised)

    def seconds_since(self, path: str, step: bytes | None) -> float | None:
        """How long ago this very submission was raised, each once; None: it was not."""
        at = None if step is None else self._raised.pop((path, _digest(step)), None)
        return None if at is None else time.monotonic() - at


def _digest(step: bytes) -> bytes:
    return hashlib.blake2b(step, digest_size=16).digest()
