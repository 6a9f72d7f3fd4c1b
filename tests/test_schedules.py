"""Random schedules of faults and of the program, against a real tinker and the lab.

What is drawn here with fixed seeds is drawn at random where ``SCHEDULES_SEED`` says so, and
in other numbers where ``SCHEDULES`` does. A schedule that fails is printed as a program.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.common import chains, sent_in_vain
from tests.schedules.draw import repeatable, schedules
from tests.schedules.judge import safety_violations, violations
from tests.schedules.model import (
    REFUSED_UNSEEN,
    UNCERTAIN,
    Actor,
    Client,
    DrawnFault,
    Kind,
    Op,
    Phase,
    Schedule,
    inf,
)
from tests.schedules.runner import Played, play

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Plain = Callable[[], AbstractContextManager[None]]

PARTS = 8
"""Tests that share the examples, so that they can run side by side."""

EXAMPLES = int(os.environ.get("SCHEDULES", "320")) // PARTS

_seed = os.environ.get("SCHEDULES_SEED", "0")
SEED = random.getrandbits(32) if _seed == "random" else int(_seed)

RELEASE = metadata.version("tinker")
"""Draws other schedules for each release: those of several, side by side, are distinct."""

pytestmark = [
    # A failing schedule is made smaller first: a few hundred runs.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="its asyncio waits where no clock is read"),
]


def each(
    strategy: SearchStrategy[Schedule], number: int, part: int, test: Callable[[Schedule], None]
) -> None:
    """Run a test on schedules of a strategy, and print how many of them are of the kind that hurts.

    Each is drawn by itself: of a hundred examples drawn together most are copies of an earlier
    one with a part of it repeated, and those find little.
    """
    seen = Counter[str]()

    def run(_: int, schedule: Schedule) -> None:
        seen["schedules"] += 1
        seen["with an answer lost in an outage"] += schedule.loses_in_outage()
        test(schedule)

    # What hypothesis tries first is the simplest of all: filtered out, or it would be the only one.
    drawn = given(st.integers(0, 2**31).filter(bool), strategy)(run)
    # `deadline`, `too_slow`: an example is an outage that is waited for. `database`: the same
    # examples everywhere.
    drawn = settings(
        max_examples=1,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )(drawn)
    for example in range(number):
        seed(f"{SEED} {part} {example} {RELEASE}")(drawn)()
    sys.stdout.write(f"{dict(seen)}\n")


@pytest.fixture(autouse=True)
def _quiet(overheard: Any) -> None:
    """What httpx says of each of some ten thousand requests is other tests' business."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def judge(played: Played) -> None:
    found = violations(played)
    if found and not safety_violations(played):
        # Waits and their ends are a matter of the machine too: it has to be so twice.
        played = play(played.schedule, shim=played.shim)
        found = violations(played)
    lines = (f"with seed {SEED}:", *found, "", played.schedule.script(), played.lines())
    assert not found, "\n".join(lines)


def play_and_judge(schedule: Schedule) -> None:
    judge(play(schedule))


