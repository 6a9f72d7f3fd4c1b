"""The test matrix: releases of tinker by releases of Python, and the checks around it.

`nox` alone is what CI runs: the checks, the matrix, the releases where something changed, the
Fireworks SDKs, and other packages that patch. `nox -t wide` adds tinker's own tests, both
majors of wrapt, today's newest tinker, Ray and notebooks; `nox -s survey` is every release
there is, in one table. `nox -l` lists the parts; options behind `--` go to what a part runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
# An interpreter that is missing is said so, not fetched.
nox.options.download_python = "never"
# Where bytecode is not kept, every process that a test starts compiles tinker anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
NEWEST_PYTHON = PYTHONS[-2]
"""For what needs to run once: the newest but one, which every tool supports."""

TINKERS = (
    "0.15.0",  # under fireworks-ai 1.0.0a40 to a62; every submission in turn
    "0.16.1",  # under 1.0.1a63 to 1.2.0a7x
    "0.22.2",  # under 1.2.0a75 to a85; client config, parallel parts, protobuf results
    "0.22.7",  # under 1.2.0a89 and 1.2.0
    "0.23.0",  # under 1.2.1 to 1.2.2x
    "newest",
)

FIREWORKS = {
    # One release for each tinker that the SDK was ever pinned to, and its own copy.
    "tinker-0.15.0": ["fireworks-ai==1.0.0a62", "tinker==0.15.0", "requests"],
    "tinker-0.16.1": ["fireworks-ai[training-sdk]==1.2.0a73"],
    "tinker-0.22.2": ["fireworks-ai[training-sdk]==1.2.0a85"],
    "tinker-0.22.7": ["fireworks-ai[training-sdk]==1.2.0"],
    "tinker-0.23.0": ["fireworks-ai[training-sdk]==1.2.24"],
    "own-copy": ["fireworks-ai[training-sdk]==1.2.28"],
}

PROCESSES = (
    # Only up to 0.27.0 tinker can sample in a process of its own.
    (PYTHONS[0], "0.15.0"),
    (NEWEST_PYTHON, "newest"),
    (PYTHONS[-1], "0.23.0"),
)

WITHOUT_TINKER = [
    "tests/test_autoload.py",
    "tests/test_cli.py",
    "tests/test_control_plane.py",
    "tests/test_demo.py",
    "tests/test_lab.py",
    "tests/test_limits.py",
    "tests/test_policy.py",
    "tests/test_releases.py",
    "tests/test_settings.py",
    "tests/test_verdict.py",
    "tests/test_waiting.py",
]
"""Tests that say the same whatever tinker is installed: they run once for each Python."""

WITH_TINKER = ["tests/test_seams.py", "tests/test_steps_aside.py", "tests/test_survives.py"]

PROOF = [
    "tests/test_bad_input.py",
    "tests/test_events.py",
    "tests/test_failures.py",
    "tests/test_retirement.py",
    "tests/test_secrets.py",
]
"""What is fuzzed, broken and searched for: on the first and the last tinker of the matrix."""

# The tests wait more than they work, so there are more of them at a time than cores.
PYTEST = ("-m", "pytest", "-n", "8", "--dist", "load", "--maxschedchunk", "1", "-q")


def requirement(tinker: str) -> str:
    return "tinker" if tinker == "newest" else f"tinker=={tinker}"


def install(session: nox.Session, tinker: str) -> None:
    session.install(".[lab]", requirement(tinker), *nox.project.dependency_groups(PROJECT, "test"))


def away(session: nox.Session) -> None:
    """Go where the tests are and the sources are not: they run with the installed package."""
    here = Path(session.create_tmp()) / "away"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    for folder in ("docs", "examples", "tests", "tools"):
        shutil.copytree(folder, here / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "noxfile.py"):
        shutil.copy(name, here)
    session.chdir(here)


def pytest(session: nox.Session, files: list[str], *, covered: bool = True) -> None:
    """Run tests; on one of the Pythons with what they cover noted for `coverage`."""
    data = coverage_data(session)
    away(session)
    python: tuple[str, ...] = ("python",)
    if covered and session.python == NEWEST_PYTHON:
        for old in data.parent.glob(f"{data.name}*"):
            old.unlink()
        session.env["COVERAGE_FILE"] = str(data)
        python = ("python", "-m", "coverage", "run", "--rcfile=tests/coverage.toml")
    session.run(*python, *PYTEST, *(session.posargs or files))


def coverage_data(session: nox.Session) -> Path:
    """Where a session notes what its tests cover: a file of each process, named like this."""
    name = re.sub(r"[^a-z0-9]+", "-", session.name.lower())
    folder = session.cache_dir.absolute() / "coverage"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".coverage.{name}"


def survey_releases(session: nox.Session, *options: str) -> None:
    """Many releases in one environment, several at a time."""
    install(session, "newest")
    # Some releases cannot be imported without grpcio; wheels are fetched with pip.
    session.install("grpcio", "packaging", "pip")
    torch = torch_folder(session)
    away(session)
    session.run(*("python", "-m", "tools.survey", f"--torch={torch}", *options), *session.posargs)


def torch_folder(session: nox.Session) -> Path:
    """What only the releases before 0.8.0 need, away from the others: they import it too."""
    folder = session.cache_dir.absolute() / f"torch-{session.python}"
    # On Linux the plain requirement would bring CUDA along, elsewhere it is the CPU's.
    build = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        # Of pip, whose settings say where the CPU's build is.
        pip = ("python", "-m", "pip", "install", "--quiet", f"--target={part}")
        try:
            session.run(*pip, "--only-binary=:all:", build)
        except CommandFailed:
            session.warn(f"pip finds no {build} here: the releases that need it are skipped")
        else:
            part.rename(folder)
    return folder


def environment(session: nox.Session, name: str, requirements: list[str]) -> Path:
    """One more environment of a session, kept between runs: its interpreter."""
    folder = Path(session.create_tmp()).absolute() / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        session.run("python", "-m", "venv", "--without-pip", str(folder))
    if session.venv_backend == "uv":
        install = ["uv", "pip", "install", "--quiet", f"--python={python}"]
    else:
        install = ["python", "-m", "pip", f"--python={python}", "install", "--quiet"]
    session.run(*install, *requirements, external=True)
    return python


def fireworks_requirements(row: str) -> list[str]:
    return [".[lab]", *FIREWORKS[row], *nox.project.dependency_groups(PROJECT, "test")]


@nox.session(python=NEWEST_PYTHON, tags=["quick"])
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=NEWEST_PYTHON, tags=["quick"])
def types(session: nox.Session) -> None:
    """Strict type checks of the package, its lab and its tests."""
    session.install("-e", ".[lab,tinker]", *nox.project.dependency_groups(PROJECT, "dev"))
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """What does not depend on tinker's release, and the demo."""
    install(session, "newest")
    pytest(session, WITHOUT_TINKER)


