"""Faults that come together, each of which a run survives: the ledger is the judge."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import logging
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker
from tinker._client import AsyncTinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType
from tinker.lib.internal_client_holder import InternalClientHolder

import tinker_routefix
from tests import programs
from tests.common import collect, stale_from_the_first, until
from tests.conftest import run_python
from tests.programs import connect, exact, forward_backward, optim_step, train
from tinker_routefix import _clients, _connecting, _probes, _question, _threads, events
from tinker_routefix._connecting import ConnectBudget
from tinker_routefix._connections import MARK
from tinker_routefix._waiters import Waiters
from tinker_routefix.lab import Answer, Exchange, Fault, Lab

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from tests.conftest import Overheard

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]
Settings = Callable[..., None]

# --- A control plane that hiccups ----------------------------------------------------------

PASSING: dict[str, dict[str, Any]] = {
    "HTTP 500": {"answer": Answer(500, "")},
    "HTTP 408": {"answer": Answer(408, "")},
    "HTTP 429": {"answer": Answer(429, "", headers={"Retry-After": "1"})},
    "dropped": {"drop": True},
}


@pytest.mark.parametrize("passing", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("kind", ["forward_backward", "poll"])
def test_control_plane_that_fails_for_the_whole_outage_ends_no_run(
    make_lab: MakeLab, plain: Plain, passing: dict[str, Any], kind: str
) -> None:
    """The pod that answers through the route is proof enough that the job runs."""

    def run() -> Lab:
        lab = make_lab()
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["control_plane"], at="control_plane", **passing))
        # The probes of the shim too: nothing gets through for so long.
        stale_from_the_first(lab, 2, kinds=[kind, "get_info"])
        train(client)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    exact(run(), gradients=1, optim_steps=1)


def test_gateway_that_has_lost_its_pod_between_two_404s_ends_no_run(
    make_lab: MakeLab, plain: Plain, settings: Settings
) -> None:
    """A probe's 502 is no answer of the pod: a replay sent then may have been carried out."""

    def run() -> Lab:
        lab = make_lab()
        client = connect(lab.base_url)
        began: list[float] = []

        def between(start: float, end: float) -> Callable[[Exchange], bool]:
            def applies(exchange: Exchange) -> bool:
                began.append(exchange.at)
                return start <= exchange.at - began[0] < end

            return applies

        kinds = ["forward_backward", "get_info"]
        lab.fault(Fault(kinds=kinds, answer=Answer(502, ""), when=between(0.4, 2)))
        lab.fault(Fault(kinds=kinds, when=between(0, 6)))
        train(client)
        return lab

    # Nothing but an answered probe ends a wait.
    settings(base_delay=20, max_delay=20)
    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    exact(run(), gradients=1, optim_steps=1)


def test_telemetry_that_gets_through_is_no_proof_that_the_job_runs(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", drop=True))
    # The client's own heartbeat would be proof.
    lab.fault(Fault(kinds=["forward_backward", "get_info", "heartbeat"]))
    future = forward_backward(client)
    telemetry = client.holder.get_telemetry()
    sent = lab.count("telemetry")
    while lab.count("telemetry") < sent + 5:
        telemetry.log("talk")
        telemetry._trigger_flush()
        time.sleep(0.5)
    assert lab.count("forward_backward") == 1
    lab.clear()
    future.result(programs.PATIENCE)
    optim_step(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=1)


def test_pod_that_does_not_know_telemetry_is_left_to_tinker(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    lab = make_lab()
    client = connect(lab.base_url)
    unknown = lab.fault(
        Fault(kinds=["telemetry"], at="pod", answer=Answer(404, {"detail": "Not Found"}))
    )
    telemetry = client.holder.get_telemetry()
    telemetry.log("talk")
    telemetry._trigger_flush()
    until(lambda: unknown.hits > 0)
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    job = programs.job_of(lab)
    assert (job.refused, job.questions, job.telemetry_dropped) == (0, 0, 0)


STRANGE = {
    "Kong": Answer(404, {"message": "no Route matched with those values"}),
    "FastAPI": Answer(404, {"detail": "Not Found"}),
    "AWS": Answer(403, {"message": "Missing Authentication Token"}),
    "a firewall": Answer(403, "<html>Request blocked</html>", "text/html"),
    "an unauthorized key": Answer(401, {"error": {"code": "UNAUTHENTICATED"}}),
    "the API, by mistake": Answer(404, {"code": 5, "message": "not found", "details": []}),
    "no JSON": Answer(200, "<html>welcome</html>", "text/html"),
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE)
def test_one_strange_answer_of_the_control_plane_ends_no_run(
    make_lab: MakeLab, answer: Answer
) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=answer, count=1))
    lab.fault(Fault(kinds=["forward_backward", "get_info"], seconds=2.5))
    train(client)
    exact(lab, gradients=1, optim_steps=1)


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE)
def test_the_same_strange_answer_twice_fails_fast(make_lab: MakeLab, answer: Answer) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=answer))
    lab.stale()
    with programs.took(0.5, 15), pytest.raises(tinker.NotFoundError):
        forward_backward(client).result(programs.PATIENCE)
    first, second = (e.at for e in lab.exchanges if e.kind == "control_plane")
    assert second - first > 0.9


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE)
def test_connecting_waits_through_strange_answers(make_lab: MakeLab, answer: Answer) -> None:
    told_about_the_job = "code" in answer.content.decode() and answer.status == 404
    lab = make_lab()
    count = 1 if told_about_the_job else None
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=answer, count=count))
    lab.stale(3)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_terminal_state_at_connect_is_believed_only_when_it_stays(make_lab: MakeLab) -> None:
    """A job that is resumed shows the old state for a while."""
    lab = make_lab()
    lab.control_plane.state = "JOB_STATE_COMPLETED"
    lab.stale(4)
    threading.Timer(1.2, setattr, (lab.control_plane, "state", "JOB_STATE_RUNNING")).start()
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_ended_job_is_noticed_at_connect_though_probes_are_answered(make_lab: MakeLab) -> None:
    """What would end the wait is confirmed also where the route releases it meanwhile."""
    lab = make_lab()
    lab.control_plane.state = "JOB_STATE_COMPLETED"
    lab.fault(Fault(kinds=["create_session"]))
    with programs.took(1, 20), pytest.raises(tinker.NotFoundError):
        connect(lab.base_url)
    assert 2 <= lab.control_plane.questions <= 4
    assert lab.count("create_session") <= 8


