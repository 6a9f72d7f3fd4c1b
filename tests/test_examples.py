"""The examples: what arrives in each backend when a route is stale in the lab."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

import tinker_routefix
from tests import programs
from tests.common import leaks
from tests.programs import connect, exact, train
from tinker_routefix import events
from tinker_routefix.lab import Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tinker_routefix.lab import Lab

    MakeLab = Callable[..., Lab]

TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends: less than one in a hundred."""

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[a-z]*.py"))


@dataclass
class Raced:
    """A run whose route was stale, and what subscribers were told of it."""

    lab: Lab
    told: list[events.Event]

    @property
    def job(self) -> tinker_routefix.JobStatus:
        return programs.job_of(self.lab)

    @property
    def seconds(self) -> float:
        """How long the one request waited that got through in the end."""
        (recovered,) = (event for event in self.told if isinstance(event, events.Recovered))
        return recovered.seconds


@pytest.fixture
def race(make_lab: MakeLab, settings: Callable[..., None]) -> Callable[..., Raced]:
    """Train one step; the route is lost to the first poll and comes back. Then the job ends."""

    def run(*, over: bool = True) -> Raced:
        settings(base_delay=0.2)
        raced = Raced(make_lab(), [])
        end = tinker_routefix.subscribe(raced.told.append)
        try:
            client = connect(raced.lab.base_url)
            raced.lab.fault(Fault(kinds=["poll"], count=3))
            train(client)
            exact(raced.lab, gradients=1, optim_steps=1)
            if over:
                raced.lab.end_job()
                with pytest.raises(Exception) as crash:
                    train(client)
                programs.gateway_404(crash.value)
        finally:
            end()
        return raced

    return run


def test_prometheus_recipe_exports_what_the_counters_say(race: Callable[..., Raced]) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from examples import prometheus_metrics

    registry = prometheus.CollectorRegistry()
    end = prometheus_metrics.export(registry)
    try:
        assert registry.get_sample_value("routefix_last_404_timestamp_seconds") == 0
        began = time.time()
        raced = race()
    finally:
        end()
    job = raced.job
    sample = registry.get_sample_value
    assert sample("routefix_refused_total", {"job": "lab/job-1"}) == job.refused > 3
    recovered = {"what": "request", "outcome": "recovered"}
    assert sample("routefix_seconds_count", recovered) == job.recovered > 0
    assert sample("routefix_seconds_sum", recovered) == pytest.approx(raced.seconds)
    failed = {"what": "request", "outcome": "failed_fast"}
    assert sample("routefix_seconds_count", failed) == job.failed_fast > 0
    assert sample("routefix_seconds_count", {"what": "warmup", "outcome": "warm"}) == 1
    last = sample("routefix_last_404_timestamp_seconds")
    assert last == job.last_intervention
    assert began < last <= time.time()