@nox.session(python=PYTHONS)
@nox.parametrize("tinker", TINKERS)
def race(session: nox.Session, tinker: str) -> None:
    """Every fault, first on plain tinker and then with the shim."""
    install(session, tinker)
    # What the ones between cover, the first and the last do too.
    pytest(session, WITH_TINKER, covered=tinker in (TINKERS[0], TINKERS[-1]))


@nox.session(python=NEWEST_PYTHON)
@nox.parametrize("tinker", [TINKERS[0], TINKERS[-1]])
def proof(session: nox.Session, tinker: str) -> None:
    """Bad input, failures, and keys where they must not be."""
    install(session, tinker)
    pytest(session, PROOF)


@nox.session()
@nox.parametrize("python,tinker", PROCESSES)
def processes(session: nox.Session, tinker: str) -> None:
    """Every way in which a run gets a second process, but for Ray's and Jupyter's."""
    install(session, tinker)
    pytest(session, ["tests/test_processes.py"])


@nox.session(python=NEWEST_PYTHON, default=False, tags=["wide"])
def ray(session: nox.Session) -> None:
    """Ray's workers."""
    install(session, "newest")
    session.install("ray")
    # Each test starts a cluster.
    pytest(session, ["-n", "2", "tests/test_ray.py"])


@nox.session(python=NEWEST_PYTHON, default=False, tags=["wide"])
def jupyter(session: nox.Session) -> None:
    """A notebook's kernel, with nest_asyncio and without."""
    install(session, "newest")
    session.install("ipykernel", "nbclient", "nest_asyncio")
    pytest(session, ["tests/test_jupyter.py"])


@nox.session(python=NEWEST_PYTHON)
def examples(session: nox.Session) -> None:
    """The recipes for structlog, Prometheus and OpenTelemetry, and what arrives there."""
    install(session, "newest")
    session.install(*nox.project.dependency_groups(PROJECT, "examples"))
    pytest(session, ["tests/test_examples.py"])