def test_gone_job_with_the_control_plane_away_gives_the_404_within_the_budget(
    make_lab: MakeLab, settings: Settings
) -> None:
    settings(retry_budget=3, control_plane_timeout=1)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.end_job(mode="hang")
    with programs.took(2, 3 + 5 + 10), pytest.raises(tinker.NotFoundError) as caught:
        forward_backward(client).result(programs.PATIENCE)
    assert "0 replays" in programs.notes(caught.value)
    job = programs.job_of(lab)
    assert (job.given_up, job.failed_fast) == (1, 0)


def test_control_plane_that_is_away_beside_half_stale_replicas_ends_no_run(
    make_lab: MakeLab, plain: Plain
) -> None:
    def run() -> Lab:
        lab = make_lab(replicas=2)
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["control_plane"], at="control_plane", drop=True))
        lab.stale(6, replica=0)
        for _ in range(3):
            train(client)
            lab.drop_connections()
            time.sleep(0.2)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    lab = run()
    exact(lab, gradients=3, optim_steps=3)
    assert programs.job_of(lab).recovered >= 1


def test_two_jobs_with_two_keys_survive_a_control_plane_that_drops_every_third_question(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab()
    keys = {"job-1": f"{programs.CANARY}-one", "job-2": f"{programs.CANARY}-two"}
    clients = {}
    for job, key in keys.items():
        # In 0.15.0 the variable's counts more than the argument.
        monkeypatch.setenv("TINKER_API_KEY", key)
        service = tinker.ServiceClient(base_url=lab.job_url(job), api_key=key)
        made = service.create_lora_training_client(base_model="lab/base", rank=8)
        clients[job] = programs.settled(made)
    asked = 0

    def third(_: object) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    dropped = lab.fault(Fault(kinds=["control_plane"], at="control_plane", drop=True, when=third))
    lab.fault(Fault(kinds=["forward_backward", "get_info"], seconds=4))
    steps = [forward_backward(client) for client in clients.values()]
    for step in steps:
        step.result(programs.PATIENCE)
    for job, client in clients.items():
        optim_step(client).result(programs.PATIENCE)
        ledger = lab.ledger_of(job)
        assert (ledger.gradients, ledger.optim_steps) == (1, 1)
        assert not ledger.duplicates()
    assert dropped.hits >= 1
    questions = [e for e in lab.exchanges if e.kind == "control_plane"]
    for job, key in keys.items():
        own = [e for e in questions if e.job == job]
        assert own
        for question in own:
            said = " ".join(question.headers.values())
            assert [one for one in keys.values() if one in said] == [key]


def test_half_stale_replicas_are_survived_while_control_plane_drops_every_third_question(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    asked = 0

    def third(_: object) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    lab.fault(Fault(kinds=["control_plane"], at="control_plane", drop=True, when=third))
    lab.stale(8, replica=0)
    train(client, 4)
    exact(lab, gradients=4, optim_steps=4)


# --- Connecting is a property of the request ------------------------------------------------


@pytest.mark.core
def test_second_client_waits_out_a_cold_race_like_the_first(
    make_lab: MakeLab, settings: Settings
) -> None:
    settings(retry_budget=1)
    lab = make_lab()
    first = connect(lab.base_url)
    train(first)
    lab.stale(5)
    train(connect(lab.base_url))
    exact(lab, gradients=2, optim_steps=2)


@pytest.mark.slow
def test_budget_of_a_request_is_not_stretched_by_a_client_that_connects(
    make_lab: MakeLab, settings: Settings
) -> None:
    settings(retry_budget=4, warmup_timeout=20)
    lab = make_lab()
    client = connect(lab.base_url)
    train(client)
    lab.stale()

    def connect_in_vain() -> None:
        with suppress(Exception):
            connect(lab.base_url)

    other = threading.Thread(target=connect_in_vain)
    other.start()
    with programs.took(3, 4 + 8), pytest.raises(tinker.NotFoundError):
        forward_backward(client).result(programs.PATIENCE)
    assert other.is_alive(), "it has 20 s of its own"
    lab.clear()
    other.join(programs.PATIENCE)


def test_what_a_service_client_starts_is_no_part_of_connecting() -> None:
    """Heartbeats and refreshes go on in a copy of its context."""
    seen: list[contextvars.Context] = []
    _connecting.connect_service(lambda: seen.append(contextvars.copy_context()), None, (), {})
    budget = seen[0][_connecting._current]
    assert budget is not None
    assert budget.ended


def test_load_by_what_began_while_connecting_is_not_warmed_up(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of the program's, say, goes on in a copy of the context that it was called in."""
    contexts: list[contextvars.Context] = []
    create = InternalClientHolder._create_session

    def noted(*args: Any, **kwargs: Any) -> Any:
        contexts.append(contextvars.copy_context())
        return create(*args, **kwargs)

    monkeypatch.setattr(InternalClientHolder, "_create_session", noted)
    lab = make_lab()
    client = connect(lab.base_url)
    path = programs.save(client, "checkpoint").path
    contexts[0].run(programs.load, client, path)
    assert programs.job_of(lab).warmups == 1


def test_failed_connect_gives_its_budget_back(make_lab: MakeLab, settings: Settings) -> None:
    settings(warmup_timeout=3)
    lab = make_lab()
    lab.stale()
    for _ in range(2):
        with programs.took(2, 20), pytest.raises(Exception) as caught:
            connect(lab.base_url)
        assert "404" in str(caught.value)
    lab.clear()
    lab.stale(2)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_each_training_client_of_a_service_has_a_budget_of_its_own(
    make_lab: MakeLab, settings: Settings
) -> None:
    """Neither what another one has used up in vain nor a route that was warm takes it away."""
    settings(warmup_timeout=3, retry_budget=0.5)
    lab = make_lab()
    service = programs.service(lab.base_url)

    def create() -> Any:
        made = service.create_lora_training_client(base_model="lab/base", rank=8)
        return programs.settled(made)

    train(create())
    lab.stale()
    with programs.took(2, 20), pytest.raises(Exception, match="404"):
        create()
    lab.clear()
    lab.stale(1.5)
    train(create())
    assert lab.count("create_model", refused=True) > 1
    exact(lab, gradients=2, optim_steps=2)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[ConnectBudget]:
    """All that are made."""
    made: list[ConnectBudget] = []

    def make() -> ConnectBudget:
        made.append(ConnectBudget())
        return made[-1]

    monkeypatch.setattr(_connecting, "ConnectBudget", make)
    return made


def test_nothing_connects_any_more_once_there_is_a_client(
    make_lab: MakeLab, budgets: list[ConnectBudget]
) -> None:
    """What was started meanwhile and goes on must not wait as long as connecting may."""
    connect(make_lab().base_url)
    assert len(budgets) == 2
    assert all(budget.ended for budget in budgets)


def _checkpoint(lab: Lab) -> tuple[Any, str]:
    """A service client, and the path of a checkpoint that a client of it has saved."""
    service = programs.service(lab.base_url)
    first = programs.settled(service.create_lora_training_client(base_model="lab/base", rank=8))
    return service, programs.save(first, "checkpoint").path


def test_client_from_a_checkpoint_has_one_budget_from_its_weights_info_on(
    make_lab: MakeLab, budgets: list[ConnectBudget]
) -> None:
    lab = make_lab()
    service, path = _checkpoint(lab)
    info = lab.fault(Fault(count=1, when=lambda one: one.path.endswith("/weights_info")))
    model = lab.fault(Fault(kinds=["create_model", "load"], count=1))
    programs.settled(service.create_training_client_from_state(path))
    if not info.hits:
        pytest.skip("from 0.24.1 on one request makes the client")
    assert model.hits == 1
    assert sum(budget.used for budget in budgets) == 1


def test_budget_of_a_client_from_a_checkpoint_outlasts_what_tinker_repeats(
    make_lab: MakeLab, budgets: list[ConnectBudget]
) -> None:
    """Its ``weights_info`` has waited, fails, and is sent again by tinker: still one client."""
    lab = make_lab()
    service, path = _checkpoint(lab)

    def is_info(exchange: Exchange) -> bool:
        return exchange.path.endswith("/weights_info")

    info = lab.fault(Fault(count=1, when=is_info))
    lab.fault(Fault(count=1, when=is_info, answer=Answer(400, b"")))
    model = lab.fault(Fault(kinds=["create_model", "load"], count=1))
    try:
        programs.settled(service.create_training_client_from_state(path))
    except tinker.BadRequestError:
        pytest.skip("this release does not repeat it")
    if not info.hits:
        pytest.skip("from 0.24.1 on one request makes the client")
    assert model.hits == 1
    assert sum(budget.used for budget in budgets) == 1


def _from_checkpoint(lab: Lab) -> Any:
    """A training client that is created from a checkpoint."""
    service, path = _checkpoint(lab)
    lab.stale(3)
    return programs.settled(service.create_training_client_from_state(path))


def test_client_from_a_checkpoint_waits_and_is_warmed_up_once(
    make_lab: MakeLab, settings: Settings
) -> None:
    settings(retry_budget=1)
    lab = make_lab()
    client = _from_checkpoint(lab)
    assert programs.job_of(lab).warmups == 2
    train(client)
    path = programs.save(client, "again").path
    programs.load(client, path)
    assert programs.job_of(lab).warmups == 2


# --- Connecting over TLS ----------------------------------------------------------------------


@pytest.fixture
def secure_lab(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab over TLS that everything in this process trusts."""
    # With a later one than it knows of, tinker 0.22 trusts nobody over pyqwest.
    lab = make_lab(tls=True, config={"use_pyqwest_transport": False})
    monkeypatch.setattr(_question, "_tls", None)
    return lab


def _opened_ahead(lab: Lab) -> list[int]:
    """The connections that were opened once a model was being created."""
    kinds = [one.kind for one in lab.exchanges]
    after = lab.exchanges[kinds.index("create_model") :]
    return [one.connection for one in after if one.kind == "capabilities"]


def _open(lab: Lab) -> set[int]:
    there = lab._gateway._connections
    return {known.number for transport, known in there.items() if not transport.is_closing()}


def test_warm_up_over_tls_finds_its_connections_open(
    secure_lab: Lab, mocker: MockerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened after the creation was sent, used for one request each, and closed then."""
    # The lab's side of the handshakes is in this process too.
    monkeypatch.setattr(_probes.ConnectionsAhead, "OPEN_WITHIN", 60.0)
    monkeypatch.setattr(_probes.ConnectionsAhead, "KEPT", 60.0)
    made = mocker.spy(_clients.Pool, "client_with")
    client = connect(secure_lab.base_url)
    opened = _opened_ahead(secure_lab)
    used = [one.kind for one in secure_lab.exchanges if one.connection in opened]
    assert len(set(opened)) == 3
    assert used == ["capabilities"] * 3 + ["get_info"] * 3
    until(lambda: not _open(secure_lab) & set(opened))
    assert made.call_count == 1
    assert made.call_args.args[1].verify_mode is ssl.CERT_REQUIRED
    train(client)
    exact(secure_lab, gradients=1, optim_steps=1)


def test_next_round_of_a_warm_up_over_tls_opens_connections_of_its_own(secure_lab: Lab) -> None:
    secure_lab.fault(Fault(kinds=["get_info"], count=1))
    connect(secure_lab.base_url)
    warm = [one.connection for one in secure_lab.exchanges if one.kind == "get_info"]
    assert len(warm) == len(set(warm)) >= 6


def test_connections_of_a_warm_up_that_does_not_come_are_closed(secure_lab: Lab) -> None:
    secure_lab.fault(Fault(kinds=["poll"], at="pod", answer=Answer(400, {"detail": "no"}), delay=1))
    with pytest.raises(Exception, match="400"):
        connect(secure_lab.base_url)
    until(lambda: len(set(_opened_ahead(secure_lab))) == 3)
    opened = _opened_ahead(secure_lab)
    until(lambda: not _open(secure_lab) & set(opened))
    assert not [one for one in secure_lab.exchanges if one.kind == "get_info"]


def test_connections_that_no_warm_up_takes_in_time_are_closed(
    secure_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model can take minutes to be created, and a server closes what is idle: new ones then."""
    monkeypatch.setattr(_probes.ConnectionsAhead, "KEPT", 4.0)
    secure_lab.fault(Fault(kinds=["poll"], at="pod", answer=None, delay=12, count=1))
    connect(secure_lab.base_url)
    opened = _opened_ahead(secure_lab)
    used = [one.kind for one in secure_lab.exchanges if one.connection in opened]
    assert used == ["capabilities"] * 3
    assert programs.job_of(secure_lab).route == "warm"


def test_pod_that_does_not_answer_the_first_requests_holds_no_warm_up_up(
    secure_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probes, "ANSWERS_WITHIN", 0.2)
    monkeypatch.setitem(_probes._OPTIONS, "timeout", 60.0)
    model = Fault(
        kinds=["capabilities"], hang=True, when=lambda _: bool(secure_lab.count("create_model"))
    )
    secure_lab.fault(model)
    with programs.took(0, 40):
        connect(secure_lab.base_url)
    assert programs.job_of(secure_lab).route == "warm"


# --- 404s of unknown shape ------------------------------------------------------------------

OTHERS = {
    "an error of its own": {"error": "no such checkpoint"},
    "a code of its own": {"error": {"code": "CHECKPOINT_GONE", "message": "no"}},
    "HTML": "<html>404</html>",
}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_pods_own_404_of_unknown_shape_is_believed_in_seconds(
    make_lab: MakeLab, plain: Plain, body: Any
) -> None:
    def run() -> tuple[Lab, BaseException]:
        lab = make_lab()
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["load"], at="pod", answer=Answer(404, body)))
        with programs.took(0, 15), pytest.raises(Exception) as caught:
            programs.load(client, "tinker://lab/weights/none")
        return lab, caught.value

    with plain():
        _, expected = run()
    lab, error = run()
    assert (type(error), str(error)) == (type(expected), str(expected))
    assert not programs.notes(error)
    assert lab.control_plane.questions == 0
    job = programs.job_of(lab)
    assert (job.refused, job.given_up, job.last_intervention) == (0, 0, None)


def test_pods_404_in_another_shape_behind_one_of_the_gateway_is_raised_in_seconds(
    make_lab: MakeLab,
) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["load"], count=1))
    html = Answer(404, "<html>no such checkpoint</html>", "text/html")
    lab.fault(Fault(kinds=["load"], at="pod", answer=html))
    with programs.took(0, 20), pytest.raises(tinker.NotFoundError) as caught:
        programs.load(client, "tinker://lab/weights/none")
    assert not programs.notes(caught.value)
    assert programs.job_of(lab).given_up == 0


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_pod_without_get_info_in_another_shape_does_not_hold_connecting_up(
    make_lab: MakeLab, body: Any
) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["get_info"], at="pod", answer=Answer(404, body)))
    # Where creating a client asks for it as well, plain tinker fails.
    with programs.took(0, 20), suppress(tinker.NotFoundError):
        train(connect(lab.base_url))
    assert not lab.ledger.duplicates()


def test_half_stale_replicas_that_say_404_in_html_are_survived(
    make_lab: MakeLab, plain: Plain
) -> None:
    html = Answer(404, "<html><h1>404 Not Found</h1>nginx</html>", "text/html")

    def run() -> Lab:
        lab = make_lab(replicas=2)
        client = connect(lab.base_url)
        lab.fault(Fault(replica=0, seconds=6, answer=html))
        for _ in range(4):
            train(client)
            lab.drop_connections()
            time.sleep(0.2)
        return lab

    with plain(), pytest.raises(Exception, match="404"):
        run()
    exact(run(), gradients=4, optim_steps=4)


def test_probe_that_hangs_does_not_hold_a_404_of_unknown_shape_back(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_probes._OPTIONS, "timeout", 60.0)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["get_info"], hang=True, count=2))
    lab.fault(Fault(kinds=["forward_backward"], count=1, answer=Answer(404, "<html>404</html>")))
    with programs.took(0, 40):
        forward_backward(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)


def test_two_404s_of_unknown_shape_over_a_connection_that_answers_probes_are_survived(
    make_lab: MakeLab,
) -> None:
    """The route can have come back between a probe and the request, or go by the request."""
    lab = make_lab()
    client = connect(lab.base_url)
    html = Answer(404, "<html>404</html>", "text/html")
    lab.fault(Fault(kinds=["forward_backward"], count=3, answer=html))
    train(client)
    exact(lab, gradients=1, optim_steps=1)


def test_request_refused_in_html_and_then_by_the_gateway_is_survived(make_lab: MakeLab) -> None:
    """What has answered a probe in between has been counted once."""
    lab = make_lab()
    client = connect(lab.base_url)
    html = Answer(404, "<html>404</html>", "text/html")
    lab.fault(Fault(kinds=["optim_step"], count=1, answer=html))
    lab.fault(Fault(kinds=["optim_step"], count=1))
    seen: list[events.Event] = []
    unsubscribe = events.subscribe(seen.append)
    train(client)
    unsubscribe()
    exact(lab, gradients=1, optim_steps=1)
    assert lab.count("optim_step") == 3
    assert programs.job_of(lab).replays == 2
    told = [(one.name, one.replays) for one in seen if isinstance(one, events.RequestEvent)]
    assert sorted(told) == [
        ("route.recovered", 2),
        ("route.refused", 0),
        ("route.refused", 1),
        ("route.replayed", 1),
        ("route.replayed", 2),
    ]


def test_request_refused_in_html_needs_no_connection_once_a_probe_was_refused(
    make_lab: MakeLab, mocker: MockerFixture
) -> None:
    """Among many that are refused at once: the route is stale for probes as well."""
    lab = make_lab()
    client = connect(lab.base_url)
    html = Answer(404, "<html>404</html>", "text/html")
    stale = Fault(answer=html)
    route = programs.route_of(lab)
    stagger = Waiters.stagger
    turns: list[None] = []

    async def late(waiters: Waiters) -> None:
        turns.append(None)
        if len(turns) == 2:
            while route.probe_refused_at < 0:  # noqa: ASYNC110 - it is a time, and tells nobody
                await asyncio.sleep(0.01)
            stale.count = 0
        await stagger(waiters)

    mocker.patch.object(Waiters, "stagger", late)
    opened = mocker.spy(_probes, "one_connection")
    lab.fault(Fault(kinds=["healthz"], answer=html, count=2))
    lab.fault(stale)

    async def both(http: Any) -> None:
        await asyncio.gather(*(http.get("/api/v1/healthz", cast_to=object) for _ in range(2)))

    programs.on_loop(client, both)
    assert lab.count("healthz", refused=True) == 2
    assert opened.call_count == 1


def test_cold_race_behind_a_gateway_that_says_404_in_html_is_survived(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(answer=Answer(404, "<html>404</html>", "text/html"), seconds=3))
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_warm_up_that_is_refused_in_html_with_probes_waits(make_lab: MakeLab) -> None:
    """A 404 of unknown shape is not the pod's where another kind of probe is refused as well."""
    lab = make_lab()
    made = ("config", "dynamic_config", "create_session", "create_model", "poll", "healthz")
    others = (*made, "heartbeat", "telemetry")
    html = Answer(404, "<html>404</html>")
    stale = stale_from_the_first(lab, 3, excluding=others, answer=html)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)
    assert stale.hits > 1
    assert programs.job_of(lab).route == "warm"


def _keeps_alive(exchange: Exchange) -> bool:
    """Whether it is no probe of the route: the connection of one is closed after it."""
    return exchange.headers.get("connection") != "close"


def test_warm_up_that_is_refused_in_html_once_and_then_dropped_waits(make_lab: MakeLab) -> None:
    """Nobody has said that the 404 was the pod's."""
    lab = make_lab()

    def warms_up(_: Exchange) -> bool:
        return lab.count("poll", status=200) > 0

    html = Answer(404, "<html>404</html>")
    refused = lab.fault(Fault(kinds=["get_info"], count=1, answer=html, when=warms_up))

    def looks_closer(exchange: Exchange) -> bool:
        return refused.hits > 0 and _keeps_alive(exchange)

    dropped = lab.fault(Fault(kinds=["get_info"], count=1, drop=True, when=looks_closer))
    connect(lab.base_url)
    assert dropped.hits == 1
    assert programs.job_of(lab).route == "warm"
    assert programs.job_of(lab).refused == 1


def test_connection_that_cannot_be_opened_leaves_the_404_as_it_is(
    make_lab: MakeLab, settings: Settings, mocker: MockerFixture
) -> None:
    settings(strict=False)
    lab = make_lab()
    client = connect(lab.base_url)
    mocker.patch.object(
        _clients.Pool, "client_with", side_effect=OSError(24, "Too many open files")
    )
    lab.fault(Fault(kinds=["forward_backward"], count=1, answer=Answer(404, "<html>404</html>")))
    forward_backward(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)


# --- A half-healed route asks less ----------------------------------------------------------


@pytest.mark.long
def test_request_refused_while_probes_pass_asks_and_replays_little(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["optim_step"], seconds=28))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    assert lab.control_plane.questions <= 10
    assert lab.count("optim_step", refused=True) <= 30
    ended = [e.at for e in lab.exchanges if e.kind == "optim_step" and e.refused][-1]
    (answered,) = (e.at for e in lab.exchanges if e.kind == "optim_step" and not e.refused)
    # Two probes a second are a clock that stands still with the machine.
    between = [e for e in lab.exchanges if e.kind == "get_info" and ended < e.at < answered]
    assert len(between) < 6


@pytest.mark.long
def test_sample_refused_while_probes_pass_asks_and_replays_little(make_lab: MakeLab) -> None:
    """Without a model there is no request that proves that the pod is at work: each 404 asks."""
    lab = make_lab()
    sampler = programs.base_sampler(lab.base_url)
    lab.fault(Fault(kinds=["sample"], seconds=28))
    programs.sample(sampler)
    assert lab.ledger.count("sample") == 1, lab.ledger.summary()
    assert lab.control_plane.questions <= 10
    assert lab.count("sample", refused=True) <= 30
    ended = [e.at for e in lab.exchanges if e.kind == "sample" and e.refused][-1]
    (answered,) = (e.at for e in lab.exchanges if e.kind == "sample" and not e.refused)
    assert answered - ended < 7


def test_late_word_of_a_job_that_starts_ends_no_run_whose_probes_pass(make_lab: MakeLab) -> None:
    """The pod has answered since the question was put."""
    lab = make_lab()
    client = connect(lab.base_url)
    lab.control_plane.state, lab.control_plane.delay = "JOB_STATE_RE_QUEUEING", 1.8
    lab.fault(Fault(kinds=["forward_backward"], count=5))
    train(client)
    exact(lab, gradients=1, optim_steps=1)


def test_sample_of_a_job_that_ends_while_probes_pass_fails_at_once(make_lab: MakeLab) -> None:
    """The question that confirms it does not wait for its turn among the few."""
    lab = make_lab()
    sampler = programs.base_sampler(lab.base_url)
    lab.fault(Fault(kinds=["sample"]))
    gone = Answer(404, {"error": {"code": "NOT_FOUND", "message": "job not found"}})
    ended = lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=gone, skip=4))
    with pytest.raises(Exception) as caught:
        programs.sample(sampler)
    programs.gateway_404(caught.value)
    first, second = [e.at for e in lab.exchanges if e.kind == "control_plane"][-2:]
    assert ended.hits == 2
    # Two probes a second are a clock that stands still with the machine.
    between = [e for e in lab.exchanges if e.kind == "capabilities" and first < e.at < second]
    assert len(between) < 6


def test_replay_is_sent_over_a_connection_that_has_answered_a_probe(make_lab: MakeLab) -> None:
    """So it gets through at once where only some of the replicas know the route."""
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    for turn in range(6):
        lab.clear()
        # Whichever it is that the first request of a step comes to.
        kinds = ["forward_backward", "optim_step", "get_info"]
        lab.fault(Fault(kinds=kinds, replica=turn % 2))
        lab.drop_connections()
        time.sleep(0.2)
        train(client)
    exact(lab, gradients=6, optim_steps=6)
    job = programs.job_of(lab)
    assert job.recovered >= 1
    # One more where a probe came between the two tries of a new connection.
    assert job.replays <= job.recovered + 1


# --- Heartbeats, and other requests in the background ------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(tinker.lib.internal_client_holder.InternalClientHolder, "_session_heartbeat"),
    reason="this release has no session",
)
def test_heartbeats_leave_a_replica_that_stays_stale(
    make_lab: MakeLab, overheard: Overheard
) -> None:
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    (created,) = (e for e in lab.exchanges if e.kind == "create_session")
    lab.fault(Fault(kinds=["heartbeat"], replica=created.replica))
    end = time.monotonic() + 60
    while not any(e.kind == "heartbeat" and e.status == 200 for e in lab.exchanges):
        assert time.monotonic() < end, [str(e) for e in lab.exchanges if e.kind == "heartbeat"]
        time.sleep(0.5)
    refused = lab.count("heartbeat", status=404)
    assert 1 <= refused <= 3
    assert overheard.events.count("heartbeat.refused") == refused
    train(client)


