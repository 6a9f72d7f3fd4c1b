"""What the shim costs while nothing goes wrong."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks import figures, plots, suite
from benchmarks.contenders import COLOURS, CONTENDERS, PLAIN, SHIM
from benchmarks.figures import Target, interval, median, number, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.suite import Plan, Rows, Section

TITLE = "Healthy route"

ROUND_TRIP = 0.05
"""Seconds; long enough that the machine's own share of a connect does not count."""

_TIMED = """
import time
began = time.perf_counter()
{what}
print(time.perf_counter() - began)
"""

IMPORTS = {
    # What is there already, what is imported, and for which contender.
    "on, as a whole": ("", "import tinker_routefix", SHIM),
    "wrapt, of that": ("", "import wrapt", PLAIN),
    "on, beyond wrapt": ("import wrapt", "import tinker_routefix", SHIM),
    "switched off": ("", "import tinker_routefix", PLAIN),
    "without it": ("", "pass", PLAIN),
    "tinker, with it on": ("", "import tinker_routefix, tinker", SHIM),
    "tinker, with it off": ("", "import tinker_routefix, tinker", PLAIN),
    "tinker, without it": ("", "import tinker", PLAIN),
}


_TEXT = """
Time from a call of `ServiceClient()` to a training client, to the end of the first step (two
operations, four requests), and per step after it; on loopback, so that nearly all of it is
CPU time. *Round trips*: how much longer than plain tinker connecting takes where each request
takes {round_trip:.0f} ms, in round trips. *Gap*: the longest pause of a 10 ms ticker on
tinker's loop during the steps. Medians, with the lowest and the highest run.

{contenders}
The same request again and again through one tinker client, the shim being installed and
uninstalled between blocks of {block} ({pairs} pairs of blocks): what it adds to a request, with
the 95 % interval of the median. *Wrappers alone*: around a loan and a request that return at
once.

{requests}
Importing it, each time in a fresh interpreter with its bytecode at hand:

{imports}"""


