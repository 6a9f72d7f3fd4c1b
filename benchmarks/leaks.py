"""How often a warm-up ends although some of the gateway's replicas still refuse."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import figures, plots, suite
from benchmarks.contenders import COLOURS, CONTENDERS, SHIM, STRATEGY_B
from benchmarks.figures import WRONG, number, share, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.suite import Plan, Rows, Section

TITLE = "Leaks"

CELLS = (
    *((2, stale) for stale in (1, 2)),
    *((4, stale) for stale in (1, 2, 3, 4)),
    *((8, stale) for stale in (1, 4, 8)),
    *((16, stale) for stale in (1, 8, 15, 16)),
)
"""Replicas, and how many of them are stale."""
PROBES = 3


_TEXT = """
Connections are spread over the replicas by lot and stay where they are. When the model has
been made, some replicas lose the route for 3 to 6 s, and the contender warms up: strategy B
sends three `get_info` in a row over one connection, a second apart; the shim sends three over
as many fresh ones, and three more after a 404. *Warm too early*: the share of warm-ups that
ended while some replica was stale. Beside it the closed form, with `f` the stale share: one
connection, `1 - f` (it stays with its replica, so that waiting changes nothing); one round of
the shim's, `(1 - f)^3`; and that times the rounds that it made while they were stale, which
by lot can come out above 1. (Where it makes `n` of them, it is `1 - (1 - (1 - f)^3)^n`, as
drawn.) For the strategies the routes are lost only after tinker has made the client, which
they would not survive, and `get_info` is really sent: tinker 0.38 answers it from memory, so
that there strategy B's warm-up sees nothing at all.

{warm_ups}
What it means for the program, which takes one step then (all cells together). A 404 that gets
past the warm-up ends plain tinker; a strategy does the operation again; the shim replays the
request.

{programs}"""


def one_connection(stale: float) -> float:
    """The chance that a connection, which stays with a replica, has one that is not stale."""
    return 1 - stale


def fresh_connections(stale: float, rounds: float = 1) -> float:
    """The chance that in one of so many rounds of three connections none meets a stale one."""
    return 1.0 - float((1 - (1 - stale) ** PROBES) ** rounds)


def measure(stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
    """Many connects of every contender, some at a time."""
    cells = CELLS[:4] if plan.quick else CELLS
    runs = 4 if plan.quick else 12 * plan.repeats(1)
    contenders = [
        suite.Run("leaks", one, {"cells": cells, "runs": runs, "seed": 0}, seconds=600)
        for one in CONTENDERS
    ]
    rows: Rows = []
    for said in suite.run(stage, contenders, say, at_once=max(2, plan.at_once())):
        rows += [{"contender": said["contender"], **row} for row in said.get("runs", ())]
    return {"runs": rows}


def _share(rows: Rows, what: str) -> float | None:
    return statistics.mean(bool(row[what]) for row in rows) if rows else None


def report(measured: dict[str, Rows]) -> Section:
    """What came out, with tables."""
    runs = measured["runs"]
    cells = sorted({(row["replicas"], row["stale"]) for row in runs})
    warm_ups = []
    for replicas, stale in cells:
        part = stale / replicas

        def mine(contender: str, cell: tuple[int, int] = (replicas, stale)) -> list[dict[str, Any]]:
            return suite.of(runs, contender=contender, replicas=cell[0], stale=cell[1])

        shim, b = mine(SHIM), mine(STRATEGY_B)
        rounds = [row["rounds"] for row in shim if row["rounds"]]
        # The last round of a warm-up that was not too early met no stale replica any more.
        stale_rounds = [row["rounds"] - (not row["early"]) for row in shim if row["rounds"]]
        expected = statistics.mean(stale_rounds) * fresh_connections(part) if rounds else None
        warm_ups.append(
            [
                f"{stale} of {replicas}",
                number(_share(b, "early"), 2),
                number(one_connection(part), 2),
                number(_share(shim, "early"), 2),
                number(fresh_connections(part), 2),
                spread(rounds, 0),
                number(expected, 2),
                spread((row["warm_up"] for row in b), 1),
                spread((row["warm_up"] for row in shim), 1),
            ]
        )
    programs = [
        [
            contender,
            share(row["met"] for row in of_it),
            share(row["crashed"] for row in of_it),
            share(row["twice"] for row in of_it),
            str(suite.wrong(of_it)),
        ]
        for contender in CONTENDERS
        if (of_it := suite.of(runs, contender=contender))
    ]
    shims = suite.of(runs, contender=SHIM)
    columns = [
        "stale replicas",
        "B: warm too early",
        "closed form",
        "shim: warm too early",
        "closed form, one round",
        "rounds",
        "closed form, all of them",
        "B: warm-up, s",
        "shim: warm-up, s",
    ]
    outcomes = ["contender", "a 404 after the warm-up", "crashed", "trained twice", WRONG]
    text = _TEXT.format(warm_ups=table(columns, warm_ups), programs=table(outcomes, programs))
    return suite.Section(
        text,
        figures.asked(
            "connecting, some replicas stale",
            shims,
            "three fresh connections a round are what a warm-up is",
        ),
    )


def draw(measured: dict[str, Rows]) -> Figure:
    """A plot of it."""
    figure, (early, met) = plots.axes(1, 2, height=3.8)
    parts = [number / 100 for number in range(101)]
    early.plot(
        parts,
        [one_connection(part) for part in parts],
        color=COLOURS[STRATEGY_B],
        label="one connection: 1 - f",
    )
    for rounds, style in ((1, "-"), (3, "--"), (10, ":")):
        early.plot(
            parts,
            [fresh_connections(part, rounds) for part in parts],
            color=COLOURS[SHIM],
            linestyle=style,
            label=f"3 fresh ones, {rounds} round{'s' * (rounds > 1)}",
        )
    cells = sorted({(row["replicas"], row["stale"]) for row in measured["runs"]})
    markers = {2: "o", 4: "s", 8: "^", 16: "D"}
    for contender in (STRATEGY_B, SHIM):
        for replicas, stale in cells:
            rows = suite.of(measured["runs"], contender=contender, replicas=replicas, stale=stale)
            early.scatter(
                stale / replicas,
                _share(rows, "early"),
                marker=markers[replicas],
                s=26,
                color=COLOURS[contender],
                zorder=3,
            )
    early.set(
        title="Warm-ups that ended too early (marks: measured)",
        xlabel="share of stale replicas, f",
        ylabel="share of the warm-ups",
    )
    early.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    shares = {
        contender: [
            _share(suite.of(measured["runs"], contender=contender), what) or 0.0
            for what in ("met", "crashed", "twice")
        ]
        for contender in CONTENDERS
    }
    for place, (contender, values) in enumerate(shares.items()):
        bars = met.bar(
            [number + (place - 1.5) * 0.2 for number in range(3)],
            values,
            width=0.18,
            color=COLOURS[contender],
            label=contender,
        )
        met.bar_label(bars, fmt="%.2f", fontsize=7)
    met.set_xticks(range(3), ["a 404 after\nthe warm-up", "crashed", "trained twice"])
    met.set(title="What became of the programs", ylabel="share of the runs")
    met.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure
