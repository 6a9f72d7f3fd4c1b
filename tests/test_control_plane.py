"""The question to the control plane, over real HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests import programs
from tinker_routefix import _control_plane
from tinker_routefix._control_plane import Answer, ControlPlane, JobState
from tinker_routefix._job import Job
from tinker_routefix.lab import Answer as HttpAnswer
from tinker_routefix.lab import Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

HEADERS = {
    "Authorization": f"Bearer {programs.CANARY}",
    "X-API-Key": programs.CANARY,
    "X-Other": "stays at home",
    "Cookie": "stays at home",
}


def ask(lab: Lab, times: int = 1) -> list[Answer]:
    job = Job.from_url(lab.base_url)
    assert job is not None

    async def questions() -> list[Answer]:
        control_plane = ControlPlane(job)
        headers = httpx.Headers(HEADERS)
        return await asyncio.gather(*(control_plane.ask(headers) for _ in range(times)))

    return asyncio.run(questions())


@pytest.mark.parametrize(
    ("mode", "state", "said"),
    [
        ("ok", JobState.RUNNING, "JOB_STATE_RUNNING"),
        ("missing", JobState.OVER, "there is no such job"),
        ("forbidden", JobState.OVER, "not visible"),
        ("unauthorized", JobState.UNKNOWN, "HTTP 401"),
        ("error", JobState.UNKNOWN, "HTTP 500"),
        ("rubbish", JobState.UNKNOWN, "without a job state"),
        ("redirect", JobState.UNKNOWN, "HTTP 302"),
        ("drop", JobState.UNKNOWN, "no answer (RemoteProtocolError)"),
        ("hang", JobState.UNKNOWN, "no answer within 2 s"),
        ("slow_drip", JobState.UNKNOWN, "no answer within 2 s"),
    ],
)
def test_every_kind_of_answer(
    lab: Lab, settings: Callable[..., None], mode: Any, state: JobState, said: str
) -> None:
    if "no answer within" in said:
        settings(control_plane_timeout=2)
    lab.control_plane.mode = mode
    with programs.took(0, 10):
        (answer,) = ask(lab)
    assert answer.state is state
    assert said in answer.said
    assert lab.control_plane.questions <= 1


def test_a_host_that_is_not_there(lab: Lab, settings: Callable[..., None]) -> None:
    settings(control_plane_url="http://127.0.0.1:9")
    (answer,) = ask(lab)
    assert answer.state is JobState.UNKNOWN
    assert answer.said == "no answer (ConnectError)"


@pytest.mark.parametrize("size", [70_000, 20_000_000])
def test_an_answer_without_end_is_not_read(lab: Lab, size: int) -> None:
    body = b'{"state": "JOB_STATE_RUNNING", "x": "' + b"x" * size + b'"}'
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=HttpAnswer(200, body)))
    (answer,) = ask(lab)
    assert answer.state is JobState.UNKNOWN


def test_only_the_credentials_are_sent(lab: Lab) -> None:
    ask(lab)
    (question,) = [e for e in lab.exchanges if e.kind == "control_plane"]
    assert question.headers["x-api-key"] == programs.CANARY
    assert question.headers["authorization"] == f"Bearer {programs.CANARY}"
    assert "x-other" not in question.headers
    assert "cookie" not in question.headers


def test_a_proxy_of_the_environment_is_not_told(
    lab: Lab, make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = make_lab()
    monkeypatch.setenv("HTTP_PROXY", proxy.origin)
    monkeypatch.setenv("ALL_PROXY", proxy.origin)
    monkeypatch.delenv("NO_PROXY", raising=False)
    (answer,) = ask(lab)
    assert answer.state is JobState.RUNNING
    assert not proxy.exchanges


def test_a_configured_control_plane_is_asked_instead(
    lab: Lab, make_lab: Callable[..., Lab], settings: Callable[..., None]
) -> None:
    other = make_lab()
    settings(control_plane_url=other.origin)
    (answer,) = ask(lab)
    assert answer.state is JobState.RUNNING
    assert lab.control_plane.questions == 0
    assert other.control_plane.questions == 1


def test_one_question_serves_all_who_ask_at_once(lab: Lab) -> None:
    answers = ask(lab, times=400)
    assert len(set(map(id, answers))) == 1
    assert lab.control_plane.questions == 1


def test_an_answer_stays_good_for_a_second(lab: Lab, mocker: Any) -> None:
    job = Job.from_url(lab.base_url)
    assert job is not None

    async def questions() -> tuple[int, int]:
        control_plane = ControlPlane(job)
        for _ in range(50):
            await control_plane.ask({})
        at_once = control_plane.questions
        later = time.monotonic() + _control_plane.GOOD_FOR
        mocker.patch("tinker_routefix._control_plane.time.monotonic", return_value=later)
        await control_plane.ask({})
        return at_once, control_plane.questions

    assert asyncio.run(questions()) == (1, 2)


def test_who_is_cancelled_does_not_take_the_answer_from_the_others(lab: Lab) -> None:
    lab.control_plane.delay = 0.5
    job = Job.from_url(lab.base_url)
    assert job is not None

    async def questions() -> Answer:
        control_plane = ControlPlane(job)
        first = asyncio.ensure_future(control_plane.ask({}))
        second = asyncio.ensure_future(control_plane.ask({}))
        await asyncio.sleep(0.1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(questions()).state is JobState.RUNNING
    assert lab.control_plane.questions == 1


def test_the_loop_goes_on_while_a_tls_context_is_built(mocker: Any) -> None:
    """Even where building one takes a second, the loop ticks."""
    mocker.patch.object(_control_plane, "_tls", None)
    mocker.patch("httpx.create_ssl_context", side_effect=lambda **_: time.sleep(1))

    async def program() -> int:
        building = asyncio.ensure_future(_control_plane.tls_context())
        ticks = 0
        while not building.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(program()) >= 10
