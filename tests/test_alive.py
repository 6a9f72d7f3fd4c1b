"""Faults that come together, each of which a run survives: the ledger is the judge."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker

import tinker_routefix
from tests import programs
from tests.common import collect
from tests.conftest import run_python
from tests.programs import connect, exact, forward_backward, optim_step, train
from tinker_routefix import _sdk
from tinker_routefix.lab import Answer, Fault, Lab

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
        lab.fault(Fault(kinds=[kind, "get_info"], seconds=2))
        train(client)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    exact(run(), gradients=1, optim_steps=1)


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


def test_control_plane_that_drops_every_third_question_beside_half_stale_replicas(
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
def test_second_client_is_as_patient_as_the_first(make_lab: MakeLab, settings: Settings) -> None:
    settings(retry_budget=1)
    lab = make_lab()
    first = connect(lab.base_url)
    train(first)
    lab.stale(5)
    train(connect(lab.base_url))
    exact(lab, gradients=2, optim_steps=2)


@pytest.mark.long
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
    _sdk.connect_service(lambda: seen.append(contextvars.copy_context()), None, (), {})
    budget = seen[0][_sdk._connecting]
    assert budget is not None
    assert budget.ended


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


def _from_checkpoint(lab: Lab) -> Any:
    """A training client that is created from a checkpoint."""
    service = programs.service(lab.base_url)
    first = programs.settled(service.create_lora_training_client(base_model="lab/base", rank=8))
    path = programs.save(first, "checkpoint").path
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


def test_probe_that_hangs_does_not_hold_a_404_of_unknown_shape_back(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["get_info"], hang=True, count=2))
    lab.fault(Fault(kinds=["forward_backward"], count=1, answer=Answer(404, "<html>404</html>")))
    with programs.took(0, 9):
        forward_backward(client).result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)


def test_cold_race_behind_a_gateway_that_says_404_in_html_is_survived(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(answer=Answer(404, "<html>404</html>", "text/html"), seconds=3))
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_connection_that_cannot_be_opened_leaves_the_404_as_it_is(
    make_lab: MakeLab, settings: Settings, mocker: MockerFixture
) -> None:
    settings(strict=False)
    lab = make_lab()
    client = connect(lab.base_url)
    mocker.patch.object(_sdk._Pool, "client_with", side_effect=OSError(24, "Too many open files"))
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
    assert answered - ended < 4


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


@pytest.mark.long
@pytest.mark.skipif(
    not hasattr(tinker.lib.internal_client_holder.InternalClientHolder, "_session_heartbeat"),
    reason="this release has no session",
)
def test_heartbeats_leave_a_replica_that_stays_stale(make_lab: MakeLab) -> None:
    lab = make_lab(replicas=2)
    client = connect(lab.base_url)
    (created,) = (e for e in lab.exchanges if e.kind == "create_session")
    lab.fault(Fault(kinds=["heartbeat"], replica=created.replica))
    end = time.monotonic() + 60
    while not any(e.kind == "heartbeat" and e.status == 200 for e in lab.exchanges):
        assert time.monotonic() < end, [str(e) for e in lab.exchanges if e.kind == "heartbeat"]
        time.sleep(0.5)
    assert 1 <= lab.count("heartbeat", status=404) <= 3
    train(client)


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
    assert not [event for event in overheard.events if event.startswith("route.")]
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


def test_counters_outlive_the_clients_of_a_job(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale(1)
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
