"""Plays one schedule and shows what the lab saw: for schedules that a test has printed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console

# Before the shim and tinker are imported.
os.environ.setdefault("TINKER_API_KEY", "tml-schedule")
os.environ.setdefault("TINKER_ROUTEFIX_STRICT", "1")

import tinker_routefix
from tests.schedules.judge import violations
from tests.schedules.runner import play

if TYPE_CHECKING:
    from tests.schedules.model import Schedule


def replay(schedule: Schedule) -> None:
    """Play a schedule; with ``TINKER_ROUTEFIX=0`` on plain tinker.

    Raises:
        SystemExit: Something must not be.
    """
    shim = tinker_routefix.status().active
    played = play(schedule, shim=shim)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(played.lines())
    found = violations(played)
    for one in found:
        console.print(one, style="bold red")
    console.print(f"{len(found)} violations, {'with the shim' if shim else 'plain tinker'}")
    raise SystemExit(bool(found))
