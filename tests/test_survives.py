"""Each fault first breaks plain tinker; then the same program survives it with the shim.

The judge is the lab's ledger: what the trainer carried out, against what was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import tinker

from tests import programs
from tests.common import stale_from_the_first
from tests.programs import connect, exact, forward_backward, optim_step, train, train_pipelined
from tinker_routefix import _clients
from tinker_routefix.lab import Answer, Fault, Lab

if TYPE_CHECKING:
    from pytest_mock import MockerFixture

    from tinker_routefix.lab import Exchange

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]


def crashes(lab: Lab, run: Callable[[Lab], object]) -> BaseException:
    """Plain tinker ends with the gateway's 404."""
    with pytest.raises(Exception) as crash:
        run(lab)
    programs.gateway_404(crash.value)
    return crash.value


# --- Connecting --------------------------------------------------------------------------


@pytest.mark.core
def test_cold_race_is_survived(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> None:
        lab.stale(6)
        train(connect(lab.base_url), 3)

    with plain():
        crashes(make_lab(), run)
    lab = make_lab()
    run(lab)
    exact(lab, gradients=3, optim_steps=3)
    assert programs.job_of(lab).recovered >= 1
    assert programs.job_of(lab).route == "warm"


@pytest.mark.slow
def test_replicas_healing_one_after_another_are_survived(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> None:
        # From the first request on, however long a busy machine takes until then.
        times: list[float] = []

        def stale(seconds: float, exchange: Exchange) -> bool:
            times.append(exchange.at)
            return exchange.at - times[0] < seconds

        for replica, seconds in enumerate((2, 5, 9)):
            lab.fault(Fault(replica=replica, when=functools.partial(stale, seconds)))
        train(connect(lab.base_url), 5)

    with plain():
        crashes(make_lab(replicas=3), run)
    lab = make_lab(replicas=3)
    run(lab)
    exact(lab, gradients=5, optim_steps=5)


def test_404s_after_model_creation_are_waited_out_by_the_warm_up(
    make_lab: MakeLab, plain: Plain
) -> None:
    """The model is made, then the route is gone: nothing that tinker sends would notice."""

    def run(lab: Lab) -> None:
        stale_from_the_first(
            lab,
            4,
            excluding=(
                "config",
                "dynamic_config",
                "create_session",
                "create_model",
                "poll",
                "healthz",
                "heartbeat",
                "telemetry",
            ),
        )
        train(connect(lab.base_url), 2)

    with plain():
        crashes(make_lab(), run)
    lab = make_lab()
    run(lab)
    exact(lab, gradients=2, optim_steps=2)
    first_work = next(e for e in lab.exchanges if e.kind == "forward_backward")
    assert not first_work.refused, "the warm-up has to hold the program back"


def test_warm_up_takes_three_answers_over_three_connections(make_lab: MakeLab) -> None:
    lab = make_lab(replicas=3)
    connect(lab.base_url)
    probes = [e for e in lab.exchanges if e.kind == "get_info"][:3]
    assert len({e.connection for e in probes}) == 3
    assert {e.replica for e in probes} == {0, 1, 2}
    assert lab.control_plane.questions == 0


@pytest.mark.parametrize("mode", ["hang", "drop", "rubbish", "error", "unauthorized", "redirect"])
def test_connect_waits_when_control_plane_cannot_tell(
    make_lab: MakeLab, settings: Callable[..., None], mode: Any
) -> None:
    settings(control_plane_timeout=1)
    lab = make_lab()
    lab.control_plane.mode = mode
    lab.stale(3)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_connect_waits_for_a_starting_job(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.control_plane.state = "JOB_STATE_CREATING"
    lab.stale(3)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)


def test_connect_to_a_gone_job_fails_fast(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.end_job(mode="missing")
    with programs.took(0, 10), pytest.raises(tinker.NotFoundError) as caught:
        connect(lab.base_url)
    assert "there is no such job" in programs.notes(caught.value)


def test_connect_with_persistent_404_gives_up_after_its_budget(
    make_lab: MakeLab, settings: Callable[..., None]
) -> None:
    settings(warmup_timeout=3)
    lab = make_lab()
    lab.stale(float("inf"))
    with programs.took(2, 15), pytest.raises(tinker.NotFoundError) as caught:
        connect(lab.base_url)
    assert "JOB_STATE_RUNNING" in programs.notes(caught.value)
    assert programs.job_of(lab).given_up >= 1


def test_warm_up_with_persistent_404_raises_timeout(
    make_lab: MakeLab, settings: Callable[..., None]
) -> None:
    settings(warmup_timeout=3)
    lab = make_lab()
    lab.fault(Fault(kinds=["get_info"]))
    with programs.took(2, 15), pytest.raises(TimeoutError, match="JOB_STATE_RUNNING") as caught:
        connect(lab.base_url)
    assert isinstance(programs.gateway_404(caught.value), tinker.NotFoundError)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"at": "pod", "answer": Answer(500, {"detail": "no"})}, "InternalServerError"),
        ({"drop": True}, "APIConnectionError"),
    ],
    ids=["HTTP 500", "dropped"],
)
def test_warm_up_with_another_error_ends_quietly(
    make_lab: MakeLab, overheard: Any, how: dict[str, Any], error: str
) -> None:
    lab = make_lab()
    # Three probes get it; the get_info that 0.38 sends afterwards is answered.
    lab.fault(Fault(kinds=["get_info"], count=3, **how))
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)
    assert "warmup.ended" in overheard.events
    assert f"error='{error}'" in "".join(overheard.published)