def test_opentelemetry_recipe_exports_spans_and_metrics(
    race: Callable[..., Raced], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from examples import opentelemetry_spans

    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    metering = MeterProvider([reader])
    # The global providers of a process can be set only once.
    monkeypatch.setattr(trace, "get_tracer", tracing.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", metering.get_meter)
    end = opentelemetry_spans.export()
    try:
        with tracing.get_tracer("program").start_as_current_span("step"):
            raced = race()
    finally:
        end()
    job = raced.job
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"step", "route.recovered", "route.failed_fast"}

    step, wait = spans["step"], spans["route.recovered"]
    told = [event.name for event in step.events]
    assert told.count("route.refused") == job.refused
    assert {"warmup.ended", "route.recovered", "route.failed_fast"} <= set(told)
    assert wait.parent is not None
    assert wait.parent.span_id == step.context.span_id
    assert wait.attributes is not None
    assert wait.attributes["routefix.request"] == "retrieve_future (ForwardBackward)"
    assert wait.end_time is not None
    assert wait.start_time is not None
    seconds = (wait.end_time - wait.start_time) / 1e9
    assert seconds == pytest.approx(raced.seconds, abs=0.001)

    points: dict[str, list[Any]] = {}
    data = reader.get_metrics_data()
    assert data is not None
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        points[metric.name] = list(metric.data.data_points)
    (refused,) = points["routefix.refused"]
    assert (refused.value, dict(refused.attributes)) == (job.refused, {"routefix.job": "lab/job-1"})
    counts = {one.attributes["routefix.outcome"]: one.count for one in points["routefix.wait"]}
    assert counts == {"route.recovered": job.recovered, "route.failed_fast": job.failed_fast}


def test_opentelemetry_recipe_outside_any_span_exports_the_wait_alone(
    race: Callable[..., Raced], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from examples import opentelemetry_spans

    exporter = InMemorySpanExporter()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", tracing.get_tracer)
    end = opentelemetry_spans.export()
    try:
        race(over=False)
    finally:
        end()
    (wait,) = exporter.get_finished_spans()
    assert (wait.name, wait.parent) == ("route.recovered", None)


@pytest.fixture
def rendered() -> Iterator[io.StringIO]:
    """What a handler of the root logger writes with structlog's formatter."""
    pytest.importorskip("structlog")
    from examples import structlog_events

    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(structlog_events.formatter())
    root = logging.getLogger()
    root.addHandler(handler)
    yield written
    root.removeHandler(handler)


def test_structlog_recipe_renders_events_with_their_fields(
    race: Callable[..., Raced], rendered: io.StringIO
) -> None:
    logging.getLogger("somebody.else").warning("another line", extra={"fields": 1})
    raced = race()
    records = [json.loads(line) for line in rendered.getvalue().splitlines()]
    ours = [record for record in records if record.get("job") == "lab/job-1"]
    refused = [record for record in ours if record["event"] == "route.refused"]
    assert refused[0]["request"] == "retrieve_future (ForwardBackward)"
    assert refused[0]["message"].startswith("the gateway answered retrieve_future")
    (recovered,) = (record for record in ours if record["event"] == "route.recovered")
    assert recovered["level"] == "info"
    assert recovered["seconds"] == raced.seconds
    (failed,) = (record for record in ours if record["event"] == "route.failed_fast")
    assert (failed["level"], failed["control_plane_said"]) == ("warning", "JOB_STATE_DELETED")
    # And the lines of others stay as they are.
    (other,) = (record for record in records if record["event"] == "another line")
    assert (other["level"], other["fields"]) == ("warning", 1)


SHOWS = {
    "opentelemetry_spans": r'"name": "route.recovered"',
    "prometheus_metrics": r"\nroutefix_refused_total\{job=\"lab/job-1\"\} [1-9]",
    "structlog_events": r'\n\{"event": "route.recovered", .*"seconds": \d',
}
NEEDS = {
    "opentelemetry_spans": "opentelemetry.sdk",
    "prometheus_metrics": "prometheus_client",
    "structlog_events": "structlog",
}


AS_A_PROGRAM = """
import os, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_run_as_a_program_shows_the_race(example: Path) -> None:
    pytest.importorskip(NEEDS[example.stem])
    ended = subprocess.run(
        # Without the interpreter's end, where pyqwest may abort it.
        [sys.executable, "-c", AS_A_PROGRAM, str(example)],
        # Away from the sources, as somebody who has only the package and the file.
        cwd=example.parent,
        env={**os.environ, "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(SHOWS[example.stem], ended.stdout)
    assert not leaks(ended.stdout)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_docs_include_the_example_file(example: Path) -> None:
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    assert f'--8<-- "examples/{example.name}"' in page


# --- Screenshots --------------------------------------------------------------------------

IMAGES = ROOT / "docs" / "images"


SAY = {
    "check.svg": ["racing: ", "healthy: all 20 probes were answered"],
    "demo.svg": ["Cold race", "Mid-training", "everything trained exactly once"],
    "status.svg": ["can patch tinker", "TINKER_ROUTEFIX_MAX_REPLAYS"],
}


def test_images_are_exactly_those_shown_in_docs() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        Path(found).name
        for page in pages
        for found in re.findall(r"images/[\w-]+\.svg", page.read_text(encoding="utf-8"))
    }
    assert shown == {image.name for image in IMAGES.iterdir()} == {*SAY}


@pytest.mark.parametrize("name", SAY)
def test_image_shows_the_expected_text_and_no_local_path(name: str) -> None:
    source = (IMAGES / name).read_text(encoding="utf-8")
    words = [element.text or "" for element in ElementTree.fromstring(source).iter()]
    text = re.sub(r"\s+", " ", "".join(words))
    for expected in SAY[name]:
        assert expected in text
    for machine in ("/home", "/root", "/tmp", "/Users", "cdnjs"):
        assert machine not in source
    assert not leaks(source)
