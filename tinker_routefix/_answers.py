"""What an exception of the SDK says.

An exception is an HTTP answer or the lack of one, and a 404 is the gateway's, the pod's own, or of
a shape that does not tell.
"""

from __future__ import annotations

import enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import httpx

from . import _verdict
from ._verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._job import Job


class Kind(enum.Enum):
    """What came back instead of a result."""

    NO_ANSWER = enum.auto()
    """None: no connection, a timeout, a failure in the program; a gateway's 502, 503 or 504."""
    GATEWAY_404 = enum.auto()
    """The gateway had no route: the request never reached the pod."""
    UNKNOWN_404 = enum.auto()
    """A 404 that may be the gateway's or the pod's."""
    NOT_READY = enum.auto()
    """A fixed gateway says that it has no route yet."""
    ANSWER = enum.auto()
    """Any other HTTP answer, the pod's own 404 among them: the route is there."""

    @property
    def is_refusal(self) -> bool:
        """Whether it is a 404 that the gateway gave, or may have given."""
        return self in (Kind.GATEWAY_404, Kind.UNKNOWN_404)


def kind_of(error: BaseException, job: Job) -> Kind:
    """What an exception says about the route to a job; never raises."""
    response = response_of(error)
    if response is None:
        return Kind.NO_ANSWER
    try:
        if _verdict.is_route_not_ready(response.status_code, response.content):
            return Kind.NOT_READY
        verdict = _verdict.of_body(response.content)
        if response.status_code in _WITHOUT_THE_POD and verdict is not Verdict.POD:
            return Kind.NO_ANSWER
        if response.status_code != HTTPStatus.NOT_FOUND or not job.owns(str(response.url)):
            return Kind.ANSWER
    except (RuntimeError, httpx.HTTPError):
        # No request attached, or a body that was never read.
        return Kind.ANSWER
    return _KINDS[verdict]


_WITHOUT_THE_POD = (
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_KINDS = {
    Verdict.GATEWAY: Kind.GATEWAY_404,
    Verdict.UNKNOWN: Kind.UNKNOWN_404,
    Verdict.POD: Kind.ANSWER,
}


def response_of(error: BaseException) -> httpx.Response | None:
    """The HTTP answer in an exception of the SDK; None: there was none."""
    response = getattr(error, "response", None)
    return response if isinstance(response, httpx.Response) else None


def is_404(error: BaseException) -> bool:
    """Whether an exception is a 404, whoever gave it."""
    response = response_of(error)
    return response is not None and response.status_code == HTTPStatus.NOT_FOUND


def request_of(error: BaseException) -> httpx.Request:
    """The request that a 404 answers."""
    return cast("httpx.Response", cast("Any", error).response).request


def headers_of(error: BaseException) -> Mapping[str, str]:
    """The headers of the request that a 404 answers."""
    return request_of(error).headers
