"""Every test starts with the shim installed, strict and with the default settings."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import subprocess
import sys
import zlib
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tests.common import (
    CANARY,
    Listener,
    collect,
    leaks,
    not_excused,
    tell_nox,
    unexplained_executions,
)

# Before anything is imported: the shim reads its settings once, tinker its key at connect.
os.environ["TINKER_API_KEY"] = CANARY
os.environ["TINKER_ROUTEFIX_STRICT"] = "1"
# tinker imports numpy, which starts threads for each core, in hundreds of processes here.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest

import tinker_routefix
from tinker_routefix import _addresses, _counters, _log, _patching, _routes, _settings, events
from tinker_routefix.lab import _tls

if TYPE_CHECKING:
    import warnings
    from collections.abc import Callable, Generator, Iterable, Iterator

    from tinker_routefix.lab import Lab

OVER_TLS = os.environ.get("ROUTEFIX_TESTS_TLS") == "1"
"""Whether every lab of a test serves https."""
TRANSPORT = os.environ.get("ROUTEFIX_TESTS_TRANSPORT")
"""``httpx`` or ``pyqwest``: what the labs tell tinker to use, where a test does not say."""

if unknown := {name for name in os.environ if name.startswith("ROUTEFIX_TESTS_")} - {
    "ROUTEFIX_TESTS_TLS",
    "ROUTEFIX_TESTS_TRANSPORT",
}:
    raise pytest.UsageError(f"no such variable of the tests: {', '.join(unknown)}")

if OVER_TLS:
    # TLS contexts are kept for the process, so every one has to trust the labs.
    os.environ["SSL_CERT_FILE"] = str(_tls.ca_file())

pytest_plugins = ["tinker_routefix.lab.pytest_plugin"]


@functools.cache
def _release(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def pytest_report_header() -> str:
    names = ("tinker", "fireworks-ai", "wrapt", "tenacity", "httpx", "pyqwest", "pydantic")
    over = f"; labs over {'https' if OVER_TLS else 'http'}, transport {TRANSPORT or 'as it comes'}"
    return "with " + ", ".join(f"{name} {_release(name)}" for name in names) + over


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tests have noted of plain tinker and the shim, side by side."""
    noted = [
        (report.nodeid.partition("::")[2], value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "wire"
    ]
    if noted:
        terminalreporter.section("plain tinker and the shim")
    for test, value in noted:
        terminalreporter.write_line(f"{value}  {test}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On CI a failed test is run once more: what it failed with is told all the same."""
    outcome: str = report.outcome
    if outcome == "rerun" and "PYTEST_XDIST_WORKER" not in os.environ:
        tell_nox("rerun.txt", f"FAILED AT FIRST: {report.nodeid}\n{report.longreprtext}\n\n")


JUDGES = ("test_schedules", "test_never_twice", "test_demo", "survey")
"""Files whose tests ask the ledger themselves: a second run excuses nothing in them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "trains_twice" in item.keywords or item.path.stem in JUDGES:
            item.add_marker(pytest.mark.flaky(reruns=0))
    if "PYTEST_XDIST_WORKER" in os.environ:
        mix(items)


def mix(items: list[pytest.Item]) -> None:
    """Have tests that work and tests that wait run beside each other: they stand in files apart.

    The longest are spread over the first half: the last one to end is waited for.
    """
    items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    long = [item for item in items if any(map(item.get_closest_marker, ("long", "slow")))]
    items[:] = [item for item in items if item not in long]
    apart = len(items) // 2 // max(len(long), 1) + 1
    for number, item in enumerate(long):
        items.insert(number * apart, item)


def pytest_collection_finish() -> None:
    """What is there before the first test is no test's garbage, and need not be looked at."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Put back what a test changes in the process."""
    # A lab may get the port that another one had: it is not the same gateway.
    for routes in _routes._routes.values():
        routes.clear()
    _routes._counters.clear()
    _counters._fed.clear()
    _routes._dropped.last_intervention = None
    _addresses._managers.clear()
    # And the log lines that an earlier test had need not make do for this one.
    _log._own_failures = _log.RateLimit(seconds=60.0)
    settings = _settings.current()
    yield
    _settings.set_current(settings)
    _patching.install()
    if "make_lab" in request.fixturenames:
        _end_clients()
        collect()
        _freeze_once()


@functools.cache
def _freeze_once() -> None:
    """Nor is what the first lab and its client have imported: looking at it takes 10 ms a time."""
    gc.freeze()


def _end_clients() -> None:
    """Cancel what is left of the test on tinker's loop: the next one has none of it beside it.

    A client sends heartbeats and telemetry, and a request waits, for as long as there is a process.
    """
    holders = sys.modules.get("tinker.lib.internal_client_holder")
    # In 0.3.0 to 0.5.0 a client that is freed on this loop waits for it. (And one of the Fireworks
    # SDK's own copy waits 30 s for telemetry that was cancelled.)
    if holders is None or _release("tinker").startswith(("0.3.", "0.4.", "0.5.")):
        return
    loop = holders._internal_client_holder_thread_singleton._loop
    if loop is not None and loop.is_running():
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(30)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=10)


@pytest.fixture
def make_lab(
    request: pytest.FixtureRequest, make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Lab]]:
    """As the lab's own fixture; and whatever a test does, the shim adds no execution."""
    # tinker makes several TLS contexts a client, for http too, and loads all that they trust.
    monkeypatch.setenv("SSL_CERT_FILE", str(_tls.ca_file()))
    labs: list[Lab] = []

    def make(*args: Any, **kwargs: Any) -> Lab:
        kwargs.setdefault("tls", OVER_TLS)
        transport = TRANSPORT or getattr(request.module, "TRANSPORT", None)
        if transport is not None:
            config = {"use_pyqwest_transport": transport == "pyqwest"}
            kwargs["config"] = config | dict(kwargs.get("config") or {})
        labs.append(make_lab(*args, **kwargs))
        return labs[-1]

    yield make
    for lab in [] if request.node.get_closest_marker("trains_twice") else labs:
        found = unexplained_executions(lab)
        not_excused(found)
        assert not found, lab.ledger.summary()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """`with plain():` runs tinker as it is, without the shim.

    And, unless a test is about that, without telemetry: before 0.38 its drain would hold
    every crash for 30 s.
    """

    @contextmanager
    def without(*, telemetry: bool = False) -> Iterator[None]:
        tinker_routefix.uninstall()
        try:
            with monkeypatch.context() as patch:
                patch.setenv("TINKER_TELEMETRY", str(int(telemetry)))
                yield
        finally:
            tinker_routefix.install()
            collect()

    return without