# --- In the middle of a run --------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("subject", ["forward_backward", "optim_step"])
def test_poll_404_is_survived(make_lab: MakeLab, plain: Plain, subject: str) -> None:
    """The very crash: an accepted operation, and a 404 where its result is asked for."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        train(client)
        stale_from_the_first(lab, 4, kinds=[f"poll:{subject}"])
        train(client, 2)

    with plain():
        error = crashes(make_lab(), run)
        assert isinstance(error, ValueError)
    lab = make_lab()
    run(lab)
    exact(lab, gradients=3, optim_steps=3)
    assert programs.job_of(lab).recovered >= 1


@pytest.mark.core
@pytest.mark.parametrize("way", [train, train_pipelined], ids=["sequential", "pipelined"])
@pytest.mark.parametrize("kind", ["forward_backward", "optim_step"])
def test_submission_404_is_survived(make_lab: MakeLab, plain: Plain, kind: str, way: Any) -> None:
    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        train(client)
        stale_from_the_first(lab, 3, kinds=[kind])
        way(client, 3)

    with plain():
        error = crashes(make_lab(), run)
        assert isinstance(error, tinker.NotFoundError)
    lab = make_lab()
    run(lab)
    exact(lab, gradients=4, optim_steps=4)


@pytest.mark.parametrize(
    ("state", "retries"),
    [
        ("JOB_STATE_RUNNING", True),
        ("JOB_STATE_RE_QUEUEING", False),
        ("JOB_STATE_PAUSED", False),
    ],
)
def test_forward_backward_retries_only_when_running(
    make_lab: MakeLab, state: str, retries: bool
) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.control_plane.state = state
    lab.fault(Fault(kinds=["forward_backward"], count=1))
    future = forward_backward(client)
    if retries:
        assert future.result(programs.PATIENCE) is not None
    else:
        with pytest.raises(tinker.NotFoundError) as caught:
            future.result(programs.PATIENCE)
        assert f"{state}; 0 replays" in programs.notes(caught.value)
    assert lab.count("forward_backward") == 1 + retries
    exact(lab, gradients=int(retries), optim_steps=0)


@pytest.mark.parametrize("refused", [0, 2], ids=["before the 404", "after a replay"])
def test_forward_backward_does_not_retry_when_job_deleted(make_lab: MakeLab, refused: int) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    if refused:
        lab.fault(Fault(kinds=["forward_backward"]))
    else:
        lab.end_job()
    future = forward_backward(client)
    while lab.count("forward_backward", refused=True) < refused:
        time.sleep(0.01)
    lab.end_job()
    with pytest.raises(tinker.NotFoundError) as caught:
        future.result(programs.PATIENCE)
    assert "JOB_STATE_DELETED" in programs.notes(caught.value)
    assert programs.job_of(lab).failed_fast == 1
    sent = lab.count("forward_backward")
    assert sent == 1 or refused
    time.sleep(1.5)
    assert lab.count("forward_backward") == sent, "a request that was given up goes on being sent"
    exact(lab, gradients=0, optim_steps=0)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["first", "middle", "last"])
def test_404_on_one_part_of_a_batch_is_survived(make_lab: MakeLab, plain: Plain, part: int) -> None:
    """A batch of several submissions, one of which is refused twice."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=["forward_backward"], skip=part, count=2))
        forward_backward(client, programs.many_parts()).result(programs.PATIENCE)
        optim_step(client).result(programs.PATIENCE)

    with plain():
        crashes(make_lab(), run)
    lab = make_lab()
    run(lab)
    exact(lab, gradients=3, optim_steps=1)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "retrieve-futures"])
