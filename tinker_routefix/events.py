"""What happens on a route, as events: for the counters, the log, and programs that subscribe.

Every fact is published here, once. The counters of ``status()``, the final report and the log
lines are made of it, so that what a person reads and what a machine counts cannot drift apart.
An event never holds a key, a header or a body.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from . import _log

if TYPE_CHECKING:
    from ._log import RateLimit

__all__ = [
    "Cancelled",
    "ClientConnected",
    "Event",
    "FailedFast",
    "FixSeen",
    "GivenUp",
    "HeartbeatRefused",
    "ProbesSent",
    "QuestionAnswered",
    "QuestionAsked",
    "Recovered",
    "Refused",
    "Replayed",
    "RequestEvent",
    "State",
    "StepRepeated",
    "TelemetryDropped",
    "Uncertain",
    "WaitOutcome",
    "WaitOver",
    "Waiting",
    "WarmupEnded",
    "WarmupOutcome",
    "WarmupStarted",
    "subscribe",
]

State = Literal["running", "starting", "ended", "unknown"]
"""What the control plane's response means for a job; ``ended`` includes suspended."""
WarmupOutcome = Literal["warm", "timeout", "job ended", "error", "cancelled", "failed"]
"""How a warm-up ended."""
WaitOutcome = Literal["recovered", "given up", "ended"]
"""How a wait for the route ended."""


