"""The Fireworks SDK on top of tinker, or with its own copy of it: same faults, same judge.

Each fault first breaks the plain SDK; then the same program survives it with the shim.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

import tinker_routefix
from tests import fireworks_programs as programs
from tests.common import exact, notes, stale_from_the_first
from tests.conftest import run_python
from tests.fireworks_programs import connect, forward_backward, optim_step, save, sdk, train
from tinker_routefix.lab import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tinker_routefix.lab import Lab

    MakeLab = Callable[..., Lab]
    Plain = Callable[[], AbstractContextManager[None]]

pytest.importorskip("fireworks.training.sdk", reason="the Fireworks SDK is not installed")

STALE = 2.5
"""Seconds."""


def crashes(run: Callable[[], object]) -> BaseException:
    """The plain SDK ends with the gateway's 404."""
    with pytest.raises(Exception) as crash:
        run()
    programs.gateway_404(crash.value)
    return crash.value


# --- The race ----------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 8], ids=["full", "lora"])
def test_cold_race_is_survived(make_lab: MakeLab, plain: Plain, lora_rank: int) -> None:
    def run(lab: Lab) -> None:
        stale_from_the_first(lab, STALE)
        train(connect(lab.base_url, lora_rank), 2)

    with plain():
        crashes(lambda: run(make_lab()))
    lab = make_lab()
    run(lab)
    exact(lab, gradients=2, optim_steps=2)
    question = next(e for e in lab.exchanges if e.kind == "control_plane")
    assert programs.API_KEY in question.headers["x-api-key"]


def test_connect_on_a_healthy_route_probes_three_replicas(make_lab: MakeLab) -> None:
    lab = make_lab(replicas=3)
    connect(lab.base_url)
    probes = [e for e in lab.exchanges if e.kind == "get_info"]
    assert len({e.connection for e in probes}) == len({e.replica for e in probes}) == 3
    assert lab.control_plane.questions == 0


def test_race_after_the_manager_reports_ready_is_survived(make_lab: MakeLab, plain: Plain) -> None:
    """RUNNING and one healthz is what it goes by, and then the first call gets a 404."""

    def run(lab: Lab) -> None:
        stale_from_the_first(lab, STALE)
        url = programs.manager(lab.origin).wait_for_existing(lab.job).base_url
        assert url == lab.base_url
        train(connect(url))

    with plain():
        crashes(lambda: run(make_lab()))
    lab = make_lab()
    run(lab)
    exact(lab, gradients=1, optim_steps=1)


def _step(client: Any, kind: str) -> None:
    """One submission of a kind: two that tinker repeats inside of the request, one outside."""
    if kind == "save":
        save(client)
    else:
        {"forward_backward": forward_backward, "optim_step": optim_step}[kind](client).result(60)


@pytest.mark.trains_twice
@pytest.mark.parametrize("lost", [None, Answer(502, b"")], ids=["dropped", "HTTP 502"])
@pytest.mark.parametrize("kind", ["forward_backward", "optim_step", "save"])
def test_submission_with_lost_answer_then_404_is_not_sent_again(
    make_lab: MakeLab, plain: Plain, kind: str, lost: Answer | None
) -> None:
    def run() -> tuple[BaseException, list[int | None]]:
        lab = make_lab()
        client = connect(lab.base_url)
        lab.fault(Fault(kinds=[kind], count=1, lost_answer=True, answer=lost))
        lab.fault(Fault(kinds=[kind], count=2))
        error = crashes(lambda: _step(client, kind))
        return error, [e.status for e in lab.exchanges if e.kind == kind]

    with plain():
        _, expected = run()
    error, sent = run()
    assert sent == expected
    assert sent[-1] == 404
    assert tinker_routefix.may_have_been_carried_out(error)