def test_404s_on_saves_loads_and_sampling_are_survived(
    make_lab: MakeLab, plain: Plain, together: bool
) -> None:
    """Also where samples are polled for together (0.26.2 and later): a 404 there is for good."""
    config = {"sample_use_retrieve_futures": together}
    kinds = ["save", "load", "save_sampler", "sampling_session", "sample"]

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        for kind in [*kinds, *(f"poll:{kind}" for kind in kinds), "polls"]:
            lab.fault(Fault(kinds=[kind], count=2))
        path = programs.save(client, "checkpoint").path
        programs.load(client, path)
        programs.sample(programs.sampler(client))

    with plain():
        crashes(make_lab(config=config), run)
    lab = make_lab(config=config)
    run(lab)
    exact(lab, gradients=0, optim_steps=0)
    for kind in ("save", "load", "save_sampler", "sample"):
        assert lab.ledger.count(kind) == 1, lab.ledger.summary()


def test_404_on_a_shared_sample_poll_is_survived(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> None:
        sampler = programs.sampler(connect(lab.base_url))
        # Older releases never ask for `polls`: for them it is the sample's own poll.
        stale_from_the_first(lab, 2, kinds=["polls", "poll:sample"])
        programs.sample(sampler)

    config = {"sample_use_retrieve_futures": True}
    # The poller of 0.26.2 and 0.27.0 polls again after any error; every other release crashes.
    crash = pytest.raises(Exception, match="404")
    patient = metadata.version("tinker") in ("0.26.2", "0.27.0")
    with plain(), contextlib.nullcontext() if patient else crash:
        run(make_lab(config=config))
    lab = make_lab(config=config)
    run(lab)
    assert lab.ledger.count("sample") == 1, lab.ledger.summary()
    assert programs.job_of(lab).recovered >= 1


def test_flapping_route_is_survived(make_lab: MakeLab, plain: Plain) -> None:
    """One request in five is refused, at random, for a whole run."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        lab.flap(0.2)
        train(client, 20)

    with plain():
        crashes(make_lab(seed=1), run)
    lab = make_lab(seed=1)
    run(lab)
    exact(lab, gradients=20, optim_steps=20)
    assert lab.count(refused=True) >= 5


@pytest.mark.slow
def test_outage_with_a_hundred_futures_in_flight_is_survived(
    make_lab: MakeLab, plain: Plain, mocker: MockerFixture
) -> None:
    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        # Nothing here is a matter of the machine's speed: no result is ready before all
        # hundred are polled for, and then the route is stale until each can have noticed.
        since: list[float] = []
        unready = Answer(408, {"type": "try_again", "request_id": "any", "queue_state": "active"})
        polls = ["poll:forward_backward"]
        lab.fault(Fault(kinds=polls, at="pod", answer=unready, delay=2, when=lambda _: not since))
        futures = [forward_backward(client, [programs.datum()]) for _ in range(100)]
        while lab.ledger.gradients < 100:
            time.sleep(0.05)
        refused = lab.fault(Fault(kinds=polls, count=100))
        since.append(lab.exchanges[-1].at)
        lab.fault(Fault(when=lambda e: e.at < since[0] + 3 or refused.hits < 100))
        for future in futures:
            future.result(programs.PATIENCE)

    with plain():
        crashes(make_lab(), run)
    lab = make_lab()
    replacements = mocker.spy(_clients.Pool, "swap")
    run(lab)
    exact(lab, gradients=100, optim_steps=0)
    assert lab.count("poll:forward_backward", refused=True) >= 100
    # One question serves them all, and so does a new client: tinker's take 50 requests each.
    assert lab.control_plane.questions <= 12
    assert 2 <= replacements.call_count <= 20


@pytest.mark.slow
def test_half_of_the_replicas_stale_for_20_seconds_is_survived(
    make_lab: MakeLab, plain: Plain
) -> None:
    """An early release that gets the 404 again costs none of the four replays."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        lab.stale(replica=0)
        end = time.monotonic() + 20
        # Longer on a machine that stands still meanwhile.
        while time.monotonic() < end or lab.ledger.optim_steps < 10 or lab.count(refused=True) < 10:
            # Nothing is in flight: every step begins on new connections, once tinker has seen it.
            # A request on one that is just being closed may have been carried out.
            lab.drop_connections()
            time.sleep(0.2)
            train_pipelined(client, 2)

    with plain():
        crashes(make_lab(replicas=2), run)
    lab = make_lab(replicas=2)
    run(lab)
    steps = lab.ledger.optim_steps
    exact(lab, gradients=steps, optim_steps=steps)
    assert programs.job_of(lab).given_up == 0


# --- How a replay is made ----------------------------------------------------------------


def test_replay_is_the_same_request_over_a_fresh_connection(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["forward_backward"], count=3))
    train(client)
    sent = [e for e in lab.exchanges if e.kind == "forward_backward"]
    assert [e.refused for e in sent] == [True, True, True, False]
    assert len({e.body for e in sent}) == 1
    assert len({e.headers["x-idempotency-key"] for e in sent}) == 1
    assert len({e.connection for e in sent}) == 4
    exact(lab, gradients=1, optim_steps=1)