async def _beat(http: Any, session_id: str) -> None:
    """As tinker sends one every 10 s."""
    await http.service.session_heartbeat(session_id=session_id, max_retries=0, timeout=10)


def _heartbeat(client: Any) -> None:
    if not hasattr(client.holder, "_session_heartbeat"):
        pytest.skip("this release has no session")
    beat = functools.partial(_beat, session_id=client.holder.get_session_id())
    programs.on_loop(client, beat, "SESSION")


def _settled(lab: Lab) -> None:
    """Wait until nothing is sent in the background any more."""
    sent = -1
    while sent != len(lab.exchanges):
        sent = len(lab.exchanges)
        time.sleep(0.5)


def test_heartbeat_and_save_refused_in_the_same_outage_both_get_through(make_lab: MakeLab) -> None:
    """The save is replayed; the session goes on at the replica that is not stale."""
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    stale: list[int | None] = []

    def at_the_same(exchange: Exchange) -> bool:
        stale.append(exchange.replica)
        return exchange.replica == stale[0]

    refusing = lab.fault(Fault(kinds=["heartbeat"], when=at_the_same))
    lab.fault(Fault(kinds=["save", "get_info"], seconds=3))
    saved = client.save_state("name")
    _until_a_heartbeat_is_through(client)
    assert refusing.hits >= 1
    saved.result(programs.PATIENCE)
    assert lab.count("save", refused=True) >= 1
    assert lab.ledger.count("save") == 1
    train(client)
    exact(lab, gradients=1, optim_steps=1)