@pytest.mark.parametrize(
    "hiccup", [{"answer": Answer(500, b"")}, {"drop": True}], ids=["HTTP 500", "dropped"]
)
def test_control_plane_that_hiccups_during_an_outage_ends_no_run(
    make_lab: MakeLab, plain: Plain, hiccup: dict[str, Any]
) -> None:
    """It is asked again, with the manager's key."""

    def run(lab: Lab) -> Fault:
        manager = programs.manager(lab.origin)
        client = connect(manager.wait_for_existing(lab.job).base_url)
        passing = lab.fault(Fault(kinds=["control_plane"], at="control_plane", count=2, **hiccup))
        # Once it has asked, not before it has asked again: however late that is.
        lab.fault(Fault(when=lambda _: passing.hits == 1))
        stale_from_the_first(lab, STALE)
        train(client, 2)
        return passing

    with plain():
        crashes(lambda: run(make_lab()))
    lab = make_lab()
    assert run(lab).hits == 2
    exact(lab, gradients=2, optim_steps=2)
    questions = [e for e in lab.exchanges if e.kind == "control_plane"]
    assert {e.headers["x-api-key"] for e in questions} == {programs.API_KEY}


def test_managers_with_two_keys_do_not_hurt_each_other(make_lab: MakeLab) -> None:
    """A revoked key beside a good one: the manager with the request's own key asks."""
    lab = make_lab()
    good = programs.manager(lab.origin)
    revoked = sdk().TrainerJobManager(api_key="revoked", base_url=lab.origin)
    lab.fault(
        Fault(
            kinds=["control_plane"],
            at="control_plane",
            answer=Answer(401, {"error": {"code": "UNAUTHENTICATED"}}),
            when=lambda exchange: "revoked" in exchange.headers.get("x-api-key", ""),
        )
    )
    client = connect(lab.base_url)
    stale_from_the_first(lab, STALE, kinds=["optim_step", "get_info"])
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    asked = [e for e in lab.exchanges if e.kind == "control_plane" and e.job]
    assert asked
    assert {e.status for e in asked} == {200}
    del good, revoked


@pytest.mark.parametrize("kind", ["forward_backward", "optim_step"])
def test_poll_404_is_survived(make_lab: MakeLab, plain: Plain, kind: str) -> None:
    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        stale_from_the_first(lab, STALE, kinds=[f"poll:{kind}"])
        train(client)

    with plain():
        lab = make_lab()
        crashes(lambda: run(lab))
        assert lab.ledger.count(kind) == 1, "it was carried out all the same"
    lab = make_lab()
    run(lab)
    exact(lab, gradients=1, optim_steps=1)


@pytest.mark.parametrize("kind", ["forward_backward", "optim_step"])
def test_submission_404_is_survived(make_lab: MakeLab, plain: Plain, kind: str) -> None:
    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        stale_from_the_first(lab, STALE, kinds=[kind])
        train(client)

    with plain():
        crashes(lambda: run(make_lab()))
    lab = make_lab()
    run(lab)
    exact(lab, gradients=1, optim_steps=1)


def test_404_on_one_part_of_a_batch_is_survived(make_lab: MakeLab, plain: Plain) -> None:
    """The others are in flight. What plain SDKs do next: hang, step without it, or give up."""

    def run(lab: Lab) -> None:
        client = connect(lab.base_url)
        stale_from_the_first(lab, STALE, kinds=["forward_backward"], skip=1)
        future = forward_backward(client, 2 * 1024 + 2)
        optim = optim_step(client)
        future.result(programs.PATIENCE)
        optim.result(programs.PATIENCE)

    with plain():
        crashes(lambda: run(make_lab()))
    lab = make_lab()
    run(lab)
    exact(lab, gradients=3, optim_steps=1)


def test_checkpoint_listing_on_a_stale_route_is_complete(make_lab: MakeLab, plain: Plain) -> None:
    """The SDK makes an empty list of a 404, and a resumed run starts from scratch."""

    def run(lab: Lab) -> Any:
        client = connect(lab.base_url)
        save(client)
        stale_from_the_first(lab, STALE)
        return client.list_checkpoints()

    with plain():
        assert run(make_lab()) == []
    assert run(make_lab()) == ["step-1"]


