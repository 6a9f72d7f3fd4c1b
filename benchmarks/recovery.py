"""How long after the route has healed the next request gets through, and who lives to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import figures, suite
from benchmarks.figures import Target, median, number, share, spread, table
from benchmarks.suite import CONTENDERS, PLAIN, SHIM

if TYPE_CHECKING:
    from benchmarks.suite import Rows, Stage

TITLE = "Recovery"

OUTAGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
ON = {
    "everything": "the whole route is lost",
    "polls": "only polls are refused",
    "submissions": "only submissions are refused",
}
LONGEST = 10.0
"""The longest outage that the figure to reach is about."""


_TEXT = """
A program trains step by step; at a random moment the gateway begins to refuse, for the time at
the top of the column (a tenth more or less, at random). *Overshoot* is the time from the healing
to the end of the next refused kind of request that gets through, of the runs that lived to see
it: median, lowest and highest. *Operations wrong* are those executed twice, lost or out of
order, and numbers that were skipped, of all runs together.

{tables}"""


def measure(stage: Stage) -> dict[str, Rows]:
    """Runs of all contenders, several at a time: they mostly wait."""
    runs = [
        suite.Run("recovery", contender, {"outage": outage, "on": on, "seed": seed})
        for contender in CONTENDERS
        for outage in (OUTAGES[1:3] if stage.quick else OUTAGES)
        for on in ON
        # The strategies' waits are long, and their figures need no second digit.
        for seed in range(stage.repeats(4 if contender in (PLAIN, SHIM) else 2))
    ]
    return {"runs": stage.run(runs, at_once=8)}


def report(measured: dict[str, Rows]) -> tuple[str, list[Target]]:
    """What came out, with tables."""
    runs = measured["runs"]
    outages = sorted({row["outage"] for row in runs})
    tables = []
    for on, what in ON.items():
        rows = []
        for contender in CONTENDERS:
            mine = [row for row in runs if row["contender"] == contender and row["on"] == on]
            cells = [
                spread((row.get("overshoot") for row in mine if row["outage"] == outage), 2)
                for outage in outages
            ]
            there = suite.of(mine)
            rows.append(
                [
                    contender,
                    *cells,
                    share(row.get("survived") for row in mine),
                    share(row["twice"] for row in there),
                    str(suite.wrong(there)),
                ]
            )
        columns = [
            "contender",
            *(f"{outage:g} s" for outage in outages),
            "survived",
            "trained twice",
            figures.WRONG,
        ]
        tables += [f"Overshoot in seconds, {what}:", "", table(columns, rows)]
    shims = [row for row in suite.of(runs, contender=SHIM) if row["outage"] <= LONGEST]
    overshoots = [row["overshoot"] for row in shims if row["overshoot"] is not None]
    middle = median(overshoots) or 0.0
    worst = max(overshoots, default=0.0)
    alive = all(row.get("survived") for row in runs if row["contender"] == SHIM)
    text = _TEXT.format(tables="\n".join(tables))
    return (
        text,
        [
            Target(
                figures.OVERSHOOT,
                "route, polls, submissions",
                f"{number(middle, 2)} s / {number(worst, 2)} s "
                f"({len(overshoots)} runs{'' if alive else ', not all survived'})",
                middle <= 0.5 and worst <= 2 and alive,
                "strategies, whole route: "
                + "; ".join(
                    f"{contender[-1]} "
                    + spread(
                        (
                            row["overshoot"]
                            for row in suite.of(runs, contender=contender, on="everything")
                            if row["outage"] <= LONGEST
                        ),
                        1,
                    )
                    + " s"
                    for contender in CONTENDERS
                    if contender not in (PLAIN, SHIM)
                ),
            ),
            *figures.asked("one program", suite.of(runs, contender=SHIM)),
        ],
    )
