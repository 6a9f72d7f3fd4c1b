"""Where the shim has no business: every other answer, URL and caller is plain tinker's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

import tinker_routefix
from tests import programs
from tests.programs import connect, exact, forward_backward, train
from tinker_routefix import _background
from tinker_routefix.lab import GATEWAY_404, Answer, Fault, Lab

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]


def outcome(run: Callable[[], object]) -> tuple[str, str]:
    """How a program ended: the type of its error and of the last cause."""
    try:
        run()
    except Exception as error:
        *_, last = programs.chain(error)
        return type(error).__name__, type(last).__name__
    return "ok", "ok"


# --- Jobs that do not run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "mode", "said"),
    [
        ("JOB_STATE_DELETED", "ok", "JOB_STATE_DELETED"),
        ("JOB_STATE_FAILED", "ok", "JOB_STATE_FAILED"),
        ("JOB_STATE_RUNNING", "missing", "no such job"),
        ("JOB_STATE_RUNNING", "forbidden", "not visible"),
        ("JOB_STATE_RE_QUEUEING", "ok", "JOB_STATE_RE_QUEUEING"),
    ],
)
@pytest.mark.parametrize("where", ["submission", "poll"])
def test_request_to_a_job_not_running_fails_fast(
    make_lab: MakeLab, plain: Plain, state: str, mode: Any, said: str, where: str
) -> None:
    def run(lab: Lab) -> tuple[BaseException, float]:
        client = connect(lab.base_url)
        lab.work_seconds = 60
        if where == "submission":
            lab.end_job(state=state, mode=mode)
        future = forward_backward(client)
        if where == "poll":
            # Accepted, and the job ends while it is worked on.
            while not lab.count("poll:forward_backward"):
                time.sleep(0.01)
            lab.end_job(state=state, mode=mode)
        kind = "forward_backward" if where == "submission" else "poll:forward_backward"
        while not lab.count(kind, refused=True):
            time.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(Exception) as caught:
            future.result(programs.PATIENCE)
        return caught.value, time.monotonic() - began

    with plain():
        expected, _ = run(make_lab(poll_seconds=0.3))
    lab = make_lab(poll_seconds=0.3)
    error, seconds = run(lab)
    assert type(error) is type(expected)
    assert seconds < 15, "tinker's telemetry must not hold it: it would for 30 s"
    programs.gateway_404(error)
    assert said in programs.notes(error)
    assert "0 replays" in programs.notes(error)
    assert programs.job_of(lab).failed_fast >= 1
    assert programs.job_of(lab).replays == 0


@pytest.mark.long
def test_telemetry_of_a_gone_job_does_not_delay_the_error(make_lab: MakeLab, plain: Any) -> None:
    """Before 0.38 a fatal error waits 30 s for telemetry that is refused like all else."""

    def run(lab: Lab) -> float:
        client = connect(lab.base_url)
        lab.end_job()
        began = time.monotonic()
        with pytest.raises(tinker.NotFoundError):
            forward_backward(client).result(programs.PATIENCE)
        return time.monotonic() - began

    from tinker.lib.telemetry import Telemetry

    drains = hasattr(Telemetry, "_send_batch_with_retry")
    with plain(telemetry=True):
        assert (run(make_lab()) > 20) is drains
    lab = make_lab()
    assert run(lab) < 15
    assert programs.job_of(lab).telemetry_dropped >= (1 if drains else 0)


def test_telemetry_that_the_pod_does_not_know_does_not_delay_the_error(make_lab: MakeLab) -> None:
    """Before 0.38 a fatal error waits 30 s for it too."""
    lab = make_lab()
    client = connect(lab.base_url)
    unknown = Answer(404, {"detail": "Not Found"})
    lab.fault(Fault(kinds=["telemetry"], at="pod", answer=unknown))
    lab.control_plane.state = "JOB_STATE_DELETED"
    lab.fault(Fault(kinds=["forward_backward"]))
    with programs.took(0, 15), pytest.raises(tinker.NotFoundError):
        forward_backward(client).result(programs.PATIENCE)


def test_error_is_not_delayed_while_another_client_gets_through(
    make_lab: MakeLab, settings: Callable[..., None]
) -> None:
    """Where replicas differ, an answer to one is no reason to hold another one's crash."""
    settings(max_replays=0)
    lab = make_lab()
    client, other = connect(lab.base_url), connect(lab.base_url)
    lab.fault(Fault(kinds=["forward_backward", "telemetry"]))
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            other.save_state("meanwhile").result(programs.PATIENCE)

    busy = threading.Thread(target=go_on)
    busy.start()
    try:
        with programs.took(0, 15), pytest.raises(tinker.NotFoundError):
            forward_backward(client).result(programs.PATIENCE)
    finally:
        done.set()
        busy.join(programs.PATIENCE)
    other.save_state("after").result(programs.PATIENCE)
    assert programs.job_of(lab).route != "given up"


