"""What happens is told as events, of which the log lines are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import tinker_routefix
from tests import programs
from tests.programs import connect, exact, train
from tinker_routefix import events
from tinker_routefix.lab import Fault, Lab

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
    train(connect(make_lab().base_url))
    assert kinds(told) == [events.WarmupStarted, events.WarmupEnded]
    ended = told[-1]
    assert isinstance(ended, events.WarmupEnded)
    assert (ended.outcome, ended.rounds, ended.error) == ("warm", 1, None)
    assert overheard.events.count("warmup.ended") == 1


def test_race_emits_events_from_first_404_to_recovery(
    make_lab: MakeLab, told: list[events.Event], overheard: Any, settings: Callable[..., None]
) -> None:
    settings(base_delay=0.2)
    lab = make_lab()
    client = connect(lab.base_url)
    del told[:]
    began = time.time()
    lab.fault(Fault(kinds=["poll"], seconds=1.5))
    train(client)
    exact(lab, gradients=1, optim_steps=1)

    assert kinds(told)[:2] == [events.Refused, events.QuestionAnswered]
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
    assert {(event.state, event.said) for event in answered} == {("running", "JOB_STATE_RUNNING")}
    assert counters.questions == len(answered)
    for event in told:
        assert event.name in overheard.events or event.level == 10, event


def test_gone_job_emits_failed_fast(make_lab: MakeLab, told: list[events.Event]) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    del told[:]
    lab.end_job()
    with pytest.raises(Exception) as crash:
        train(client)
    failed = told[-1]
    assert isinstance(failed, events.FailedFast)
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
