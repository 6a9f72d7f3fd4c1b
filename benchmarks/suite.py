"""What a benchmark is: it measures, and it reports what it has measured."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from benchmarks.figures import lot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from matplotlib.figure import Figure

    from benchmarks.contenders import Stage
    from benchmarks.figures import Target

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure."""

    repeat: int | None = None
    """How often each measurement is repeated; None: as often as the benchmark finds right."""
    quick: bool = False
    """Just enough to see that everything works."""

    def repeats(self, usual: int) -> int:
        """How often to repeat what is usually repeated so often."""
        return self.repeat or (1 if self.quick else usual)

    def at_once(self) -> int:
        """How many runs at a time, of those that should run alone."""
        return 4 if self.quick else 1


class Run(NamedTuple):
    """A program to be run for a contender."""

    program: str
    contender: str
    about: dict[str, Any]
    seconds: float = 180.0
    """After so long it hangs."""


class Section(NamedTuple):
    """What a benchmark has to say."""

    text: str
    """Markdown."""
    targets: list[Target]


class Benchmark(Protocol):
    """One of the benchmarks: a module."""

    TITLE: str

    def measure(self, stage: Stage, plan: Plan, say: Callable[[str], None]) -> dict[str, Rows]:
        """Measure; every row is what one run handed in, under a name for its kind."""

    def report(self, measured: dict[str, Rows]) -> Section:
        """What came out, with tables."""

    def draw(self, measured: dict[str, Rows]) -> Figure:
        """A plot of it."""


def run(
    stage: Stage, runs: Iterable[Run], say: Callable[[str], None], *, at_once: int = 1
) -> Iterator[dict[str, Any]]:
    """Run programs, so many at a time, and yield what they hand in as it comes.

    Those that only wait can run at once; what is measured in microseconds runs alone.
    """
    numbered = list(runs)
    done = itertools.count(1)

    def one(run: Run) -> dict[str, Any]:
        said = stage.run(run.program, run.contender, seconds=run.seconds, **run.about)
        outcome = {"hung": True} if said is None else said
        about = " ".join(f"{name}={value}" for name, value in run.about.items())
        say(f"{next(done)}/{len(numbered)} {run.program} {run.contender} {about}"[:110])
        return {"contender": run.contender, **run.about, **outcome}

    if at_once == 1:
        yield from map(one, numbered)
        return
    # Mixed, so that the load of the machine is the same for all contenders.
    lot(0).shuffle(numbered)
    with ThreadPoolExecutor(at_once) as threads:
        yield from threads.map(one, numbered)


def of(rows: Iterable[dict[str, Any]], **about: Any) -> Rows:
    """The rows with some values, without the runs that hung."""
    return [
        row
        for row in rows
        if not row.get("hung") and all(row.get(name) == value for name, value in about.items())
    ]


def wrong(rows: Iterable[dict[str, Any]]) -> int:
    """How many operations of some runs were executed twice, lost, skipped or out of order."""
    count = 0
    for row in rows:
        count += row["twice"] + row["lost"] + row["skipped"]
        # After a number that was skipped, every other one counts as too early.
        count += 0 if row["skipped"] else row["out_of_order"]
    return count