@pytest.mark.parametrize(
    "answer",
    [Answer(404, {"detail": "no such session"}), Answer(410, {"detail": "gone"})],
    ids=["HTTP 404", "HTTP 410"],
)
def test_heartbeat_refused_by_the_pod_renews_no_connection(
    make_lab: MakeLab, answer: Answer
) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["heartbeat"], at="pod", answer=answer))
    _connections_of_heartbeats_stay(lab, client)


def test_heartbeat_of_an_ended_job_renews_no_connection(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.end_job()
    with pytest.raises(tinker.NotFoundError):
        forward_backward(client).result(programs.PATIENCE)
    _connections_of_heartbeats_stay(lab, client)


def test_answer_that_comes_too_late_does_not_keep_heartbeats_at_a_stale_replica(
    make_lab: MakeLab, settings: Callable[..., None]
) -> None:
    """A resumed job's old state: the request was through before it came."""
    settings(control_plane_timeout=30)
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    lab.control_plane.state, lab.control_plane.delay = "JOB_STATE_COMPLETED", 8
    lab.fault(Fault(kinds=["optim_step"], count=1))
    train(client)
    until(lambda: programs.route_of(lab).job_ended)
    stale: list[int | None] = []

    def at_the_same(exchange: Exchange) -> bool:
        stale.append(exchange.replica)
        return exchange.replica == stale[0]

    refusing = lab.fault(Fault(kinds=["heartbeat"], when=at_the_same))
    _until_a_heartbeat_is_through(client)
    assert refusing.hits >= 1


def _until_a_heartbeat_is_through(client: Any) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            _heartbeat(client)
            return
        except tinker.NotFoundError:
            assert time.monotonic() < end
            time.sleep(0.5)


def _connections_of_heartbeats_stay(lab: Lab, client: Any) -> None:
    _settled(lab)
    before = len(lab.exchanges)
    for _ in range(3):
        with pytest.raises(tinker.APIStatusError):
            _heartbeat(client)
        _settled(lab)
    # One of tinker's own may have come as well.
    beats = [e for e in lab.exchanges[before:] if e.kind == "heartbeat"]
    assert len(beats) >= 3
    assert len({e.connection for e in beats}) == 1


def _post(http: Any, path: str) -> Any:
    return http.post(path, body={}, cast_to=httpx.Response)


def test_background_requests_are_not_replayed_and_not_warned_of(
    make_lab: MakeLab, overheard: Overheard
) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale()
    for path in ("client/dynamic_config", "cancel_future", "session_heartbeat"):
        with programs.took(0, 5), pytest.raises(tinker.NotFoundError):
            programs.on_loop(
                client,
                functools.partial(_post, path=f"/api/v1/{path}"),
            )
    # The warm-up, and the new connection of the heartbeat, send probes.
    told = {event for event in overheard.events if event.startswith("route.")}
    assert told <= {"route.probed"}
    assert programs.job_of(lab).given_up == 0


def test_farewell_after_a_give_up_does_not_wait_for_a_second_budget(
    make_lab: MakeLab, settings: Settings
) -> None:
    settings(retry_budget=2)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale()
    with pytest.raises(tinker.NotFoundError):
        forward_backward(client).result(programs.PATIENCE)
    refused = lab.count(refused=True)
    with pytest.raises(tinker.NotFoundError):
        programs.on_loop(
            client,
            functools.partial(_post, path="/api/v1/sessions/one/finish"),
        )
    finished = [e for e in lab.exchanges[refused:] if e.path.endswith("/finish")]
    assert len(finished) == 1


# --- Nothing of the program's breaks it --------------------------------------------------------


class BrokenHandler(logging.Handler):
    def emit(self, _: logging.LogRecord) -> None:
        raise RuntimeError("a handler of the program's")


def test_log_handlers_filters_and_subscribers_that_raise_end_no_run(make_lab: MakeLab) -> None:
    def broken(_: object) -> bool:
        raise RuntimeError("the program's")

    logger = logging.getLogger("tinker_routefix")
    handler = BrokenHandler()
    logger.addHandler(handler)
    logger.addFilter(broken)
    unsubscribe = tinker_routefix.subscribe(broken)
    try:
        lab = make_lab()
        client = connect(lab.base_url)
        lab.stale(1)
        train(client)
        exact(lab, gradients=1, optim_steps=1)
    finally:
        unsubscribe()
        logger.removeFilter(broken)
        logger.removeHandler(handler)


def test_busy_default_executor_does_not_stretch_an_outage(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    release = threading.Event()

    async def occupy() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(64):
            loop.run_in_executor(None, release.wait, 60)

    client.holder.run_coroutine_threadsafe(occupy()).result(programs.PATIENCE)
    try:
        lab.fault(Fault(kinds=["optim_step", "get_info"], seconds=1))
        with programs.took(0, 20):
            optim_step(client).result(programs.PATIENCE)
    finally:
        release.set()
    assert lab.ledger.optim_steps == 1


def test_one_probe_that_hangs_does_not_keep_the_others_back(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["get_info"], hang=True, count=1))
    lab.fault(Fault(kinds=["forward_backward"], count=1))
    with programs.took(0, 8):
        forward_backward(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)


# --- It lets go ----------------------------------------------------------------------------------


def test_replaced_clients_are_closed_and_let_go(
    make_lab: MakeLab, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no task stays behind."""
    # Some replays are sent during the outage: a new client that does not answer then goes too.
    settings(base_delay=0.2)
    made: list[Any] = []
    make = _clients.Pool._new_client

    def new_client(self: Any, kwargs: dict[str, Any]) -> Any:
        made.append(make(self, kwargs))
        return made[-1]

    monkeypatch.setattr(_clients.Pool, "_new_client", new_client)
    lab = make_lab()
    client = connect(lab.base_url)
    made += _lent(client)
    for kinds in (["poll"], ["forward_backward"], ["optim_step"]) * 2:
        lab.fault(Fault(kinds=[*kinds, "get_info"], seconds=0.7))
        train(client)
    lent = set(map(id, _lent(client)))
    replaced = [one for one in made if id(one) not in lent]
    assert len(replaced) > 6
    until(lambda: all(one.is_closed() for one in replaced))
    left = [weakref.ref(one) for one in replaced]
    made.clear()
    replaced.clear()

    def let_go() -> bool:
        collect()
        return not any(ref() for ref in left)

    until(let_go)
    until(lambda: not _threads._tasks)
    assert not any(getattr(one, MARK)._reentrant_tasks for one in _lent(client))


def test_pool_that_the_program_has_closed_gets_no_new_client(make_lab: MakeLab) -> None:
    """A heartbeat can be refused while its session is being closed."""
    client = connect(make_lab().base_url)
    pools = [getattr(pool, MARK) for pool in client.holder._client_pools.values()]
    client.holder.close()
    if not hasattr(pools[0]._pool, "_closed"):
        pytest.skip("this release's pools are never closed")
    until(lambda: any(pool.closed for pool in pools))
    assert all(pool.replacement() is None for pool in pools if pool.closed)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every HTTP client that is made for a pool of tinker's, by whomever."""
    clients: list[Any] = []
    init = AsyncTinker.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # Those that probe have one of their own.
        if kwargs.get("http_client") is None:
            clients.append(self)

    monkeypatch.setattr(AsyncTinker, "__init__", noted)
    return clients


def _unused(client: Any, lab: Lab, made: list[Any]) -> list[Any]:
    """Those of a lab that are in no pool; clients of earlier tests may still be replaced."""
    pools = client.holder._client_pools.values()
    pooled = {id(one) for pool in pools for one in pool._clients}
    here = [one for one in made if str(one.base_url).startswith(lab.base_url)]
    return [one for one in here if id(one) not in pooled]


def _slow_look(seconds: float = 1.5) -> Fault:
    """The connection of a new client is looked at, before the client takes an old one's place."""
    return Fault(kinds=["get_info"], at="pod", answer=None, delay=seconds, when=_keeps_alive)


def test_new_client_whose_connection_hangs_holds_no_replay_up(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probes, "ANSWERS_WITHIN", 0.2)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["optim_step"], count=1))
    looked_at = lab.fault(Fault(kinds=["get_info"], hang=True, when=_keeps_alive))
    forward_backward(client).result(programs.PATIENCE)
    with programs.took(0, 10):
        optim_step(client).result(programs.PATIENCE)
    assert looked_at.hits > 0
    exact(lab, gradients=1, optim_steps=1)


