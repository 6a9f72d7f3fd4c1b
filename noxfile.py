"""`nox`: README's tests. `-t ci`: what CI adds. `-t wide`: nightly. `-t update`: writes.

The releases and Pythons are those of `tests/releases/matrix.toml`. Options behind `--` go
to what a session runs. The last line says what did not run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement

# The first with `--parallel`.
nox.needs_version = ">=2026.10.20"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
nox.options.allow_parallel = True
# A missing interpreter is reported, neither fetched nor, on CI, a failure: one may be too new.
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
# Where bytecode is not kept, every process that a test starts compiles tinker anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PROJECT = nox.project.load_toml("pyproject.toml")
MATRIX = nox.project.load_toml("tests/releases/matrix.toml")
PYTHONS: list[str] = MATRIX["pythons"]
MAIN_PYTHON: str = MATRIX["main_python"]
OLDEST_PYTHON: str = MATRIX["oldest_python"]
RUNNING_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OLDEST: str = MATRIX["everywhere"][0]
FILES = {
    name: [f"tests/test_{file}.py" for file in files] for name, files in MATRIX["files"].items()
}

ROOT = Path(__file__).parent.absolute()
CACHE = ROOT / ".nox" / ".cache"
AWAY = ("docs", "examples", "tests", "tools")
# The tests wait more than they work, so there are more of them at a time than cores.
PYTEST = ("-m", "pytest", "-n", "8", "--dist", "load", "--maxschedchunk", "1", "-q")
# Sessions run beside each other on CI, and a process stands still there now and then.
RERUNS = ("--reruns", "1") if os.environ.get("CI") == "true" else ()
BRANCHES = ("--branch",) if os.environ.get("COVERAGE_BRANCHES") else ()
ALL = ("tests", *(f"--ignore={name}" for name in FILES["own-session"]))
# Each worker collects all tests of its files, and few of them are these.
CORE = ("-n", "3", "-m", "core", *(f"tests/test_{name}.py" for name in MATRIX["core"]))


# --- What ran, in one line ---------------------------------------------------------------

RUN = Path(os.environ.get("NOX_RUN") or tempfile.mkdtemp(prefix="nox-"))
"""Reports of this run; sessions that run in parallel are processes that share it."""


def junit(report: Path) -> Counter[tuple[str, bool]]:
    """For each file of tests, how many ran and how many were skipped."""
    counts: Counter[tuple[str, bool]] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - our own
        # A file that skips itself as a whole is a case without a class.
        where = (case.get("classname") or case.get("name") or "").split(".")
        counts[([*where, "?"])[1], case.find("skipped") is None] += 1
    return counts


def print_last_line() -> None:
    """What did not run, whatever the reason."""
    report = RUN / "report.json"
    if report.is_file():
        sessions = json.loads(report.read_text("utf-8"))["sessions"]
        tests = sum((junit(path) for path in RUN.glob("*.xml")), Counter[tuple[str, bool]]())
        counts = Counter(ran for (_, ran), number in tests.items() for _ in range(number))
        named = {file for file, _ in tests}
        if "--" not in sys.argv and any(one["name"] == "tests" for one in sessions):
            named |= {path.stem for path in (ROOT / "tests").glob("test_*.py")}
        idle = sorted(named - {file for file, ran in tests if ran})
        missed = [
            f"{(one['signatures'] or [one['name']])[0]}: {one['reason']}"
            for one in sessions
            if one["result"] == "skipped"
        ]
        reruns = "".join(path.read_text("utf-8") for path in RUN.glob("rerun.txt"))
        minutes = sum(one["duration"] for one in sessions) / 60
        sys.stderr.write(
            f"{reruns}nox > {len(sessions)} sessions, {minutes:.1f} minutes in sum; tests: "
            f"{counts[True]} ran, {counts[False]} skipped, {reruns.count('FAILED AT FIRST: ')} "
            f"failed at first; {len(missed)} sessions NOT RUN"
            + (f" ({'; '.join(missed)})" if missed else "")
            + (f"; {len(idle)} files without a test that ran ({', '.join(idle)})" if idle else "")
            + "; for more (the long tests, other Pythons and tinkers): nox -t ci, nox -t wide\n"
        )
    shutil.rmtree(RUN, ignore_errors=True)


if "NOX_RUN" not in os.environ:
    os.environ["NOX_RUN"] = str(RUN)
    nox.options.report = str(RUN / "report.json")
    atexit.register(print_last_line)


# --- How sessions install and test -------------------------------------------------------


@functools.cache
def state() -> str:
    """What the tests and their coverage depend on: neither is mixed with another commit's."""
    digest = hashlib.sha256(repr(BRANCHES).encode())
    for path in map(ROOT.joinpath, ("noxfile.py", "pyproject.toml", "README.md")):
        digest.update(path.read_bytes())
    for folder in (*AWAY, "autoload", "tinker_routefix"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def covered_by(session: str) -> Path:
    """Where the coverage of a session on the main Python is, of this very code."""
    return CACHE / "coverage" / state() / session


def dependencies(*groups: str) -> list[str]:
    return list(nox.project.dependency_groups(PROJECT, *groups))


def install(session: nox.Session, *requirements: str, extra: str = "[lab]") -> None:
    """The package, what tests need, and more; the newest where no release is given."""
    upgrade = [f"--upgrade-package={name}" for name in requirements if name == "tinker"]
    package = f"tinker-routefix{extra} @ file://{wheel(session)}"
    session.install(package, *upgrade, *requirements, *dependencies("test"))


def requirement(tinker: str) -> str:
    return "tinker" if tinker == "newest" else f"tinker=={tinker}"


def run_always(session: nox.Session, *command: str, silent: bool = False) -> object:
    """Run also under --install-only, where `run` does nothing, and -R, where `run_install` does."""
    outcome = session.run(*command, external=True, silent=silent)
    return outcome or session.run_install(*command, external=True, silent=silent)


def built(name: str, session: nox.Session, build: Callable[[Path], object]) -> Path:
    """A folder that all sessions share, made by the first of them."""
    folder = CACHE / name / state()
    if not folder.is_dir():
        part = Path(session.create_tmp()).absolute() / name
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        build(part)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A session beside this one may have been first.
        with contextlib.suppress(OSError):
            part.rename(folder)
    return folder


def wheel(session: nox.Session) -> str:
    """The package, built once for all sessions: they test the file that a user would install."""
    build = ("uv", "build", "--quiet", "--wheel")
    folder = built("wheels", session, lambda to: run_always(session, *build, f"--out-dir={to}"))
    return str(next(folder.glob("*.whl")))


def away(session: nox.Session) -> None:
    """Go where the tests are and the sources are not: they run with the installed package.

    It is one place for all sessions, so that each Python compiles the tests once.
    """

    def build(part: Path) -> None:
        for folder in AWAY:
            shutil.copytree(folder, part / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(name, part)

    session.chdir(built("away", session, build))


def measures(session: nox.Session) -> bool:
    """Whether a session may measure what its tests cover."""
    # One without a Python of its own is not slowed down for a person who waits for it.
    there = session.python or (RUNNING_PYTHON if os.environ.get("CI") == "true" else None)
    return there == MAIN_PYTHON


def pytest(session: nox.Session, *options: str, covered: bool = True) -> None:
    """Run tests; skip the session where there is none of what a person has asked for."""
    if not run_tests(session, *options, covered=covered):
        session.skip("no test ran")


def run_tests(session: nox.Session, *options: str, covered: bool = True) -> bool:
    """Whether any ran; on the main Python `coverage` is told what they cover."""
    if Path.cwd() == ROOT:
        away(session)
    number = len(list(RUN.glob(f"{session.name}-*.xml")))
    report = RUN / f"{session.name}-{number}.xml"
    python: tuple[str, ...] = ("python",)
    if covered and measures(session) and not session.posargs:
        data = covered_by(session.name)
        if "COVERAGE_FILE" not in session.env:
            # Of an earlier run.
            shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True, exist_ok=True)
        session.env["COVERAGE_FILE"] = str(data / f".coverage.{number}")
        python = ("python", "-m", "coverage", "run", *BRANCHES)
    # 5: nothing was collected.
    outcome = session.run(
        *(*python, *PYTEST, *RERUNS, f"--junitxml={report}"),
        *(session.posargs or options),
        success_codes=[0, 5],
    )
    if outcome is None:  # --install-only: it was not run
        return True
    for found in RUN.glob("unexcused.txt"):
        raise CommandFailed(f"what a second run does not excuse: {found.read_text('utf-8')}")
    ran = any(ran for _, ran in junit(report))
    if not ran and not session.posargs:
        raise CommandFailed("no test ran")
    return ran


def each(session: nox.Session, rows: Iterable[str], run: Callable[[str], bool]) -> None:
    """Run all rows of a session, also after one has failed, and name those that have."""
    failed, ran = [], False
    for row in rows:
        session.log(f"{session.name}: {row}")
        try:
            ran |= run(row)
        except CommandFailed as error:
            failed.append(f"{row} ({error.reason})")
    if failed:
        session.error(f"failed with {', '.join(failed)}")
    if not ran:
        session.skip("no test ran")


def check_python(session: nox.Session) -> None:
    """Sessions without a Python of their own run on nox's."""
    if sys.version_info < (3, 11):  # noqa: UP036 - nox itself runs on older ones
        session.error(f"nox runs on Python {RUNNING_PYTHON}, and 3.11 or newer is needed")
    # nox keeps an environment that another Python has made.
    version = "import sys; print(*sys.version_info[:2], sep='.')"
    made_with = str(session.run("python", "-c", version, silent=True, log=False)).strip()
    if made_with != RUNNING_PYTHON:
        make = ("uv", "venv", "--quiet", "--clear", f"--python={sys.executable}")
        session.run(*make, session.virtualenv.location, external=True)


# --- nox ---------------------------------------------------------------------------------


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, line ends; `-- --fix` mends them, as pre-commit does."""
    check_python(session)
    session.install(*dependencies("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    listed = str(session.run("git", "ls-files", external=True, silent=True)).splitlines()
    files = [name for name in listed if name != "LICENSE" and Path(name).is_file()]
    # mkdocs.yml names Python objects.
    for hook, suffixes in (
        (["check-toml"], (".toml",)),
        (["check-yaml", "--unsafe"], (".yml", ".yaml")),
        (["end-of-file-fixer"], ("",)),
        (["trailing-whitespace-fixer"], ("",)),
    ):
        session.log(hook[0])
        session.run(*hook, *[name for name in files if name.endswith(suffixes)], log=False)


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the package, its tests and its tools."""
    check_python(session)
    extras = PROJECT["project"]["optional-dependencies"]
    session.install(*PROJECT["project"]["dependencies"], *extras["lab"], *extras["tinker"])
    session.install(*dependencies("dev"))
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the long ones: the newest tinker, nox's Python."""
    check_python(session)
    install(session, "tinker")
    apart: list[str] = []
    if measures(session) and not session.posargs:
        # It doubles the time: not for what `compat` and `robustness` measure, or nobody.
        unmeasured = [f"tests/test_{name}.py" for name in MATRIX["unmeasured"]]
        apart = FILES["compat"] + FILES["robustness"] + unmeasured
    # It is what is waited for: more workers, who wait for each other less.
    options = ("-n", "10", "-m", "not long")
    pytest(session, *options, *ALL, *(f"--ignore={name}" for name in apart))
    if apart:
        pytest(session, *options, *apart, covered=False)
        (covered_by(session.name) / "passed").touch()


@nox.session
def core(session: nox.Session) -> None:
    """The core tests: the oldest tinker of the matrix, nox's Python."""
    check_python(session)
    install(session, requirement(OLDEST))
    pytest(session, *CORE, covered=False)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages build, their programs run, what they name exists."""
    check_python(session)
    install(session, *dependencies("docs"), extra="[lab,tinker]")
    # Not --quiet: it keeps warnings from --strict as well.
    site = Path(session.create_tmp()).absolute() / "site"
    session.run("mkdocs", "build", "--strict", f"--site-dir={site}")
    report = f"--junitxml={RUN / 'docs.xml'}"
    files = session.posargs or ["tests/test_docs.py"]
    session.run("python", "-m", "pytest", "-q", report, *files)


# --- nox -t ci ---------------------------------------------------------------------------


@nox.session(python=PYTHONS, tags=["ci"], default=False)
def compat(session: nox.Session) -> None:
    """The core tests, on the main Python with each tinker; all with some."""
    main = session.python == MAIN_PYTHON
    if not main and session.python == RUNNING_PYTHON:
        session.skip("here `tests` and `core` of `nox` are the same")

    def run(tinker: str) -> bool:
        install(session, requirement(tinker))
        if tinker == "newest" and main:
            # What `tests` has covered of this very code is not run again.
            long = ("-n", "4", "-m", "long", *FILES["compat"])
            passed = (covered_by("tests") / "passed").is_file()
            return run_tests(session, *(long if passed else ALL))
        if main and tinker in MATRIX["thorough"]:
            # `robustness` covers what the oldest does.
            return run_tests(session, *FILES["compat"], covered=tinker != OLDEST)
        ran = run_tests(session, *CORE, covered=False)
        # On GitHub `nox` runs them on the oldest as well.
        if tinker == "newest" and session.python != OLDEST_PYTHON:
            ran |= run_tests(session, "-m", "not long", *FILES["any-tinker"])
        return ran

    each(session, MATRIX["tinkers"] if main else MATRIX["everywhere"], run)


@nox.session(name="compat-boundaries", python=OLDEST_PYTHON, tags=["ci"], default=False)
def compat_boundaries(session: nox.Session) -> None:
    """The core tests where tinker changed."""
    install(session, "tinker", "grpcio", "packaging", "pip")
    pytest(session, "tests/survey.py", "-k", "boundary")


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def robustness(session: nox.Session) -> None:
    """Bad input, failures, secrets; the oldest tinker."""
    install(session, requirement(OLDEST))
    pytest(session, *FILES["robustness"])


@nox.session(python=list(MATRIX["processes"]), tags=["ci"], default=False)
def processes(session: nox.Session) -> None:
    """Spawned and forked children, sidecars, launchers."""
    install(session, requirement(MATRIX["processes"][session.python]))
    pytest(session, *FILES["processes"])


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False, allow_parallel=False)
def schedules(session: nox.Session) -> None:
    """SCHEDULES of faults, 160 by default, fixed seeds."""
    session.env.setdefault("SCHEDULES", os.environ.get("SCHEDULES", "160"))

    def run(tinker: str) -> bool:
        install(session, requirement(tinker))
        # Its clock runs ten times as fast: nothing may slow it down, also not too many at a time.
        return run_tests(session, "-n", "3", "tests/test_schedules.py", covered=False)

    each(session, MATRIX["everywhere"], run)


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def fireworks(session: nox.Session) -> None:
    """The Fireworks SDK on each tinker that it has had under it."""

    def run(row: str) -> bool:
        # No row may find the tinker of another one.
        session.run("uv", "pip", "uninstall", "--quiet", "tinker", "fireworks-ai", external=True)
        install(session, *MATRIX["fireworks"][row])
        if row.startswith("tinker-"):
            check = "from importlib.metadata import version; assert version('tinker') == {!r}"
            session.run("python", "-c", check.format(row.removeprefix("tinker-")))
        # Each worker takes seconds to import this SDK.
        return run_tests(session, "-n", "3", "tests/test_fireworks.py", covered=False)

    each(session, MATRIX["fireworks"], run)


@nox.session(name="core-tls", python=MAIN_PYTHON, tags=["ci"], default=False)
@nox.parametrize("row", list(MATRIX["tls"]), ids=list(MATRIX["tls"]))
def core_tls(session: nox.Session, row: str) -> None:
    """The core tests over TLS."""
    install(session, *MATRIX["tls"][row])
    transport = row.rpartition("-")[2]
    session.env.update(ROUTEFIX_TESTS_TLS="1", ROUTEFIX_TESTS_TRANSPORT=transport)
    pytest(session, *CORE, covered=False)


@nox.session(python=OLDEST_PYTHON, tags=["ci"], default=False)
def minimums(session: nox.Session) -> None:
    """The lowest wrapt, tenacity and httpx that are allowed."""
    compile_pins = ("uv", "pip", "compile", "--quiet", "--resolution=lowest-direct")
    lowest = str(run_always(session, *compile_pins, "pyproject.toml", silent=True))
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    pins = [line for line in lowest.splitlines() if line.partition("==")[0] in names]
    session.log(f"the minimums are {', '.join(pins)}")
    if len(pins) != len(names):
        session.error(f"uv resolves {pins} for {sorted(names)}")
    install(session, requirement(OLDEST), *pins)
    # httpx 0.23 uses a module that Python deprecates.
    session.env["PYTEST_ADDOPTS"] = "-W ignore::DeprecationWarning"
    files = ["tests/test_control_plane.py", "tests/test_policy.py", "tests/test_seams.py"]
    pytest(session, *files)
    pytest(session, *CORE)


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def coexist(session: nox.Session) -> None:
    """Beside other packages that patch tinker, httpx or asyncio."""
    others = ("ddtrace", "logfire", "nest_asyncio", "opentelemetry-instrumentation-httpx")
    install(session, "tinker", *others, "sentry-sdk")
    pytest(session, "-n", "4", "tests/test_coexist.py", covered=False)


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def examples(session: nox.Session) -> None:
    """structlog, Prometheus, OpenTelemetry: what arrives there."""
    install(session, "tinker", *dependencies("examples"))
    pytest(session, "-n", "4", "tests/test_examples.py", covered=False)


def test_wire(session: nox.Session, *options: str) -> None:
    if missing := [name for name in ("nginx", "haproxy") if not shutil.which(name)]:
        session.skip(f"not installed: {', '.join(missing)}")
    install(session, "tinker")
    pytest(session, "-n", "2", *options, "tests/test_wire.py", covered=False)


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def wire(session: nox.Session) -> None:
    """Real gateways: nginx and HAProxy, but for what takes long."""
    test_wire(session, "-m", "not wide")


@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False)
def releases(session: nox.Session) -> None:
    """Whether the data on releases are what the index has."""
    install(session, "packaging", "pip")
    check = ("python", "-m", "tools.releases", "--check", *session.posargs)
    # 75: the index cannot be reached. That is not the releases' fault, nor a success.
    said = str(session.run(*check, silent=True, success_codes=[0, 75]))
    session.log(said)
    if "cannot be reached" in said:
        session.skip("the package index cannot be reached")


@nox.session(python=MAIN_PYTHON, default=False, tags=["wide"])
def site(session: nox.Session) -> None:
    """The built pages in a browser, without a network."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        session.skip("there is no Chromium: apt-get install chromium")
    groups = nox.project.dependency_groups(PROJECT, "docs", "test")
    session.install("-e", ".[lab,tinker]", *groups, "playwright")
    report = f"--junitxml={RUN / 'site.xml'}"
    files = session.posargs or ["tests/test_site.py"]
    session.run("python", "-m", "pytest", "-q", report, *files)


# In parallel it waits until all others have ended.
@nox.session(python=MAIN_PYTHON, tags=["ci"], default=False, allow_parallel=False)
def coverage(session: nox.Session) -> None:
    """Every line of the shim, at night every branch."""
    session.install("coverage>=7.10")
    data = CACHE / "coverage"
    for old in data.glob("*"):
        if old.name != state():
            shutil.rmtree(old)
    if not (data / state()).is_dir():
        session.skip("no data of this very code: `nox -t ci` collects them")
    # Elsewhere: a report deletes what it finds beside its file.
    session.env["COVERAGE_FILE"] = str(Path(session.create_tmp()).absolute() / ".coverage")
    parts = sorted((data / state()).iterdir())
    session.log(f"what was covered by {', '.join(part.name for part in parts)}")
    session.run("coverage", "combine", "--keep", "--quiet", *map(str, parts))
    session.run("coverage", "report", *session.posargs)


# --- nox -t wide -------------------------------------------------------------------------


@nox.session(python=PYTHONS, tags=["wide"], default=False)
def survey(session: nox.Session) -> None:
    """Every release of tinker."""
    install(session, "tinker", "grpcio", "packaging", "pip")
    pytest(session, "tests/survey.py", "--durations=0", covered=False)


@nox.session(name="wire-all", python=MAIN_PYTHON, tags=["wide"], default=False)
def wire_all(session: nox.Session) -> None:
    """Real gateways, all of it."""
    test_wire(session)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False, allow_parallel=False)
