"""Many jobs in one process, and one process for a day."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import figures, plots, suite
from benchmarks.contenders import COLOURS, CONTENDERS, PLAIN, SHIM
from benchmarks.figures import number, spread, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.suite import Plan, Rows, Section

TITLE = "Scale"

JOBS = (1, 10, 100)
OUTAGE = 3.0
FLAT = ("memory_mb", "blocks", "clients", "tasks", "waiting", "closing", "routes")
GROWING = ("requests", "refused", "replays", "recovered", "given_up", "probes", "questions")


_TEXT = """
So many jobs, each with a client of its own, in one process: three steps each at the same time,
then all routes are lost for {outage:g} s, and three steps more. *Memory* for the clients, and
how much of it came after that; *tasks* on tinker's loop, and how many more there are in the
end.

{jobs}
A day: {day[jobs]} jobs, {day[hours]} hours, {day[steps]:,} steps, {day[outages]:,} outages of 0.5
to 20 s in which one to all of four replicas are stale. Real: tinker with its clients, pools,
futures and loop, the whole shim, the lab's trainer. Simulated: the time, which jumps to the
next timer when nothing is left to do; the network, a function call below httpx; threads, whose
work is done at once. Looked at every hour after a garbage collection; *blocks* are Python's own
count of what it has allocated, *clients* the HTTP clients that exist.

{flat}
Counted in all: {counted}. Operations executed twice, lost, skipped or out of order: {wrong}.
"""


def measure(stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
    """Jobs beside each other; then a day on a clock of its own."""
    runs = [
        suite.Run("scale", contender, {"jobs": jobs, "outage": OUTAGE})
        for turn in range(plan.repeats(2))
        for jobs in (JOBS[:2] if plan.quick else JOBS)
        for contender in CONTENDERS
        # The strategies' figures need no second digit.
        if turn == 0 or contender in (PLAIN, SHIM)
    ]
    hours = {"jobs": 1, "hours": 2} if plan.quick else {"jobs": 2, "hours": 24}
    day = [suite.Run("day", SHIM, {**hours, "seed": 0}, seconds=1200)]
    return {
        "runs": list(suite.run(stage, runs, say, at_once=plan.at_once())),
        "day": list(suite.run(stage, day, say)),
    }


def report(measured: dict[str, Rows]) -> Section:
    """What came out, with tables."""
    runs = measured["runs"]
    rows = []
    for jobs in sorted({row["jobs"] for row in runs}):
        for contender in CONTENDERS:
            mine = suite.of(runs, contender=contender, jobs=jobs)
            columns = [
                spread((row[name] for row in mine), digits)
                for name, digits in (
                    ("survived", 0),
                    ("steps_seconds", 1),
                    ("memory_mb", 0),
                    ("memory_grown_mb", 0),
                    ("tasks", 0),
                    ("tasks_grown", 0),
                    ("threads", 0),
                    ("gap_ms", 0),
                    ("questions_a_second", 0),
                    ("probes_a_second", 0),
                )
            ]
            rows.append([str(jobs), contender, *columns, str(suite.wrong(mine))])
    (day,) = suite.of(measured["day"])
    samples = day["samples"]
    # The first hour fills what is there to be filled: caches, pools, connections.
    settled = samples[1:]
    flat = [
        [
            name,
            number(settled[0][name], 1 if name == "memory_mb" else 0),
            number(settled[-1][name], 1 if name == "memory_mb" else 0),
            number(min(sample[name] for sample in settled), 1 if name == "memory_mb" else 0),
            number(max(sample[name] for sample in settled), 1 if name == "memory_mb" else 0),
        ]
        for name in FLAT
    ]
    counted = ", ".join(f"{name} {samples[-1][name]:,}" for name in GROWING)
    columns = [
        "jobs",
        "contender",
        "survived",
        "first steps, s",
        "memory, MB",
        "grown by",
        "tasks",
        "grown by",
        "threads",
        "gap, ms",
        "questions a second and job",
        "probes a second and job",
        figures.WRONG,
    ]
    text = _TEXT.format(
        outage=OUTAGE,
        jobs=table(columns, rows),
        day=day,
        flat=table(["after each hour", "hour 1", f"hour {day['hours']}", "least", "most"], flat),
        counted=counted,
        wrong=suite.wrong([day]),
    )
    shims = suite.of(runs, contender=SHIM)
    first, last = settled[0]["blocks"], settled[-1]["blocks"]
    growth = (last - first) / first * 100
    tasks = max(abs(sample["tasks"] - settled[0]["tasks"]) for sample in settled)
    idle = not any(sample["waiting"] or sample["closing"] for sample in settled[-1:])
    return suite.Section(
        text,
        [
            *figures.asked("1 to 100 jobs in one process", shims),
            figures.Target(
                figures.FLAT,
                f"{day['jobs']} jobs, {day['hours']} hours",
                f"{number(growth, 2)} % more allocated blocks at its end than after its first "
                f"hour; tasks within {tasks}",
                growth <= 1 and idle,
            ),
        ],
    )


def draw(measured: dict[str, Rows]) -> Figure:
    """A plot of it."""
    figure, (memory, flat) = plots.axes(1, 2, height=3.6)
    memory.set_xscale("log")
    for contender in CONTENDERS:
        rows = suite.of(measured["runs"], contender=contender)
        sizes = sorted({row["jobs"] for row in rows})
        values = [
            figures.median(
                row["memory_mb"] + row["memory_grown_mb"] for row in suite.of(rows, jobs=size)
            )
            for size in sizes
        ]
        memory.plot(sizes, values, marker="o", markersize=4, color=COLOURS[contender])
        memory.set_xticks(sizes, [str(size) for size in sizes])
    memory.minorticks_off()
    memory.legend(CONTENDERS)
    memory.set(title="Memory for so many jobs, with an outage, MB", xlabel="jobs")
    memory.set_ylim(0)
    (day,) = suite.of(measured["day"])
    hours = [sample["hour"] for sample in day["samples"]]
    blocks = [sample["blocks"] / 1000 for sample in day["samples"]]
    flat.plot(hours, blocks, color=COLOURS[SHIM], label="allocated blocks, thousands")
    flat.plot(
        hours,
        [sample["memory_mb"] for sample in day["samples"]],
        color="black",
        linestyle="--",
        label="memory, MB",
    )
    flat.plot(
        hours,
        [sample["tasks"] for sample in day["samples"]],
        color="#e69f00",
        linestyle=":",
        label="tasks",
    )
    flat.set(title="A simulated day", xlabel="hour")
    flat.set_ylim(0)
    flat.legend()
    return figure