def test_client_made_while_the_program_closes_its_pools_is_closed(
    make_lab: MakeLab, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probes, "ANSWERS_WITHIN", 30.0)
    lab = make_lab()
    client = connect(lab.base_url)
    if not hasattr(next(iter(client.holder._client_pools.values())), "_closed"):
        pytest.skip("this release's pools are never closed")
    before = len(made)
    lab.fault(Fault(kinds=["optim_step"], count=1))
    looked_at = lab.fault(_slow_look(4))
    optim_step(client)
    until(lambda: bool(looked_at.hits))
    client.holder.close()

    def closed() -> bool:
        unused = _unused(client, lab, made[before:])
        return bool(unused) and all(one.is_closed() for one in unused)

    until(closed)


def test_client_made_for_one_that_tinker_replaces_meanwhile_is_closed(
    make_lab: MakeLab, made: list[Any]
) -> None:
    """tinker itself opens a new connection after a bare 400: that one stays in the pool."""
    lab = make_lab()
    client = connect(lab.base_url)
    before = len(made)
    lab.fault(Fault(kinds=["healthz"], count=1))
    looked_at = lab.fault(_slow_look())
    # Not what is probed with: a probe would be answered instead.
    lab.fault(Fault(kinds=["config"], answer=Answer(400, b""), count=1))

    async def get(path: str) -> None:
        with client.holder.aclient(ClientConnectionPoolType.SESSION) as http:
            await http.get(f"/api/v1/{path}", cast_to=object)

    async def both() -> list[Any]:
        refused = asyncio.ensure_future(get("healthz"))
        while not looked_at.hits:  # noqa: ASYNC110 - the lab tells nobody
            await asyncio.sleep(0.01)
        with suppress(tinker.APIError):
            await get("client/config")
        pooled = list(client.holder._client_pools[ClientConnectionPoolType.SESSION]._clients)
        await refused
        return pooled

    pooled = client.holder.run_coroutine_threadsafe(both()).result(programs.PATIENCE)
    if pooled[0] not in made[before:]:
        pytest.skip("this release keeps its clients")
    assert client.holder._client_pools[ClientConnectionPoolType.SESSION]._clients == pooled
    unused = _unused(client, lab, made[before:])
    assert unused
    until(lambda: all(one.is_closed() for one in unused))
    # And the replay went over the one that tinker has put there.
    first, *_, last = (e.connection for e in lab.exchanges if e.kind == "healthz")
    assert first != last
    until(lambda: first not in _open(lab))


