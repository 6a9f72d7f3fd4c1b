"""Whose 404 is it?

The gateway's 404 means that a route was not there: the request never reached the pod and
can be sent again. The pod's own 404 is an answer, and none of our business. The two are
told apart by the body; what cannot be told apart is treated like the gateway's, because
then the control plane is asked before anything is sent again.
"""

from __future__ import annotations

import enum
import json
from typing import Any

MAX_BODY = 64 * 1024
"""Bytes of a 404's body that are looked at; the gateway's has about a hundred."""


class Verdict(enum.Enum):
    """Who answered a request with a 404."""

    GATEWAY = "gateway"
    POD = "pod"
    UNKNOWN = "unknown"


def of_body(body: bytes) -> Verdict:
    """Tell from the body of a 404 who wrote it; never raises."""
    if len(body) > MAX_BODY:
        return Verdict.UNKNOWN
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        return Verdict.UNKNOWN
    if not isinstance(document, dict):
        return Verdict.UNKNOWN
    error = document.get("error")
    if isinstance(error, dict) and error.get("code") == "NOT_FOUND":
        return Verdict.GATEWAY
    # FastAPI's shape.
    if "detail" in document and "error" not in document:
        return Verdict.POD
    return Verdict.UNKNOWN
