"""What the documentation says is so: its programs run, and what it names exists.

Each check looks at the texts and returns its problems; with a text that has been tampered
with, each is seen to complain. Whether the pages build is for `mkdocs build --strict`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import tinker_routefix
from tests import releases as files
from tests.common import CANARY
from tinker_routefix import _cli, _settings, _switch, events, lab
from tinker_routefix._cli import report as check_report
from tinker_routefix._cli import run as run_command
from tinker_routefix._cli import status as status_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_mock import MockerFixture

    from tinker_routefix.lab import Lab

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
if not (ROOT / ".github").is_dir():
    pytest.skip("only a checkout has all that is read here", allow_module_level=True)
examples = pytest.importorskip("pytest_examples", reason="needs the dependency group docs")
yaml = pytest.importorskip("yaml", reason="needs the dependency group docs")

Pages = dict[str, str]
"""Texts, by their path in the checkout."""
Check = Callable[[Pages], list[str]]

FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "mkdocs.yml")),
    *sorted(DOCS.glob("**/*.md")),
    DOCS / "check.schema.json",
    *sorted((ROOT / ".github").glob("**/*.yml")),
]
PAGES: Pages = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in FILES}
PROSE = [path for path in PAGES if path.endswith(".md")]
OPERATIONS = "docs/operations.md"
COMMANDS = "docs/command-line.md"
SCHEMA = "docs/check.schema.json"
TROUBLES = "docs/troubleshooting.md"
CONTRIBUTING = "CONTRIBUTING.md"
RELEASE = ".github/workflows/release.yml"
CI = ".github/workflows/ci.yml"
TAGS = ("", "ci", "wide", "update")


# --- Reading -----------------------------------------------------------------------------


def tables(text: str, *header: str) -> list[list[list[str]]]:
    """The tables whose header begins with these words: their rows, and there the cells."""
    found: list[list[list[str]]] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if tuple(cells[: len(header)]) == header:
            found.append([])
            inside = True
        elif inside and not set(line) <= set("| -:"):
            found[-1].append(cells)
    return found


def code(cell: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def fences(text: str) -> Iterator[tuple[str, str]]:
    """The blocks of code: language and content."""
    for _, language, content in re.findall(
        r"^( *)```(\w*).*?\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL
    ):
        yield language, content


def shell(text: str) -> Iterator[str]:
    """The commands of the blocks for a shell."""
    for language, content in fences(text):
        if language == "sh":
            for line in content.splitlines():
                yield from re.split(r"&&|\|\||\||;", line.partition(" #")[0])


def spans(text: str) -> Iterator[str]:
    """What stands between backquotes in the text around the blocks, over line ends too."""
    around = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", around):
        yield " ".join(span.split())


def both_ways(what: str, said: set[str], there: set[str]) -> list[str]:
    return [f"{what}: {name} is not there" for name in sorted(said - there)] + [
        f"{what}: {name} is not told of" for name in sorted(there - said)
    ]


def words(pages: Pages, pattern: str, *paths: str) -> set[str]:
    return {word for path in paths or pages for word in re.findall(pattern, pages[path])}


# --- What there is -----------------------------------------------------------------------

VARIABLES = {field.metadata["variable"] for field in dataclasses.fields(_settings.Settings)}


@dataclasses.dataclass
class Line:
    """A kind of log line."""

    levels: set[str]
    fields: set[str]


@cache
def log_lines() -> dict[str, Line]:
    """Every kind that the package has: of events, and of calls that log without one."""
    lines: dict[str, Line] = {}
    for kind in vars(events).values():
        if isinstance(kind, type) and issubclass(kind, events.Event) and hasattr(kind, "name"):
            levels = {logging.getLevelName(kind._level)}
            if kind.level is not events.Event.level:
                levels = set(re.findall(r"logging\.(\w+)", inspect.getsource(kind.level.fget)))  # type: ignore[attr-defined]
            fields = {field.name for field in dataclasses.fields(kind)} - {"at", "gateway"}
            lines[kind.name] = Line(levels, fields)
    for path in sorted((Path(tinker_routefix.__file__).parent).glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in (
                *("_log.event", "_log.warn"),
                *(["event", "warn"] if path.name == "_log.py" else []),
            ):
                continue
            name = next((arg for arg in call.args if isinstance(arg, ast.Constant)), None)
            if name is None:
                continue
            warns = ast.unparse(call.func).endswith("warn")
            level = "WARNING" if warns else ast.unparse(call.args[0]).removeprefix("logging.")
            line = lines.setdefault(str(name.value), Line(set(), set()))
            line.levels.add(level)
            line.fields |= {str(keyword.arg) for keyword in call.keywords} - {"limit"}
    return lines


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command, the long ones where there are both."""
    names = [list(action.option_strings) for action in parser._actions]
    return {max(spelt, key=len) for spelt in names if spelt} - {"--help"}


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of the command line, and what reads their options."""
    parser, run = _cli._parsers("tinker-routefix")
    (choices,) = (
        cast("Mapping[str, argparse.ArgumentParser]", action.choices)
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {**choices, "run": run}


EXIT_CODES: dict[str, set[int]] = {
    "status": {status_command.ACTIVE, status_command.OFF, status_command.CANNOT_HELP},
    "check": {int(code) for code in check_report.Exit},
}


@cache
def sessions() -> dict[str, str]:
    """The sessions of nox, and the tag that runs them: none for what `nox` alone runs."""
    nox = [sys.executable, "-m", "nox", "--list"]
    listed = subprocess.run(nox, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = r"^[*-] ([a-z-]+?)(?:-3\.\d+)?(?:\(.*\))?(?: \[(\w+)\])? ->"
    return dict(re.findall(line, listed, re.MULTILINE))


# --- The checks --------------------------------------------------------------------------


def settings(pages: Pages) -> list[str]:
    """Every variable that is named exists, and the page of settings explains each default."""
    known = VARIABLES | {_switch.AUTOLOAD}
    said = words(pages, r"\bTINKER_ROUTEFIX(?:_[A-Z_]*[A-Z])?\b(?!_)")
    page = pages["docs/settings.md"]
    (rows,) = tables(page, "variable", "why this default")
    names = {field.name for field in dataclasses.fields(_settings.Settings)}
    set_in_code = {
        name
        for path in PROSE
        for call in re.findall(r"\bconfigure\(([^)]*)\)", pages[path])
        for name in re.findall(r"(\w+)=", call)
    }
    return [
        *(f"{name} is no setting" for name in sorted(said - known)),
        *both_ways("defaults", {name for row in rows for name in code(row[0])}, VARIABLES),
        *(f"configure() knows no {name}" for name in sorted(set_in_code - names)),
    ]


def names_of_events(pages: Pages) -> list[str]:
    """Every event that is named exists."""
    areas = "|".join(sorted({name.partition(".")[0] for name in log_lines()}))
    pattern = rf"(?:`|^)((?:{areas})\.[a-z_]+)(?:`|: )"
    said = {name for path in PROSE for name in re.findall(pattern, pages[path], re.MULTILINE)}
    return [f"{name} is no event" for name in sorted(said - log_lines().keys())]


def table_of_events(pages: Pages) -> list[str]:
    """The page of operations has every kind of log line, with its levels and its fields."""
    text = pages[OPERATIONS]
    (rows,) = tables(text, "event", "level", "fields")
    there = log_lines()
    problems = both_ways("log lines", {name for row in rows for name in code(row[0])}, {*there})
    for row in rows:
        (name,) = code(row[0])
        line = there.get(name, Line(set(), set()))
        problems += both_ways(
            f"levels of {name}", set(re.findall(r"[A-Z]{4,}", row[1])), line.levels
        )
        problems += both_ways(f"fields of {name}", set(code(row[2])), line.fields)
    (rows,) = tables(text, "field", "meaning")[:1]
    fields = set().union(*(line.fields for line in there.values())) | {"skipped"}
    return problems + both_ways("fields", {name for row in rows for name in code(row[0])}, fields)


def counters(pages: Pages) -> list[str]:
    """The page of operations has every field of a job's status; other attributes exist."""
    rows = tables(pages[OPERATIONS], "field", "meaning")[1]
    fields = {field.name for field in dataclasses.fields(tinker_routefix.JobStatus)}
    attributes = words(pages, r"\bstatus\(\)\.(\w+)", *PROSE)
    return [
        *both_ways("counters", {name for row in rows for name in code(row[0])}, fields),
        *(
            f"status() has no {name}"
            for name in sorted(attributes)
            if not hasattr(tinker_routefix.Status, name)
        ),
    ]