def soak(session: nox.Session) -> None:
    """SCHEDULES of faults, 4,000 by default, new ones each time."""
    session.env["SCHEDULES"] = os.environ.get("SCHEDULES", "4000")
    session.env["SCHEDULES_SEED"] = os.environ.get("SCHEDULES_SEED", "random")
    schedules(session)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def ray(session: nox.Session) -> None:
    """Ray's workers."""
    install(session, "tinker", "ray")
    # Each test starts a cluster.
    pytest(session, "-n", "2", "tests/test_ray.py", covered=False)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def jupyter(session: nox.Session) -> None:
    """A notebook's kernel, with nest_asyncio and without."""
    install(session, "tinker", "ipykernel", "nbclient", "nest_asyncio")
    pytest(session, "tests/test_jupyter.py", covered=False)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def torch(session: nox.Session) -> None:
    """A loss of the program's own, which tinker needs torch for."""
    install(session, "tinker", "torch", "numpy")
    pytest(session, "-n", "2", "tests/test_never_twice.py", "-k", "custom", covered=False)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def latest(session: nox.Session) -> None:
    """The newest tinker of today, also one that is not known here."""
    install(session, "tinker", "packaging", "pip")
    session.run("python", "-m", "tools.latest")
    pytest(session, *CORE, covered=False)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def wrapt(session: nox.Session) -> None:
    """Both majors of wrapt, with its C part and without."""

    def run(row: str) -> bool:
        major, _, part = row.partition(" ")
        install(session, "tinker", f"wrapt{major}")
        session.env["WRAPT_DISABLE_EXTENSIONS"] = "1" if part == "pure" else ""
        return run_tests(session, *CORE, covered=False)

    each(session, ["<2", "<2 pure", ">=2", ">=2 pure"], run)