def test_client_that_another_package_lends_a_copy_of_is_helped(
    make_lab: MakeLab, made: list[Any]
) -> None:
    pools: Any = tinker.lib.internal_client_holder.ClientConnectionPool
    tinker_routefix.uninstall()
    aclient = pools.aclient

    @contextmanager
    def copies(self: Any) -> Iterator[Any]:
        with aclient(self) as http:
            yield copy.copy(http)

    pools.aclient = copies
    try:
        tinker_routefix.install()
        lab = make_lab()
        client = connect(lab.base_url)
        before = len(made)
        lab.fault(Fault(kinds=["forward_backward"], count=1))
        train(client)
        exact(lab, gradients=1, optim_steps=1)
        # The pool's own client stays, so that a new one would be for nothing.
        assert len(made) == before
    finally:
        tinker_routefix.uninstall()
        pools.aclient = aclient
        tinker_routefix.install()


@pytest.mark.parametrize("pyqwest", [False, True], ids=["httpx", "pyqwest"])
def test_connection_that_was_refused_is_closed(make_lab: MakeLab, *, pyqwest: bool) -> None:
    """Over pyqwest closing the client does not: it would stay open until idle for 90 s."""
    lab = make_lab(config={"use_pyqwest_transport": pyqwest})
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["optim_step"], count=1))
    train(client)
    (refused,) = (e.connection for e in lab.exchanges if e.kind == "optim_step" and e.refused)
    until(lambda: refused not in _open(lab))
    exact(lab, gradients=1, optim_steps=1)


