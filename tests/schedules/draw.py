"""Draws schedules: the strategies, and the bounds that keep an example short.

Most of what is drawn has to be survived, or nothing would show that the shim works at all;
the rest has to end as with plain tinker.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hypothesis import strategies as st

from tests.schedules.judge import FEW, KINDS_OF, SHORT
from tests.schedules.model import (
    ENDED,
    GATEWAY_SHAPES,
    LOST,
    REFUSED_UNSEEN,
    REPLIES,
    UNCERTAIN,
    Actor,
    Client,
    DrawnFault,
    Happening,
    How,
    Kind,
    Op,
    Phase,
    Reply,
    Schedule,
    inf,
)

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

CONNECT_KINDS = ("config", "dynamic_config", "create_session", "create_model", "get_info")
WORK_KINDS = ("forward_backward", "forward", "optim_step", "save", "load", "save_sampler", "sample")

PASSING = (*UNCERTAIN, *REFUSED_UNSEEN, "slow")
"""What tinker itself survives, where it does not last."""
UNCLEAR = tuple(reply for reply in REPLIES if reply not in ENDED and reply != "slow")
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


def submissions_of(actors: list[Actor]) -> tuple[str, ...]:
    """What the program submits: other faults would strike nothing."""
    called = {kind for actor in actors for op in actor.ops for kind in KINDS_OF[op.kind]}
    return tuple(kind for kind in WORK_KINDS if kind in called) or WORK_KINDS


def with_polls(submissions: tuple[str, ...]) -> tuple[str, ...]:
    polls = ("poll", "polls") if "sample" in submissions else ("poll",)
    return (*submissions, *(f"poll:{kind}" for kind in submissions), *polls)


def kinds_in(phase: Phase, work: tuple[str, ...], excluding: tuple[str, ...]) -> list[str]:
    kinds = CONNECT_KINDS if phase == "connect" else with_polls(work)
    return [kind for kind in kinds if kind not in excluding]


def kinds_of(*kinds: str) -> SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def gateway_faults(draw: DrawFn, work: tuple[str, ...], *, extent: str, most: float) -> DrawnFault:
    """404s of the gateway: for so many seconds, so many of them, or for good."""
    phase = draw(PHASES)
    some = kinds_of(*(CONNECT_KINDS if phase == "connect" else with_polls(work)))
    how: dict[str, Any] = {}
    if extent == "seconds":
        how["seconds"] = draw(seconds(most))
        how["chance"] = draw(st.sampled_from((1.0, 1.0, 0.5, 0.2)))
    elif extent == "count":
        how["count"] = draw(st.integers(1, round(most)))
    if extent != "for good":
        how["skip"] = draw(st.sampled_from((0, 0, 0, 1, 2, 5)))
    return DrawnFault(
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
def survivable_faults(draw: DrawFn, work: tuple[str, ...]) -> list[DrawnFault]:
    """As much as the shim has to bring every call through."""
    number = draw(st.integers(0, 3))
    if draw(st.booleans()):
        return [draw(gateway_faults(work, extent="count", most=1)) for _ in range(min(number, FEW))]
    most = SHORT / max(number, 1)
    return [draw(gateway_faults(work, extent="seconds", most=most)) for _ in range(number)]


@st.composite
def hopeless_faults(draw: DrawFn, work: tuple[str, ...]) -> list[DrawnFault]:
    """Whatever there is, and some of it for good."""
    extents = st.sampled_from(("seconds", "count", "for good"))
    number = draw(st.integers(0, 3))
    return [draw(gateway_faults(work, extent=draw(extents), most=SHORT)) for _ in range(number)]


@st.composite
def plain_faults(
    draw: DrawFn, work: tuple[str, ...], excluding: tuple[str, ...] = ()
) -> DrawnFault:
    """What is none of the shim's business, so many times."""
    phase = draw(PHASES)
    some = kinds_in(phase, work, excluding)
    shape = draw(st.sampled_from((*PASSING, *FATAL)))
    count = draw(st.integers(1, 3))
    return DrawnFault(
        phase=phase,
        shape=shape,
        kinds=draw(kinds_of(*some)),
        skip=draw(st.integers(0, 3)),
        count=count,
        delay=draw(seconds(1.0)) if shape == "slow" else 0.0,
    )


def hanging_probes() -> SearchStrategy[DrawnFault]:
    """The shim's own requests are never answered; tinker's would wait for a minute."""
    return st.builds(
        DrawnFault,
        phase=st.just("work"),
        shape=st.just("hang"),
        kinds=st.just(("get_info",)),
        count=st.integers(1, 4),
    )


