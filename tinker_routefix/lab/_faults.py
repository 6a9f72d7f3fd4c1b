"""Scripted faults: which requests are answered wrongly, by whom, when, and how often.

Everything is decided by counters, clocks and seeded generators, so that a run can be repeated.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

Stage = Literal["gateway", "pod", "control_plane"]


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes | str | dict[str, Any] = b""
    """A dict is sent as JSON, text as UTF-8."""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        if isinstance(self.body, bytes):
            return self.body
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return text.encode()


GATEWAY_404: Final = Answer(
    404,
    {
        "error": {
            "message": "Trainer job not found or not running",
            "param": "jobId",
            "code": "NOT_FOUND",
        }
    },
)
"""What a gateway replica answers whose route table does not have the job."""


@dataclass(eq=False)
class Exchange:
    """One request that reached the server, and what became of it."""

    at: float
    """Seconds since the lab started."""
    kind: str
    method: str
    path: str
    """As sent, with the gateway's prefix and without the query."""
    job: str | None = None
    subject: str | None = None
    """Of a poll: the kind of the operation that it asks for, None when that is unknown."""
    replica: int | None = None
    """The gateway replica, None when no gateway was involved."""
    connection: int = 0
    """Numbers the TCP connections of a lab, from 0."""
    status: int | None = None
    """None while in flight, and for ever when the connection was closed instead."""
    error: Answer | None = None
    """The answer, where it was an error."""
    refused: bool = False
    """Whether the gateway answered it with 404."""
    reached: bool = False
    """Whether it reached the trainer and was handled there."""
    headers: dict[str, str] = field(default_factory=dict)
    """With names in lower case."""
    body: bytes = b""
    """As received: not decompressed."""
    said: dict[str, Any] | None = None
    """The body as JSON, also when it was protobuf; None when it could not be read."""
    seconds: float = math.nan
    """How long it took; not a number while in flight."""

    @property
    def seq_id(self) -> int | None:
        """The sequence number in the body."""
        return (self.said or {}).get("seq_id")

    @property
    def model_id(self) -> str | None:
        """The model that the body names."""
        return (self.said or {}).get("model_id")

    @property
    def names(self) -> set[str]:
        """What ``Fault.kinds`` may call it: ``poll`` and ``poll:optim_step``, say."""
        return {self.kind, f"{self.kind}:{self.subject}"} if self.subject else {self.kind}

    def __str__(self) -> str:
        name = f"{self.kind}:{self.subject}" if self.subject else self.kind
        return f"{self.at:8.3f}s {name} seq={self.seq_id} -> {self.status} ({self.path})"


@dataclass(eq=False)
class Fault:
    """Which requests go wrong, and how. All conditions have to hold."""

    kinds: Collection[str] | None = None
    """Names of requests (``poll`` means any poll, ``poll:optim_step`` those for one kind of
    operation); None means every one but healthz."""
    excluding: Collection[str] = ()
    replica: int | None = None
    job: str | None = None
    starts: float = 0.0
    """Seconds after it was armed."""
    seconds: float = math.inf
    """How long it lasts."""
    skip: int = 0
    """How many matching requests are let through first."""
    count: int | None = None
    """How many times it strikes at most; None means without limit."""
    chance: float = 1.0
    """Probability to strike, seeded by the lab's seed."""
    at: Stage = "gateway"
    """Who answers wrongly: the gateway before the trainer sees the request, the trainer itself
    (without carrying it out), or the control plane."""
    answer: Answer | None = GATEWAY_404
    delay: float = 0.0
    """Seconds to wait first. With ``answer=None`` nothing but the delay happens."""
    drop: bool = False
    """Close the connection instead of answering."""
    hang: bool = False
    """Never answer: hold the request until the client or the lab goes away."""
    lost_answer: bool = False
    """Let the trainer carry it out, then answer as above; with ``answer=None`` like ``drop``."""
    when: Callable[[Exchange], bool] | None = None
    then: Fault | None = None
    """Armed when this one strikes for the first time."""

    hits: int = field(default=0, init=False)
    """How often it struck."""
    _armed: float = field(default=math.inf, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)
    _random: random.Random = field(default_factory=random.Random, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a stage that does not exist: such a fault would never strike.

        Raises:
            ValueError: ``at`` is no stage.
        """
        if self.at not in get_args(Stage):
            stages = ", ".join(map(repr, get_args(Stage)))
            raise ValueError(f"Fault(at={self.at!r}) is not accepted: expected one of {stages}")

    @property
    def only_delays(self) -> bool:
        """Whether the request goes on after the delay."""
        return not (self.answer or self.drop or self.hang or self.lost_answer)

    def _matches(self, exchange: Exchange, stage: Stage, now: float) -> bool:
        names = exchange.names
        return (
            self.at == stage
            and (
                exchange.kind != "healthz"
                if self.kinds is None
                else not names.isdisjoint(self.kinds)
            )
            and names.isdisjoint(self.excluding)
            and self.replica in (None, exchange.replica)
            and self.job in (None, exchange.job)
            and 0 <= now - self._armed - self.starts < self.seconds
            and (self.when is None or self.when(exchange))
        )

    def _strikes(self, exchange: Exchange, stage: Stage, now: float) -> bool:
        if not self._matches(exchange, stage, now):
            return False
        self._seen += 1
        if self._seen <= self.skip or (self.count is not None and self.hits >= self.count):
            return False
        if self.chance < 1 and self._random.random() >= self.chance:
            return False
        self.hits += 1
        return True


class Faults:
    """The armed faults of a lab. Thread-safe."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._armed = 0
        self._faults: list[Fault] = []
        # Reentrant: a predicate may arm or clear faults itself.
        self._lock = threading.RLock()

    def arm(self, fault: Fault) -> Fault:
        """Start a fault's clock and counters."""
        with self._lock:
            # One generator per fault: what one of them draws does not change the others.
            fault._random.seed(f"{self._seed}/{self._armed}")
            self._armed += 1
            fault._armed = time.monotonic()
            fault._seen = fault.hits = 0
            if fault in self._faults:
                self._faults.remove(fault)
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Disarm all."""
        with self._lock:
            self._faults.clear()

    def strike(self, exchange: Exchange, stage: Stage) -> tuple[float, Fault | None]:
        """Seconds to wait, and the first fault that applies apart from mere delays."""
        delay = 0.0
        with self._lock:
            # What a predicate arms is reached too, hence the clock is read anew for each.
            for fault in self._faults:
                if fault._strikes(exchange, stage, time.monotonic()):
                    if fault.then is not None and fault.hits == 1:
                        self.arm(fault.then)
                    delay += fault.delay
                    if not fault.only_delays:
                        return delay, fault
        return delay, None
