"""Medians, spreads and tables."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NOTHING = "n/a"
WRONG = "operations wrong"
"""Executed twice, lost or out of order, and numbers that were skipped."""

EXACT = "operations executed twice, lost or out of order"
REQUEST = "per request on a healthy route, against plain tinker"
IMPORT_ON = "`import tinker_routefix`, on, beyond wrapt itself"
IMPORT_OFF = "`import tinker_routefix`, switched off"
CONNECT = "connect on a healthy route, beyond plain tinker"
OVERSHOOT = "overshoot, median / worst, outages up to 10 s"
QUESTIONS = "control-plane questions per job and second"
PROBES = "probes per job and second after the first second"
GAP = "longest gap in a 10 ms ticker on tinker's loop, beyond plain tinker's"

# Over TLS, far away.
FAR_CONNECT = "far away: connect on a healthy route, beyond plain tinker"
FAR_QUESTION = "far away: a question to the control plane after the first of an incident"
FAR_OPENED = "far away: connections opened, 100 polls in flight, 4 s outage"
FAR_LEFT = "far away: connections open 20 s after an outage of 15 s, beyond those before"
FAR_GAP = {
    waiting: f"far away: longest gap beyond plain, {waiting:,} in flight" for waiting in (100, 1000)
}
FAR_OVERSHOOT = "far away: overshoot, median / worst, outages up to 10 s"
IMPORT_BESIDE = "`import tinker_routefix`, on, beyond wrapt, beside tinker"

FIGURES = {
    EXACT: "0",
    REQUEST: "1 % and 20 us",
    IMPORT_ON: "5 ms",
    IMPORT_OFF: "1 ms",
    CONNECT: "3 round trips",
    OVERSHOOT: "0.5 s / 2 s",
    QUESTIONS: "1",
    PROBES: "2",
    GAP: "15 ms",
    FAR_CONNECT: "1.5 round trips",
    FAR_QUESTION: "1 round trip",
    FAR_OPENED: "40",
    FAR_LEFT: "4",
    FAR_GAP[100]: "15 ms",
    FAR_GAP[1000]: "90 ms",
    FAR_OVERSHOOT: "0.5 s / 1.2 s",
    IMPORT_BESIDE: "8 ms",
}
"""What is to be reached, at most, in the order in which it is shown."""


class Target(NamedTuple):
    """A figure to reach, and what was measured."""

    what: str
    """One of :data:`FIGURES`."""
    where: str
    measured: str
    reached: bool
    note: str = ""


def targets(reached: Iterable[Target]) -> str:
    """A table of figures to reach."""
    order = list(FIGURES)
    rows = [
        [
            one.what,
            one.where,
            FIGURES[one.what],
            one.measured,
            "reached" if one.reached else "**not**",
            one.note,
        ]
        for one in sorted(reached, key=lambda one: order.index(one.what))
    ]
    columns = ["figure", "where", "at most", "measured", "", "note"]
    return table(columns, rows, numbers=False)


def asked(where: str, rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The targets for what the shim sends of its own while it waits."""
    questions = max((row["questions_a_second"] for row in rows), default=0)
    probes = max((row["probes_a_second"] for row in rows), default=0)
    return [
        Target(QUESTIONS, where, str(questions), questions <= 1),
        Target(PROBES, where, str(probes), probes <= 2),
    ]


def lot(seed: object) -> random.Random:
    """A generator whose numbers can be drawn again."""
    return random.Random(str(seed))  # noqa: S311


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is there."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """The median, with the lowest and the highest value."""
    there = [value for value in values if value is not None]
    if not there:
        return NOTHING
    low, high = number(min(there), digits), number(max(there), digits)
    middle = number(statistics.median(there), digits)
    return middle if low == high else f"{middle} ({low} to {high})"


def number(value: float, digits: int = 1) -> str:
    """A number as it is shown."""
    # No minus in front of a zero.
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def share(values: Iterable[object]) -> str:
    """How many of some outcomes are so, of how many."""
    there = [bool(value) for value in values]
    return f"{sum(there)} of {len(there)}" if there else NOTHING


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; all columns but the first are numbers, or none is."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(columns) - 1))]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