def states(pages: Pages) -> list[str]:
    """Each state of a job has its advice."""
    from tinker_routefix._job_state import JobState

    (rows,) = tables(pages["docs/failures.md"], "`state`")
    return both_ways("states", {code(row[0])[0] for row in rows}, {str(s.value) for s in JobState})


def command_line(pages: Pages) -> list[str]:
    """The page of the command line has every command, with its options and its exit codes."""
    parts = re.split(r"^## (\w+)$", pages[COMMANDS], flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    problems = both_ways("commands", {*sections}, {*commands()})
    for name, text in sections.items():
        if name not in commands():
            continue
        said = {
            option for (row, *_) in itertools.chain(*tables(text, "option")) for option in code(row)
        }
        problems += both_ways(f"options of {name}", said, options(commands()[name]))
        codes = {int(row[0]) for table in tables(text, "exit code") for row in table}
        there = EXIT_CODES.get(name, set())
        problems += both_ways(f"exit codes of {name}", {*map(str, codes)}, {*map(str, there)})
    return problems


def report_of_check(pages: Pages) -> list[str]:
    """The schema of `check --json` and the page of the command line have every field of it."""
    schema = json.loads(pages[SCHEMA])["$defs"]
    problems = []
    for name, kind, header in (
        ("report", check_report.Report, "field"),
        ("change", check_report.Change, "of a change"),
    ):
        there = {field.name for field in dataclasses.fields(kind)}
        (rows,) = tables(pages[COMMANDS], header, "meaning")
        problems += both_ways(f"{name}, table", {code(row[0])[0] for row in rows}, there)
        problems += both_ways(f"{name}, schema", {*schema[name]["properties"]}, there)
        problems += both_ways(f"{name}, required", {*schema[name]["required"]}, there)
    codes = {str(int(code)) for code in check_report.Exit} - {"2"}
    said = {str(code) for code in schema["report"]["properties"]["exit_code"]["enum"]}
    return problems + both_ways("exit codes, schema", said, codes)


def called(pages: Pages) -> list[str]:
    """Every call of the command line that is shown is one that it takes."""
    problems = []
    for path in PROSE:
        for text in itertools.chain(shell(pages[path]), spans(pages[path])):
            match = re.search(
                r"(?:^|[\s/])(?:tinker-routefix|python -m tinker_routefix) (.+)", text
            )
            if match is None:
                continue
            name, *arguments = shlex.split(match[1])
            if name not in commands():
                problems.append(f"{path}: there is no command {name}")
            # Without arguments it is only named, and placeholders have no values.
            elif arguments and not _takes(name, arguments):
                problems.append(f"{path}: {name} does not take {' '.join(arguments)}")
    return problems


def _takes(name: str, arguments: list[str]) -> bool:
    try:
        if name == "run":
            run_command.parse(arguments)
        else:
            if name == "check" and arguments[-1].startswith("-"):
                arguments = [*arguments, "URL"]
            commands()[name].parse_args(arguments)
    except (SystemExit, run_command.UsageError):
        return False
    return True


def sessions_of_nox(pages: Pages) -> list[str]:
    """Every session of nox that is named exists, and the guide for contributors has them all."""
    named = words(pages, r"\bnox -s '?([a-z]+(?:-[a-z]+)*)", *PROSE)
    problems = [f"nox has no session {name}" for name in sorted(named - sessions().keys())]
    parts = zip(tables(pages[CONTRIBUTING], "session", "what it shows"), TAGS, strict=True)
    for rows, tag in parts:
        said = {name for row in rows for name in code(row[0])}
        there = {name for name, runs in sessions().items() if runs == tag}
        problems += both_ways("sessions", said, there)
    return problems


def paths(pages: Pages) -> list[str]:
    """Every file of the checkout that is named is there."""
    folders = r"(?:tests|tools|docs|tinker_routefix|autoload|examples|benchmarks|\.github|\.ci)"
    named = {
        (path, name)
        for path in PROSE
        for name in spans(pages[path])
        if re.fullmatch(rf"{folders}/[\w./-]+|[\w.-]+\.(?:md|toml|py)", name)
    }
    modules = {
        ("docs/architecture.md", f"tinker_routefix/{name}.py")
        for table in tables(pages["docs/architecture.md"], "file")
        for row in table
        for name in code(row[0])
    }
    # Programs that a page shows, by their titles.
    shown = words(pages, r'title="([^"]+)"', *PROSE) | {"train.py", "program.py"}
    return [
        f"{path}: there is no {name}"
        for path, name in sorted(named | modules)
        if name not in shown
        and not any(list(ROOT.glob(folder + name)) for folder in ("", "*/", "*/*/"))
    ]


def public_names(pages: Pages) -> list[str]:
    """The reference has every public name, and every name that is used anywhere is public."""
    problems = []
    for path, there in (
        ("docs/reference/index.md", {*tinker_routefix.__all__} - {"__version__", "subscribe"}),
        ("docs/reference/events.md", {*events.__all__}),
        ("docs/reference/lab.md", {*lab.__all__}),
    ):
        named = r"^(?:::: tinker_routefix\.(?!events$|lab$)| +- )(\w+)$"
        members = set(re.findall(named, pages[path], re.MULTILINE))
        problems += both_ways(path, members, there)
    used = words(pages, r"\btinker_routefix\.(\w+)(?=[\W_]*)", *PROSE)
    shown = {*tinker_routefix.__all__, "events", "lab", "pth", "start"}
    return problems + [f"tinker_routefix has no {name}" for name in sorted(used - shown)]


def the_readmes_commands(pages: Pages) -> list[str]:
    """The guide for contributors gives the README's own commands."""
    there = {line for line in shell(pages["README.md"]) if line.strip()}
    first = {line for line in shell(pages[CONTRIBUTING]) if "python3 -m venv" in line}
    said = {
        line for line in shell(pages[CONTRIBUTING].partition("To work on it")[0]) if line.strip()
    }
    return [f"the README has no {line!r}" for line in sorted((first | said) - there)]


def workflows(pages: Pages) -> list[str]:
    """Actions are pinned, rights are few, and a release is tested on every Python."""
    problems = []
    for path in pages:
        if "/workflows/" not in path:
            continue
        problems += [
            f"{path}: {action} is not pinned by the hash of a release"
            for action in re.findall(r"uses: (.+)", pages[path])
            if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        ]
        jobs = yaml.safe_load(pages[path])["jobs"]
        for name, job in jobs.items():
            rights = job.get("permissions") or {}
            allowed = {"id-token"} if (path, name) == (RELEASE, "publish") else {"contents"}
            if set(rights) - allowed or rights.get("contents", "read") != "read":
                problems.append(f"{path}: {name} may do more than it needs: {rights}")
    jobs = yaml.safe_load(pages[RELEASE])["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pythons = re.findall(r":: (3\.\d+)'", str(project["classifiers"]))
    if jobs["test"]["strategy"]["matrix"]["python"] != pythons:
        problems.append(f"a release is not tested on {pythons}")
    pythons = files.matrix()["pythons"]
    if yaml.safe_load(pages[CI])["jobs"]["tests"]["strategy"]["matrix"]["python"] != pythons:
        problems.append(f"CI does not run on {pythons}")
    if jobs["publish"].get("if") != "github.ref_type == 'tag'":
        problems.append("not only a tag is published")
    if set(jobs["publish"]["needs"]) != {"build", "test"}:
        problems.append("what is published need not have been tested")
    return problems


def forms(pages: Pages) -> list[str]:
    """Who reports something is asked for what is needed, and warned of pasting keys."""
    problems = []
    for path in pages:
        if "ISSUE_TEMPLATE" not in path or path.endswith("config.yml"):
            continue
        body = yaml.safe_load(pages[path])["body"]
        names = [part["id"] for part in body if part["type"] != "markdown"]
        if len(set(names)) != len(names):
            problems.append(f"{path}: two parts have one id")
        if "Do not paste keys" not in body[0]["attributes"].get("value", ""):
            problems.append(f"{path}: nobody is warned of pasting keys")
        labels = [part["attributes"].get("label", "") for part in body]
        if "tinker-routefix status --json" not in labels:
            problems.append(f"{path}: nobody asks for the status")
    return problems


def recipes_are_run(pages: Pages) -> list[str]:
    """A program that a page shows as a file is run by the tests of that page."""
    others = [
        path for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name
    ]
    tests = "".join(path.read_text("utf-8") for path in others)
    return [
        f"{path}: no test runs {title}"
        for path in PROSE
        for title in re.findall(r'^ *```python title="([^"]+)"', pages[path], re.MULTILINE)
        if Path(title).stem not in tests
    ]


def offline(pages: Pages) -> list[str]:
    """Nothing that a browser shows is fetched from elsewhere: Mermaid would be, by the theme."""
    problems = [
        f"{path}: a Mermaid diagram is drawn by a script from a server"
        for path in PROSE
        if any(language == "mermaid" for language, _ in fences(pages[path]))
    ]
    problems += [
        f"{path}: shows {picture} of another server"
        for path in PROSE
        for picture in re.findall(r"!\[[^]]*\]\((https?:[^)]+)\)", pages[path])
    ]
    font = re.search(r"^  font: (\w+)$", pages["mkdocs.yml"], re.MULTILINE)
    if font is None or font[1] != "false":
        problems.append("mkdocs.yml: fonts are fetched from a server")
    return problems


def readme(pages: Pages) -> list[str]:
    """The README is short, says first what people have on their screen, and shows anywhere."""
    text = pages["README.md"]
    lines = text.splitlines()
    problems = [f"line of {len(line)} columns: {line}" for line in lines if len(line) > 100]
    for what, count, most in (("lines", len(lines), 120), ("words", len(text.split()), 900)):
        if count > most:
            problems.append(f"{count} {what}, more than {most}")
    first = text.partition("```python")[0]
    texts = (
        "NotFoundError: Error code: 404",
        "Trainer job not found or not running",
        "ValueError: Error retrieving result",
        "/training/v1/rlorTrainerJobs/",
    )
    problems += [f"the line comes before {said!r}" for said in texts if said not in first]
    # Package indexes show it without the files beside it.
    problems += [
        f"{target} is relative"
        for target in re.findall(r"\]\(([^)]+)\)", text)
        if not target.startswith("https://")
    ]
    if "**The shim never adds an execution.**" not in text:
        problems.append("the promise is another one")
    return problems


def found_by_error_text(pages: Pages) -> list[str]:
    """The page of troubleshooting has the texts that people have on their screen, as headings."""
    headings = "\n".join(re.findall(r"^## .*$", pages[TROUBLES], re.MULTILINE))
    texts = (
        "NotFoundError: Error code: 404",
        "Trainer job not found or not running",
        "ValueError: Error retrieving result",
        "RouteTimeoutError",
        "may have been carried out",
        "SettingError",
        "RoutefixWarning",
    )
    return [f"no heading has {text!r}" for text in texts if text not in headings]


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        settings,
        names_of_events,
        table_of_events,
        counters,
        states,
        command_line,
        report_of_check,
        called,
        sessions_of_nox,
        paths,
        public_names,
        the_readmes_commands,
        workflows,
        forms,
        recipes_are_run,
        offline,
        readme,
        found_by_error_text,
    )
}


