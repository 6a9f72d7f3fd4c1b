"""Random schedules of troubles and of the program, against a real tinker and the lab.

What is drawn here with fixed seeds is drawn at random where ``SCHEDULES_SEED`` says so, and
in other numbers where ``SCHEDULES`` does. A schedule that fails is printed as a program.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.schedules.draw import repeatable, schedules
from tests.schedules.judge import complaints, damage
from tests.schedules.runner import Played, play

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from tests.schedules.model import Schedule

Plain = Callable[[], AbstractContextManager[None]]

PARTS = 8
"""Tests that share the examples, so that they can run side by side."""

EXAMPLES = int(os.environ.get("SCHEDULES", "320")) // PARTS

_seed = os.environ.get("SCHEDULES_SEED", "0")
SEED = random.getrandbits(32) if _seed == "random" else int(_seed)

pytestmark = [
    # A failing schedule is made smaller first: a few hundred runs.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="its asyncio waits where no clock is read"),
]


def each(strategy: SearchStrategy[Schedule], number: int, part: int) -> Callable[..., Any]:
    """Run a test on schedules of a strategy."""

    def decorate(test: Callable[[Schedule], None]) -> Callable[[], None]:
        # `deadline`, `too_slow`: an example is an outage that is waited for. `database`: the
        # same examples everywhere.
        return settings(
            max_examples=number,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            phases=[Phase.generate, Phase.shrink],
        )(seed(SEED * PARTS + part)(given(strategy)(test)))

    return decorate


@pytest.fixture(autouse=True)
def _quiet(overheard: Any) -> None:
    """What httpx says of each of some ten thousand requests is other tests' business."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def judge(played: Played) -> None:
    found = complaints(played)
    if found and not damage(played):
        # Waits and their ends are a matter of the machine too: it has to be so twice.
        played = play(played.schedule, shim=played.shim)
        found = complaints(played)
    lines = (f"with seed {SEED}:", *found, "", played.schedule.script(), played.lines())
    assert not found, "\n".join(lines)


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_happens(part: int) -> None:
    @each(schedules(), EXAMPLES, part)
    def run(schedule: Schedule) -> None:
        judge(play(schedule))

    run()


@pytest.mark.parametrize("part", range(2))
def test_plain_tinker_is_what_it_is_taken_for(part: int, plain: Plain) -> None:
    """The judge's idea of plain tinker, and that it does not complain about that."""

    @each(schedules(), EXAMPLES // 2, part)
    def run(schedule: Schedule) -> None:
        judge(play(schedule, shim=False))

    with plain():
        run()


@pytest.mark.parametrize("part", range(2))
def test_what_is_not_its_business(part: int, plain: Plain) -> None:
    """Request by request what plain tinker does: other troubles, and jobs that are over."""

    @each(repeatable(), EXAMPLES // 4, part)
    def run(schedule: Schedule) -> None:
        with plain():
            expected = play(schedule, shim=False)
        got = play(schedule)
        judge(got)
        said = (schedule.script(), expected.lines(), got.lines())
        assert account(got) == account(expected), "\n".join(said)

    run()


def account(played: Played) -> list[str]:
    """What the program was told, and what was sent for it."""
    aside = ("control_plane", "heartbeat", "telemetry", "get_info", "capabilities")
    told = [f"{one.op}: {one.state}, {type(one.error).__name__}" for one in played.results]
    # Sorted: the parts of a batch are sent side by side.
    sent = sorted(
        f"{one.kind}:{one.subject} {one.seq_id} -> {one.status}"
        for one in played.exchanges
        if one.kind not in aside
    )
    return told + sent