@nox.session(python=NEWEST_PYTHON, default=False)
def screenshots(session: nox.Session) -> None:
    """Make the pictures of the command line anew; `-- check` for one of them."""
    install(session, "newest")
    session.run("python", "-m", "tools.screenshots", *session.posargs)


@nox.session(python=NEWEST_PYTHON)
@nox.parametrize("tinker", [TINKERS[0], TINKERS[-1]])
def schedules(session: nox.Session, tinker: str) -> None:
    """Schedules of troubles, drawn with fixed seeds: a few hundred."""
    install(session, tinker)
    # Its clock runs ten times as fast: nothing may slow it down, also not too many at a time.
    pytest(session, ["-n", "3", "tests/test_schedules.py"], covered=False)


@nox.session(python=NEWEST_PYTHON, default=False)
@nox.parametrize("tinker", [TINKERS[0], TINKERS[-1]])
def soak(session: nox.Session, tinker: str) -> None:
    """Thousands of schedules, others each time: SCHEDULES of them, 4,000 by default."""
    install(session, tinker)
    session.env["SCHEDULES"] = os.environ.get("SCHEDULES", "4000")
    session.env["SCHEDULES_SEED"] = os.environ.get("SCHEDULES_SEED", "random")
    pytest(session, ["-n", "3", "tests/test_schedules.py"], covered=False)