@pytest.mark.parametrize("mode", ["rubbish", "redirect", "unauthorized"])
def test_request_fails_fast_when_control_plane_refuses_the_question(
    make_lab: MakeLab, plain: Plain, mode: Any
) -> None:
    def run(lab: Lab) -> BaseException:
        client = connect(lab.base_url)
        lab.stale(float("inf"))
        lab.control_plane.mode = mode
        with pytest.raises(Exception) as caught:
            forward_backward(client).result(programs.PATIENCE)
        return caught.value

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    with programs.took(0, 20):
        error = run(lab)
    assert type(error) is type(expected) is tinker.NotFoundError
    assert "0 replays" in programs.notes(error)
    assert lab.control_plane.questions == 2, "one strange answer ends nothing"


@pytest.mark.parametrize("mode", ["drop", "hang", "error", "slow_drip"])
def test_request_waits_for_its_budget_when_control_plane_cannot_tell(
    make_lab: MakeLab, settings: Callable[..., None], mode: Any
) -> None:
    settings(retry_budget=4, control_plane_timeout=1)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale(float("inf"))
    lab.control_plane.mode = mode
    with programs.took(3, 20), pytest.raises(tinker.NotFoundError) as caught:
        forward_backward(client).result(programs.PATIENCE)
    assert "0 replays" in programs.notes(caught.value)
    assert lab.count("forward_backward") == 1
    job = programs.job_of(lab)
    assert (job.given_up, job.failed_fast) == (1, 0)


@pytest.mark.long
def test_persistent_404_of_a_running_job_gives_up_after_four_replays(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale(float("inf"))
    with programs.took(20, 45), pytest.raises(tinker.NotFoundError) as caught:
        forward_backward(client).result(programs.PATIENCE)
    assert "JOB_STATE_RUNNING; 4 replays" in programs.notes(caught.value)
    exact(lab, gradients=0, optim_steps=0)
    assert programs.job_of(lab).given_up == 1


def test_poll_that_gives_up_raises_tinkers_error(
    make_lab: MakeLab, plain: Plain, settings: Callable[..., None]
) -> None:
    def run(lab: Lab) -> BaseException:
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["poll:forward_backward"]))
        with pytest.raises(Exception) as caught:
            forward_backward(client).result(programs.PATIENCE)
        return caught.value

    with plain():
        expected = run(make_lab())
    settings(retry_budget=2)
    lab = make_lab()
    error = run(lab)
    assert type(error) is type(expected) is ValueError
    assert "JOB_STATE_RUNNING" in programs.notes(error)
    assert lab.ledger.gradients == 1


# --- The pod's own 404s ------------------------------------------------------------------


def test_pod_404_for_a_missing_checkpoint_is_raised_at_once(
    make_lab: MakeLab, plain: Plain
) -> None:
    def run(lab: Lab) -> tuple[str, str]:
        client = connect(lab.base_url)
        return outcome(lambda: programs.load(client, "tinker://nowhere/weights/nothing"))

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    with programs.took(0, 20):
        assert run(lab) == expected
    assert expected[1] == "NotFoundError"
    assert lab.control_plane.questions == 0
    assert lab.count("load") == 1