@pytest.mark.parametrize("check", CHECKS)
def test_docs_pass_each_check(check: str) -> None:
    assert CHECKS[check](PAGES) == []


TAMPERED = [
    ("settings", "docs/activation.md", "TINKER_ROUTEFIX_STRICT=1", "TINKER_ROUTEFIX_STRCT=1"),
    ("settings", "docs/settings.md", "| `TINKER_ROUTEFIX_MAX_DELAY` |", "| the longest |"),
    ("settings", "docs/settings.md", "retry_budget=60", "retry_limit=60"),
    (
        "names_of_events",
        "docs/security.md",
        "`control_plane.not_asked`",
        "`control_plane.mute`",
    ),
    ("names_of_events", OPERATIONS, "process.report: requests", "process.reported: requests"),
    ("table_of_events", OPERATIONS, "| `route.replayed` |", "| `route.resent` |"),
    ("table_of_events", OPERATIONS, "| `shim.failed` | WARNING |", "| `shim.failed` | ERROR |"),
    (
        "table_of_events",
        OPERATIONS,
        "| DEBUG | `job`, `state`, `control_plane_said`",
        "| DEBUG | `job`, `control_plane_said`",
    ),
    ("table_of_events", OPERATIONS, "| `age_seconds` | how", "| how long ago | how"),
    ("counters", OPERATIONS, "| `replays` | requests sent again |", "| `resent` | |"),
    ("counters", "docs/removing.md", "status().last_intervention", "status().last_needed"),
    ("states", "docs/failures.md", "| `starting` |", "| `pending` |"),
    ("command_line", COMMANDS, "| `--rate` |", "| `--pace` |"),
    ("command_line", COMMANDS, "| 7 | unclear", "| 8 | unclear"),
    ("command_line", COMMANDS, "\n## demo\n", "\n## show\n"),
    ("report_of_check", COMMANDS, "| `raced` |", "| `races` |"),
    ("report_of_check", SCHEMA, '"raced": {', '"races": {'),
    ("report_of_check", SCHEMA, "143", "144"),
    ("called", COMMANDS, "check --watch https", "check --follow https"),
    ("called", COMMANDS, "lab --stale 5", "lab --stale long"),
    ("called", "docs/activation.md", "tinker-routefix status", "tinker-routefix state"),
    (
        "called",
        CONTRIBUTING,
        "`tinker-routefix status --json`",
        "`tinker-routefix status --yaml`",
    ),
    ("sessions_of_nox", CONTRIBUTING, "| `survey` |", "| `poll` |"),
    ("sessions_of_nox", "docs/releases.md", "nox -s latest", "nox -s newest"),
    ("sessions_of_nox", "docs/releases.md", "nox -s compat-boundaries", "nox -s compat-borders"),
    ("paths", "docs/releases.md", "`tests/releases/look.py`", "`tests/releases/see.py`"),
    ("paths", "docs/architecture.md", "| `_warmup` |", "| `_warmth` |"),
    ("public_names", "docs/reference/index.md", "x.uninstall\n", "x.remove\n"),
    ("public_names", "docs/reference/events.md", "- Recovered\n", ""),
    (
        "public_names",
        "docs/failures.md",
        "tinker_routefix.RouteTimeoutError",
        "tinker_routefix.Late",
    ),
    ("the_readmes_commands", CONTRIBUTING, "pip install nox uv", "pip install nox"),
    ("workflows", RELEASE, "checkout@08c6903cd8c0fde910a37f88322edcfb5dd907a8", "checkout@v5"),
    ("workflows", CI, '"3.14"]', '"3.15"]'),
    ("workflows", RELEASE, '"3.11", ', ""),
    ("workflows", RELEASE, "contents: read", "contents: write"),
    ("workflows", RELEASE, "if: github.ref_type == 'tag'\n    runs-on", "runs-on"),
    ("workflows", RELEASE, "needs: [build, test]", "needs: [build]"),
    ("forms", ".github/ISSUE_TEMPLATE/fault.yml", "Do not paste keys", "Be brief"),
    ("forms", ".github/ISSUE_TEMPLATE/release.yml", "status --json", "status"),
    ("forms", ".github/ISSUE_TEMPLATE/fault.yml", "id: note", "id: log"),
    ("offline", "docs/troubleshooting.md", "```text", "```mermaid"),
    ("offline", "docs/quick-start.md", "](images/", "](https://elsewhere.example/images/"),
    ("offline", "mkdocs.yml", "font: false", "font: true"),
    (
        "readme",
        "README.md",
        "Changes:",
        f"{'so ' * 30}changes are",
    ),
    ("readme", "README.md", "\n\n", "\n\n\n"),
    ("readme", "README.md", "the", "the the"),
    ("readme", "README.md", "ValueError: Error retrieving", "ValueError: Error receiving"),
    ("readme", "README.md", "](https://pypi.org", "](pypi.org"),
    ("readme", "README.md", "never adds an execution", "never trains twice"),
    ("found_by_error_text", TROUBLES, "Error retrieving result", "Error receiving result"),
    ("recipes_are_run", "docs/processes.md", 'title="spawned.py"', 'title="brewed.py"'),
]
"""For each check, what it has to complain of: page, text, and what is put in its place."""


