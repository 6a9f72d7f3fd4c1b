"""What a schedule is: faults of a gateway, replies of a control plane, and a program.

A schedule is plain data, so that hypothesis can shrink it and a failing one can be printed as
a program. All times are in seconds of the faster clock. Nothing here imports tinker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from tinker_routefix.lab import GATEWAY_404, Answer, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

Phase = Literal["connect", "work"]
"""When something is armed: before the first client connects, or once all have."""

inf: Final = math.inf
"""So that what is printed can be run."""

_HTML: Final = "<html><body>404 page not found</body></html>"
_BOTH: Final = {"detail": "no route", "error": "no route"}

GATEWAY_SHAPES: Final[dict[str, Answer]] = {
    "gateway": GATEWAY_404,
    "empty": Answer(404, b""),
    "html": Answer(404, _HTML, "text/html"),
    "truncated": Answer(404, GATEWAY_404.content[:40]),
    "list": Answer(404, "[]"),
    "both": Answer(404, _BOTH),
    "binary": Answer(404, bytes(range(256)), "application/octet-stream"),
    "large": Answer(404, b'{"error": "' + b"x" * 100_000 + b'"}'),
}
"""404s that are the gateway's, or may be: sent again where the job runs."""

PLAIN_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "pod": {"answer": Answer(404, {"detail": "Not Found"}), "at": "pod"},
    "400": {"answer": Answer(400, {"error": "bad"})},
    "bare 400": {"answer": Answer(400, b"")},
    "403": {"answer": Answer(403, {"error": "forbidden"})},
    "410": {"answer": Answer(410, {"error": "gone"})},
    "429": {"answer": Answer(429, {"error": "slow down"})},
    "500": {"answer": Answer(500, "oops", "text/plain"), "at": "pod"},
    "502": {"answer": Answer(502, b"")},
    "503": {"answer": Answer(503, {"queue_state": "route_not_ready"})},
    "drop": {"answer": None, "drop": True},
    "lost answer": {"answer": None, "lost_answer": True},
    "lost answer, 502": {"answer": Answer(502, b""), "lost_answer": True},
    "lost answer, 504": {"answer": Answer(504, b""), "lost_answer": True},
    "hang": {"answer": None, "hang": True},
    "slow": {"answer": None},
}
"""Everything else that can go wrong: none of the shim's business."""

LOST: Final = ("lost answer", "lost answer, 502", "lost answer, 504")
"""Where the trainer carries out a request and the client does not hear of it."""

UNCERTAIN: Final = (*LOST, "500", "502", "drop")
"""Where the client cannot know whether a request was carried out."""

REFUSED_UNSEEN: Final = ("429", "503", "bare 400")
"""Where it knows that the request was not, and tinker sends it again."""

REPLIES: Final[dict[str, dict[str, Any]]] = {
    **{
        state: {"answer": Answer(200, {"state": f"JOB_STATE_{state}"})}
        for state in ("CREATING", "DELETED", "PAUSED", "SINGING")
    },
    "missing": {"answer": Answer(404, {"error": {"code": "NOT_FOUND"}})},
    "forbidden": {"answer": Answer(403, {"error": {"code": "PERMISSION_DENIED"}})},
    "error": {"answer": Answer(500, {"error": {"code": "INTERNAL"}})},
    "html": {"answer": Answer(404, _HTML, "text/html")},
    "rubbish": {"answer": Answer(200, b"\x00\xff")},
    "redirect": {"answer": Answer(302, headers={"Location": "/elsewhere"})},
    "drop": {"answer": None, "drop": True},
    "hang": {"answer": None, "hang": True},
    "slow": {"answer": None, "delay": 1.0},
}
"""What the control plane may say for a while instead of RUNNING; ``slow``: RUNNING, but late."""

ENDED: Final = ("DELETED", "PAUSED", "missing", "forbidden")
"""Replies after which nothing is sent again, not even at connect."""


