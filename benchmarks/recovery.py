"""How long after the route has healed the next request gets through, and who lives to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import figures, plots, suite
from benchmarks.contenders import COLOURS, CONTENDERS, PLAIN, SHIM
from benchmarks.figures import Target, number, share, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.suite import Plan, Rows, Section

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
the top of the column (a tenth more or less, by lot). *Overshoot* is the time from the healing
to the end of the next refused kind of request that gets through, of the runs that lived to see
it: median, lowest and highest. *Operations wrong* are those executed twice, lost or out of
order, and numbers that were skipped, of all runs together.

{tables}"""


def measure(stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
    """Runs of all contenders, several at a time: they mostly wait."""
    runs = [
        suite.Run("recovery", contender, {"outage": outage, "on": on, "seed": seed})
        for contender in CONTENDERS
        for outage in (OUTAGES[1:3] if plan.quick else OUTAGES)
        for on in ON
        # The strategies' waits are long, and their figures need no second digit.
        for seed in range(plan.repeats(4 if contender in (PLAIN, SHIM) else 2))
    ]
    return {"runs": list(suite.run(stage, runs, say, at_once=8))}


def report(measured: dict[str, Rows]) -> Section:
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
    middle = _quantile(overshoots, 0.5)
    worst = max(overshoots, default=0.0)
    alive = all(row.get("survived") for row in runs if row["contender"] == SHIM)
    text = _TEXT.format(tables="\n".join(tables))
    return suite.Section(
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


def _quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[int(part * (len(ordered) - 1))] if ordered else 0.0


def draw(measured: dict[str, Rows]) -> Figure:
    """A plot of it."""
    figure, panels = plots.axes(1, 3, height=3.8, sharey=True)
    outages = sorted({row["outage"] for row in measured["runs"]})
    for panel, (on, what) in zip(panels, ON.items(), strict=True):
        for shift, contender in enumerate(CONTENDERS):
            rows = suite.of(measured["runs"], contender=contender, on=on)
            dots = [row for row in rows if row["overshoot"] is not None]
            places = [outages.index(row["outage"]) + (shift - 2) * 0.16 for row in dots]
            values = [max(row["overshoot"], 0.01) for row in dots]
            lived = sum(bool(row["survived"]) for row in rows)
            panel.scatter(
                places,
                values,
                s=12,
                alpha=0.7,
                color=COLOURS[contender],
                label=f"{contender}: {lived} of {len(rows)} survived",
            )
        panel.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        panel.axhline(2, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=what.capitalize(), xlabel="outage, s", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(range(len(outages)), [f"{outage:g}" for outage in outages])
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handletextpad=0.1)
    panels[0].set_ylabel("overshoot, s (dotted 0.5, dashed 2)")
    return figure