@pytest.mark.parametrize("part", range(PARTS))
def test_random_faults_leave_no_violation(part: int) -> None:
    each(schedules(), EXAMPLES // 2, part, play_and_judge)


@pytest.mark.parametrize("part", range(PARTS))
def test_answers_lost_in_outages_add_no_execution(part: int) -> None:
    """Gateway replicas restart: what may have been carried out is not sent again by the shim."""
    each(schedules(restarting=True), EXAMPLES - EXAMPLES // 2, part, play_and_judge)


def one_call(kind: Kind, *faults: DrawnFault) -> Schedule:
    """A schedule of one call and an ``optim_step`` after it."""
    ops = (Op(kind=kind), Op(kind="optim_step"))
    return Schedule(clients=(Client(),), actors=(Actor(ops=ops),), faults=faults)


SUBMISSIONS: list[tuple[Kind, str]] = [
    ("forward_backward", "forward_backward"),
    ("optim_step", "optim_step"),
    ("save", "save"),
    ("load", "load"),
    ("sample", "save_sampler"),
]
"""Calls of the program, and the one of their requests that may not be repeated."""


@pytest.mark.parametrize("within", ["first", "replay"])
@pytest.mark.parametrize("lost", UNCERTAIN)
@pytest.mark.parametrize(("call", "kind"), SUBMISSIONS)
def test_stale_route_after_a_lost_answer_ends_the_call(
    call: Kind, kind: str, lost: str, within: str
) -> None:
    """tinker's own repeat gets the 404; so it does where the answer to a replay was lost."""
    # Longer than it takes a busy machine to repeat.
    stale = DrawnFault(phase="work", shape="gateway", kinds=(kind,), seconds=6.0)
    fault = DrawnFault(phase="work", shape=lost, kinds=(kind,), count=1, then=stale)
    if within == "replay":
        fault = replace(stale, seconds=inf, count=1, then=fault)
    played = play(one_call(call, fault))
    assert any(sent_in_vain(tries) for tries in chains(played.exchanges).values())
    judge(played)


@pytest.mark.parametrize("harmless", REFUSED_UNSEEN)
@pytest.mark.parametrize(("call", "kind"), SUBMISSIONS)
def test_stale_route_after_a_harmless_try_is_survived(call: Kind, kind: str, harmless: str) -> None:
    stale = DrawnFault(phase="work", shape="gateway", kinds=(kind,), seconds=2.0)
    judge(
        play(
            one_call(
                call, DrawnFault(phase="work", shape=harmless, kinds=(kind,), count=1, then=stale)
            )
        )
    )


@pytest.mark.parametrize("lost", UNCERTAIN)
@pytest.mark.parametrize(
    ("call", "kind", "phase"),
    [
        ("sample", "sample", "work"),
        ("optim_step", "poll", "work"),
        ("optim_step", "create_session", "connect"),
        ("optim_step", "create_model", "connect"),
    ],
)
def test_stale_route_after_a_lost_answer_is_survived_by_what_may_be_repeated(
    call: Kind, kind: str, phase: Phase, lost: str
) -> None:
    stale = DrawnFault(phase=phase, shape="gateway", kinds=(kind,), seconds=2.0)
    judge(
        play(
            one_call(call, DrawnFault(phase=phase, shape=lost, kinds=(kind,), count=1, then=stale))
        )
    )


@pytest.mark.parametrize("part", range(2))
def test_plain_tinker_under_random_faults_leaves_no_violation(part: int, plain: Plain) -> None:
    """The judge's idea of plain tinker, and that there is no violation in that."""

    def run(schedule: Schedule) -> None:
        judge(play(schedule, shim=False))

    with plain():
        each(schedules() | schedules(restarting=True), EXAMPLES // 2, part, run)


@pytest.mark.parametrize("part", range(2))
def test_other_faults_and_ended_jobs_end_as_with_plain_tinker(part: int, plain: Plain) -> None:
    """Request by request what plain tinker does: other faults, and jobs that have ended."""

    def run(schedule: Schedule) -> None:
        with plain():
            expected = play(schedule, shim=False)
        got = play(schedule)
        judge(got)
        said = (schedule.script(), expected.lines(), got.lines())
        assert account(got) == account(expected), "\n".join(said)

    each(repeatable(), EXAMPLES // 4, part, run)


def account(played: Played) -> list[str]:
    """What the program was told, and what was sent for it."""
    # How often a session is asked for its samples before they are there is a matter of the moment.
    aside = ("control_plane", "heartbeat", "telemetry", "get_info", "capabilities", "polls")
    told = [f"{one.op}: {one.state}, {type(one.error).__name__}" for one in played.results]
    # Sorted: what is not the program's is sent side by side with that.
    sent = sorted(
        f"{one.kind}:{one.subject} {one.seq_id} -> {one.status}"
        for one in played.exchanges
        if one.kind not in aside
    )
    return told + sent