def _lent(client: Any) -> list[Any]:
    """The HTTP clients that tinker has."""
    pools = client.holder._client_pools.values()
    return [one for pool in pools for one in pool._clients if hasattr(one, MARK)]


def test_counters_outlive_the_clients_of_a_job(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["forward_backward"], count=1))
    train(client)
    client.holder.close()
    del client
    collect()
    end = time.monotonic() + 30
    while (job := programs.job_of(lab)).route != "unused":
        assert time.monotonic() < end, job
        collect()
        time.sleep(0.1)
    assert job.recovered >= 1
    assert tinker_routefix.status().last_intervention == job.last_intervention is not None


def test_find_spec_of_the_sdk_does_not_load_the_shim() -> None:
    program = (
        "import sys; sys.path.append('autoload')\n"
        "import _tinker_routefix_autoload as autoload; autoload.load()\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('tinker') is not None\n"
        "assert 'tinker_routefix' not in sys.modules\n"
        "import tinker\n"
        "assert 'tinker_routefix' in sys.modules\n"
        "assert type(tinker.__loader__) is type(tinker.__spec__.loader)\n"
        "assert type(tinker.__loader__).__name__ == 'SourceFileLoader', tinker.__loader__\n"
    )
    ended = run_python(program, TINKER_ROUTEFIX_AUTOLOAD="1")
    assert ended.returncode == 0, ended.stderr