def counted(number: int, what: str) -> str:
    """A number of things, for a sentence."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that was seen or done on the route to one job."""

    name: ClassVar[str]
    """As in the log."""
    _level: ClassVar[int] = logging.INFO

    job: str
    """Account and name of the job, with a slash between them."""
    gateway: str = ""
    """The URL of the job's gateway, as in :class:`~tinker_routefix.JobStatus`; not in the log."""
    at: float = dataclasses.field(default_factory=time.time)
    """When it happened: a Unix timestamp, in seconds; not in the log, which has its own."""

    @property
    def level(self) -> int:
        """The log line's level, as in :mod:`logging`."""
        return self._level


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClientConnected(Event):
    """The first client of a job goes through the shim."""

    name: ClassVar[str] = "client.connected"

    release: str
    """Of the SDK whose client it is, as in ``tinker 0.38.0``."""
    control_plane: str
    """Where the control plane is asked: a URL, up to ``/v1``."""

    def __str__(self) -> str:
        return (
            f"a client of {self.release} connects to job {self.job} through the shim; the control "
            f"plane is at {self.control_plane}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WarmupStarted(Event):
    """The warm-up of a new model's route begins."""

    name: ClassVar[str] = "warmup.started"
    _level: ClassVar[int] = logging.DEBUG

    def __str__(self) -> str:
        return f"warming the route to job {self.job} up"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WarmupEnded(Event):
    """A warm-up has ended, one way or the other."""

    name: ClassVar[str] = "warmup.ended"

    outcome: WarmupOutcome
    """``warm``; ``timeout`` (404s to the end) or ``job ended``, which the caller gets as an
    exception; ``error``: something else failed, and the next call gets that error; ``cancelled``:
    the program stopped waiting for its client; ``failed``: the shim did, and stepped aside."""
    rounds: int
    """How often all probes were sent; 1 on a healthy route."""
    refused: bool
    """Whether it got a 404."""
    seconds: float
    """How long it took, in seconds."""
    error: str | None = None
    """The name of the exception's class, where one ended it."""

    @property
    def level(self) -> int:
        """The log line's level: a healthy route is no news, one that is not there is bad news."""
        if self.outcome in ("timeout", "job ended", "error"):
            return logging.WARNING
        healthy = self.outcome in ("warm", "cancelled") and not self.refused
        return logging.DEBUG if healthy else logging.INFO

    def __str__(self) -> str:
        if self.outcome == "warm":
            return f"the route to job {self.job} is warm after {self.seconds:.1f} s"
        if self.outcome == "error":
            return (
                f"the warm-up of job {self.job} failed with {self.error}; the next call gets that "
                "error, if it lasts"
            )
        return f"the warm-up of job {self.job} ended after {self.seconds:.1f} s: {self.outcome}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent(Event):
    """Something about one request of the program that was refused."""

    request: str
    """Which one, as in ``forward_backward`` or ``retrieve_future (OptimStep)``; ``warm-up``."""
    replays: int
    """How many times it has been replayed (sent again) so far; how many rounds of a warm-up have
    failed before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refused(RequestEvent):
    """A request of the program, or a warm-up, got a 404 that is not the pod's own."""

    name: ClassVar[str] = "route.refused"

    @property
    def level(self) -> int:
        """The log line's level: the first 404 of a request is news, that of a replay is not."""
        return logging.DEBUG if self.replays else logging.INFO

    def __str__(self) -> str:
        return f"the gateway answered {self.request} of job {self.job} with a 404"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbesSent(Event):
    """The shim has sent requests of its own through the route: a warm-up's, or probes of a wait."""

    name: ClassVar[str] = "route.probed"
    _level: ClassVar[int] = logging.DEBUG

    number: int
    """How many."""

    def __str__(self) -> str:
        return f"probing the route to job {self.job} with {counted(self.number, 'request')}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAsked(Event):
    """A question to the control plane is sent; sent again over another connection, once more."""

    name: ClassVar[str] = "control_plane.asked"
    _level: ClassVar[int] = logging.DEBUG

    def __str__(self) -> str:
        return f"asking the control plane about job {self.job}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswered(Event):
    """The control plane was asked about the job, and this is the result."""

    name: ClassVar[str] = "control_plane.answered"
    _level: ClassVar[int] = logging.DEBUG

    state: State
    """What its response means: ``running``, ``starting``, ``ended`` (suspended, gone and not
    visible with this key included) or ``unknown`` (no usable response)."""
    control_plane_said: str
    """Its response, or why there is none."""
    seconds: float
    """How long that took, in seconds."""

    def __str__(self) -> str:
        return f"the control plane's response on job {self.job}: {self.control_plane_said}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Event):
    """Requests of the job have waited for its route for a while, and go on doing so.

    The first one comes after 2 s, the next ones every 15 s: one for all requests of the job.
    """

    name: ClassVar[str] = "route.waiting"
    _level: ClassVar[int] = logging.WARNING

    state: State
    """What the control plane's last response means, as in :class:`QuestionAnswered`."""
    control_plane_said: str
    """That response, or why there is none."""
    seconds: float
    """Seconds since the first 404 of the request that has waited longest."""
    at_most: float
    """How many seconds more it may wait."""

    def __str__(self) -> str:
        state = f"control plane: {self.control_plane_said}; trying"
        if self.state == "unknown":
            state = (
                f"no usable response of the control plane: {self.control_plane_said}; asking it "
                "and trying"
            )
        return (
            f"job {self.job}: the gateway has had no route for {self.seconds:.0f} s (HTTP 404); "
            f"{state} again, for at most {self.at_most:.0f} s more"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WaitOver(Event):
    """The wait that :class:`Waiting` has reported has ended."""

    name: ClassVar[str] = "route.wait_over"
    _level: ClassVar[int] = logging.WARNING

    outcome: WaitOutcome
    """``recovered``; ``given up``: the caller of a request gets the 404; ``ended``: the program
    stopped waiting, or a request has ended with another error."""
    control_plane_said: str
    """The control plane's last response on the job, or why there is none."""
    seconds: float
    """How long it lasted, in seconds."""

    def __str__(self) -> str:
        after = f"after {self.seconds:.0f} s"
        if self.outcome == "recovered":
            return f"job {self.job}: the route works again {after}; the run goes on"
        if self.outcome == "given up":
            return (
                f"job {self.job}: gave up on the route {after} (control plane: "
                f"{self.control_plane_said}); the exception says what to do"
            )
        return f"job {self.job}: nothing waits for the route any more, {after}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replayed(RequestEvent):
    """A refused request is sent again; also where its 404 does not tell whose it is, to find out.

    Such a 404 is a :class:`Refused` only once it is known not to be the pod's.
    """

    name: ClassVar[str] = "route.replayed"
    _level: ClassVar[int] = logging.DEBUG

    seconds: float
    """Seconds since its first 404."""

    def __str__(self) -> str:
        return f"sending {self.request} of job {self.job} again, replay {self.replays}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(RequestEvent):
    """A refused request got through."""

    name: ClassVar[str] = "route.recovered"

    seconds: float
    """Seconds from its first 404 to its answer."""

    def __str__(self) -> str:
        return (
            f"{self.request} of job {self.job} got through after {self.seconds:.1f} s "
            f"and {counted(self.replays, 'replay')}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(RequestEvent):
    """The program has stopped waiting for a refused request."""

    name: ClassVar[str] = "route.cancelled"

    seconds: float
    """Seconds since its first 404."""

    def __str__(self) -> str:
        return (
            f"the program stopped waiting for {self.request} of job {self.job} after "
            f"{self.seconds:.1f} s and {counted(self.replays, 'replay')}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp(RequestEvent):
    """A request was refused until it timed out; the caller gets the 404."""

    name: ClassVar[str] = "route.given_up"
    _level: ClassVar[int] = logging.WARNING

    state: State
    """What the control plane's last response means, as in :class:`QuestionAnswered`."""
    control_plane_said: str
    """That response, or why there is none."""
    age_seconds: float
    """How old that response is, in seconds."""
    seconds: float
    """Seconds since the request's first 404."""

    def __str__(self) -> str:
        return (
            f"the gateway answered {self.request} of job {self.job} with a 404; the control "
            f"plane's response on the job, {self.age_seconds:.1f} s before: "
            f"{self.control_plane_said}; {counted(self.replays, 'replay')} in {self.seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailedFast(GivenUp):
    """What the control plane says ended the wait; the caller gets the 404."""

    name: ClassVar[str] = "route.failed_fast"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Uncertain(RequestEvent):
    """A request is not replayed: an earlier try of it may have been carried out.

    The caller gets the 404, as from tinker alone.
    """

    name: ClassVar[str] = "route.uncertain"
    _level: ClassVar[int] = logging.WARNING

    earlier: str
    """How that try ended, as in ``got no answer (ReadError)`` or ``was answered HTTP 502``."""
    seconds: float
    """Seconds since the request's first 404."""

    def __str__(self) -> str:
        return (
            f"the gateway answered {self.request} of job {self.job} with a 404, but an earlier try "
            f"of it {self.earlier}: it may have been carried out, and is not sent again"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRepeated(Event):
    """The program submits once more what has just ended in a 404: it has a retry of its own."""

    name: ClassVar[str] = "program.step_repeated"
    _level: ClassVar[int] = logging.WARNING

    request: str
    """Which endpoint, as in ``forward_backward``."""
    seconds: float
    """Seconds since the 404 was raised."""

    def __str__(self) -> str:
        return (
            f"the program has submitted {self.request} of job {self.job} again, {self.seconds:.1f} "
            "s after a 404 was raised for it: what was carried out of that step is now carried "
            "out twice. Remove your own retry around the SDK"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryDropped(Event):
    """A batch of tinker's telemetry was dropped instead of sent again, so that nobody waits for it.

    The wait for the route had failed, or lasted for long.
    """

    name: ClassVar[str] = "telemetry.dropped"
    _level: ClassVar[int] = logging.DEBUG

    def __str__(self) -> str:
        return f"dropped a batch of telemetry of job {self.job}, which has no route"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRefused(Event):
    """A heartbeat got a 404 that is not the pod's own; the next one has another connection."""

    name: ClassVar[str] = "heartbeat.refused"
    _level: ClassVar[int] = logging.DEBUG

    def __str__(self) -> str:
        return (
            f"the gateway answered a heartbeat of job {self.job} with a 404; its connection is "
            "replaced"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FixSeen(Event):
    """The gateway was seen to tell a stale route from a job that is gone: the real fix."""

    name: ClassVar[str] = "gateway.fix_seen"
    _level: ClassVar[int] = logging.DEBUG

    fix: str
    """Which one: ``503 route_not_ready``."""

    def __str__(self) -> str:
        return f"the gateway answered {self.fix} for the route to job {self.job}"


Callback = Callable[[Event], object]

_lock = threading.Lock()
_subscribers: tuple[Callback, ...] = ()
_listeners: tuple[Callback, ...] = ()
"""The shim's own: told first, so that whoever is told next finds the counters up to date."""


def listen(callback: Callback) -> None:
    """Have a function of the shim's own called with every event, before anybody else."""
    global _listeners
    with _lock:
        _listeners = (*_listeners, callback)


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
    """Count an event, log it, and tell all who subscribed, in this order; never raises.

    Args:
        event: What happened.
        limit: Holds the log lines back, not the subscribers.
    """
    for listener in _listeners:
        _tell(listener, event)
    if _log.is_wanted(event.level, event.name):
        fields = dataclasses.asdict(event)
        del fields["at"], fields["gateway"]
        _log.event(event.level, event.name, str(event), limit=limit, **fields)
    for subscriber in _subscribers:
        _tell(subscriber, event)


def _tell(callback: Callback, event: Event) -> None:
    try:
        callback(event)
    except Exception as error:  # noqa: BLE001 - the program's own code, inside a request of it
        _log.own_failure("a subscriber's function", error, strict=False)


def _renew_lock() -> None:
    """In a forked child: who held it in the parent is not there to let go."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
