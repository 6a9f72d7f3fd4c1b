"""What happens on a route, as events: for the log, and for programs that subscribe.

One event, one log line: the line's text and fields are the event's, so that what a person
reads and what a machine counts cannot drift apart. An event never holds a key, a header or
a body.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from . import _log

if TYPE_CHECKING:
    from ._log import RateLimit


def counted(number: int, what: str) -> str:
    """A number of things, for a sentence."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that was met or done on the route to one job."""

    name: ClassVar[str]
    """As in the log."""

    job: str
    """Account and name of the job, with a slash between them."""
    at: float = dataclasses.field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def level(self) -> int:
        """The log line's level."""
        return logging.INFO


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WarmupStarted(Event):
    """A new model's route is about to be proved."""

    name: ClassVar[str] = "warmup.started"

    @property
    def level(self) -> int:
        """No news yet."""
        return logging.DEBUG

    def __str__(self) -> str:
        return f"warming the route to job {self.job} up"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WarmupEnded(Event):
    """A warm-up is over, one way or the other."""

    name: ClassVar[str] = "warmup.ended"

    outcome: str
    """``warm``; ``timeout`` (404s to the end) or ``over`` (so is the job), which the caller
    gets as an exception; ``error``: something else was met, and the next call will tell."""
    rounds: int
    """How often all probes were sent; 1 on a healthy route."""
    seconds: float
    error: str | None = None
    """The name of the exception's class, where one ended it."""

    @property
    def level(self) -> int:
        """A healthy route is no news; one that is not there is bad news."""
        if self.outcome != "warm":
            return logging.WARNING
        return logging.INFO if self.rounds > 1 else logging.DEBUG

    def __str__(self) -> str:
        if self.outcome == "warm":
            return f"the route to job {self.job} is warm after {self.seconds:.1f} s"
        if self.outcome == "error":
            return (
                f"the warm-up of job {self.job} met {self.error} and ends; the next call will tell"
            )
        return f"the warm-up of job {self.job} ended after {self.seconds:.1f} s: {self.outcome}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent(Event):
    """Something about one request of the program that was refused."""

    request: str
    """Which one, as in ``forward_backward`` or ``retrieve_future (OptimStep)``."""
    replays: int
    """How often it has been sent again."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refused(RequestEvent):
    """A request of the program was answered with a 404 that is not the pod's own."""

    name: ClassVar[str] = "route.refused"

    @property
    def level(self) -> int:
        """The first 404 of a request is news; those that replays meet are steps on the way."""
        return logging.DEBUG if self.replays else logging.INFO

    def __str__(self) -> str:
        return f"the gateway answered {self.request} of job {self.job} with a 404"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswered(Event):
    """The control plane was asked about the job, and this is what came of it."""

    name: ClassVar[str] = "control_plane.answered"

    state: str
    """``running``, ``on its way``, ``over`` or ``unknown``."""
    said: str
    """Its own word, or why there is none."""
    seconds: float

    @property
    def level(self) -> int:
        """A step on the way."""
        return logging.DEBUG

    def __str__(self) -> str:
        return f"the control plane's word on job {self.job}: {self.said}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replayed(RequestEvent):
    """A refused request is sent again."""

    name: ClassVar[str] = "route.replayed"

    seconds: float
    """Since it was first refused."""

    @property
    def level(self) -> int:
        """A step on the way."""
        return logging.DEBUG

    def __str__(self) -> str:
        return f"sending {self.request} of job {self.job} again, replay {self.replays}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(RequestEvent):
    """A refused request got through."""

    name: ClassVar[str] = "route.recovered"

    seconds: float
    """From its first 404 to its answer."""

    def __str__(self) -> str:
        return (
            f"{self.request} of job {self.job} got through after {self.seconds:.1f} s "
            f"and {counted(self.replays, 'replay')}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp(RequestEvent):
    """A request was refused until its budget was spent; the caller gets the 404."""

    name: ClassVar[str] = "route.given_up"

    state: str
    """What the control plane's last word on the job means: as in :class:`QuestionAnswered`."""
    said: str
    """The word itself."""
    said_ago: float
    """How long ago that was."""
    seconds: float
    """Since its first 404."""

    @property
    def level(self) -> int:
        """The run is about to end."""
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"the gateway answered {self.request} of job {self.job} with a 404; the control "
            f"plane's word on the job, {self.said_ago:.1f} s before: {self.said}; "
            f"{counted(self.replays, 'replay')} in {self.seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailedFast(GivenUp):
    """The control plane did not say that the job runs; the caller gets the 404."""

    name: ClassVar[str] = "route.failed_fast"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Uncertain(RequestEvent):
    """A request is not replayed: an earlier try of it may have been carried out.

    The caller gets the 404, as from tinker alone.
    """

    name: ClassVar[str] = "route.uncertain"

    earlier: str
    """How that try ended, as in ``got no answer (ReadError)`` or ``was answered HTTP 502``."""
    seconds: float
    """Since the request's first 404."""

    @property
    def level(self) -> int:
        """The run is about to end."""
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"the gateway answered {self.request} of job {self.job} with a 404, but an earlier try "
            f"of it {self.earlier}: it may have been carried out, and is not sent again"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRepeated(Event):
    """The program submits once more what has just ended in a 404: it has a retry of its own."""

    name: ClassVar[str] = "program.step_repeated"

    request: str
    """Which endpoint, as in ``forward_backward``."""
    seconds: float
    """Since the 404 was raised."""

    @property
    def level(self) -> int:
        """The program may be training twice."""
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"the program has submitted {self.request} of job {self.job} again, {self.seconds:.1f} "
            "s after a 404 was raised for it: what was carried out of that step is now carried "
            "out twice. Remove your own retry around the SDK"
        )


Callback = Callable[[Event], object]

_lock = threading.Lock()
_subscribers: tuple[Callback, ...] = ()


def subscribe(callback: Callback) -> Callable[[], None]:
    """Have a function called with every event, as it happens.

    It is called on tinker's event loop, between requests: it has to be quick, and must not
    wait for a result of tinker's. What it raises is logged and goes no further.

    Args:
        callback: Takes one :class:`Event`; tell them apart by class.

    Returns:
        A function that ends the subscription; harmless when repeated.

    Raises:
        TypeError: The callback cannot be called.
    """
    global _subscribers
    if not callable(callback):
        raise TypeError(f"callback={callback!r} is not accepted: expected a function of one event")
    # An entry of its own, so that a function that subscribes twice is called twice.
    entry: Callback = lambda event: callback(event)  # noqa: E731
    with _lock:
        _subscribers = (*_subscribers, entry)

    def unsubscribe() -> None:
        global _subscribers
        with _lock:
            _subscribers = tuple(other for other in _subscribers if other is not entry)

    return unsubscribe


def publish(event: Event, *, limit: RateLimit | None = None) -> None:
    """Log an event, and tell all who subscribed; never raises.

    Args:
        event: What happened.
        limit: Holds the log lines back, not the subscribers.
    """
    if _log.logger.isEnabledFor(event.level):
        fields = dataclasses.asdict(event)
        del fields["at"]
        _log.event(event.level, event.name, str(event), limit=limit, **fields)
    for tell in _subscribers:
        try:
            tell(event)
        except Exception as error:  # noqa: BLE001 - the program's own code, inside a request of it
            _log.own_failure("a subscriber's function", error, strict=False)


def _renew_lock() -> None:
    """In a forked child: who held it in the parent is not there to let go."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
