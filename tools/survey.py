"""Run tests against every release of tinker, in one environment, and under the Fireworks SDK.

The test matrix installs a few releases, each with its own dependencies. This puts the
unpacked wheel of every release in front of one environment that has the newest one's
dependencies: quick enough to ask all of them whether the shim still works there. A Fireworks
SDK pins its tinker, or brings its own, so each of them needs an environment: `--row`.

    python -m tools.survey                              # every release, the core tests
    python -m tools.survey 0.18.0 0.26.2
    python -m tools.survey --boundaries --file tests/test_survives.py
    python -m tools.survey --row 1.2.28=/path/to/python
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from importlib import metadata
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
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parent.parent

TINKER = {
    "test_cold_race_is_survived": "cold race",
    "test_poll_404_is_survived": "poll 404",
    "test_submission_404_is_survived": "submit 404",
    "test_pod_404_for_an_unknown_future_is_raised_at_once": "pod 404",
    "test_client_with_another_base_url_is_not_touched": "other URL",
    "test_switched_off_shim_patches_and_imports_nothing": "kill switch",
    "test_uninstall_restores_every_touched_class_exactly": "exact uninstall",
}
"""What each core test is about; a core test that is not named here has its own column."""

FIREWORKS = {
    "test_cold_race_is_survived[full]": "cold, full",
    "test_cold_race_is_survived[lora]": "cold, LoRA",
    "test_poll_404_is_survived": "poll 404",
    "test_submission_404_is_survived": "submit 404",
    "test_404_on_one_part_of_a_batch_is_survived": "submit 404",
    "test_checkpoint_listing_on_a_stale_route_is_complete": "checkpoints",
    "test_request_to_a_deleted_job_fails_fast": "deleted job",
    "test_switched_off_shim_leaves_the_crash": "kill switch",
    "test_shim_works_in_any_import_order": "import order",
    "test_job_behind_a_split_gateway_is_asked_about_at_the_managers_control_plane": "own gateway",
}
"""The same for the tests of the Fireworks SDK."""

REST = "all others"
"""The column of the tests without a name, where all are run and not only the core."""

TEST_TIMEOUT = 180
"""Seconds for one test: more than the tests' own patience, so that these can say why."""

COLOURS = {"ok": "green", "passed": "green", "skipped": "yellow", "failed": "bold red"}

PROBE = """
import importlib, json, sys
from importlib import metadata
import tinker_routefix
for name in ("client", "trainer"):
    importlib.import_module(f"fireworks.training.sdk.{name}")
def release(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "fireworks-ai": release("fireworks-ai"),
    "tinker": release("tinker"),
    "seams": {seam.name: seam.state for seam in tinker_routefix.status().seams},
}))
"""
"""What a Fireworks environment has, and what stands at the seams there."""