@pytest.mark.core
def test_pod_404_for_an_unknown_future_is_raised_at_once(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> tuple[str, str]:
        client = connect(lab.base_url)
        lost = Answer(404, {"detail": "Future not found"})
        lab.fault(Fault(kinds=["poll:optim_step"], at="pod", answer=lost))
        return outcome(lambda: programs.optim_step(client).result(programs.PATIENCE))

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    with programs.took(0, 20):
        assert run(lab) == expected == ("ValueError", "NotFoundError")
    assert lab.control_plane.questions == 0
    assert lab.count("poll:optim_step") == 1


@pytest.mark.parametrize("missing", ["config", "dynamic_config"])
def test_pod_404_for_a_missing_config_endpoint_is_left_to_tinker(
    make_lab: MakeLab, plain: Plain, missing: str
) -> None:
    def run(lab: Lab) -> tuple[str, str]:
        return outcome(lambda: train(connect(lab.base_url)))

    with plain():
        expected = run(make_lab(without=(missing,)))
    lab = make_lab(without=(missing,))
    with programs.took(0, 20):
        assert run(lab) == expected
    assert lab.control_plane.questions == 0


# --- Everything else ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422, 429, 500, 503])
@pytest.mark.parametrize("kind", ["optim_step", "poll:optim_step"])
def test_other_error_status_is_left_to_tinker(
    make_lab: MakeLab, plain: Plain, status: int, kind: str
) -> None:
    def run(lab: Lab) -> tuple[tuple[str, str], int, int]:
        client = connect(lab.base_url)
        answer = Answer(status, {"detail": "the lab says no"})
        lab.fault(Fault(kinds=[kind], count=1, answer=answer))
        how = outcome(lambda: programs.optim_step(client).result(programs.PATIENCE))
        return how, lab.count(kind), lab.ledger.optim_steps

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    assert lab.control_plane.questions == 0


@pytest.mark.core
def test_client_with_another_base_url_is_not_touched(make_lab: MakeLab, plain: Plain) -> None:
    """Not one request more, and the gateway's own 404 is as final as in plain tinker."""

    def run(lab: Lab) -> tuple[tuple[str, str], list[str]]:
        client = connect(lab.direct_url)
        train(client, 2)
        lab.fault(Fault(kinds=["forward_backward"], at="pod", answer=GATEWAY_404))
        how = outcome(lambda: train(client))
        quiet = ("telemetry", "heartbeat")
        return how, [e.kind for e in lab.exchanges if e.kind not in quiet]

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    assert expected[0] == ("NotFoundError", "NotFoundError")
    assert not [j for j in tinker_routefix.status().jobs if j.gateway == lab.origin]


@pytest.mark.parametrize("kind", ["heartbeat", "telemetry"])
def test_background_call_refused_by_gateway_is_left_to_tinker(make_lab: MakeLab, kind: str) -> None:
    if kind == "heartbeat" and not hasattr(ClientConnectionPoolType, "SESSION"):
        pytest.skip("tinker before 0.3.0 has no session and sends no heartbeat")
    lab = make_lab()
    client = connect(lab.base_url)
    before = lab.count("get_info")
    lab.fault(Fault(kinds=[kind]))

    async def beat(http: Any) -> None:
        if kind == "heartbeat":
            session_id = client.holder.get_session_id()
            await http.service.session_heartbeat(session_id=session_id, max_retries=0)
        else:
            await http.post("/api/v1/telemetry", cast_to=object, body={}, options={})

    with programs.took(0, 15), pytest.raises(tinker.NotFoundError):
        programs.on_loop(client, beat, "SESSION" if kind == "heartbeat" else "TELEMETRY")
    assert lab.control_plane.questions == 0
    # For a connection that is renewed one or two are looked at.
    assert lab.count("get_info") - before <= 2 * lab.count("heartbeat", refused=True)


def waits(lab: Lab, client: Any, futures: int = 1) -> list[Any]:
    """Submissions that are refused and wait for the route."""
    started = [forward_backward(client, [programs.datum(n + 1)]) for n in range(futures)]
    while not lab.control_plane.questions:
        time.sleep(0.01)
    return started


async def telemetry(http: Any) -> Any:
    return await http.post("/api/v1/telemetry", cast_to=object, body={}, options={})


def in_background(client: Any) -> Any:
    """Telemetry of the job's, on its way."""

    async def send() -> Any:
        with client.holder.aclient(ClientConnectionPoolType["TELEMETRY"]) as http:
            return await telemetry(http)

    return future_of(client.holder.run_coroutine_threadsafe(send()))


def future_of(awaitable: Any) -> Any:
    """The future below tinker's own."""
    return awaitable.future()


@pytest.fixture
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """None but the test's own."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.mark.usefixtures("no_telemetry")
def test_telemetry_refused_in_a_wait_waits_and_gets_through(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    stale = lab.fault(Fault(kinds=["forward_backward", "telemetry", "get_info", "capabilities"]))
    (future,) = waits(lab, client)
    sent = in_background(client)
    while not lab.count("telemetry", refused=True):
        time.sleep(0.01)
    time.sleep(0.5)
    assert not sent.done()
    assert lab.count("telemetry") == 1
    stale.count = 0
    future.result(programs.PATIENCE)
    sent.result(programs.PATIENCE)
    assert lab.count("telemetry", refused=True) <= 2
    assert programs.job_of(lab).telemetry_dropped == 0
    # It has been neither asked about nor counted as a request of the program's.
    assert programs.job_of(lab).recovered == 1
    exact(lab, gradients=1, optim_steps=0)


@pytest.mark.usefixtures("no_telemetry")
def test_telemetry_held_in_a_wait_is_let_go_at_once_when_it_fails(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault())
    (future,) = waits(lab, client)
    sent = in_background(client)
    while not lab.count("telemetry", refused=True):
        time.sleep(0.01)
    lab.end_job()
    with pytest.raises(tinker.NotFoundError):
        future.result(programs.PATIENCE)
    with programs.took(0, 5):
        assert sent.result(programs.PATIENCE) is None
    assert programs.job_of(lab).telemetry_dropped == 1


@pytest.mark.usefixtures("no_telemetry")
def test_telemetry_held_for_long_is_dropped(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fatal exception that has nothing to do with the route waits for it."""
    monkeypatch.setattr(_background, "TELEMETRY_WAITS", 1.0)
    lab = make_lab()
    client = connect(lab.base_url)
    stale = lab.fault(Fault())
    (future,) = waits(lab, client)
    assert in_background(client).result(programs.PATIENCE) is None
    assert not future_of(future).done()
    assert programs.job_of(lab).telemetry_dropped == 1
    stale.count = 0
    future.result(programs.PATIENCE)


@pytest.mark.usefixtures("no_telemetry")
@pytest.mark.parametrize("status", [404, 422])
def test_telemetry_refused_after_the_wait_is_left_to_tinker(make_lab: MakeLab, status: int) -> None:
    """While it lasts, an answer to another request has it sent once more."""
    lab = make_lab()
    client, other = connect(lab.base_url), connect(lab.base_url)
    stale = lab.fault(Fault(kinds=["forward_backward"]))
    lab.fault(Fault(kinds=["telemetry"], count=None if status == 404 else 1))
    if status != 404:
        lab.fault(Fault(kinds=["telemetry"], at="pod", answer=Answer(status, {"detail": "no"})))
    (future,) = waits(lab, client)
    sent = in_background(client)
    while not sent.done() and lab.count("telemetry") < 3:
        programs.save(other, f"meanwhile-{time.monotonic()}")
    assert sent.done() is (status != 404)
    stale.count = 0
    future.result(programs.PATIENCE)
    with pytest.raises(tinker.APIStatusError) as caught:
        sent.result(programs.PATIENCE)
    assert caught.value.status_code == status
    assert "tinker_routefix" not in programs.notes(caught.value)


ELSEWHERE = "/training/v1/rlorTrainerJobs/lab/job-9/api/v1/optim_step"
"""Another job's route, which the lab's gateway does not know."""


def test_404_after_a_redirect_elsewhere_is_left_to_tinker(make_lab: MakeLab) -> None:
    """A download that a redirect took to a store: its 404 says nothing of the route."""
    # The other transport follows redirects by itself and does not tell.
    lab = make_lab(config={"use_pyqwest_transport": False})
    client = connect(lab.base_url)
    away = Answer(307, b"", headers={"location": f"{lab.origin}{ELSEWHERE}"})
    lab.fault(Fault(kinds=["optim_step"], at="pod", answer=away))
    with programs.took(0, 20), pytest.raises(tinker.NotFoundError):
        programs.optim_step(client).result(programs.PATIENCE)
    assert lab.control_plane.questions == 0


# --- Callers that do not want to wait ----------------------------------------------------


def test_timeout_of_the_caller_ends_the_wait(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["poll:forward_backward"]))
    future = forward_backward(client)
    # The wait that goes on behind it is of half a minute.
    with programs.took(0.5, 15), pytest.raises((TimeoutError, concurrent.futures.TimeoutError)):
        future.result(1)
    lab.clear()
    assert future.result(programs.PATIENCE) is not None
    exact(lab, gradients=1, optim_steps=0)


@pytest.mark.parametrize("kind", ["poll:forward_backward", "forward_backward"])
def test_cancelled_request_is_not_sent_again(make_lab: MakeLab, kind: str) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=[kind]))

    async def program() -> None:
        future = forward_backward(client)
        waiter = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    # By itself the wait ends after half a minute.
    with programs.took(0.9, 15):
        asyncio.run(program())
    time.sleep(1)
    refused = lab.count(kind, refused=True)
    time.sleep(1.5)
    assert lab.count(kind, refused=True) == refused, "a cancelled request goes on being sent"


def test_cancelling_during_a_control_plane_question_ends_the_wait(
    make_lab: MakeLab, settings: Callable[..., None]
) -> None:
    settings(control_plane_timeout=60)
    lab = make_lab()
    client = connect(lab.base_url)
    lab.control_plane.mode = "hang"
    lab.stale(float("inf"))

    async def program() -> None:
        await asyncio.wait_for(forward_backward(client).result_async(), 1)

    with programs.took(0.9, 15), pytest.raises(TimeoutError):
        asyncio.run(program())
