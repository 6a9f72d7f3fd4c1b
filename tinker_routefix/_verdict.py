"""Whose 404 is it?

The gateway's 404 means that a route was not there: the request never reached the pod and
can be sent again. The pod's own 404 is an answer, and none of our business. The two are
told apart by the body. What cannot be told apart is tried: it is the pod's own once the same
connection has answered a probe and refused the request three times in a row. Until then it counts
as the gateway's: it is sent again over a connection that has just answered a probe, or like that.
"""

from __future__ import annotations

import enum
import json
import random
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MAX_BODY = 64 * 1024
"""Bytes of a 404's body that are looked at; the gateway's has about a hundred."""


class Verdict(enum.Enum):
    """Who answered a request with a 404."""

    GATEWAY = "gateway"
    POD = "pod"
    UNKNOWN = "unknown"


class Fix(enum.Enum):
    """How a gateway can tell a stale route from a job that is gone, so that the SDK knows."""

    ROUTE_NOT_READY = "503 route_not_ready"
    """The SDK repeats a 503 by itself."""


def of_body(body: bytes) -> Verdict:
    """Tell from the body of a 404 who wrote it; never raises."""
    document = _document(body)
    if document is None:
        return Verdict.UNKNOWN
    if _code(document) == _NOT_FOUND:
        return Verdict.GATEWAY
    # FastAPI's shape.
    if "detail" in document and "error" not in document:
        return Verdict.POD
    return Verdict.UNKNOWN


def is_route_not_ready(status: int, body: bytes) -> bool:
    """Whether an answer is a gateway's 503 for a route that it does not have yet; never raises."""
    if status != HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    document = _document(body) or {}
    # At the top, or in the object that holds the error.
    places = (document, document.get("error"), document.get("detail"))
    return any(
        isinstance(place, dict) and place.get("queue_state") == "route_not_ready"
        for place in places
    )


_NOT_FOUND = "NOT_FOUND"


def _document(body: bytes) -> dict[str, Any] | None:
    if len(body) > MAX_BODY:
        return None
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _code(document: dict[str, Any]) -> str | None:
    error = document.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


BELIEVED_AFTER = 3
"""404s in a row, over a connection that answers probes: the pod's."""

BETWEEN = 0.5
"""Seconds between two of them, where the program's request is sent."""


async def is_the_pods(
    is_probe_answered: Callable[[], Awaitable[bool]],
    is_refused: Callable[[], Awaitable[bool]],
    pause: Callable[[float], Awaitable[None]] | None = None,
) -> bool:
    """Whether the 404 of a request turns out to be the pod's own.

    Args:
        is_probe_answered: Sends a probe over a connection.
        is_refused: Sends the request over the same one; whether the 404 is again one of unknown
            shape.
        pause: Waits between two of them.
    """
    for number in range(BELIEVED_AFTER):
        if number and pause is not None:
            await pause(BETWEEN)
        # A balancer that takes turns by request must not send all probes to one replica, and all
        # tries to another.
        for _ in range(random.choice((1, 2))):  # noqa: S311
            if not await is_probe_answered():
                return False
        if not await is_refused():
            return False
    return True