# --- Nothing to wait for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "use"),
    [("poll", train), ("forward_backward", train), ("save", save)],
    ids=["poll", "submission", "save"],
)
def test_request_to_a_deleted_job_fails_fast(
    make_lab: MakeLab, plain: Plain, kind: str, use: Callable[[Any], None]
) -> None:
    """Without the shim telemetry, switched off here, can hold these crashes for 30 s."""

    def run(lab: Lab) -> BaseException:
        client = connect(lab.base_url)
        lab.control_plane.state = "JOB_STATE_DELETED"
        lab.fault(Fault(kinds=[kind, "telemetry"]))
        began = time.monotonic()
        crash = crashes(lambda: use(client))
        assert time.monotonic() - began < 15
        return crash

    with plain():
        expected = run(make_lab())
    crash = run(make_lab())
    assert type(crash) is type(expected)
    assert type(programs.gateway_404(crash)) is type(programs.gateway_404(expected))
    assert "JOB_STATE_DELETED" in notes(crash)


# --- Who is imported first ---------------------------------------------------------------

PROGRAM = """
import importlib, os, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
from tests import fireworks_programs as programs
programs.train(programs.connect(sys.argv[1]))
sys.stdout.write("survived")
sys.stdout.flush()
os._exit(0)
"""

SDK = ("fireworks.training.sdk", "fireworks.training.sdk.client")


@pytest.mark.parametrize(
    "imports",
    [("tinker_routefix", *SDK), (*SDK, "tinker_routefix")],
    ids=["shim-first", "sdk-first"],
)
def test_shim_works_in_any_import_order(make_lab: MakeLab, imports: tuple[str, ...]) -> None:
    lab = make_lab()
    stale_from_the_first(lab, STALE)
    ended = run_python(PROGRAM, lab.base_url, *imports)
    assert (ended.stdout, ended.returncode) == ("survived", 0), ended.stderr
    exact(lab, gradients=1, optim_steps=1)


def test_switched_off_shim_leaves_the_crash(make_lab: MakeLab) -> None:
    lab = make_lab()
    stale_from_the_first(lab, STALE)
    ended = run_python(PROGRAM, lab.base_url, *SDK, "tinker_routefix", TINKER_ROUTEFIX="0")
    assert ended.returncode == 1
    assert "NotFoundError" in ended.stderr


# --- A gateway with an address of its own ------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("said", ["argument", "environment"])
def test_job_behind_a_split_gateway_is_asked_about_at_the_managers_control_plane(
    make_lab: MakeLab, plain: Plain, monkeypatch: pytest.MonkeyPatch, said: str, kept: bool
) -> None:
    """The job is behind one origin, what is known of it behind another.

    Many programs need the manager for one line and let go of it.
    """
    if not programs.has_split_gateway():
        pytest.skip("this release has one address for both")

    def run(control_plane: Lab, gateway: Lab) -> int:
        more = {}
        if said == "argument":
            more["trainer_gateway_url"] = gateway.origin
        else:
            monkeypatch.setenv("FIREWORKS_TRAINER_GATEWAY_URL", gateway.origin)
        manager = programs.manager(control_plane.origin, **more)
        url = manager.wait_for_existing(control_plane.job).base_url
        assert url == gateway.base_url
        if not kept:
            del manager
        asked = control_plane.control_plane.questions
        stale_from_the_first(gateway, STALE)
        train(connect(url))
        return control_plane.control_plane.questions - asked

    def labs() -> tuple[Lab, Lab]:
        gateway = make_lab()
        gateway.control_plane.mode = "missing"
        return make_lab(), gateway

    with plain():
        crashes(lambda: run(*labs()))
    control_plane, gateway = labs()
    assert run(control_plane, gateway) >= 1
    assert gateway.control_plane.questions == 0
    assert control_plane.ledger.count() == 0
    exact(gateway, gradients=1, optim_steps=1)