@pytest.mark.parametrize(("check", "page", "old", "new"), TAMPERED)
def test_check_of_tampered_docs_notices_it(check: str, page: str, old: str, new: str) -> None:
    assert old in PAGES[page], "the text has changed: tamper with something else"
    assert CHECKS[check]({**PAGES, page: PAGES[page].replace(old, new)})


def test_every_check_has_a_tampered_page() -> None:
    assert {check for check, *_ in TAMPERED} == CHECKS.keys()


# --- The programs ------------------------------------------------------------------------


def programs() -> list[Any]:
    """The Python blocks, but for the recipes that other tests run as files of their own."""
    found = examples.find_examples(ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS)
    return sorted((one for one in found if "title=" not in one.prefix), key=str)


@pytest.mark.parametrize("program", programs(), ids=str)
def test_program_in_docs_runs_as_printed(
    program: Any,
    lab: Lab,
    eval_example: Any,
    capsys: pytest.CaptureFixture[str],
    mocker: MockerFixture,
) -> None:
    """Each by itself; `url` is the base URL of a job that is well."""
    mocker.patch.dict(os.environ)
    if "configure(" in program.source:
        # As in a process of its own: a client of an earlier program may still send its telemetry.
        mocker.patch("tinker_routefix._routes.all_routes", return_value=[])
    eval_example.set_config(line_length=100)
    run = eval_example.run_print_check if "#>" in program.source else eval_example.run
    run(program, module_globals={"url": lab.base_url})
    assert CANARY not in capsys.readouterr().out


def test_failing_program_in_docs_is_noticed(eval_example: Any) -> None:
    wrong = "import tinker_routefix\n\ntinker_routefix.configure(patience=3)\n"
    with pytest.raises(TypeError, match="patience"):
        eval_example.run(examples.CodeExample.create(wrong))


def test_docs_contain_programs() -> None:
    assert len(programs()) >= 10
