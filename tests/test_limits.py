"""What is just within a limit, and what is just beyond it."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import tinker_routefix
from tests.clock import FakeClock
from tests.common import RUNNING, Listener, http
from tinker_routefix import _addresses, _question
from tinker_routefix._addresses import Address, Manager
from tinker_routefix._control_plane import ControlPlane
from tinker_routefix._job import Job
from tinker_routefix._job_state import Answer, JobState, read_answer
from tinker_routefix._question import Connections
from tinker_routefix._verdict import Verdict, of_body

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KIB_64 = 65_536
NOWHERE = Job("http://127.0.0.1:9", "acct", "job-1")


def padded(document: dict[str, Any], size: int) -> bytes:
    """A JSON document of exactly so many bytes."""
    empty = len(json.dumps({**document, "padding": ""}))
    body = json.dumps({**document, "padding": "x" * (size - empty)}).encode()
    assert len(body) == size
    return body


@pytest.mark.parametrize(
    ("document", "verdict"),
    [({"error": {"code": "NOT_FOUND"}}, Verdict.GATEWAY), ({"detail": "no"}, Verdict.POD)],
)
def test_404_body_is_read_up_to_64_kib(document: dict[str, Any], verdict: Verdict) -> None:
    assert of_body(padded(document, KIB_64)) is verdict
    assert of_body(padded(document, KIB_64 + 1)) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("size", "state"), [(KIB_64, JobState.RUNNING), (KIB_64 + 1, JobState.UNKNOWN)]
)
def test_control_plane_answer_is_read_up_to_64_kib(
    settings: Callable[..., None], size: int, state: JobState
) -> None:
    settings(control_plane_timeout=60)
    body = padded({"state": "JOB_STATE_RUNNING"}, size)
    with Listener(http(body)) as listener:
        answer = asyncio.run(ControlPlane(Job(listener.url, "acct", "job-1")).ask({}))
    assert answer.state is state


@pytest.mark.parametrize(("later", "questions"), [(0.99, 1), (1.0, 2)])
def test_answer_is_reused_for_exactly_one_second(mocker: Any, later: float, questions: int) -> None:
    fetch = mocker.patch.object(Connections, "fetch", return_value=(200, RUNNING, None))
    clock = FakeClock(mocker)

    async def ask() -> tuple[Answer, Answer]:
        control_plane = ControlPlane(NOWHERE)
        first = await control_plane.ask({})
        clock.now += later
        return first, await control_plane.ask({})

    first, second = asyncio.run(ask())
    assert fetch.call_count == questions
    assert (first is second) is (questions == 1)
    assert first.answered_at == clock.began


def test_slow_answer_is_reused_from_its_end_on(mocker: Any) -> None:
    clock = FakeClock(mocker)
    told: list[Any] = []
    unsubscribe = tinker_routefix.subscribe(told.append)

    async def slow(*_: object) -> tuple[int, bytes, None]:
        clock.now += 4.1239
        return 200, RUNNING, None

    fetch = mocker.patch.object(Connections, "fetch", side_effect=slow)

    async def ask() -> None:
        control_plane = ControlPlane(NOWHERE)
        await control_plane.ask({})
        await control_plane.ask({})

    asyncio.run(ask())
    unsubscribe()
    assert fetch.call_count == 1
    (answered,) = told
    assert answered.seconds == 4.124


def test_failed_question_is_asked_again_after_a_second(mocker: Any) -> None:
    """The first time: then it is backed off from."""
    outcomes = [ValueError("no"), (200, RUNNING, None)]
    mocker.patch.object(Connections, "fetch", side_effect=outcomes)
    clock = FakeClock(mocker)

    async def ask() -> list[str]:
        control_plane = ControlPlane(NOWHERE)
        said = []
        for _ in range(3):
            said.append((await control_plane.ask({})).message)
            clock.now += 0.6
        return said

    failed = "no answer (ValueError)"
    assert asyncio.run(ask()) == [failed, failed, "JOB_STATE_RUNNING"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("JOB_STATE_" + "X" * 60, "JOB_STATE_" + "X" * 60),
        ("JOB_STATE_" + "X" * 61, "a strange state"),
        ("JOB_STATE_", "a strange state"),
        ("JOB_STATE_NEW lines\n", "a strange state"),
        ("MY_JOB_STATE_NEW", "a strange state"),
        ("RUNNING", "RUNNING"),
    ],
)
def test_unknown_state_is_repeated_up_to_its_length_limit(word: str, said: str) -> None:
    assert read_answer(200, json.dumps({"state": word}).encode())[1] == said


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What httpx clients are made with."""
    seen: list[dict[str, Any]] = []
    init = httpx.AsyncClient.__init__

    def note(self: httpx.AsyncClient, **kwargs: Any) -> None:
        seen.append(kwargs)
        init(self, **kwargs)

    monkeypatch.setattr(httpx.AsyncClient, "__init__", note)
    return seen


def assert_verifies(context: ssl.SSLContext) -> None:
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize("by", ["gateway", "settings"])
def test_question_over_https_verifies_the_certificate(
    settings: Callable[..., None], made: list[dict[str, Any]], by: str
) -> None:
    """The key goes to nobody who merely answers at that address."""
    job = Job("https://127.0.0.1:9", "acct", "job")
    if by == "settings":
        settings(control_plane_url="https://127.0.0.1:9")
        job = Job("https://gateway.example", "acct", "job")
    answer = asyncio.run(ControlPlane(job).ask({}))
    assert answer.message == "no answer (ConnectError)"
    # More than one where the machine is so busy that the question is put once more.
    assert made
    for kwargs in made:
        assert_verifies(kwargs["verify"])


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_question_verifies_tls_unless_the_job_manager_does_not(
    made: list[dict[str, Any]], scheme: str, verify: bool
) -> None:
    address = Address(f"{scheme}://127.0.0.1:9", None, verify=verify)
    _addresses.register(NOWHERE.gateway, Manager(lambda: address))
    answer = asyncio.run(ControlPlane(NOWHERE).ask({}))
    assert answer.message == "no answer (ConnectError)"
    (kwargs,) = made
    if scheme == "https" and verify:
        assert_verifies(kwargs["verify"])
    else:
        # Nothing to verify, or by the user's own will; and no time spent on a context.
        assert kwargs["verify"] is False


def test_questions_share_one_tls_context(monkeypatch: pytest.MonkeyPatch, mocker: Any) -> None:
    monkeypatch.setattr(_question, "_tls", None)
    create: Callable[..., Any] = mocker.spy(httpx, "create_ssl_context")

    async def contexts() -> list[ssl.SSLContext]:
        return [await _question.tls_context() for _ in range(3)]

    first, *others = asyncio.run(contexts())
    assert all(other is first for other in others)
    assert create.call_count == 1  # type: ignore[attr-defined]


def test_tls_context_reads_ssl_cert_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a company's own authority the control plane would be out of reach without them."""
    monkeypatch.setattr(_question, "_tls", None)
    # One without certificates is refused, so it was read.
    own = tmp_path / "ca.pem"
    own.touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    with pytest.raises(ssl.SSLError):
        asyncio.run(_question.tls_context())