def measure(stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
    """Every contender connects and trains; then what the shim adds, and its import."""
    repeats = plan.repeats(8)
    steps = 30 if plan.quick else 100
    turns = [
        # Each turn begins with another contender.
        CONTENDERS[(turn + place) % len(CONTENDERS)]
        for turn in range(repeats)
        for place in range(len(CONTENDERS))
    ]
    near = {"steps": steps, "round_trip": 0.0}
    far = {"steps": 0, "round_trip": ROUND_TRIP}
    runs = [suite.Run("healthy", one, about) for one in turns for about in (near, far)]
    blocks = 20 if plan.quick else 120
    added = [
        suite.Run("overhead", SHIM, {"blocks": blocks, "requests": 50 if plan.quick else 100}),
        suite.Run("wrappers", SHIM, {"blocks": 20, "calls": 2000}),
    ]
    imported = []
    for turn in range(-1, 3 if plan.quick else 20):
        for name, (before, what, contender) in IMPORTS.items():
            seconds = float(stage.python(f"{before}\n{_TIMED.format(what=what)}", contender))
            # The first time it is compiled.
            if turn >= 0:
                imported.append({"case": name, "ms": seconds * 1e3})
    say("imports")
    return {
        "runs": list(suite.run(stage, runs, say, at_once=plan.at_once())),
        "added": list(suite.run(stage, added, say)),
        "imports": imported,
    }


def report(measured: dict[str, Rows]) -> Section:
    """What came out, with tables."""
    near = {one: suite.of(measured["runs"], contender=one, round_trip=0.0) for one in CONTENDERS}
    far = {
        one: suite.of(measured["runs"], contender=one, round_trip=ROUND_TRIP) for one in CONTENDERS
    }
    plain_requests = median(row["requests_to_connect"] for row in near[PLAIN]) or 0
    plain_far = median(row["connect_ms"] for row in far[PLAIN]) or 0

    def trips(row: dict[str, float]) -> float:
        return (row["connect_ms"] - plain_far) / (ROUND_TRIP * 1e3)

    rows = [
        [
            one,
            spread((row["connect_ms"] for row in near[one]), 0),
            spread((row["first_step_ms"] for row in near[one]), 0),
            spread((row["step_ms"] for row in near[one]), 2),
            spread((row["cpu_us"] for row in near[one]), 0),
            spread((row["requests_to_connect"] - plain_requests for row in near[one]), 0),
            spread((row["requests_a_step"] for row in near[one]), 2),
            spread((trips(row) for row in far[one]), 1),
            spread((row["gap_ms"] for row in near[one]), 1),
            str(suite.wrong(near[one] + far[one])),
        ]
        for one in CONTENDERS
    ]
    (added,) = suite.of(measured["added"], calls=None)
    (alone,) = (row for row in measured["added"] if "calls" in row)
    cost = {
        name: [on - off for on, off in zip(added["shim"][name], added["plain"][name], strict=True)]
        for name in ("cpu_us", "wall_us")
    }
    base = {name: statistics.median(added["plain"][name]) for name in cost}
    more = {name: statistics.median(values) for name, values in cost.items()}
    percent = more["wall_us"] / base["wall_us"] * 100

    def ranged(name: str) -> str:
        low, high = interval(cost[name])
        return f"{number(more[name])} ({number(low)} to {number(high)})"

    pure = [
        on - off for on, off in zip(alone["shim"]["cpu_us"], alone["plain"]["cpu_us"], strict=True)
    ]
    imports = {
        name: [row["ms"] for row in measured["imports"] if row["case"] == name] for name in IMPORTS
    }
    columns = [
        "contender",
        "connect, ms",
        "first step, ms",
        "a step, ms",
        "CPU a request, us",
        "more requests to connect",
        "requests a step",
        "round trips more",
        "gap, ms",
        figures.WRONG,
    ]
    requests = [
        ["CPU time, us", number(base["cpu_us"]), ranged("cpu_us")],
        ["wall time, us", number(base["wall_us"]), f"{ranged('wall_us')}, {number(percent, 2)} %"],
        [
            "wrappers alone, us",
            number(statistics.median(alone["plain"]["cpu_us"])),
            number(statistics.median(pure)),
        ],
    ]
    text = _TEXT.format(
        round_trip=ROUND_TRIP * 1e3,
        contenders=table(columns, rows),
        block=added["requests"],
        pairs=len(cost["cpu_us"]),
        requests=table(["a request", "plain", "added by the shim"], requests),
        imports=table(["import", "ms"], [[name, spread(ms, 2)] for name, ms in imports.items()]),
    )
    extra_trips = median(trips(row) for row in far[SHIM]) or 0.0
    on = median(imports["on, beyond wrapt"]) or 0.0
    off = median(imports["switched off"]) or 0.0
    gap = (median(row["gap_ms"] for row in near[SHIM]) or 0.0) - (
        median(row["gap_ms"] for row in near[PLAIN]) or 0.0
    )
    return suite.Section(
        text,
        [
            Target(
                figures.REQUEST,
                "a request on loopback",
                f"{number(percent, 2)} % and {number(more['wall_us'])} us of wall time, "
                f"{number(more['cpu_us'])} us of CPU time",
                percent <= 1 and max(more.values()) <= 20,
                "of a request that takes 20 ms it is "
                f"{number(more['wall_us'] / 20_000 * 100, 2)} %",
            ),
            Target(
                figures.IMPORT_ON,
                "a bare interpreter",
                f"{number(on, 2)} ms",
                on <= 5,
            ),
            Target(figures.IMPORT_OFF, "a bare interpreter", f"{number(off, 2)} ms", off <= 1),
            Target(
                figures.CONNECT,
                f"round trips of {ROUND_TRIP * 1e3:.0f} ms",
                f"{number(extra_trips)} round trips",
                extra_trips <= 3,
                "without TLS; the fresh connections are opened at the same time, so that their "
                "handshakes add 2 more in all",
            ),
            Target(
                figures.GAP,
                "healthy steps",
                f"{number(gap)} ms",
                gap <= 15,
            ),
        ],
    )


def draw(measured: dict[str, Rows]) -> Figure:
    """A plot of it."""
    figure, ((connect, step), (added, imports)) = plots.axes(2, 2, height=6.4)
    near = {one: suite.of(measured["runs"], contender=one, round_trip=0.0) for one in CONTENDERS}
    plots.strips(
        connect,
        {one: [row["connect_ms"] / 1e3 for row in rows] for one, rows in near.items()},
        COLOURS,
    )
    connect.set(title="Connect", ylabel="s", ylim=(0, None))
    plots.strips(
        step, {one: [row["step_ms"] for row in rows] for one, rows in near.items()}, COLOURS
    )
    step.set(title="A step", ylabel="ms", ylim=(0, None))
    (blocks,) = suite.of(measured["added"], calls=None)
    pairs = zip(blocks["shim"]["cpu_us"], blocks["plain"]["cpu_us"], strict=True)
    differences = sorted(on - off for on, off in pairs)
    # Blocks in which the machine did something else would hide all the rest.
    tail = max(1, len(differences) // 20)
    added.hist(differences[tail:-tail], bins=24, color=COLOURS[SHIM])
    added.axvline(statistics.median(differences), color="black", linewidth=1)
    added.axvline(20, color="black", linewidth=1, linestyle=":")
    added.set(
        title="CPU time added to a request (line: median, dotted: 20 us)",
        xlabel="us, shim - plain, pairs of blocks",
        ylabel="pairs",
    )
    cases = ["switched off", "on, beyond wrapt", "wrapt, of that"]
    values = [median(r["ms"] for r in measured["imports"] if r["case"] == case) for case in cases]
    bars = imports.barh(cases, values, color=["#7f7f7f", COLOURS[SHIM], "#56b4e9"])
    imports.bar_label(bars, fmt="%.1f", padding=3)
    imports.set(title="Import on a bare interpreter", xlabel="ms")
    imports.set_xscale("log")
    imports.margins(x=0.2)
    return figure
