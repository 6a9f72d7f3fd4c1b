"""What happens is told as events, of which the log lines are made."""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import tinker_routefix
from tests import programs
from tests.common import stale_from_the_first
from tests.programs import connect, exact, train
from tinker_routefix import _counters, _log, _status, events
from tinker_routefix._job import Job
from tinker_routefix.lab import Fault, Lab

if TYPE_CHECKING:
    from types import ModuleType

MakeLab = Callable[..., Lab]


@pytest.fixture
def told() -> Any:
    """Every event that is published while a test runs."""
    seen: list[events.Event] = []
    unsubscribe = tinker_routefix.subscribe(seen.append)
    yield seen
    unsubscribe()


def kinds(told: list[events.Event]) -> list[type[events.Event]]:
    return [type(event) for event in told]


def test_healthy_run_emits_only_warm_up_events(
    make_lab: MakeLab, told: list[events.Event], overheard: Any
) -> None:
    lab = make_lab()
    train(connect(lab.base_url))
    # Over TLS the connections of the warm-up are opened before it begins.
    sent = [event.number for event in told if isinstance(event, events.ProbesSent)]
    assert sum(sent) == programs.job_of(lab).probes > 0
    assert kinds(told) == [
        events.ClientConnected,
        *[events.ProbesSent] * (len(sent) - 1),
        events.WarmupStarted,
        events.ProbesSent,
        events.WarmupEnded,
    ]
    ended = told[-1]
    assert isinstance(ended, events.WarmupEnded)
    assert (ended.outcome, ended.rounds, ended.refused, ended.error) == ("warm", 1, False, None)
    assert {event.gateway for event in told} == {programs.job_of(lab).gateway}
    assert overheard.events.count("warmup.ended") == 1


def test_race_emits_events_from_first_404_to_recovery(
    make_lab: MakeLab, told: list[events.Event], overheard: Any, settings: Callable[..., None]
) -> None:
    settings(base_delay=0.2)
    lab = make_lab()
    client = connect(lab.base_url)
    warmup = programs.job_of(lab).probes
    del told[:]
    began = time.time()
    stale_from_the_first(lab, 1.5, kinds=["poll"])
    train(client)
    exact(lab, gradients=1, optim_steps=1)

    asked = [events.QuestionAsked, events.QuestionAnswered]
    assert [kind for kind in kinds(told) if kind is not events.ProbesSent][:3] == [
        events.Refused,
        *asked,
    ]
    assert kinds(told)[-1] is events.Recovered
    assert len({event.job for event in told}) == 1
    assert told[0].job == lab.base_url.split("rlorTrainerJobs/")[1]
    assert all(began <= event.at <= time.time() for event in told)
    refused = [event for event in told if isinstance(event, events.Refused)]
    replayed = [event for event in told if isinstance(event, events.Replayed)]
    # Each but the first 404 is the answer to a replay, and the last replay got through.
    assert [event.replays for event in refused] == list(range(len(refused)))
    assert [event.replays for event in replayed] == list(range(1, len(refused) + 1))
    recovered = told[-1]
    assert isinstance(recovered, events.Recovered)
    assert recovered.replays == len(replayed)
    assert recovered.request == refused[0].request == "retrieve_future (ForwardBackward)"
    assert 1.0 < recovered.seconds < 30
    counters = programs.job_of(lab)
    assert counters.refused == len(refused)
    assert counters.replays == len(replayed)
    assert counters.longest_wait == pytest.approx(recovered.seconds, abs=0.01)
    answered = [event for event in told if isinstance(event, events.QuestionAnswered)]
    assert {(event.state, event.control_plane_said) for event in answered} == {
        ("running", "JOB_STATE_RUNNING")
    }
    assert counters.questions == len(answered) == kinds(told).count(events.QuestionAsked)
    sent = [event.number for event in told if isinstance(event, events.ProbesSent)]
    assert counters.probes - warmup == sum(sent)
    for event in told:
        assert event.name in overheard.events or event.level == 10, event


def test_gone_job_emits_failed_fast(make_lab: MakeLab, told: list[events.Event]) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    del told[:]
    lab.end_job()
    with pytest.raises(Exception) as crash:
        train(client)
    (failed,) = [event for event in told if isinstance(event, events.FailedFast)]
    dropped = programs.job_of(lab).telemetry_dropped
    assert kinds(told).count(events.TelemetryDropped) == dropped
    assert failed.replays == 0
    # The note on the exception is the event.
    assert str(failed) in programs.notes(crash.value)


def test_failing_subscriber_disturbs_neither_run_nor_others(
    make_lab: MakeLab, told: list[events.Event], overheard: Any
) -> None:
    def fail(_: events.Event) -> None:
        raise RuntimeError("a fault of the program's own")

    unsubscribe = tinker_routefix.subscribe(fail)
    later: list[events.Event] = []
    unsubscribe_later = tinker_routefix.subscribe(later.append)
    try:
        lab = make_lab()
        train(connect(lab.base_url))
    finally:
        unsubscribe()
        unsubscribe_later()
    exact(lab, gradients=1, optim_steps=1)
    assert later == told
    assert "shim.failed" in overheard.events


def test_subscriber_finds_its_event_counted(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    found = []

    def look(event: events.Event) -> None:
        if isinstance(event, events.Refused):
            found.append(programs.job_of(lab).refused)

    unsubscribe = tinker_routefix.subscribe(look)
    try:
        lab.fault(Fault(kinds=["forward_backward"], count=2))
        train(client)
    finally:
        unsubscribe()
    assert found == [1, 2]


@pytest.mark.parametrize("other", ["job", "gateway"])
def test_event_of_another_job_is_not_counted(other: str) -> None:
    job = Job("https://gateway.example", "acct", "job")
    counters = _counters.feed(job)
    event = events.TelemetryDropped(job=str(job), gateway=job.gateway)
    events.publish(replace(event, **{other: "another"}))  # type: ignore[arg-type]
    assert counters == _counters.Counters()
    events.publish(event)
    assert counters == _counters.Counters(telemetry_dropped=1)
    assert _counters.of(job) is counters


@pytest.mark.parametrize(("held_back", "text"), [(1, "1 similar line"), (2, "2 similar lines")])
def test_lines_held_back_are_counted_in_the_next(overheard: Any, held_back: int, text: str) -> None:
    limit = _log.RateLimit(seconds=3600)
    for _ in range(1 + held_back):
        events.publish(events.TelemetryDropped(job="acct/job"), limit=limit)
    limit._last.clear()
    events.publish(events.TelemetryDropped(job="acct/job"), limit=limit)
    first, last = overheard.lines
    assert "suppressed" not in first
    assert f"no route ({text} suppressed)" in last
    assert f"'routefix_skipped': {held_back}" in last


def test_unsubscribing_twice_leaves_other_subscriptions_alone() -> None:
    seen: list[events.Event] = []
    first = tinker_routefix.subscribe(seen.append)
    second = tinker_routefix.subscribe(seen.append)
    event = events.WarmupStarted(job="acct/job")
    events.publish(event)
    assert seen == [event, event]
    first()
    first()
    events.publish(event)
    assert seen == [event] * 3
    second()
    events.publish(event)
    assert seen == [event] * 3


def test_subscribe_with_a_non_callable_raises_type_error() -> None:
    with pytest.raises(TypeError, match="callback='print' is not accepted"):
        tinker_routefix.subscribe("print")  # type: ignore[arg-type]


def test_event_attributes_are_read_only() -> None:
    event = events.Recovered(job="acct/job", request="optim_step", replays=1, seconds=2.0)
    with pytest.raises(AttributeError):
        event.seconds = 3.0  # type: ignore[misc]


def undocumented(module: ModuleType) -> list[str]:
    """The fields of a module's public dataclasses that no docstring follows."""
    return [
        f"{node.name}.{line.target.id}"
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for line, below in pairwise([*node.body, ast.Pass()])
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
        and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
    ]


@pytest.mark.parametrize("module", [events, _status])
def test_each_public_field_has_a_docstring(module: ModuleType) -> None:
    assert undocumented(module) == []


def test_public_names_include_every_kind_of_event() -> None:
    kinds = {
        name
        for name, kind in vars(events).items()
        if isinstance(kind, type) and issubclass(kind, events.Event)
    }
    assert kinds < {*events.__all__} <= vars(events).keys()
