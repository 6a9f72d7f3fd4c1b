"""Draws schedules: the strategies, and the bounds that keep an example short.

Most of what is drawn has to be survived, or nothing would show that the shim works at all;
the rest has to end as with plain tinker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hypothesis import strategies as st

from tests.schedules.judge import FEW, SHORT
from tests.schedules.model import (
    GATEWAY_SHAPES,
    OVER,
    WORDS,
    Actor,
    Client,
    Happening,
    How,
    Kind,
    Op,
    Phase,
    Schedule,
    Trouble,
    Word,
    inf,
)

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

CONNECT_KINDS = ("config", "dynamic_config", "create_session", "create_model", "get_info")
WORK_KINDS = ("forward_backward", "forward", "optim_step", "save", "load", "save_sampler", "sample")
POLL_KINDS = ("poll", *(f"poll:{kind}" for kind in WORK_KINDS), "polls")

PASSING = ("429", "500", "503", "drop", "lost answer", "lost answer, 502", "bare 400", "slow")
"""What tinker itself gets over, where it does not last."""
UNCLEAR = tuple(word for word in WORDS if word not in OVER and word != "slow")
FATAL = ("pod", "400", "403", "410")
"""What ends a call of plain tinker."""


T = TypeVar("T")
Style = Literal["thread", "async"]
PHASES: SearchStrategy[Phase] = st.sampled_from(("work", "connect"))


def seconds(most: float) -> SearchStrategy[float]:
    # Tenths: a shrunk schedule is easier to read.
    return st.integers(0, round(most * 10)).map(lambda tenths: tenths / 10)


def seldom(what: SearchStrategy[list[T]]) -> SearchStrategy[list[T]]:
    """In one schedule out of three."""
    nothing: SearchStrategy[list[T]] = st.just([])
    return st.one_of(nothing, nothing, what)


def kinds_of(*kinds: str) -> SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def gateway_troubles(draw: DrawFn, *, extent: str, most: float) -> Trouble:
    """404s of the gateway: for so many seconds, so many of them, or for good."""
    phase = draw(PHASES)
    some = kinds_of(*CONNECT_KINDS) if phase == "connect" else kinds_of(*WORK_KINDS, *POLL_KINDS)
    how: dict[str, Any] = {}
    if extent == "seconds":
        how["seconds"] = draw(seconds(most))
        how["chance"] = draw(st.sampled_from((1.0, 1.0, 0.5, 0.2)))
    elif extent == "count":
        how["count"] = draw(st.integers(1, round(most)))
    if extent != "for good":
        how["skip"] = draw(st.sampled_from((0, 0, 0, 1, 2, 5)))
    return Trouble(
        phase=phase,
        shape=draw(st.sampled_from(("gateway", *GATEWAY_SHAPES))),
        kinds=draw(st.one_of(st.none(), some)),
        starts=draw(seconds(2.0)),
        replica=draw(st.sampled_from((None, None, 0, 1))),
        job=draw(st.sampled_from((None, None, 0, 1))),
        delay=draw(st.sampled_from((0.0, 0.0, 0.0, 0.3))),
        **how,
    )


@st.composite
def survivable_troubles(draw: DrawFn) -> list[Trouble]:
    """As much as the shim has to bring every call through."""
    number = draw(st.integers(0, 3))
    if draw(st.booleans()):
        return [draw(gateway_troubles(extent="count", most=1)) for _ in range(min(number, FEW))]
    most = SHORT / max(number, 1)
    return [draw(gateway_troubles(extent="seconds", most=most)) for _ in range(number)]


@st.composite
def hopeless_troubles(draw: DrawFn) -> list[Trouble]:
    """Whatever there is, and some of it for good."""
    extents = st.sampled_from(("seconds", "count", "for good"))
    number = draw(st.integers(0, 3))
    return [draw(gateway_troubles(extent=draw(extents), most=SHORT)) for _ in range(number)]


@st.composite
def plain_troubles(draw: DrawFn, *, probes: bool = True) -> Trouble:
    """What is none of the shim's business, so many times.

    Without ``probes`` it is nothing that the shim's own requests meet, too.
    """
    phase = draw(PHASES)
    some = (
        CONNECT_KINDS[: None if probes else -1]
        if phase == "connect"
        else (*WORK_KINDS, *POLL_KINDS)
    )
    shape = draw(st.sampled_from((*PASSING, *FATAL)))
    count = draw(st.integers(1, 3))
    return Trouble(
        phase=phase,
        shape=shape,
        kinds=draw(kinds_of(*some)),
        skip=draw(st.integers(0, 3)),
        count=count,
        delay=draw(seconds(1.0)) if shape == "slow" else 0.0,
    )


def hanging_probes() -> SearchStrategy[Trouble]:
    """The shim's own requests are never answered; tinker's would wait for a minute."""
    return st.builds(
        Trouble,
        phase=st.just("work"),
        shape=st.just("hang"),
        kinds=st.just(("get_info",)),
        count=st.integers(1, 4),
    )


def words(*, hopeless: bool) -> SearchStrategy[Word]:
    says = st.just("slow")
    if hopeless:
        says = st.one_of(says, st.sampled_from(OVER), st.sampled_from(UNCLEAR))
    return st.builds(
        Word,
        phase=PHASES,
        says=says,
        starts=seconds(3.0),
        seconds=st.one_of(st.just(inf), seconds(3.0)),
        job=st.sampled_from((None, 0, 1)),
    )


def happenings() -> SearchStrategy[Happening]:
    return st.builds(
        Happening,
        at=seconds(4.0),
        what=st.sampled_from(("connections dropped", "connections dropped", "trainer restarted")),
        job=st.sampled_from((0, 1)),
    )


WAITS: tuple[How, ...] = ("wait", "later", "wait", "later", "later", "timeout", "cancel")


@st.composite
def ops(draw: DrawFn, style: Style, waits: tuple[How, ...] = WAITS) -> Op:
    kinds: tuple[Kind, ...] = ("forward_backward", "optim_step") * 2 + ("forward", "save")
    alone: tuple[Kind, ...] = ("load", "sample", "info") if style == "thread" else ()
    kind = draw(st.sampled_from((*kinds, *alone)))
    how = "wait" if kind in alone else draw(st.sampled_from(waits))
    return Op(
        kind=kind,
        parts=draw(st.sampled_from((1, 1, 1, 2, 3))) if kind.startswith("forward") else 1,
        how=how,
        seconds=draw(seconds(3.0)) if how in ("timeout", "cancel") else 0.0,
    )


@st.composite
def schedules(draw: DrawFn) -> Schedule:
    """Anything that may happen."""
    clients = draw(
        st.lists(
            st.builds(Client, job=st.sampled_from((0, 0, 1)), service=st.sampled_from((0, 0, 1))),
            min_size=1,
            max_size=3,
        )
    )
    actors = []
    for client in range(len(clients)):
        for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
            style: Style = draw(st.sampled_from(("thread", "thread", "async")))
            program = draw(st.lists(ops(style), min_size=1, max_size=6))
            actors.append(Actor(ops=tuple(program), client=client, style=style))
    hopeless = draw(st.sampled_from((False, False, True)))
    troubles = draw(hopeless_troubles() if hopeless else survivable_troubles())
    troubles += draw(seldom(st.lists(plain_troubles(), min_size=1, max_size=2)))
    if not any(op.kind == "info" for actor in actors for op in actor.ops):
        troubles += draw(seldom(st.lists(hanging_probes(), max_size=1)))
    said = st.lists(words(hopeless=hopeless), min_size=1, max_size=2)
    happened = st.lists(happenings(), max_size=2)
    return Schedule(
        clients=tuple(clients),
        actors=tuple(actors),
        troubles=tuple(draw(st.permutations(troubles))),
        words=tuple(draw(seldom(said))),
        happenings=tuple(draw(seldom(happened))),
        replicas=draw(st.sampled_from((1, 2, 3))),
        work_seconds=draw(st.sampled_from((0.0, 0.0, 0.05, 0.3))),
        together=draw(st.booleans()),
        telemetry=draw(st.booleans()),
        futures_together=draw(st.booleans()),
        pyqwest=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


@st.composite
def repeatable(draw: DrawFn) -> Schedule:
    """One call after the other, and troubles by number: the same again, request by request.

    Without 404s of the gateway, or with a job that is over: the shim is to change nothing.
    """
    style: Style = draw(st.sampled_from(("thread", "async")))
    program = draw(st.lists(ops(style, waits=("wait",)), min_size=1, max_size=6))
    troubles = draw(st.lists(plain_troubles(probes=False), max_size=2))
    said: tuple[Word, ...] = ()
    if draw(st.booleans()):
        phase = draw(PHASES)
        kinds = CONNECT_KINDS[:-1] if phase == "connect" else (*WORK_KINDS, *POLL_KINDS)
        troubles.append(
            Trouble(
                phase=phase,
                shape=draw(st.sampled_from(tuple(GATEWAY_SHAPES))),
                kinds=draw(kinds_of(*kinds)),
                skip=draw(st.integers(0, 3)),
            )
        )
        said = (Word(phase="connect", says=draw(st.sampled_from(OVER))),)
    return Schedule(
        clients=(Client(),),
        actors=(Actor(ops=tuple(program), style=style),),
        troubles=tuple(troubles),
        words=said,
        futures_together=draw(st.booleans()),
        pyqwest=draw(st.booleans()),
    )
