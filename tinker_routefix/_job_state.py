"""What the control plane's response says about a job.

A response about the job ends a wait; one strange response (a proxy's error page, a key that is
being rotated, a replica that does not know a new job yet) never does. So what kind of response it
is, is told here once, and whoever waits decides how often it has to come.
"""

from __future__ import annotations

import dataclasses
import email.utils
import enum
import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .events import State

LONGEST_RETRY_AFTER = 60.0
"""Seconds of a ``Retry-After`` that are honoured: one strange response must not silence it."""

_PREFIX = "JOB_STATE_"
_LOOKS_LIKE_A_STATE = re.compile(r"JOB_STATE_[A-Z_]{1,60}")
_RUNNING = frozenset({"RUNNING"})
_STARTING = frozenset(
    {"PENDING", "CREATING", "CREATING_INPUT_DATASET", "VALIDATING", "RE_QUEUEING"}
)
_ENDED = frozenset(
    {
        "ARCHIVED",
        "CANCELLED",
        "CANCELLING",
        "COMPLETED",
        "DELETED",
        "DELETING",
        "DELETING_CLEANING_UP",
        "EARLY_STOPPED",
        "EXPIRED",
        "FAILED",
        "IDLE",
        "PAUSED",
        "WRITING_RESULTS",
    }
)


class JobState(enum.Enum):
    """What the control plane's response means for a request that was refused."""

    _value_: State
    RUNNING = "running"
    STARTING = "starting"
    ENDED = "ended"
    """Ended, ending, suspended, gone or not visible with this key."""
    UNKNOWN = "unknown"
    """The control plane could not be reached or understood."""


class Told(enum.Enum):
    """What kind of answer a question got."""

    RUNNING = enum.auto()
    STARTING = enum.auto()
    ENDED = enum.auto()
    """A terminal state."""
    GONE = enum.auto()
    """There is no such job, or it is not visible: in the API's own shape."""
    QUESTION_REFUSED = enum.auto()
    """The question itself was turned down, by whoever it was, or the answer cannot be read."""
    NOTHING = enum.auto()
    """Nothing for now: no connection, no answer, overload, a failure, a state that is new."""

    @property
    def state(self) -> JobState:
        """What it means for the job."""
        return _STATES.get(self, JobState.UNKNOWN)


_STATES = {
    Told.RUNNING: JobState.RUNNING,
    Told.STARTING: JobState.STARTING,
    Told.ENDED: JobState.ENDED,
    Told.GONE: JobState.ENDED,
}
_TOLD = {
    JobState.RUNNING: Told.RUNNING,
    JobState.STARTING: Told.STARTING,
    JobState.ENDED: Told.ENDED,
    JobState.UNKNOWN: Told.NOTHING,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the control plane said, in words that may be shown, and when."""

    told: Told
    message: str
    answered_at: float
    """``time.monotonic()`` at the end of the question."""
    since: float = float("-inf")
    """When it began to say the same, question after question."""
    ask_again_at: float = float("-inf")
    """Before this moment it is not asked again."""

    @property
    def state(self) -> JobState:
        """What it means for the job."""
        return self.told.state

    def heard_for(self, seconds: float) -> bool:
        """Whether it has been said twice, so far apart."""
        # Two questions that are a second apart are not answered exactly so.
        return self.answered_at - self.since >= 0.9 * seconds


NOT_ASKED = Answer(Told.NOTHING, "not asked", float("-inf"))


def state_of(word: str) -> JobState:
    """The meaning of a job state's name, with or without its prefix; new ones are unknown."""
    name = word.removeprefix(_PREFIX)
    if name in _RUNNING:
        return JobState.RUNNING
    if name in _STARTING:
        return JobState.STARTING
    return JobState.ENDED if name in _ENDED else JobState.UNKNOWN


_NOT_FOUND = frozenset({5, "NOT_FOUND"})
_NOT_VISIBLE = frozenset({7, "PERMISSION_DENIED"})
"""A code of ``google.rpc.Status``, by number or by name."""


def read_answer(status: int, body: bytes) -> tuple[Told, str]:
    """The meaning of a response of the control plane; never raises."""
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
        # Any proxy, framework or firewall answers these; about a job only the API does.
        codes = _codes(document)
        if codes & _NOT_FOUND:
            return Told.GONE, f"there is no such job (HTTP {status})"
        if codes & _NOT_VISIBLE:
            return Told.GONE, f"the job is not visible with this key (HTTP {status})"
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        return Told.NOTHING, f"HTTP {status}"
    if status == HTTPStatus.UNAUTHORIZED:
        return Told.QUESTION_REFUSED, "the key was refused (HTTP 401)"
    if status != HTTPStatus.OK:
        return Told.QUESTION_REFUSED, f"HTTP {status}"
    word = document.get("state") if isinstance(document, dict) else None
    if not isinstance(word, str):
        return Told.QUESTION_REFUSED, "an answer without a job state"
    state = state_of(word)
    # A word comes from outside and could even be our key: show it only where it cannot.
    known = state is not JobState.UNKNOWN or _LOOKS_LIKE_A_STATE.fullmatch(word)
    return _TOLD[state], word if known else "a strange state"


def _codes(document: Any) -> set[Any]:
    """The codes in a ``google.rpc.Status``, which stands at the top or in ``error``."""
    places = (document, document.get("error")) if isinstance(document, dict) else ()
    return {
        place[name]
        for place in places
        if isinstance(place, dict)
        for name in ("code", "status")
        if isinstance(place.get(name), str | int)
    }


def retry_after(header: str | None) -> float:
    """Seconds that a ``Retry-After`` asks for; 0 for none, or one that cannot be read."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER)
