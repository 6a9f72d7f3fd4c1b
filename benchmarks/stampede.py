"""What happens when the route goes while hundreds of results are being waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import figures, suite
from benchmarks.figures import Target, median, number, spread, table
from benchmarks.suite import CONTENDERS, PLAIN, SHIM

if TYPE_CHECKING:
    from benchmarks.suite import Rows, Stage

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
thread stands still, and the CPU time for which the loop was *busy* without a tick. Plain tinker
is there twice: it does not survive the loss, so that it also runs without one; of the two gaps the
longer one counts as plain tinker's.

{table}"""


def measure(stage: Stage) -> dict[str, Rows]:
    """One run after the other: the loop's pauses are measured."""
    repeats = stage.repeats(3)
    runs = []
    for turn in range(repeats):
        for waiting in WAITING[:3] if stage.quick else WAITING:
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
    return {"runs": stage.run(runs)}


def _groups(measured: dict[str, Rows]) -> dict[str, Rows]:
    groups = {WHOLE: suite.of(measured["runs"], contender=PLAIN, outage=False)}
    return groups | {
        one: suite.of(measured["runs"], contender=one, outage=True) for one in CONTENDERS
    }


def report(measured: dict[str, Rows]) -> tuple[str, list[Target]]:
    """What came out, with tables."""
    groups = _groups(measured)
    sizes = sorted({row["waiting"] for row in measured["runs"]})
    columns = {
        "done": ("done", 0),
        "through, s": ("through", 1),
        "requests": ("requests", 0),
        "connections": ("connections", 0),
        "questions": ("questions", 0),
        "a second": ("questions_a_second", 0),
        "probes": ("probes", 0),
        "gap, ms": ("gap_ms", 0),
        "collection, ms": ("collection_ms", 0),
        "busy, ms": ("busy_ms", 0),
    }
    rows = []
    for size in sizes:
        for name, all_of_it in groups.items():
            mine = suite.of(all_of_it, waiting=size)
            cells = [
                spread((row[what] for row in mine), digits) for what, digits in columns.values()
            ]
            wrong = str(suite.wrong(mine)) if mine else "hung"
            rows.append([f"{size:,}", name, *cells, wrong])
    header = ["waiting", "contender", *columns, figures.WRONG]
    text = _TEXT.format(give_up=GIVE_UP, table=table(header, rows))
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
    return text, targets
