"""The wire that production speaks: over TLS and HTTP/2, a round trip away, both transports."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import figures, healthy, labs, suite
from benchmarks.figures import Target, median, number, spread, table
from benchmarks.stampede import GIVE_UP
from benchmarks.suite import PLAIN, SHIM

if TYPE_CHECKING:
    from benchmarks.suite import Rows, Stage

TITLE = "Far away"

WIRES = ("pyqwest-far", "httpx-far")
WAITING = (100, 1000)
LONG, LONG_WAITING, LINGER = 15.0, 40, 20.0
"""An outage, in seconds, the results being waited for, and how long after its end is looked."""
OUTAGES = (0.5, 1.0, 2.0, 5.0, 10.0)
ON = ("everything", "polls", "submissions")

_TEXT = """
An nginx speaks TLS 1.3 and HTTP/2 in front of the lab, behind a proxy that makes every round trip
{round_trip:.0f} ms long. The programs are those of the other benchmarks; plain tinker and the
shim run in turns. Medians, with the lowest and the highest run.

{connect}
Many results are being waited for when the route is lost for 4 s. *Gap*: as in the stampede, where
plain tinker is there twice. *Question*: one to the control plane, after the first.

{crowd}
{waiting} results, an outage of {long:.0f} s: connections that are open {linger:.0f} s later,
beyond those that were before it.

{left}
Seconds from the end of an outage of up to 10 s until the next refused request is through:

{overshoot}"""


def measure(stage: Stage) -> dict[str, Rows]:
    """What is a pause of the loop or takes milliseconds runs alone, what only waits at once."""
    repeats = stage.repeats(5)
    alone, waits = [], []
    for turn in range(repeats):
        for wire in WIRES:
            both = (PLAIN, SHIM) if turn % 2 else (SHIM, PLAIN)
            connect = {"wire": wire, "steps": 0, "round_trip": 0.0}
            alone += [suite.Run("healthy", contender, connect) for contender in both]
            for waiting in WAITING[:1] if stage.quick else WAITING:
                crowd = {"wire": wire, "waiting": waiting, "outage": True, "give_up": GIVE_UP}
                alone += [suite.Run("stampede", contender, crowd) for contender in both]
                alone.append(suite.Run("stampede", PLAIN, {**crowd, "outage": False}))
            long = {"waiting": LONG_WAITING, "lost": LONG, "linger": LINGER}
            if not stage.quick:
                about = {"wire": wire, "outage": True, "give_up": GIVE_UP, **long}
                waits.append(suite.Run("stampede", SHIM, about))
            waits += [
                suite.Run(
                    "recovery", SHIM, {"wire": wire, "outage": outage, "on": on, "seed": turn}
                )
                for outage in (OUTAGES[:2] if stage.quick else OUTAGES)
                for on in ON
            ]
    return {
        "runs": stage.run(alone) + stage.run(waits, at_once=4),
        "imports": healthy.imports(stage),
    }


def report(measured: dict[str, Rows]) -> tuple[str, list[Target]]:
    """What came out, with tables."""
    runs = measured["runs"]
    connect, crowd, left, overshoot = [], [], [], []
    reached: list[Target] = []
    trip = labs.FAR * 1e3

    def reach(what: str, wire: str, value: str, good: bool) -> None:
        reached.append(Target(what, wire.removesuffix("-far"), value, good))

    for wire in WIRES:

        def rows(contender: str, wire: str = wire, **about: Any) -> Rows:
            return suite.of(runs, contender=contender, wire=wire, **about)

        took = {one: [row["connect_ms"] for row in rows(one, steps=0)] for one in (PLAIN, SHIM)}
        trips = (statistics.median(took[SHIM]) - statistics.median(took[PLAIN])) / trip
        reach(figures.FAR_CONNECT, wire, f"{number(trips)} round trips", trips <= 1.5)
        connect.append([wire, *(spread(took[one], 0) for one in took), number(trips)])
        for waiting in WAITING:
            about: dict[str, Any] = {"waiting": waiting, "outage": True}
            groups = {
                "plain, nothing lost": rows(PLAIN, waiting=waiting, outage=False),
                PLAIN: rows(PLAIN, **about),
                SHIM: rows(SHIM, **about),
            }
            columns = ("done", "connections", "question_ms", "gap_ms")
            for name, mine in groups.items() if groups[SHIM] else ():
                cells = [spread((row[column] for row in mine), 0) for column in columns]
                crowd.append([f"{wire}, {waiting:,}", name, *cells, str(suite.wrong(mine))])
            if not groups[SHIM]:
                continue
            gaps = {
                name: median(row["gap_ms"] for row in mine) or 0.0 for name, mine in groups.items()
            }
            shim = gaps.pop(SHIM)
            more = shim - max(gaps.values())
            most = {100: 15, 1000: 90}[waiting]
            reach(figures.FAR_GAP[waiting], wire, f"{number(more)} ms", more <= most)
            if waiting == WAITING[0]:
                opened = median(row["connections"] for row in groups[SHIM]) or 0
                reach(figures.FAR_OPENED, wire, number(opened, 0), opened <= 40)
                question = (median(row["question_ms"] for row in groups[SHIM]) or 0) / trip
                value = f"{number(question, 2)} round trips"
                # With some milliseconds of its own.
                reach(figures.FAR_QUESTION, wire, value, round(question) <= 1)
        lingered = [row["left_open"] for row in rows(SHIM, waiting=LONG_WAITING)]
        if lingered:
            middle = statistics.median(lingered)
            reach(figures.FAR_LEFT, wire, number(middle, 0), middle <= 4)
            left.append([wire, spread(lingered, 0)])
        late = [row["overshoot"] for row in rows(SHIM) if row.get("overshoot") is not None]
        middle, worst = statistics.median(late), max(late)
        value = f"{number(middle, 2)} s / {number(worst, 2)} s ({len(late)} runs)"
        reach(figures.FAR_OVERSHOOT, wire, value, middle <= 0.5 and worst <= 1.2)
        overshoot.append([wire, spread(late, 2), str(sum("met" in row for row in rows(SHIM)))])
    # Probes cannot be told from others here: behind nginx no connection is used twice.
    asked = [row for row in suite.of(runs, contender=SHIM) if "probes_a_second" in row]
    reached.append(figures.asked("far away", asked)[0])
    case = "on, beyond wrapt, beside tinker"
    beside = statistics.median(row["ms"] for row in measured["imports"] if row["case"] == case)
    value = f"{number(beside, 1)} ms"
    reached.append(Target(figures.IMPORT_BESIDE, "a fresh interpreter", value, beside <= 8))
    text = _TEXT.format(
        round_trip=trip,
        waiting=LONG_WAITING,
        long=LONG,
        linger=LINGER,
        connect=table(["connect, ms", "plain", "shim", "round trips more"], connect),
        crowd=table(
            [
                *("wire, waiting", "contender", "done", "connections"),
                *("question, ms", "gap, ms", figures.WRONG),
            ],
            crowd,
        ),
        left=table(["wire", "connections left open"], left),
        overshoot=table(["wire", "seconds", "runs"], overshoot),
    )
    return text, reached
