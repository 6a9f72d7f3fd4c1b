"""What the shim costs while nothing goes wrong."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import figures, suite
from benchmarks.figures import Target, median, number, spread, table
from benchmarks.suite import CONTENDERS, PLAIN, SHIM

if TYPE_CHECKING:
    from benchmarks.suite import Rows, Stage

TITLE = "Healthy route"

ROUND_TRIP = 0.05
"""Seconds; long enough that the machine's own share of a connect does not count."""

_TEXT = """
Time from a call of `ServiceClient()` to a training client, to the end of the first step (two
operations, four requests), and per step after it; on loopback, so that nearly all of it is
CPU time. *Round trips*: how much longer than plain tinker connecting takes where each request
takes {round_trip:.0f} ms, in round trips. *Gap*: the longest pause of a 10 ms ticker on
tinker's loop during the steps. Medians, with the lowest and the highest run.

{contenders}
The same request again and again through one tinker client, in {processes} processes, the shim
being installed and uninstalled between blocks of {block} ({pairs} pairs of blocks in each): what it
adds to a request. Of each process the median counts; they differ by more than what is measured.

{requests}
Importing it, each time in a fresh interpreter with its bytecode at hand:

{imports}"""


def measure(stage: Stage) -> dict[str, Rows]:
    """Every contender connects and trains; then what the shim adds, and its import."""
    near = {"steps": 30 if stage.quick else 100, "round_trip": 0.0}
    far = {"steps": 0, "round_trip": ROUND_TRIP}
    runs = [
        # Each turn begins with another contender.
        suite.Run("healthy", CONTENDERS[(turn + place) % len(CONTENDERS)], about)
        for turn in range(stage.repeats(8))
        for place in range(len(CONTENDERS))
        for about in (near, far)
    ]
    blocks = {"blocks": 6 if stage.quick else 16, "requests": 50 if stage.quick else 100}
    return {
        "runs": stage.run(runs),
        "added": stage.run([suite.Run("overhead", SHIM, blocks)] * stage.repeats(15)),
        "imports": imports(stage),
    }


def imports(stage: Stage) -> Rows:
    """What importing costs, each time in a fresh interpreter."""
    import pyperf  # type: ignore[import-untyped]

    stage.say("imports")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "imports.json"
        script = Path(__file__).with_name("imports.py")
        options = ["--quiet", f"--output={out}", f"--processes={3 if stage.quick else 20}"]
        subprocess.run([sys.executable, str(script), *options], check=True)  # noqa: S603 - ours
        return [
            {"case": case.get_name(), "ms": seconds * 1e3}
            for case in pyperf.BenchmarkSuite.load(str(out))
            for seconds in case.get_values()
        ]


def report(measured: dict[str, Rows]) -> tuple[str, list[Target]]:
    """What came out, with tables."""
    near = {one: suite.of(measured["runs"], contender=one, round_trip=0.0) for one in CONTENDERS}
    far = {
        one: suite.of(measured["runs"], contender=one, round_trip=ROUND_TRIP) for one in CONTENDERS
    }
    plain_far = median(row["connect_ms"] for row in far[PLAIN]) or 0

    def trips(row: dict[str, float]) -> float:
        return (row["connect_ms"] - plain_far) / (ROUND_TRIP * 1e3)

    columns = {
        "connect, ms": ("connect_ms", 0),
        "first step, ms": ("first_step_ms", 0),
        "a step, ms": ("step_ms", 2),
        "CPU a request, us": ("cpu_us", 0),
        "requests to connect": ("requests_to_connect", 0),
        "requests a step": ("requests_a_step", 2),
        "gap, ms": ("gap_ms", 1),
    }
    rows = [
        [
            one,
            *(
                spread((row[what] for row in near[one]), digits)
                for what, digits in columns.values()
            ),
            spread(map(trips, far[one]), 1),
            str(suite.wrong(near[one] + far[one])),
        ]
        for one in CONTENDERS
    ]
    added = measured["added"]
    cost = {
        name: [
            statistics.median(
                on - off for on, off in zip(one["shim"][name], one["plain"][name], strict=True)
            )
            for one in added
        ]
        for name in ("cpu_us", "wall_us")
    }
    base = {
        name: statistics.median(statistics.median(one["plain"][name]) for one in added)
        for name in cost
    }
    more = {name: statistics.median(values) for name, values in cost.items()}
    percent = more["wall_us"] / base["wall_us"] * 100

    wall = f"{spread(cost['wall_us'])}, {number(percent, 2)} %"
    requests = [
        ["CPU time, us", number(base["cpu_us"]), spread(cost["cpu_us"])],
        ["wall time, us", number(base["wall_us"]), wall],
    ]
    cases: dict[str, list[float]] = {row["case"]: [] for row in measured["imports"]}
    for row in measured["imports"]:
        cases[row["case"]].append(row["ms"])
    text = _TEXT.format(
        round_trip=ROUND_TRIP * 1e3,
        contenders=table(["contender", *columns, "round trips more", figures.WRONG], rows),
        processes=len(added),
        block=added[0]["requests"],
        pairs=len(added[0]["plain"]["cpu_us"]),
        requests=table(["a request", "plain", "added by the shim"], requests),
        imports=table(["import", "ms"], [[name, spread(ms, 2)] for name, ms in cases.items()]),
    )
    extra_trips = median(trips(row) for row in far[SHIM]) or 0.0
    gap = (median(row["gap_ms"] for row in near[SHIM]) or 0.0) - (
        median(row["gap_ms"] for row in near[PLAIN]) or 0.0
    )
    on, off = (statistics.median(cases[name]) for name in ("on, beyond wrapt", "switched off"))
    return (
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
            Target(figures.IMPORT_ON, "a fresh interpreter", f"{number(on, 2)} ms", on <= 5),
            Target(figures.IMPORT_OFF, "a fresh interpreter", f"{number(off, 2)} ms", off <= 1),
            Target(
                figures.CONNECT,
                f"round trips of {ROUND_TRIP * 1e3:.0f} ms",
                f"{number(extra_trips)} round trips",
                extra_trips <= 3,
                "without TLS; over TLS see `far`",
            ),
            Target(figures.GAP, "healthy steps", f"{number(gap)} ms", gap <= 15),
        ],
    )