def replies(*, hopeless: bool) -> SearchStrategy[Reply]:
    reply = st.just("slow")
    if hopeless:
        reply = st.one_of(reply, st.sampled_from(ENDED), st.sampled_from(UNCLEAR))
    return st.builds(
        Reply,
        phase=PHASES,
        reply=reply,
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
def restarts(draw: DrawFn, work: tuple[str, ...], *, most: float) -> DrawnFault:
    """A gateway replica restarts: an answer is lost, and the route is stale for what comes next.

    That is tinker's own repeat of the same request: its first one, or one within a replay.
    """
    phase: Phase = draw(st.sampled_from(("work", "work", "work", "connect")))
    some = draw(kinds_of(*(CONNECT_KINDS if phase == "connect" else work)))
    replica = draw(st.sampled_from((None, None, None, 0, 1)))
    first = draw(st.sampled_from((0.0, 0.0, 0.5)))
    stale = DrawnFault(
        phase=phase,
        shape=draw(st.sampled_from(("gateway", *GATEWAY_SHAPES))),
        kinds=draw(st.sampled_from((some, some, None))),
        # tinker repeats after half a second, or after one.
        seconds=1.0 + draw(seconds(most - first - 1.0)),
        replica=replica,
    )
    lost = DrawnFault(
        phase=phase,
        shape=draw(st.sampled_from((*LOST, *LOST, *UNCERTAIN, *REFUSED_UNSEEN))),
        kinds=some,
        skip=0 if first else draw(st.sampled_from((0, 0, 1, 2))),
        count=draw(st.sampled_from((1, 1, 2))),
        replica=replica,
        then=stale,
    )
    if not first:
        return lost
    skip = draw(st.sampled_from((0, 0, 1, 2)))
    return replace(stale, kinds=some, seconds=first, skip=skip, then=lost)


@st.composite
def schedules(draw: DrawFn, *, restarting: bool = False) -> Schedule:
    """Anything that may happen.

    Args:
        draw: Draws.
        restarting: Whether the outages are those of gateway replicas that restart.

    """
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
    work = submissions_of(actors)
    if restarting:
        number = draw(st.sampled_from((1, 1, 2)))
        faults = [draw(restarts(work, most=SHORT / number)) for _ in range(number)]
    else:
        faults = draw(hopeless_faults(work) if hopeless else survivable_faults(work))
    faults += draw(seldom(st.lists(plain_faults(work), min_size=1, max_size=2)))
    if not any(op.kind == "info" for actor in actors for op in actor.ops):
        faults += draw(seldom(st.lists(hanging_probes(), max_size=1)))
    replied = st.lists(replies(hopeless=hopeless), min_size=1, max_size=2)
    happened = st.lists(happenings(), max_size=2)
    return Schedule(
        clients=tuple(clients),
        actors=tuple(actors),
        faults=tuple(draw(st.permutations(faults))),
        control_plane_replies=tuple(draw(seldom(replied))),
        happenings=tuple(draw(seldom(happened))),
        replicas=draw(st.sampled_from((1, 2, 3))),
        work_seconds=draw(st.sampled_from((0.0, 0.0, 0.05, 0.3))),
        together=draw(st.booleans()),
        telemetry=draw(st.booleans()),
        futures_together=draw(st.booleans()),
        pyqwest=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


NOT_BY_NUMBER = ("get_info", "polls")
"""What the shim sends as well; how often a session is asked for its samples."""


@st.composite
def repeatable(draw: DrawFn) -> Schedule:
    """One call after the other, and faults by number: the same again, request by request.

    Without 404s of the gateway, or with a job that has ended: the shim is to change nothing. From
    the first 404 on everything of that job gets one: a pod that goes on answering is proof that it
    runs, whatever the control plane has said once.
    """
    style: Style = draw(st.sampled_from(("thread", "async")))
    program = draw(st.lists(ops(style, waits=("wait",)), min_size=1, max_size=6))
    # Of parts that are sent side by side another one may be the first that a fault strikes.
    actor = Actor(ops=tuple(replace(op, parts=1) for op in program), style=style)
    work = submissions_of([actor])
    faults = draw(st.lists(plain_faults(work, NOT_BY_NUMBER), max_size=2))
    replied: tuple[Reply, ...] = ()
    if draw(st.booleans()):
        phase = draw(PHASES)
        shape = draw(st.sampled_from(tuple(GATEWAY_SHAPES)))
        faults.append(
            DrawnFault(
                phase=phase,
                shape=shape,
                kinds=draw(kinds_of(*kinds_in(phase, work, NOT_BY_NUMBER))),
                skip=draw(st.integers(0, 3)),
                count=1,
                then=DrawnFault(phase=phase, shape=shape),
            )
        )
        replied = (Reply(phase="connect", reply=draw(st.sampled_from(ENDED))),)
    return Schedule(
        clients=(Client(),),
        actors=(actor,),
        faults=tuple(faults),
        control_plane_replies=replied,
        futures_together=draw(st.booleans()),
        pyqwest=draw(st.booleans()),
    )