@dataclass(frozen=True, kw_only=True)
class DrawnFault:
    """Requests that go wrong for a while."""

    phase: Phase
    shape: str
    kinds: tuple[str, ...] | None = None
    """None: every kind but healthz."""
    starts: float = 0.0
    seconds: float = inf
    skip: int = 0
    count: int | None = None
    chance: float = 1.0
    delay: float = 0.0
    replica: int | None = None
    job: int | None = None
    """Which of the two jobs; None: both."""
    then: DrawnFault | None = None
    """What follows at once when this one strikes for the first time; its phase does not count."""

    @property
    def of_gateway(self) -> bool:
        """Whether it answers with 404s that the shim treats as the gateway's."""
        return self.shape in GATEWAY_SHAPES

    @property
    def answer(self) -> Answer | None:
        """What requests are answered with; None where there is no answer."""
        if self.of_gateway:
            return GATEWAY_SHAPES[self.shape]
        answer: Answer | None = PLAIN_SHAPES[self.shape]["answer"]
        return answer

    def fault(self, jobs: tuple[str, str]) -> Fault:
        """What the lab calls it."""
        how = {"answer": self.answer} if self.of_gateway else PLAIN_SHAPES[self.shape]
        return Fault(
            kinds=self.kinds,
            starts=self.starts,
            seconds=self.seconds,
            skip=self.skip,
            count=self.count,
            chance=self.chance,
            delay=self.delay,
            replica=self.replica,
            job=None if self.job is None else jobs[self.job],
            then=None if self.then is None else self.then.fault(jobs),
            **how,
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the control plane replies for a while."""

    phase: Phase
    reply: str
    starts: float = 0.0
    seconds: float = inf
    job: int | None = None

    def fault(self, jobs: tuple[str, str]) -> Fault:
        """What the lab calls it."""
        return Fault(
            kinds=["control_plane"],
            at="control_plane",
            starts=self.starts,
            seconds=self.seconds,
            job=None if self.job is None else jobs[self.job],
            **REPLIES[self.reply],
        )


@dataclass(frozen=True, kw_only=True)
class Happening:
    """What happens to the lab so many seconds after all have connected."""

    at: float
    what: Literal["connections dropped", "trainer restarted"]
    job: int = 0


@dataclass(frozen=True, kw_only=True)
class Client:
    """A training client."""

    job: int = 0
    service: int = 0
    """Clients of a job with the same number come from one ``ServiceClient``."""


Kind = Literal["forward_backward", "forward", "optim_step", "save", "load", "sample", "info"]
How = Literal["wait", "later", "timeout", "cancel"]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One call of the program."""

    kind: Kind
    parts: int = 1
    """How many submissions it is made of."""
    how: How = "wait"
    """``later``: its result is waited for when all else is done; ``timeout``: first with a
    ``result(timeout=seconds)``, then like that; ``cancel``: cancelled after ``seconds``."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A thread of the program, or a coroutine on a loop of its own."""

    ops: tuple[Op, ...]
    client: int = 0
    style: Literal["thread", "async"] = "thread"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything that is drawn."""

    clients: tuple[Client, ...]
    actors: tuple[Actor, ...]
    faults: tuple[DrawnFault, ...] = ()
    control_plane_replies: tuple[Reply, ...] = ()
    happenings: tuple[Happening, ...] = ()
    replicas: int = 1
    work_seconds: float = 0.0
    together: bool = False
    """Whether all clients connect at the same time."""
    telemetry: bool = False
    futures_together: bool = False
    """Whether samples are polled for together (0.26.2 and later)."""
    pyqwest: bool = False
    """Whether the second HTTP transport is used (0.22.0 and later)."""
    seed: int = 0

    def all_faults(self) -> Iterator[DrawnFault]:
        """Every fault, those that follow others included."""
        for fault in self.faults:
            link: DrawnFault | None = fault
            while link is not None:
                yield link
                link = link.then

    def loses_in_outage(self) -> bool:
        """Whether there are tries that may have been carried out and gateway 404s, both."""
        shapes = [fault.shape for fault in self.all_faults()]
        return not GATEWAY_SHAPES.keys().isdisjoint(shapes) and not {*UNCERTAIN}.isdisjoint(shapes)

    def script(self) -> str:
        """A program that plays it, to be run in a checkout."""
        return _SCRIPT.format(_shown(self))


_SCRIPT: Final = """\
from tests.schedules.model import *
from tests.schedules.replay import replay

replay(
{}
)
"""


def _shown(value: Any, depth: int = 1) -> str:
    """Like ``repr``, without what is at its default, and in lines."""
    margin = "    " * depth
    if isinstance(value, tuple) and any(is_dataclass(one) for one in value):
        return "(\n" + "".join(f"{_shown(one, depth + 1)},\n" for one in value) + f"{margin})"
    if not is_dataclass(value):
        return repr(value)
    said = [
        f"{one.name}={_shown(getattr(value, one.name), depth + 1)}"
        for one in fields(value)
        if getattr(value, one.name) != one.default
    ]
    name = type(value).__name__
    if isinstance(value, Schedule):
        inner = "".join(f"{margin}    {one},\n" for one in said)
        return f"{margin}{name}(\n{inner}{margin})"
    return f"{margin}{name}({', '.join(said)})"