@pytest.mark.slow
def test_replay_is_sent_only_with_proof_younger_than_the_refusal(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["optim_step"], seconds=8))
    train(client)
    sent = [e.at for e in lab.exchanges if e.kind == "optim_step"]
    proofs = [
        e.at for e in lab.exchanges if e.kind in ("control_plane", "get_info") and e.status == 200
    ]
    assert len(sent) > 2
    for refused, replayed in itertools.pairwise(sent):
        assert any(refused <= proof <= replayed for proof in proofs), (refused, replayed, proofs)


@pytest.mark.slow
def test_repeatedly_refused_request_is_sent_at_most_twice_a_second(make_lab: MakeLab) -> None:
    """The prober's path answers all the time, the request's does not: two a second at most."""
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["optim_step"], count=6))
    train(client)
    sent = [e.at for e in lab.exchanges if e.kind == "optim_step"]
    assert len(sent) == 7
    # Each is paced from when its 404 was received: a slow machine only makes the gaps longer.
    assert all(after - before >= 0.45 for before, after in itertools.pairwise(sent[1:]))
    exact(lab, gradients=1, optim_steps=1)


@pytest.mark.parametrize("kind", ["poll:forward_backward", "forward_backward"])
def test_lost_control_plane_question_does_not_end_the_run(make_lab: MakeLab, kind: str) -> None:
    """One connection to the control plane that hangs is no reason to end a run."""
    lab = make_lab()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", hang=True, count=1))
    lab.fault(Fault(kinds=[kind], seconds=1))
    train(client)
    assert lab.control_plane.questions >= 1
    exact(lab, gradients=1, optim_steps=1)


def test_refused_job_does_not_hold_up_another(make_lab: MakeLab) -> None:
    lab = make_lab()
    first, second = connect(lab.base_url), connect(lab.job_url("job-2"))
    # Until the other is through: whoever waits for the first waits until that gives up.
    lab.fault(Fault(job="job-1"))
    waiting = forward_backward(first)
    while not lab.count("forward_backward", refused=True):
        time.sleep(0.01)
    train(second, 3)
    assert lab.ledger_of("job-2").gradients == 3
    lab.clear()
    waiting.result(programs.PATIENCE)
    exact(lab, gradients=1, optim_steps=0)


def test_healed_route_leaves_no_waiter_or_prober(make_lab: MakeLab) -> None:
    """No waiter, task or open incident after the route has healed."""
    lab = make_lab()
    client = connect(lab.base_url)
    lab.stale(2)
    train_pipelined(client, 3)
    route = programs.route_of(lab)
    time.sleep(0.5)
    assert route.waiters.count == 0
    assert not route.needs_notice
    probes = lab.count("get_info")
    time.sleep(1.5)
    assert lab.count("get_info") == probes