@nox.session(python=NEWEST_PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Plain tinker, two earlier strategies and the shim, measured side by side."""
    session.install("-e", ".[lab,tinker]", *nox.project.dependency_groups(PROJECT, "bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(python=NEWEST_PYTHON, default=False)
def mutants(session: nox.Session) -> None:
    """Whether the tests notice small changes of the shim's core; `-- _verdict` for one module."""
    install(session, "newest")
    session.install("cosmic-ray>=8.4")
    session.run("python", "-m", "tools.mutants", *session.posargs)


@nox.session(python=PYTHONS[0])
def boundaries(session: nox.Session) -> None:
    """The same on the releases where something changed and that `race` does not run."""
    files = [f"--file={name}" for name in WITH_TINKER]
    elsewhere = [f"--elsewhere={tinker}" for tinker in TINKERS]
    survey_releases(session, "--boundaries", "--timeout=1500", *files, *elsewhere)


@nox.session(python=NEWEST_PYTHON)
@nox.parametrize("row", list(FIREWORKS))
def fireworks(session: nox.Session, row: str) -> None:
    """The Fireworks SDK on top, for each tinker under it, and with its own copy."""
    session.install(*fireworks_requirements(row))
    pytest(session, ["tests/test_fireworks.py"])


@nox.session(python=PYTHONS[0])
def floors(session: nox.Session) -> None:
    """The lowest wrapt, tenacity and httpx that are allowed."""
    if session.venv_backend != "uv":
        session.skip("only uv can resolve to the lowest direct dependencies: pip install uv")
    session.install("--resolution=lowest-direct", ".")
    lowest = session.run("uv", "pip", "freeze", silent=True, external=True) or ""
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    pins = [line for line in lowest.splitlines() if line.partition("==")[0] in names]
    session.log(f"the floors are {', '.join(pins)}")
    groups = nox.project.dependency_groups(PROJECT, "test")
    session.install(".[lab]", "tinker==0.15.0", *pins, *groups)
    # httpx 0.23 uses a module that Python deprecates.
    files = ["tests/test_control_plane.py", "tests/test_policy.py", "tests/test_seams.py"]
    pytest(session, ["-W", "ignore::DeprecationWarning", *files])
    pytest(session, ["-W", "ignore::DeprecationWarning", "-m", "core", "tests"])


@nox.session(python=NEWEST_PYTHON, default=False, tags=["wide"])
@nox.parametrize("extension", [True, False], ids=["c", "pure"])
@nox.parametrize("major", ["<2", ">=2"], ids=["wrapt1", "wrapt2"])
def wrapt(session: nox.Session, major: str, extension: bool) -> None:
    """Both majors of wrapt, with its C part and without."""
    install(session, "newest")
    session.install(f"wrapt{major}")
    if not extension:
        session.env["WRAPT_DISABLE_EXTENSIONS"] = "1"
    pytest(session, ["-m", "core", "tests"])


@nox.session(python=NEWEST_PYTHON)
def coexist(session: nox.Session) -> None:
    """Beside other packages that patch tinker, httpx or asyncio."""
    install(session, "newest")
    session.install(
        "ddtrace", "logfire", "nest_asyncio", "opentelemetry-instrumentation-httpx", "sentry-sdk"
    )
    pytest(session, ["tests/test_coexist.py"])


@nox.session(python=NEWEST_PYTHON)
def atlas(session: nox.Session) -> None:
    """Whether what is written of the releases is what the package index has; and news."""
    session.install(".", "click", "packaging", "pip")
    check = ("python", "-m", "tools.releases", "--check", *session.posargs)
    # 75: the index cannot be reached. That is not the releases' fault, nor a success.
    said = str(session.run(*check, silent=True, success_codes=[0, 75]))
    session.log(said)
    if "cannot be reached" in said:
        session.skip("the package index cannot be reached")


@nox.session(python=NEWEST_PYTHON, default=False, tags=["wide"])
def latest(session: nox.Session) -> None:
    """The newest tinker of today, also one that is not known here: its seams, the core tests."""
    install(session, "newest")
    session.install("--upgrade", "tinker")
    away(session)
    session.run("python", "-m", "tools.latest", *session.posargs)


@nox.session(python=PYTHONS[0], default=False)
def survey(session: nox.Session) -> None:
    """The core tests on every release of tinker and the Fireworks SDKs, in one table.

    Releases before 0.8.0 import torch; without it they are skipped, and said to be.
    """
    rows = [
        f"--row={row}={environment(session, row, fireworks_requirements(row))}" for row in FIREWORKS
    ]
    survey_releases(session, *rows)


@nox.session(python=NEWEST_PYTHON)
def docs(session: nox.Session) -> None:
    """The pages build strictly; their programs run, and what they name exists."""
    groups = nox.project.dependency_groups(PROJECT, "docs", "test")
    session.install("-e", ".[lab,tinker]", *groups)
    site = Path(session.create_tmp()).absolute() / "site"
    # Not --quiet: it keeps warnings from --strict as well.
    session.run("mkdocs", "build", "--strict", f"--site-dir={site}")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests/test_docs.py"]))


@nox.session(python=NEWEST_PYTHON)
def coverage(session: nox.Session) -> None:
    """Every branch of the shim, over all that the sessions before this one have run."""
    session.install("coverage>=7.10")
    data = coverage_data(session).parent
    # Elsewhere: a report deletes what it finds beside its file.
    session.env["COVERAGE_FILE"] = str(Path(session.create_tmp()).absolute() / ".coverage")
    options = "--rcfile=tests/coverage.toml"
    session.run("coverage", "combine", "--keep", "--quiet", options, str(data))
    session.run("coverage", "report", options, *session.posargs)


@nox.session(python=NEWEST_PYTHON, default=False, tags=["wide"])
def downstream(session: nox.Session) -> None:
    """The tests that tinker's wheel carries, without the shim and with it: the same outcome."""
    install(session, "newest")
    session.install("pytest-asyncio", "respx")
    where = session.run(
        "python",
        "-c",
        "import tinker, pathlib; print(pathlib.Path(tinker.__file__).parent)",
        silent=True,
    )
    outcomes = []
    for switch in ("0", "1"):
        report = Path(session.create_tmp()) / f"shim-{switch}.xml"
        session.run(
            *("python", "-m", "pytest", "-q", "-p", "tinker_routefix", "-n", "4"),
            *("-c", "/dev/null", "-o", "asyncio_mode=auto", "-o", "python_files=*_test.py"),
            *("--import-mode=importlib", f"--junitxml={report.absolute()}", str(where).strip()),
            env={"TINKER_ROUTEFIX": switch, "TINKER_API_KEY": "tml-tests"},
            success_codes=[0, 1],
        )
        outcomes.append(
            {
                (case.get("classname"), case.get("name")): sorted(child.tag for child in case)
                for case in ElementTree.parse(report).iter("testcase")  # noqa: S314 - our own
            }
        )
    plain, shim = outcomes
    if not plain or plain != shim:
        different = sorted(
            str(case) for case in plain.keys() | shim.keys() if plain.get(case) != shim.get(case)
        )
        session.error(f"{len(plain)} tests, with another outcome under the shim: {different}")
    session.log(f"{len(plain)} tests of tinker's own: the same outcome with the shim")
