"""What a benchmark is: it runs contenders, each in a fresh interpreter, and reports."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from benchmarks.figures import lot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.figures import Target

PLAIN = "plain"
STRATEGY_A = "strategy A"
STRATEGY_B = "strategy B"
SHIM = "tinker_routefix"
CONTENDERS = (PLAIN, STRATEGY_A, STRATEGY_B, SHIM)

Rows = list[dict[str, Any]]

_ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """A program to be run for a contender."""

    program: str
    contender: str
    about: dict[str, Any]


class Benchmark(Protocol):
    """One of the benchmarks: a module."""

    TITLE: str

    def measure(self, stage: Stage) -> dict[str, Rows]:
        """Measure; every row is what one run handed in, under a name for its kind."""

    def report(self, measured: dict[str, Rows]) -> tuple[str, list[Target]]:
        """What came out, as Markdown with tables, and the figures to reach."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where the contenders' processes run, and how much is measured."""

    wire: str
    repeat: int | None
    """How often each measurement is repeated; None: as often as the benchmark finds right."""
    quick: bool
    """Just enough to see that everything works."""
    say: Callable[[str], None]
    labs: dict[str, str]
    """What contenders have to have in their environment."""

    def repeats(self, usual: int) -> int:
        """How often to repeat what is usually repeated so often."""
        return self.repeat or (1 if self.quick else usual)

    def run(self, runs: Iterable[Run], *, at_once: int = 1) -> Rows:
        """Run programs and collect what they hand in.

        Args:
            runs: The programs.
            at_once: How many at a time. Those that only wait can run at once; what is measured
                in microseconds runs alone.
        """
        numbered = list(runs)
        done = itertools.count(1)

        def one(run: Run) -> dict[str, Any]:
            outcome = self._run(run)
            about = " ".join(f"{name}={value}" for name, value in run.about.items())
            which = f"{next(done)}/{len(numbered)}"
            self.say(f"{which} {run.program} {run.contender} {about}"[:110])
            return {"contender": run.contender, **run.about, **outcome}

        if at_once > 1:
            # Mixed, so that the load of the machine is the same for all contenders.
            lot(0).shuffle(numbered)
        with ThreadPoolExecutor(4 if self.quick else at_once) as threads:
            return list(threads.map(one, numbered))

    def _run(self, run: Run) -> dict[str, Any]:
        """One process; one that has not ended after three minutes hangs.

        Raises:
            RuntimeError: It ended without a result.
        """
        about = {"contender": run.contender, "wire": self.wire, **run.about}
        try:
            ended = subprocess.run(  # noqa: S603 - our own program
                [sys.executable, "-m", "benchmarks.programs", run.program],
                input=json.dumps(about),
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
                cwd=_ROOT,
                env=self._environment(run.contender),
            )
        except subprocess.TimeoutExpired:
            return {"hung": True}
        if ended.returncode or not ended.stdout.strip():
            raise RuntimeError(f"{run.program} of {run.contender} failed:\n{ended.stderr[-2000:]}")
        return dict(json.loads(ended.stdout.strip().splitlines()[-1]))

    def _environment(self, contender: str) -> dict[str, str]:
        # Whatever is set for tinker or the shim out there must not decide anything.
        unset = ("TINKER_", "PYTHONDONTWRITEBYTECODE")
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(unset)},
            **self.labs,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "TINKER_API_KEY": "tml-benchmark",
            # Its requests would get the same faults, and be counted.
            "TINKER_TELEMETRY": "0",
            "TINKER_ROUTEFIX": str(int(contender == SHIM)),
        }


@contextmanager
def stage(
    wire: str, *, repeat: int | None, quick: bool, say: Callable[[str], None]
) -> Iterator[Stage]:
    """Labs, while a benchmark runs."""
    from benchmarks import labs

    with labs.serving() as environment:
        yield Stage(wire, repeat, quick, say, environment)


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
