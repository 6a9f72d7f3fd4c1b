"""Run the core tests against every release of tinker, in one environment.

The test matrix installs a few releases, each with its own dependencies. This puts the
unpacked wheel of every release in front of one environment that has the newest one's
dependencies: quick enough to ask all of them whether the shim still works there.

    python -m tools.survey                  # every release
    python -m tools.survey --boundaries     # where something changed
    python -m tools.survey 0.18.0 0.26.2
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich.box
from rich.console import Console
from rich.table import Table

from tests import releases as files
from tests.releases import look
from tools import releases as index

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent

COLUMNS = {
    "test_cold_race": "cold race",
    "test_polls_refused": "poll 404",
    "test_submissions_refused": "submit 404",
    "test_an_unknown_future_is_the_pods_answer": "pod 404",
    "test_another_base_url_is_not_touched": "other URL",
    "test_off_is_off": "kill switch",
    "test_uninstall_restores_every_touched_class_exactly": "exact uninstall",
}
"""What each core test is about; a core test that is not named here has its own column."""

COLOURS = {"ok": "green", "passed": "green", "skipped": "yellow", "failed": "bold red"}


@dataclasses.dataclass(slots=True)
class Row:
    """What one release had to say."""

    release: str
    seams: str = ""
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    why: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    verdict: str = "passed"

    def fail(self, why: str) -> None:
        """Once failed, a release stays failed."""
        self.verdict = "failed"
        self.why.append(why)

    def skip(self, why: str) -> None:
        """Does not hide a failure."""
        if self.verdict == "passed":
            self.verdict = "skipped"
        self.why.append(why)


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What is the same for every release."""

    cache: Path
    offline: bool
    workers: int
    timeout: float
    atlas: files.Atlas
    known: dict[str, dict[str, bool]]
    not_here: tuple[str, ...]
    """Packages that some releases need and this environment does not have."""

    def row(self, release: str) -> Row:
        """One line of the table; a release that cannot be had is a failed one."""
        row = Row(release)
        started = time.monotonic()
        try:
            self._look(row)
            missing = [name for name in self.not_here if self.known[release][f"needs_{name}"]]
            if missing:
                row.skip(f"importing it needs {missing[0]}, which is not installed here")
            else:
                self._test(row)
        except (OSError, click.ClickException) as error:
            row.fail(str(error))
        row.seconds = time.monotonic() - started
        return row

    def _look(self, row: Row) -> None:
        missing = files.misfits(self.atlas[row.release])
        row.seams = "failed" if missing else f"{len(look.SEAMS)} ok"
        for misfit in missing:
            row.fail(misfit)

    def _test(self, row: Row) -> None:
        folder = index.unpacked(self.cache, row.release, offline=self.offline)
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "junit.xml"
            pytest = [sys.executable, "-m", "pytest", "-m", "core", "-n", str(self.workers)]
            pytest += ["-p", "no:cacheprovider", f"--junitxml={report}", "tests"]
            code, output = _run(pytest, {**os.environ, "PYTHONPATH": path}, self.timeout)
            if code is None:
                row.fail(f"not done after {self.timeout:g} s")
            # The header that the tests' conftest prints: which tinker they really run with.
            elif f"with tinker {row.release}," not in output:
                row.fail(f"the tests did not run with this release: {_last_line(output)}")
            elif report.is_file():
                self._read(row, report)
                if code and row.verdict != "failed":
                    row.fail(f"pytest ended with {code}: {_last_line(output)}")
            else:
                row.fail(f"no report: {_last_line(output)}")

    def _read(self, row: Row, report: Path) -> None:
        for column, outcome, why in _outcomes(report):
            if not column:
                # A whole file: skipped is none of ours, a core test in it is missed below.
                if outcome == "failed":
                    row.fail(why)
                continue
            if outcome == "failed":
                row.fail(why)
            elif outcome == "skipped":
                row.skip(why)
            # The worst outcome of a group is the group's.
            outcomes = ("ok", "skipped", "failed")
            row.cells[column] = max(row.cells.get(column, "ok"), outcome, key=outcomes.index)
        if missing := [name for name in COLUMNS.values() if name not in row.cells]:
            row.fail(f"did not run: {', '.join(missing)}")


def _outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Column, outcome and reason of each test in a report that our own pytest wrote.

    A file that could not be collected, or skips itself, has no column.
    """
    for case in ET.parse(report).iter("testcase"):  # noqa: S314
        name = case.get("name", "")
        test = name.partition("[")[0]
        outcome, why = "ok", ""
        for tag in ("skipped", "failure", "error"):
            for found in case.iter(tag):
                outcome = "skipped" if tag == "skipped" else "failed"
                message = (found.get("message") or tag).strip()
                # What pytest marks as the error itself says more than "collection failure".
                errors = [line[1:] for line in (found.text or "").splitlines() if line[:2] == "E "]
                why = f"{name}: {(errors or message.splitlines())[0].strip()[:200]}"
        yield COLUMNS.get(test, test) if case.get("classname") else "", outcome, why


def _run(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int | None, str]:
    """Its exit code and output; no code if it had to be ended, with all that it started."""
    with subprocess.Popen(  # noqa: S603
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, ""
        return process.returncode, output


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _table(rows: list[Row]) -> Table:
    columns = dict.fromkeys(COLUMNS.values()) | dict.fromkeys(
        column for row in rows for column in row.cells
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tinker", "seams", *columns, ""):
        table.add_column(heading)
    table.add_column("s", justify="right")
    for row in rows:
        cells = [row.cells.get(column, "") for column in columns]
        words = (row.seams, *cells, row.verdict)
        table.add_row(row.release, *map(_coloured, words), f"{row.seconds:.0f}")
    return table


def _coloured(word: str) -> str:
    colour = COLOURS.get(word.split(" ")[-1])
    return f"[{colour}]{word}[/]" if colour else word


@click.command(help="Run the core tests against every release of tinker, or those named.")
@click.argument("releases", nargs=-1)
@click.option("--boundaries", is_flag=True, help="Only the releases where something changed.")
@click.option("--jobs", default=3, show_default=True, help="Releases at a time.")
@click.option("--workers", default=3, show_default=True, help="Tests of a release at a time.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds for a release.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=index.CACHE,
    show_default=True,
    help="Where wheels are kept.",
)
@click.option("--offline", is_flag=True, help="Use only what the cache holds.")
def main(
    releases: tuple[str, ...],
    boundaries: bool,
    jobs: int,
    workers: int,
    timeout: float,
    cache: Path,
    offline: bool,
) -> None:
    """Run, print the table, and exit 1 if any release failed."""
    known = files.releases()
    if unknown := [release for release in releases if release not in known]:
        raise click.UsageError(f"not in {files.RELEASES.name}: {', '.join(unknown)}")
    wanted = [
        release
        for release, facts in known.items()
        if (not releases or release in releases) and (not boundaries or facts["boundary"])
    ]
    not_here = tuple(name for name in look.NOT_ALWAYS if not importlib.util.find_spec(name))
    survey = Survey(cache, offline, workers, timeout, files.atlas(), known, not_here)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(survey.row, wanted):
            click.echo(f"{row.release}: {row.verdict}, {row.seconds:.0f} s", err=True)
            rows.append(row)
    # Not narrower than the table, where there is no terminal that knows its width.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=120)
    console.print(_table(rows))
    for row in rows:
        for why in row.why:
            console.print(f"{row.release}: {why}", markup=False)
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    console.print(f"{len(rows)} releases: {counts}")
    sys.exit("failed" in verdicts)


if __name__ == "__main__":
    main()