@nox.session(python=MAIN_PYTHON, tags=["wide"], default=False)
def downstream(session: nox.Session) -> None:
    """tinker's own tests, without the shim and with it."""
    install(session, "tinker", "pytest-asyncio", "respx")
    outcomes = []
    for switch in ("0", "1"):
        report = Path(session.create_tmp()).absolute() / f"shim-{switch}.xml"
        session.run(
            *("python", "-m", "pytest", "-q", "-p", "tinker_routefix", "-n", "4"),
            *("-c", os.devnull, "-o", "asyncio_mode=auto", "-o", "python_files=*_test.py"),
            *("--import-mode=importlib", f"--junitxml={report}", "--pyargs", "tinker"),
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
    different = [str(case) for case in {*plain, *shim} if plain.get(case) != shim.get(case)]
    passed = sum(not {"failure", "error", "skipped"} & {*tags} for tags in plain.values())
    if passed <= len(plain) // 2 or different:
        session.error(f"{passed} of {len(plain)} pass; not the same under the shim: {different}")
    session.log(f"{len(plain)} tests of tinker's own: the same outcome with the shim")


# --- nox -t update -----------------------------------------------------------------------


@nox.session(name="update-releases", python=MAIN_PYTHON, tags=["update"], default=False)
def update_releases(session: nox.Session) -> None:
    """Write down what the package index has of tinker."""
    install(session, "packaging", "pip")
    session.run("python", "-m", "tools.releases", *session.posargs)
    session.run("cog", "-r", "docs/compatibility.md")


@nox.session(python=MAIN_PYTHON, tags=["update"], default=False)
def screenshots(session: nox.Session) -> None:
    """Make the command line's pictures; `-- check` for one."""
    install(session, "tinker")
    session.run("python", "-m", "tools.screenshots", *session.posargs)


@nox.session(python=MAIN_PYTHON, tags=["update"], default=False)
def mutants(session: nox.Session) -> None:
    """Do tests notice small changes? `-- _verdict`: one module."""
    install(session, "tinker", "cosmic-ray>=8.4")
    session.run("python", "-m", "tools.mutants", *session.posargs)


@nox.session(python=MAIN_PYTHON, tags=["update"], default=False, allow_parallel=False)
def bench(session: nox.Session) -> None:
    """Plain tinker, earlier strategies and the shim, side by side."""
    install(session, *dependencies("bench"), extra="[lab,tinker]")
    session.run("python", "-m", "benchmarks", *session.posargs)