@dataclasses.dataclass(slots=True)
class Row:
    """What one release had to say."""

    name: str
    seams: str = ""
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    tests: int = 0
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

    def read(self, report: Path, columns: Mapping[str, str], rest: str) -> None:
        """Take over what pytest says of each test."""
        for column, outcome, why in _outcomes(report, columns, rest):
            if outcome == "failed":
                self.fail(why)
            # A file that skips itself as a whole has no column. It is none of ours: what
            # was expected of it is missed below.
            if not column:
                continue
            self.tests += 1
            # Once for all the parameters of a test.
            if outcome == "skipped" and f"skipped, {why}" not in self.why:
                self.why.append(f"skipped, {why}")
            # The worst outcome of a group is the group's.
            outcomes = ("ok", "skipped", "failed")
            self.cells[column] = max(self.cells.get(column, "ok"), outcome, key=outcomes.index)
        if missing := [name for name in columns.values() if name not in self.cells]:
            self.fail(f"did not run: {', '.join(dict.fromkeys(missing))}")


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What is the same for every release."""

    cache: Path
    offline: bool
    workers: int
    timeout: float
    tests: tuple[str, ...]
    """Files, all of whose tests are run; none: the core tests of all files."""
    torch: Path | None
    """The folder that has torch, for the releases that import it."""
    atlas: files.Atlas
    known: dict[str, dict[str, bool]]
    not_here: tuple[str, ...]
    """Packages that some releases need and this environment does not have."""

    def release(self, release: str) -> Row:
        """A line about a release of tinker; one that cannot be had is a failed one."""
        row = Row(release)
        misfits = files.misfits(self.atlas[release])
        row.seams = "failed" if misfits else f"{len(look.SEAMS)} ok"
        for misfit in misfits:
            row.fail(misfit)
        missing = [name for name in self.not_here if self.known[release][f"needs_{name}"]]
        if missing:
            row.skip(f"importing it needs {missing[0]}, which is not installed here")
            return row
        folders = [index.unpacked(self.cache, release, offline=self.offline)]
        if self.torch and self.known[release]["needs_torch"]:
            folders.append(self.torch)
        path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
        which = self.tests or ("-m", "core", "tests")
        self._test(
            row,
            [sys.executable, "-m", "pytest", *which],
            {"PYTHONPATH": os.pathsep.join(path)},
            f"with tinker {release},",
            TINKER,
            REST if self.tests else "",
        )
        return row

    def fireworks(self, name: str, python: str) -> Row:
        """A line about a Fireworks SDK, by the interpreter of the environment that has it."""
        row = Row(name)
        probe = subprocess.run(  # noqa: S603
            [python, "-c", PROBE],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )
        if probe.returncode:
            row.fail(f"the SDK cannot be imported: {_last_line(probe.stderr)}")
            return row
        found = json.loads(_last_line(probe.stdout))
        row.name = f"{found['fireworks-ai']} ({found['tinker'] or 'own copy'})"
        loaded = {seam: state for seam, state in found["seams"].items() if state != "not loaded"}
        wrong = {seam: state for seam, state in loaded.items() if state != "ours"}
        row.seams = "failed" if wrong or not loaded else f"{len(loaded)} ok"
        if row.seams == "failed":
            row.fail(f"seams: {wrong or 'none was loaded'}")
        self._test(
            row,
            [python, "-m", "pytest", "tests/test_fireworks.py"],
            {},
            f"fireworks-ai {found['fireworks-ai']},",
            FIREWORKS,
            REST,
        )
        return row

    def _test(
        self,
        row: Row,
        pytest: list[str],
        environment: dict[str, str],
        header: str,
        columns: Mapping[str, str],
        rest: str,
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "junit.xml"
            # Verbose, so that the last line names the test that hangs.
            pytest += ["-v", "-n", str(self.workers), f"--timeout={TEST_TIMEOUT}"]
            pytest += ["-p", "no:cacheprovider", f"--junitxml={report}"]
            code, output = run(
                pytest, os.environ | environment, self.timeout, Path(scratch) / "output"
            )
            ended = _ended(code, self.timeout)
            # The header that the tests' conftest prints: which release they really run with.
            if header not in output:
                row.fail(f"the tests did not run with this release: {ended}: {_last_line(output)}")
            elif report.is_file():
                row.read(report, columns, rest)
                if code and row.verdict != "failed":
                    row.fail(f"{ended}: {_last_line(output)}")
            else:
                failed = re.findall(
                    r"^(?:\[gw.*\] )?(?:FAILED )?(\S+::\S+) FAILED", output, re.MULTILINE
                )
                before = f", after {', '.join(failed)} had failed" if failed else ""
                row.fail(f"{ended}{before}; its last line: {_last_line(output)}")


def _outcomes(
    report: Path, columns: Mapping[str, str], rest: str
) -> Iterator[tuple[str, str, str]]:
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
                who = test if outcome == "skipped" else name
                why = f"{who}: {(errors or message.splitlines())[0].strip()[:200]}"
        column = columns.get(name) or columns.get(test) or rest or test
        yield column if case.get("classname") else "", outcome, why


def run(
    command: list[str], environment: Mapping[str, str], timeout: float, log: Path
) -> tuple[int | None, str]:
    """Its exit code and output; no code if it had to be ended, with all that it started."""
    # Into a file: a pipe would be waited for as long as any grandchild holds it.
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()
    return code, log.read_text("utf-8", "replace")


def _ended(code: int | None, timeout: float) -> str:
    if code is None:
        return f"killed, as it was not done after {timeout:g} s"
    if code < 0:
        return f"pytest was ended by {signal.Signals(-code).name}"
    return f"pytest ended with {code}"


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1].strip()


def _table(title: str, named: Mapping[str, str], rows: list[Row]) -> Table:
    columns = dict.fromkeys(named.values()) | dict.fromkeys(
        column for row in rows for column in row.cells
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in (title, "seams", *columns):
        table.add_column(heading)
    for heading in ("tests", "", "s"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        words = map(_coloured, (row.seams, *(row.cells.get(column, "") for column in columns)))
        end = (str(row.tests or ""), _coloured(row.verdict), f"{row.seconds:.0f}")
        table.add_row(row.name, *words, *end)
    return table


def _coloured(word: str) -> str:
    colour = COLOURS.get(word.split(" ")[-1])
    return f"[{colour}]{word}[/]" if colour else word


def _print(tables: Sequence[tuple[str, Mapping[str, str], list[Row]]], footer: list[str]) -> None:
    # Wider than any table, where there is no terminal that knows its width.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    for title, named, rows in tables:
        if rows:
            console.print(_table(title, named, rows))
    for title, _, rows in tables:
        for row in rows:
            for why in row.why:
                console.print(f"{title.split()[0]} {row.name}: {why}", markup=False, soft_wrap=True)
    for line in footer:
        console.print(line, markup=False, soft_wrap=True)


def _timed(name: str, make: Callable[[], Row]) -> Row:
    started = time.monotonic()
    try:
        row = make()
    except (OSError, subprocess.SubprocessError, click.ClickException) as error:
        row = Row(name)
        row.fail(str(error))
    row.seconds = time.monotonic() - started
    # The reasons at once, too: a run that is broken off prints no table.
    why = "".join(f"\n    {why}" for why in row.why)
    click.echo(f"{row.name}: {row.verdict}, {row.seconds:.0f} s{why}", err=True)
    return row


def _split(_: object, __: object, rows: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(row.partition("=")[::2] for row in rows)
    if wrong := [name for name, python in pairs if not python]:
        raise click.BadParameter(f"NAME=PYTHON is expected: {', '.join(wrong)}")
    return pairs


@click.command(help="Run tests against every release of tinker, or those named.")
@click.argument("releases", nargs=-1)
@click.option("--boundaries", is_flag=True, help="Only the releases where something changed.")
@click.option(
    "--elsewhere",
    multiple=True,
    metavar="RELEASE",
    help="Leave out what is tested elsewhere; newest: what is installed here.",
)
@click.option("--file", "tests", multiple=True, help="Run all tests of a file, not only the core.")
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="NAME=PYTHON",
    callback=_split,
    help="A Fireworks SDK, and the interpreter that has it.",
)
@click.option(
    "--torch",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder with torch in it, for the releases that import it.",
)
@click.option(
    "--jobs",
    default=4 * (os.cpu_count() or 1),
    show_default="4 for each core",
    help="Releases at a time.",
)
@click.option("--workers", default=0, show_default=True, help="Processes for each release.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for each release.")
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
    elsewhere: tuple[str, ...],
    tests: tuple[str, ...],
    rows: tuple[tuple[str, str], ...],
    torch: Path | None,
    jobs: int,
    workers: int,
    timeout: float,
    cache: Path,
    offline: bool,
) -> None:
    """Run, print the table, and exit 1 if any release failed."""
    began, spent = time.monotonic(), os.times()
    known = files.releases()
    if unknown := [release for release in releases if release not in known]:
        raise click.UsageError(f"not in {files.RELEASES.name}: {', '.join(unknown)}")
    there = {metadata.version("tinker") if name == "newest" else name for name in elsewhere}
    asked = [
        release
        for release, facts in known.items()
        if (not releases or release in releases) and (not boundaries or facts["boundary"])
    ]
    wanted = [release for release in asked if release not in there]
    if left_out := [release for release in asked if release in there]:
        click.echo(f"left out, as they are tested elsewhere: {', '.join(left_out)}")
    if torch and not (torch / "torch").is_dir():
        click.echo(f"{torch} has no torch", err=True)
        torch = None
    not_here = tuple(
        name
        for name in look.NOT_ALWAYS
        if not importlib.util.find_spec(name) and not (name == "torch" and torch)
    )
    survey = Survey(cache, offline, workers, timeout, tests, torch, files.atlas(), known, not_here)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # Those that take longest come first.
        above = [
            pool.submit(_timed, name, functools.partial(survey.fireworks, name, python))
            for name, python in rows
        ]
        below = [
            pool.submit(_timed, name, functools.partial(survey.release, name)) for name in wanted
        ]
        tables = [
            ("tinker", TINKER, [future.result() for future in below]),
            ("fireworks-ai (tinker)", FIREWORKS, [future.result() for future in above]),
        ]
    verdicts = [row.verdict for _, _, rows in tables for row in rows]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    now = os.times()
    cpu = sum(now[2:4]) - sum(spent[2:4])
    footer = [
        f"{len(wanted)} releases of tinker, {len(rows)} of fireworks-ai: {counts}",
        f"{time.monotonic() - began:.0f} s, {cpu:.0f} s of CPU",
    ]
    if left_out:
        footer.insert(0, f"left out, as they are tested elsewhere: {', '.join(left_out)}")
    _print(tables, footer)
    sys.exit("failed" in verdicts)


if __name__ == "__main__":
    main()