@pytest.fixture
def settings() -> Callable[..., None]:
    """Other settings for one test, also after a client has connected."""

    def change(**overrides: Any) -> None:
        _settings.set_current(_settings.current().replace(**overrides))

    return change


# --- No key anywhere ---------------------------------------------------------------------


class Overheard(logging.Handler):
    """Everything that came out while a test ran, by the way it came: nothing of it is secret."""

    def __init__(self, foreign: Listener | None = None) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        """The shim's log lines, with all that is in their records."""
        self.events: list[str] = []
        self.requests: list[str] = []
        """What httpx and httpcore logged of the shim's own requests, as far down as they go."""
        self.published: list[str] = []
        """What subscribers are told."""
        self.caught: list[Any] = []
        """What `pytest.raises` and `pytest.warns` caught."""
        self.printed: list[str | bytes] = []
        """The output of other processes."""
        self.foreign = foreign

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "tinker_routefix":
            if _sent_by_the_shim():
                self.requests.append(f"{self.format(record)} {record.__dict__}")
            return
        self.lines.append(f"{self.format(record)} {record.__dict__}")
        event = getattr(record, "routefix_event", None)
        if event is not None:
            self.events.append(event)

    def forget(self) -> None:
        """Forget all that was heard."""
        for heard in (self.lines, self.requests, self.published, self.caught, self.printed):
            heard.clear()

    def leaks(self) -> list[str]:
        """Each secret that came out, and on which way."""
        found = []
        for way, texts in (
            ("log", self.lines),
            ("log of httpx", self.requests),
            ("event", self.published),
            ("exception or warning", [text for one in self.caught for text in _said_by(one)]),
            ("output", self.printed),
            ("status", _shown()),
            ("foreign origin", self.foreign.heard if self.foreign is not None else []),
        ):
            for text in texts:
                shown = text if isinstance(text, str) else text.decode("latin-1")
                found += [f"{what} in {way}: {shown:.2000}" for what in leaks(text)]
        return found


def _sent_by_the_shim() -> bool:
    """Whether what runs now sends a question or a probe, and not a request of the program's."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__")
        if name == "tinker_routefix._question" or (
            name == "tinker_routefix._probes"
            and frame.f_code.co_name in ("get_info", "get_capabilities")
        ):
            return True
    return False


def _said_by(context: Any) -> list[str]:
    """What exceptions say that were caught, with notes and causes, and what warnings say."""
    warned = getattr(context, "list", None)
    if warned is not None:
        return [f"{warning.message} {warning.message!r}" for warning in warned]
    # Not filled where nothing was raised.
    error = (getattr(getattr(context, "excinfo", None), "_excinfo", None) or (None, None))[1]
    if error is None:
        return []
    links = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) and link not in links:
        links.append(link)
    notes = [note for link in links for note in getattr(link, "__notes__", ())]
    # What httpx says of a request of the program's, it says without the shim as well.
    ours = [link for link in links if not type(link).__module__.startswith("httpx")]
    return [*notes, *map(str, ours), *map(repr, ours)]


def _shown() -> list[str]:
    """What the shim tells of itself: status, counters, settings, and what it has seen and knows."""
    status = tinker_routefix.status()
    shown: list[object] = [status, dataclasses.asdict(status), _settings.current()]
    routes = sys.modules.get("tinker_routefix._routes")
    for route in routes.all_routes() if routes is not None else ():
        asked = route.control_plane
        flights = [vars(flight) for flight in asked._flights.values()]
        shown += [route, str(route.job), route.job, route.counters, asked, vars(asked), flights]
    for manager in [one for known in _addresses._managers.values() for one in known]:
        with contextlib.suppress(Exception):
            shown += [manager, manager.address()]
    return [repr(one) for one in shown]


_overheard = Overheard()
"""That of the test that runs."""


def _noted(method: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        note(result)
        return result

    return noted


# What tests catch, and what other processes print: whoever asks for it.
for owner, name, note in (
    (pytest, "raises", lambda context: _overheard.caught.append(context)),
    (pytest, "warns", lambda context: _overheard.caught.append(context)),
    (subprocess.Popen, "communicate", lambda said: _overheard.printed.extend(filter(None, said))),
):
    setattr(owner, name, _noted(getattr(owner, name), note))


@pytest.fixture(scope="session")
def _foreign() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


@pytest.fixture
def foreign(_foreign: Listener) -> Listener:
    """Another origin, where no key may ever go; it says that every job is RUNNING."""
    _foreign.heard.clear()
    _overheard.foreign = _foreign
    return _foreign


@pytest.fixture(autouse=True)
def overheard() -> Iterator[Overheard]:
    """No secret comes out of any test."""
    global _overheard
    handler = _overheard = Overheard()
    loggers = [logging.getLogger(name) for name in ("tinker_routefix", "httpx", "httpcore")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        # Those of the others are for us only: pytest would keep every one.
        logger.propagate = logger.name == "tinker_routefix"
    unsubscribe = events.subscribe(lambda event: handler.published.append(repr(event)))
    yield handler
    unsubscribe()
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
    found = handler.leaks()
    # Errors hold frames, and those hold clients.
    handler.caught.clear()
    not_excused(found)
    assert not found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Nor does a test print one."""
    report = yield
    # Log lines have been looked at, and some are tinker's own.
    printed = [text for title, text in report.sections if title.startswith("Captured std")]
    found = [what for text in printed for what in leaks(text)]
    # The last one has all that was printed.
    if call.when == "teardown" and report.passed and found:
        not_excused(found)
        report.outcome = "failed"
        report.longrepr = f"{', '.join(found)} in what {item.nodeid} printed"
    return report


def run_python(code: str, *args: str, **environment: str) -> Any:
    """Run a program in a fresh interpreter of its own; its exit code is the verdict."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def of_the_shim(warned: Iterable[warnings.WarningMessage]) -> list[str]:
    """What the shim warned of; `pytest.warns` also catches what is ignored elsewhere.

    Wherever the garbage collector happens to run, it warns of connections left open by tinker.
    """
    return [str(one.message) for one in warned if one.category is tinker_routefix.RoutefixWarning]
