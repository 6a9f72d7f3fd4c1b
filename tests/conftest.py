"""Every test starts with the shim installed, strict and with the default settings."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from tests.common import CANARY

# Before anything is imported: the shim reads its settings once, tinker its key at connect.
os.environ["TINKER_API_KEY"] = CANARY
os.environ["TINKER_ROUTEFIX_STRICT"] = "1"

import pytest

import tinker_routefix
from tinker_routefix import _seams, _settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tinker_routefix.lab import Lab

pytest_plugins = ["tinker_routefix.lab.pytest_plugin"]


def pytest_report_header() -> str:
    from importlib import metadata

    def release(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "none"

    names = ("tinker", "fireworks-ai", "wrapt", "tenacity", "httpx", "pydantic")
    return "with " + ", ".join(f"{name} {release(name)}" for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the tests that wait longest first, one in each worker: it is handed two at a time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    long = sum(item.get_closest_marker("long") is not None for item in items)
    if long <= len(items) // 2:
        items[: 2 * long : 2], items[1 : 2 * long : 2] = items[:long], items[long : 2 * long]


def collect() -> None:
    """Collect the clients that a test leaves, here and not on tinker's own loop.

    In 0.3.0 to 0.5.0 a client that is collected waits for that loop: on it, for ever.
    """
    gc.collect()


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Put back what a test changes in the process."""
    settings = _settings.current()
    yield
    _settings.put(settings)
    _seams.install()
    collect()


@pytest.fixture
def make_lab(
    request: pytest.FixtureRequest, make_lab: Callable[..., Lab]
) -> Iterator[Callable[..., Lab]]:
    """As the lab's own fixture; and whatever a test does, nothing is carried out twice."""
    labs: list[Lab] = []

    def make(*args: Any, **kwargs: Any) -> Lab:
        labs.append(make_lab(*args, **kwargs))
        return labs[-1]

    yield make
    for lab in [] if request.node.get_closest_marker("trains_twice") else labs:
        assert not lab.ledger.duplicates(), lab.ledger.summary()


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
        _settings.put(_settings.current().replace(**overrides))

    return change


class Overheard(logging.Handler):
    """Everything that is logged, formatted and raw."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.events: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{self.format(record)} {record.__dict__}")
        event = getattr(record, "routefix_event", None)
        if event is not None:
            self.events.append(event)


@pytest.fixture(autouse=True)
def overheard() -> Iterator[Overheard]:
    """No test's log lines of the shim, notes or status hold the key."""
    handler = Overheard()
    logger = logging.getLogger("tinker_routefix")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
    said = [*handler.lines, repr(tinker_routefix.status()), repr(_settings.current())]
    assert not [line for line in said if CANARY in line]


def run_python(code: str, *args: str, **environment: str) -> Any:
    """Run a program in a fresh interpreter of its own; its exit code is the verdict."""
    import subprocess

    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
