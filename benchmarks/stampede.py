"""What happens when the route goes while hundreds of results are being waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import figures, plots, suite
from benchmarks.contenders import COLOURS, CONTENDERS, PLAIN, SHIM
from benchmarks.figures import NOTHING, Target, median, number, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.suite import Plan, Rows, Section

TITLE = "Stampede"

WAITING = (1, 10, 100, 400, 1000)
GIVE_UP = 40.0
"""Seconds after the healing after which it is not waited for longer."""
WHOLE = "plain, nothing lost"


_TEXT = """
So many results of one client are being polled for when the gateway begins to refuse everything,
for some seconds; just before it heals, all results are ready. *Through*: seconds from the
healing until the last one is there (given up after {give_up:.0f} s). *Gap*: the longest pause of
a 10 ms ticker on tinker's loop from the loss on, before which garbage has been collected. It is
made of two things, each given as its longest: a *collection* of garbage, during which every
thread stands still, and the CPU time for which the loop was *busy* without a tick. *Memory*:
the peak beyond what it was before. Plain tinker is there twice: it does not survive the loss,
so that it also runs without one; of the two gaps the longer one counts as plain tinker's.

{table}"""


def measure(stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
    """One run after the other: the loop's pauses are measured."""
    repeats = plan.repeats(3)
    runs = []
    for turn in range(repeats):
        for waiting in WAITING[:3] if plan.quick else WAITING:
            about = {"waiting": waiting, "outage": True, "give_up": GIVE_UP}
            runs += [
                suite.Run("stampede", PLAIN, {**about, "outage": False}),
                suite.Run("stampede", PLAIN, about),
                suite.Run("stampede", SHIM, about),
            ]
            if turn == 0:
                # Their figures need no second digit, and many seconds.
                runs += [
                    suite.Run("stampede", one, about)
                    for one in CONTENDERS
                    if one not in (PLAIN, SHIM)
                ]
    return {"runs": list(suite.run(stage, runs, say, at_once=plan.at_once()))}


def _groups(measured: dict[str, Rows]) -> dict[str, Rows]:
    groups = {WHOLE: suite.of(measured["runs"], contender=PLAIN, outage=False)}
    return groups | {
        one: suite.of(measured["runs"], contender=one, outage=True) for one in CONTENDERS
    }


def report(measured: dict[str, Rows]) -> Section:
    """What came out, with tables."""
    groups = _groups(measured)
    sizes = sorted({row["waiting"] for row in measured["runs"]})
    rows = []
    for size in sizes:
        for name, all_of_it in groups.items():
            mine = suite.of(all_of_it, waiting=size)
            if not mine:
                rows.append([f"{size:,}", name, "hung", *([NOTHING] * 11)])
                continue
            rows.append(
                [
                    f"{size:,}",
                    name,
                    spread((row["done"] for row in mine), 0),
                    spread((row["through"] for row in mine), 1),
                    spread((row["requests"] for row in mine), 0),
                    spread((row["connections"] for row in mine), 0),
                    spread((row["questions"] for row in mine), 0),
                    spread((row["questions_a_second"] for row in mine), 0),
                    spread((row["probes"] for row in mine), 0),
                    spread((row["memory_mb"] for row in mine), 0),
                    spread((row["gap_ms"] for row in mine), 0),
                    spread((row["collection_ms"] for row in mine), 0),
                    spread((row["busy_ms"] for row in mine), 0),
                    str(suite.wrong(mine)),
                ]
            )
    columns = [
        "waiting",
        "contender",
        "done",
        "through, s",
        "requests",
        "connections",
        "questions",
        "a second",
        "probes",
        "memory, MB",
        "gap, ms",
        "collection, ms",
        "busy, ms",
        figures.WRONG,
    ]
    text = _TEXT.format(give_up=GIVE_UP, table=table(columns, rows))
    shims = groups[SHIM]
    targets = figures.asked(f"{sizes[0]:,} to {sizes[-1]:,} requests in flight", shims)
    for size in sizes:

        def more(what: str, size: int = size) -> float:
            plain = max(
                median(row[what] for row in suite.of(groups[one], waiting=size)) or 0.0
                for one in (WHOLE, PLAIN)
            )
            return (median(row[what] for row in suite.of(shims, waiting=size)) or 0.0) - plain

        targets.append(
            Target(
                figures.GAP,
                f"{size:,} in flight when the route goes",
                f"{number(more('gap_ms'))} ms",
                more("gap_ms") <= 15,
                f"without garbage collections {number(more('busy_ms'))} ms",
            )
        )
    return suite.Section(text, targets)


def draw(measured: dict[str, Rows]) -> Figure:
    """A plot of it."""
    figure, panels = plots.axes(2, 3, height=6.2)
    groups = _groups(measured)
    sizes = sorted({row["waiting"] for row in measured["runs"]})
    shown = {
        "through": "Until all are through, s",
        "requests": "Requests to the gateway",
        "connections": "Connections used",
        "memory_mb": "Peak memory beyond before, MB",
        "gap_ms": "Longest gap on the loop, ms",
        "busy_ms": "The same without collections, ms",
    }
    for panel, (what, title) in zip(panels.flat, shown.items(), strict=True):
        for name, rows in groups.items():
            points = [
                (size, value)
                for size in sizes
                if (value := median(row[what] for row in suite.of(rows, waiting=size))) is not None
            ]
            panel.plot(
                [size for size, _ in points],
                [max(value, 0.01) for _, value in points],
                color=COLOURS.get(name, "black"),
                linestyle=":" if name == WHOLE else "-",
                marker="o",
                markersize=4,
                label=name,
            )
        panel.set(title=title, xscale="log", yscale="log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
    for panel in panels[1]:
        panel.set_xlabel("results waited for")
    handles, labels = panels.flat[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure
