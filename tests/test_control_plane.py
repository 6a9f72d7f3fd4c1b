"""The question to the control plane, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import email.utils
import functools
import gc
import gzip
import json
import ssl
import threading
import time
import tracemalloc
import weakref
import zlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import tinker_routefix
from tests import programs
from tests.clock import FakeClock
from tests.common import CANARY, RUNNING, Listener, Speak, http, until
from tinker_routefix import _addresses, _control_plane, _question, _threads
from tinker_routefix._addresses import Address, Manager, register
from tinker_routefix._control_plane import ControlPlane
from tinker_routefix._job import Job
from tinker_routefix._job_state import Answer, JobState, Told
from tinker_routefix._question import Connections
from tinker_routefix._route import Route
from tinker_routefix._waiting import RouteWait
from tinker_routefix.lab import Answer as HttpAnswer
from tinker_routefix.lab import Fault, Lab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.conftest import Overheard

HEADERS = {
    "Authorization": f"Bearer {programs.CANARY}",
    "X-API-Key": programs.CANARY,
    "X-Other": "stays at home",
    "Cookie": "stays at home",
}


def ask(asked: Lab | Listener, times: int = 1) -> list[Answer]:
    if isinstance(asked, Listener):
        job = Job(asked.url, "acct", "job-1")
    else:
        job = Job(asked.origin, asked.account, asked.job)

    async def questions() -> list[Answer]:
        control_plane = ControlPlane(job)
        headers = httpx.Headers(HEADERS)
        return await asyncio.gather(*(control_plane.ask(headers) for _ in range(times)))

    return asyncio.run(questions())


@pytest.mark.parametrize(
    ("mode", "state", "said"),
    [
        ("ok", JobState.RUNNING, "JOB_STATE_RUNNING"),
        ("missing", JobState.ENDED, "there is no such job"),
        ("forbidden", JobState.ENDED, "not visible"),
        ("unauthorized", JobState.UNKNOWN, "HTTP 401"),
        ("error", JobState.UNKNOWN, "HTTP 500"),
        ("rubbish", JobState.UNKNOWN, "without a job state"),
        ("redirect", JobState.UNKNOWN, "HTTP 302"),
        ("drop", JobState.UNKNOWN, "no answer (RemoteProtocolError)"),
        ("hang", JobState.UNKNOWN, "no answer within 2 s"),
        ("slow_drip", JobState.UNKNOWN, "no answer within 2 s"),
    ],
)
def test_answer_of_each_kind_gives_its_job_state(
    lab: Lab, settings: Callable[..., None], mode: Any, state: JobState, said: str
) -> None:
    if "no answer within" in said:
        settings(control_plane_timeout=2)
    lab.control_plane.mode = mode
    with programs.took(0, 10):
        (answer,) = ask(lab)
    assert answer.state is state
    assert said in answer.message
    assert lab.control_plane.questions <= 1


def test_unreachable_control_plane_gives_unknown(lab: Lab, settings: Callable[..., None]) -> None:
    settings(control_plane_url="http://127.0.0.1:9")
    (answer,) = ask(lab)
    assert answer.state is JobState.UNKNOWN
    assert answer.message == "no answer (ConnectError)"


@pytest.mark.parametrize("size", [70_000, 20_000_000])
def test_oversized_answer_gives_unknown(lab: Lab, size: int) -> None:
    body = b'{"state": "JOB_STATE_RUNNING", "x": "' + b"x" * size + b'"}'
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=HttpAnswer(200, body)))
    (answer,) = ask(lab)
    assert answer.state is JobState.UNKNOWN


def test_end_of_an_oversized_answer_is_not_taken_for_it() -> None:
    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b" " * (_question.MAX_BODY + 1)
            yield RUNNING

    response = httpx.Response(200, stream=Body())
    assert asyncio.run(_question._read(response)) == (200, b"", None)


# --- Answers as no control plane gives them ----------------------------------------------


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", headers: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def with_state(state: str) -> bytes:
    return b'{"state": %s}' % state.encode()


YES = '"JOB_STATE_RUNNING"'
NO_STATE = "an answer without a job state"
BROKEN = "no answer (RemoteProtocolError)"
ANSWERS = {
    # What is none.
    "nothing": (b"", BROKEN),
    "not-http": (b"SSH-2.0-OpenSSH_9.6\r\n", BROKEN),
    "binary": (bytes(range(256)) * 20, BROKEN),
    "half-a-status-line": (b"HTTP/1.1 20", BROKEN),
    "half-the-headers": (b"HTTP/1.1 200 OK\r\nContent-Le", BROKEN),
    "no-such-status": (http(status="2000 OK"), BROKEN),
    "huge-headers": (http(headers=b"X: " + b"x" * 300_000 + b"\r\n"), BROKEN),
    "many-headers": (http(headers=b"X: y\r\n" * 30_000), BROKEN),
    "two-lengths": (http(headers=b"Content-Length: 7\r\n"), BROKEN),
    "a-length-below-zero": (http(length=-1), BROKEN),
    "half-a-body": (http(RUNNING, length=1000), BROKEN),
    "half-a-chunk": (chunked(RUNNING, end=b"400\r\nmore"), BROKEN),
    "a-chunk-of-no-size": (chunked(RUNNING, end=b"zz\r\n"), BROKEN),
    # Statuses.
    "created": (http(status="201 Created"), "HTTP 201"),
    "no-content": (b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
    "partial": (http(status="206 Partial Content"), "HTTP 206"),
    "not-modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "HTTP 304"),
    "unknown-status": (http(status="299 Fine"), "HTTP 299"),
    "upgrade": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", BROKEN),
    "a-404-in-html": (http(b"<html>", "404 Not Found"), "HTTP 404"),
    "a-huge-404": (http(b'{"x": "%s"}' % (b"x" * 70_000), "404 Not Found"), "HTTP 404"),
    # Bodies.
    "empty": (http(b""), NO_STATE),
    "html": (http(b"<html>JOB_STATE_RUNNING</html>"), NO_STATE),
    "half-a-document": (http(RUNNING[:-1]), NO_STATE),
    "two-documents": (http(RUNNING * 2), NO_STATE),
    "nested": (http(b"[" * 60_000), NO_STATE),
    "nested-objects": (http(b'{"state":' * 7_000), NO_STATE),
    "nested-and-closed": (http(b"[" * 30_000 + b"]" * 30_000), NO_STATE),
    "not-utf-8": (http(b'{"state": "JOB_STATE_RUNNING", "name": "\xff"}'), NO_STATE),
    "huge": (http(b'{"x": "%s", %s' % (b"x" * 10_000_000, RUNNING[1:])), NO_STATE),
    "huge-chunks": (chunked(*[b" " * 65_536] * 160, RUNNING), NO_STATE),
    "compressed": (http(gzip.compress(RUNNING), headers=b"Content-Encoding: gzip\r\n"), NO_STATE),
    "a-bomb": (
        http(gzip.compress(b" " * 10_000_000), headers=b"Content-Encoding: gzip\r\n"),
        NO_STATE,
    ),
    "deflated": (
        http(zlib.compress(RUNNING), headers=b"Content-Encoding: deflate, gzip, br, nonsense\r\n"),
        NO_STATE,
    ),
    # States.
    "null": (http(with_state("null")), NO_STATE),
    "a-number": (http(with_state("2")), NO_STATE),
    "a-huge-number": (http(with_state("9" * 5_000)), NO_STATE),
    "not-a-number": (http(with_state("NaN")), NO_STATE),
    "a-list": (http(with_state(f"[{YES}]")), NO_STATE),
    "an-object": (http(with_state(f'{{"state": {YES}}}')), NO_STATE),
    "deeper": (http(b'{"job": {"state": "JOB_STATE_RUNNING"}}'), NO_STATE),
    "lower-case": (http(with_state(YES.lower())), "a strange state"),
    "blanks": (http(with_state('" JOB_STATE_RUNNING"')), "a strange state"),
    "a-line-more": (http(with_state('"JOB_STATE_RUNNING\\n"')), "a strange state"),
    "nul": (http(with_state('"JOB_STATE_RUNNING\\u0000"')), "a strange state"),
    "twice-the-prefix": (
        http(with_state('"JOB_STATE_JOB_STATE_RUNNING"')),
        "JOB_STATE_JOB_STATE_RUNNING",
    ),
    "the-last-word-counts": (
        http(b'{"state": "JOB_STATE_RUNNING", "state": "JOB_STATE_X"}'),
        "JOB_STATE_X",
    ),
}


@pytest.mark.parametrize(("says", "said"), ANSWERS.values(), ids=ANSWERS)
def test_malformed_answer_gives_unknown(says: bytes, said: str) -> None:
    with Listener(says) as listener:
        (answer,) = ask(listener)
        assert len(listener.heard) == 1, "asked once, and nobody else"
    assert (answer.state, answer.message) == (JobState.UNKNOWN, said)


@pytest.mark.parametrize(
    "says",
    [
        http(),
        http(json.dumps({"state": "RUNNING"}).encode("utf-16")),
        http(b"\xef\xbb\xbf" + RUNNING),
        http(b" " * 65_000 + RUNNING),
        http(b'{"x": NaN, "y": -1e999, ' + RUNNING[1:]),
        http(headers=b"Content-Type: text/html; charset=utf-7\r\n"),
        http(status="200 "),
        chunked(*[RUNNING[at : at + 1] for at in range(len(RUNNING))]),
        chunked(RUNNING, end=b"0\r\nX-Trailer: yes\r\n\r\n"),
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 10 + http(),
        b"HTTP/1.0 200 OK\r\n\r\n" + RUNNING,
        http() + http(b'{"state": "JOB_STATE_FAILED"}'),
    ],
    ids=range(12),
)
def test_unusual_but_valid_answer_gives_running(says: bytes) -> None:
    with Listener(says) as listener:
        (answer,) = ask(listener)
    assert (answer.state, len(listener.heard)) == (JobState.RUNNING, 1)


def drip(piece: bytes, first: bytes = b"", pause: float = 0.05) -> Speak:
    """Say something, and then something more now and then, for ever."""

    async def speak(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return speak


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"
HANDSHAKES = (drip(b""), drip(b"\0", b"\x16\x03\x03\x40\x00"))
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "says",
    [
        drip(b""),
        drip(b"x", b"HTTP/1.1 200 OK\r\nX: "),
        drip(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n"),
        drip(b" ", HEAD),
        drip(b"1\r\n \r\n", CHUNKS),
        drip(b"x", CHUNKS + b"1;"),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
        # As fast as it goes: nothing of it counts for the body's limit.
        drip(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1_000, pause=0),
        *HANDSHAKES,
    ],
    ids=[
        *("silence", "header", "headers", "body", "chunks", "chunk-header"),
        *("continue", "flood-of-hints", "tls-silence", "tls-handshake"),
    ],
)
def test_endless_answer_times_out_without_blocking_the_loop(
    settings: Callable[..., None], says: Speak
) -> None:
    """Each piece is in time, the whole never comes; and the loop goes on meanwhile."""
    settings(control_plane_timeout=0.5)

    async def question(job: Job) -> tuple[Answer, int]:
        asking = asyncio.ensure_future(ControlPlane(job).ask({}))
        ticks = 0
        while not asking.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await asking, ticks

    # What begins like this is shaking hands.
    tls = says in HANDSHAKES
    with Listener(says, asked_first=not tls) as listener, programs.took(0.4, 60):
        url = listener.url.replace("http", "https" if tls else "http")
        answer, ticks = asyncio.run(question(Job(url, "acct", "job-1")))
    assert (answer.state, answer.message) == (JobState.UNKNOWN, "no answer within 0.5 s")
    assert ticks >= 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: http(b"x" * 10_000_000),
        lambda: chunked(*[b"x" * 65_536] * 160),
        lambda: http(gzip.compress(b" " * 100_000_000), headers=b"Content-Encoding: gzip\r\n"),
    ],
    ids=["length", "chunks", "bomb"],
)
def test_huge_answer_takes_little_memory(make: Callable[[], bytes]) -> None:
    says = make()

    async def pour(writer: asyncio.StreamWriter) -> None:
        # The server is measured too: it holds no copy.
        for at in range(0, len(says), 65_536):
            writer.write(says[at : at + 65_536])
            await writer.drain()

    with Listener(pour) as listener:
        ask(listener)
        tracemalloc.start()
        try:
            ask(listener)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 3_000_000


# --- Who is told what --------------------------------------------------------------------


def test_question_carries_only_the_credentials(lab: Lab) -> None:
    ask(lab)
    (question,) = [e for e in lab.exchanges if e.kind == "control_plane"]
    assert question.headers["x-api-key"] == programs.CANARY
    assert question.headers["authorization"] == f"Bearer {programs.CANARY}"
    assert "x-other" not in question.headers
    assert "cookie" not in question.headers


def test_question_over_http_bypasses_environment_proxies(
    lab: Lab, make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = make_lab()
    monkeypatch.setenv("HTTP_PROXY", proxy.origin)
    monkeypatch.setenv("ALL_PROXY", proxy.origin)
    monkeypatch.delenv("NO_PROXY", raising=False)
    (answer,) = ask(lab)
    assert answer.state is JobState.RUNNING
    assert not proxy.exchanges


def test_configured_control_plane_is_asked_instead_of_the_gateway(
    lab: Lab, make_lab: Callable[..., Lab], settings: Callable[..., None]
) -> None:
    other = make_lab()
    settings(control_plane_url=other.origin)
    (answer,) = ask(lab)
    assert answer.state is JobState.RUNNING
    assert lab.control_plane.questions == 0
    assert other.control_plane.questions == 1


def test_concurrent_callers_share_one_question(lab: Lab, overheard: Overheard) -> None:
    answers = ask(lab, times=400)
    assert len(set(map(id, answers))) == 1
    assert lab.control_plane.questions == 1
    assert "control_plane.own_client" not in overheard.events


def test_answer_is_reused_for_a_second(lab: Lab, mocker: Any) -> None:
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


def test_cancelled_caller_leaves_the_answer_to_the_others(lab: Lab) -> None:
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


def test_building_a_tls_context_does_not_block_the_loop(mocker: Any) -> None:
    """However long building one takes, the loop ticks."""
    ticked = threading.Event()
    mocker.patch.object(_question, "_tls", None)
    mocker.patch("httpx.create_ssl_context", side_effect=lambda **_: ticked.wait(10))

    async def program() -> Any:
        building = asyncio.ensure_future(_question.tls_context())
        for _ in range(10):
            await asyncio.sleep(0.01)
        ticked.set()
        return await building

    assert asyncio.run(program()), "it waited for the loop, which waited for it"


def test_answer_received_while_the_loop_is_blocked_counts(
    lab: Lab, settings: Callable[..., None]
) -> None:
    """tinker makes the body of a large batch on the loop: for longer than the answer may take."""
    settings(control_plane_timeout=0.5)
    control_plane = ControlPlane(Job.from_url(lab.base_url) or pytest.fail("no job"))

    async def ask() -> Answer:
        # Once it has connected, and before it has the answer.
        lab.fault(Fault(kinds=["control_plane"], at="control_plane", answer=None, delay=0.2))
        asyncio.get_running_loop().call_later(0.1, time.sleep, 1.5)
        return await control_plane.ask({})

    assert asyncio.run(ask()).state is JobState.RUNNING


@pytest.mark.parametrize(
    ("timeout", "hang", "state", "questions"),
    [
        (60, 1, JobState.RUNNING, 2),
        (2.5, 2, JobState.UNKNOWN, 2),
        # There would be two within a second.
        (2, 1, JobState.UNKNOWN, 1),
    ],
)
def test_unanswered_question_is_asked_once_more(
    lab: Lab,
    settings: Callable[..., None],
    timeout: float,
    hang: int,
    state: JobState,
    questions: int,
) -> None:
    settings(control_plane_timeout=timeout)
    lab.fault(Fault(kinds=["control_plane"], at="control_plane", hang=True, count=hang))
    with programs.took(0, 50):
        (answer,) = ask(lab)
    assert answer.state is state
    asked = [exchange for exchange in lab.exchanges if exchange.kind == "control_plane"]
    assert len(asked) == questions
    assert len({exchange.connection for exchange in asked}) == questions
    assert asked[-1].at - asked[0].at > _control_plane.GOOD_FOR or questions == 1


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "cancelled"])
def test_abandoned_question_reports_no_loop_error(
    mocker: Any, settings: Callable[..., None], fails: bool
) -> None:
    settings(control_plane_timeout=5)
    told: list[Any] = []

    async def lost() -> tuple[int, bytes, None]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if fails:
                raise OSError("closed") from None
            raise
        raise AssertionError

    async def answered() -> tuple[int, bytes, None]:
        return 200, b'{"state": "JOB_STATE_RUNNING"}', None

    async def program() -> Answer:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: told.append(about))
        answer = await ControlPlane(Job("http://127.0.0.1:1", "acct", "job-1")).ask({})
        await asyncio.sleep(0.1)
        gc.collect()
        return answer

    replies = iter((lost, answered))

    async def fetch(*_: object) -> tuple[int, bytes, None]:
        return await next(replies)()

    mocker.patch.object(Connections, "fetch", fetch)
    mocker.patch.object(_question, "HEDGE_AFTER", 0.1)
    assert asyncio.run(program()).state is JobState.RUNNING
    assert not told


def test_address_repr_hides_headers() -> None:
    address = Address("https://control.example", {"authorization": CANARY}, verify=True)
    assert repr(address) == "Address(root='https://control.example', verify=True)"


# --- How often it is asked, and what adds up ----------------------------------------------

JOB = Job("https://gateway.example", "acct", "job-1")
ENDED = b'{"state": "JOB_STATE_DELETED"}'


class Script:
    """A control plane that answers from a script, on a clock that only the test puts forward."""

    def __init__(self, mocker: Any, *replies: Any) -> None:
        self.clock = FakeClock(mocker)
        self.replies = list(replies)
        self.asked: list[tuple[float, dict[str, str]]] = []
        """When, and with which headers."""
        self.addresses: list[Address] = []
        mocker.patch.object(Connections, "fetch", self._fetch)

    async def _fetch(self, address: Address, credentials: dict[str, str]) -> Any:
        headers = credentials if address.headers is None else address.headers
        self.asked.append((self.clock.passed, dict(headers)))
        self.addresses.append(address)
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @property
    def moments(self) -> list[float]:
        return [at for at, _ in self.asked]

    async def ask(
        self, control_plane: ControlPlane, *moments: float, key: str = "key"
    ) -> list[Answer]:
        """Ask at these moments."""
        answers = []
        for at in moments:
            self.clock.now = self.clock.began + at
            answers.append(await control_plane.ask({"x-api-key": key}))
        return answers


HALF_SECONDS = [number / 2 for number in range(41)]
FAILS: Any = (500, b"", None)
RUNS: Any = (200, RUNNING, None)


@pytest.mark.parametrize("fails", [FAILS, (429, b"", None), OSError("closed")])
def test_control_plane_that_cannot_tell_is_asked_ever_less_often(mocker: Any, fails: Any) -> None:
    script = Script(mocker, fails)
    answers = asyncio.run(script.ask(ControlPlane(JOB), *HALF_SECONDS))
    assert script.moments == [0, 1, 3, 7, 11, 15, 19]
    assert {answer.told for answer in answers} == {Told.NOTHING}


def test_backoff_begins_anew_after_an_answer(mocker: Any) -> None:
    script = Script(mocker, FAILS, FAILS, FAILS, RUNS, FAILS)
    asyncio.run(script.ask(ControlPlane(JOB), *HALF_SECONDS[:30]))
    assert script.moments == [0, 1, 3, 7, 8, 9, 11]


@pytest.mark.parametrize("reply", [RUNS, (200, ENDED, None), (401, b"", None), (404, b"", None)])
def test_control_plane_that_answers_is_asked_once_a_second(mocker: Any, reply: Any) -> None:
    script = Script(mocker, reply)
    asyncio.run(script.ask(ControlPlane(JOB), *HALF_SECONDS[:7]))
    assert script.moments == [0, 1, 2, 3]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3),
        ("2.5", 2.5),
        ("0", 1),
        ("-7", 1),
        ("nan", 1),
        ("soon", 1),
        ("", 1),
        # Longer than any request waits; for ever it does not bind.
        ("86400", 60),
        ("inf", 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 1),
        ("Fri, 99 Nonsense 9999", 1),
    ],
)
def test_retry_after_of_a_control_plane_that_cannot_tell_is_honoured(
    mocker: Any, status: int, header: str, seconds: float
) -> None:
    script = Script(mocker, (status, b"", header), RUNS)
    just_before, then = seconds - 0.01, seconds + 0.01
    asyncio.run(script.ask(ControlPlane(JOB), 0, just_before, then))
    assert script.moments == [0, then]


def test_retry_after_is_read_as_a_date(mocker: Any) -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    script = Script(mocker, (503, b"", soon), RUNS)
    asyncio.run(script.ask(ControlPlane(JOB), 0, 25, 31))
    assert script.moments == [0, 31]


def test_retry_after_of_another_answer_is_ignored(mocker: Any) -> None:
    script = Script(mocker, (200, RUNNING, "30"))
    asyncio.run(script.ask(ControlPlane(JOB), 0, 1))
    assert script.moments == [0, 1]


def test_same_answer_adds_up_from_question_to_question(mocker: Any) -> None:
    script = Script(mocker, (401, b"", None))
    first, second, third = asyncio.run(script.ask(ControlPlane(JOB), 0, 1, 2))
    assert not first.heard_for(1)
    assert (second.heard_for(1), second.heard_for(2)) == (True, False)
    assert third.heard_for(2)


@pytest.mark.parametrize(
    ("replies", "moments"),
    [
        # Something else was said in between.
        ([(401, b"", None), RUNS, (401, b"", None)], [0, 1, 2]),
        ([(401, b"", None), FAILS, (401, b"", None)], [0, 1, 2]),
        # The first one is too old to confirm anything.
        ([(401, b"", None)], [0, 16]),
    ],
)
def test_interrupted_or_old_answer_confirms_nothing(
    mocker: Any, replies: list[Any], moments: list[float]
) -> None:
    script = Script(mocker, *replies)
    *_, last = asyncio.run(script.ask(ControlPlane(JOB), *moments))
    assert last.told is Told.QUESTION_REFUSED
    assert not last.heard_for(1)


def test_cached_answer_does_not_confirm_itself(mocker: Any) -> None:
    script = Script(mocker, (404, b'{"code": 5}', None))
    first, again = asyncio.run(script.ask(ControlPlane(JOB), 0, 0.99))
    assert again is first
    assert first.told is Told.GONE
    assert not again.heard_for(1)


# --- Whose key asks ----------------------------------------------------------------------


def test_each_key_has_questions_and_answers_of_its_own(mocker: Any) -> None:
    """A revoked key beside a good one: neither hurts the other."""
    script = Script(mocker, (401, b"", None), RUNS)
    control_plane = ControlPlane(JOB)

    async def program() -> list[Answer]:
        revoked = await script.ask(control_plane, 0, 0.5, key="revoked")
        return revoked + await script.ask(control_plane, 0, 0.5, key="good")

    told = [answer.told for answer in asyncio.run(program())]
    assert told == [Told.QUESTION_REFUSED] * 2 + [Told.RUNNING] * 2
    assert [headers["x-api-key"] for _, headers in script.asked] == ["revoked", "good"]


def test_concurrent_callers_share_one_question_for_each_key(mocker: Any) -> None:
    script = Script(mocker, RUNS)
    control_plane = ControlPlane(JOB)

    async def program() -> None:
        keys = ["one", "two"] * 50
        await asyncio.gather(*(control_plane.ask({"x-api-key": key}) for key in keys))

    asyncio.run(program())
    assert len(script.asked) == 2


def test_rotating_keys_do_not_pile_up(mocker: Any) -> None:
    """A JWT is a new one every few minutes."""
    script = Script(mocker, RUNS)
    control_plane = ControlPlane(JOB)

    async def program() -> None:
        for number in range(100):
            await script.ask(control_plane, number, key=f"token-{number}")
        assert len(control_plane._flights) == _control_plane.FLIGHTS
        # The last one is known, the first one is not.
        await script.ask(control_plane, 99, key="token-99")
        assert len(script.asked) == 100
        await script.ask(control_plane, 99, key="token-0")

    asyncio.run(program())
    assert len(script.asked) == 101
    assert "token" not in repr(control_plane._flights)


def test_ended_job_is_noted_by_what_was_said_last_to_any_key(mocker: Any) -> None:
    script = Script(mocker, RUNS, (200, ENDED, None), RUNS)
    control_plane = ControlPlane(JOB)

    async def program() -> list[bool]:
        noted = [(control_plane.last_answer.state is JobState.ENDED)]
        for number, key in enumerate(("one", "two", "one")):
            await script.ask(control_plane, 2 * number, key=key)
            noted.append(control_plane.last_answer.state is JobState.ENDED)
        return noted

    assert asyncio.run(program()) == [False, False, True, False]


def test_finished_question_holds_nothing_of_the_one_who_asked(mocker: Any) -> None:
    """A task keeps the context that it was made in, and that every client of a submission."""

    class Held:
        pass

    Script(mocker, RUNS)
    control_plane = ControlPlane(JOB)
    variable: contextvars.ContextVar[Held] = contextvars.ContextVar("variable")

    async def ask_it() -> weakref.ref[Held]:
        held = Held()
        variable.set(held)
        await control_plane.ask({})
        return weakref.ref(held)

    async def program() -> bool:
        reference = await asyncio.create_task(ask_it(), context=contextvars.Context())
        await asyncio.sleep(0)
        gc.collect()
        return reference() is None

    assert asyncio.run(program())


def manager(
    key: str | None, account: str | None = "acct", root: str = "https://control.example"
) -> Manager:
    """A job manager; without a key once the program has let go of it."""
    headers = None if key is None else {"x-api-key": key}
    return Manager(lambda: Address(root, headers, verify=True), lambda: account)


NOT_THE_GATEWAY = "https://control.example"


@pytest.mark.parametrize(
    ("managers", "key"),
    [
        ([manager("mine")], "mine"),
        # With this account and key, whichever was made last.
        ([manager("mine"), manager("other")], "mine"),
        ([manager("other"), manager("mine")], "mine"),
        ([manager("mine", None), manager("other")], "mine"),
        # Else the only one of the account: a token that tinker was given asks for nobody.
        ([manager("other")], "other"),
        ([manager("other", None)], "other"),
        ([manager("other"), manager("other", None)], "other"),
        ([manager("other"), manager("third", "elsewhere")], "other"),
        # Else the request itself.
        ([manager("other"), manager("third")], "mine"),
        ([manager("other", "elsewhere")], "mine"),
        ([manager(None)], "mine"),
        ([manager("mine", "elsewhere"), manager("other", "elsewhere")], "mine"),
    ],
    ids=range(12),
)
def test_question_is_asked_with_the_key_of_the_right_manager(
    mocker: Any, managers: list[Manager], key: str
) -> None:
    for one in managers:
        register(JOB.gateway, one)
    script = Script(mocker, RUNS)
    asyncio.run(script.ask(ControlPlane(JOB), 0, key="mine"))
    ((_, headers),) = script.asked
    assert headers == {"x-api-key": key}


def test_key_is_the_same_in_either_header(mocker: Any) -> None:
    register(JOB.gateway, manager("mine"))
    register(JOB.gateway, manager("other"))
    script = Script(mocker, RUNS)
    asyncio.run(ControlPlane(JOB).ask({"authorization": "Bearer mine"}))
    ((_, headers),) = script.asked
    assert headers == {"x-api-key": "mine"}


def test_manager_of_another_gateway_is_not_asked(mocker: Any) -> None:
    register("https://other.example", manager("mine"))
    fetch = mocker.patch.object(Connections, "fetch", return_value=RUNS)
    asyncio.run(ControlPlane(JOB).ask({"x-api-key": "mine"}))
    assert fetch.call_args.args[0] == Address(JOB.gateway, None, verify=True)


def test_managers_that_are_gone_leave_one_address_behind() -> None:
    for _ in range(10):
        register(JOB.gateway, manager(None))
    register(JOB.gateway, manager("mine"))
    register(JOB.gateway, manager("other"))
    assert len(_addresses._managers[JOB.gateway]) == 2
    assert _addresses.asker(JOB, {}) == Address(NOT_THE_GATEWAY, None, verify=True)


def test_manager_that_raises_is_an_error_where_the_settings_are_strict(
    settings: Callable[..., None],
) -> None:
    def fails() -> Address:
        raise OSError("no such file")

    async def wait() -> None:
        route = Route(JOB, ControlPlane(JOB))
        await RouteWait(route, no_probe, None).ask({})

    async def no_probe() -> None:
        await asyncio.sleep(60)

    settings(strict=True)
    _addresses._managers[JOB.gateway] = [Manager(fails)]
    with pytest.raises(OSError, match="no such file"):
        asyncio.run(wait())


def test_manager_that_raises_leaves_the_gateway_to_be_asked(
    mocker: Any, settings: Callable[..., None], overheard: Any
) -> None:
    def fails() -> Address:
        raise OSError("no such file")

    settings(strict=False)
    _addresses._managers[JOB.gateway] = [Manager(fails)]
    script = Script(mocker, RUNS)
    (answer,) = asyncio.run(script.ask(ControlPlane(JOB), 0, key="mine"))
    assert answer.told is Told.RUNNING
    assert script.asked == [(0, {"x-api-key": "mine"})]
    assert script.addresses == [Address(JOB.gateway, None, verify=True)]
    assert "shim.failed" in overheard.events
    _addresses._managers.clear()


# --- Connections to it ----------------------------------------------------------------------


async def _asks(control_plane: ControlPlane, times: int) -> None:
    for _ in range(times):
        await control_plane.ask(httpx.Headers(HEADERS))


def _asked_over(lab: Lab) -> list[int]:
    return [one.connection for one in lab.exchanges if one.kind == "control_plane"]


def _control_plane_of(lab: Lab) -> ControlPlane:
    return ControlPlane(Job.from_url(lab.base_url) or pytest.fail("no job"))


async def _asked_and_kept(lab: Lab) -> ControlPlane:
    """One that was asked, over a connection that is kept."""
    control_plane = _control_plane_of(lab)
    control_plane.connections.keeps = True
    await _asks(control_plane, 1)
    return control_plane


@pytest.fixture
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is good for long."""
    monkeypatch.setattr(_control_plane, "GOOD_FOR", 0.0)


@pytest.mark.usefixtures("always_asked")
def test_connection_is_kept_while_somebody_waits_and_closed_then(lab: Lab) -> None:
    async def questions() -> None:
        control_plane = _control_plane_of(lab)
        on = Route(control_plane._job, control_plane)
        await _asks(control_plane, 1)
        with on.incident():
            await _asks(control_plane, 2)
            with on.incident():
                await _asks(control_plane, 1)
            await _asks(control_plane, 1)
        await asyncio.gather(*_threads._tasks)
        await _asks(control_plane, 1)
        assert not control_plane.connections._kept

    asyncio.run(questions())
    before, *during, after = _asked_over(lab)
    assert len(during) == 4
    assert len({before, *during, after}) == 3
    until(lambda: all(one.is_closing() for one in lab._gateway._connections))


@pytest.mark.usefixtures("always_asked")
def test_answer_that_would_end_a_wait_is_confirmed_over_another_connection(lab: Lab) -> None:
    """One server behind the control plane's balancer may not know the job yet."""

    async def questions() -> None:
        control_plane = await _asked_and_kept(lab)
        await _asks(control_plane, 1)
        lab.control_plane.mode = "missing"
        await _asks(control_plane, 2)
        assert not control_plane.connections._kept

    asyncio.run(questions())
    first, second, gone, gone_again = _asked_over(lab)
    assert first == second == gone != gone_again


@pytest.mark.usefixtures("always_asked")
def test_kept_connection_that_was_closed_meanwhile_costs_no_answer(lab: Lab) -> None:
    async def questions() -> Answer:
        control_plane = await _asked_and_kept(lab)
        lab.fault(Fault(kinds=["control_plane"], at="control_plane", drop=True, count=1))
        await _asks(control_plane, 1)
        answer = control_plane.last_answer
        control_plane.connections.let_go()
        await asyncio.sleep(0.05)
        return answer

    assert asyncio.run(questions()).message == "JOB_STATE_RUNNING"
    first, dropped, again = _asked_over(lab)
    assert first == dropped != again


@pytest.mark.usefixtures("always_asked")
def test_kept_connection_that_is_lost_late_is_no_answer(lab: Lab) -> None:
    """Put once more at once, it would be followed by the hedge within a second."""

    async def questions() -> Answer:
        control_plane = await _asked_and_kept(lab)
        lost = Fault(kinds=["control_plane"], at="control_plane", drop=True, delay=1.2, count=1)
        lab.fault(lost)
        await _asks(control_plane, 1)
        assert not control_plane.connections._kept
        return control_plane.last_answer

    assert asyncio.run(questions()).told is Told.NOTHING
    first, lost = _asked_over(lab)
    assert first == lost


# --- With the program's own HTTP client -----------------------------------------------------


def _ask_with(own: Callable[[], Any], lab: Lab, *, closed: bool = False) -> Answer:
    async def question() -> Answer:
        control_plane = _control_plane_of(lab)
        client = own()
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(client, httpx.AsyncClient):
                stack.push_async_callback(client.aclose)
            if closed:
                await stack.aclose()
            control_plane.connections.use(client)
            return await control_plane.ask(httpx.Headers(HEADERS))

    return asyncio.run(question())


@pytest.fixture
def trusted_by_few(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab over TLS whose certificate only a client of the program's own trusts."""
    lab = make_lab(tls=True)
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(_question, "_tls", None)
    return lab


def test_question_uses_what_an_own_client_trusts_and_adds_nothing_of_its_own(
    trusted_by_few: Lab,
) -> None:
    async def hook(_: object) -> None:
        raise AssertionError("it would see the key, and could break the answer")

    own = functools.partial(
        httpx.AsyncClient,
        verify=ssl.create_default_context(cafile=trusted_by_few.ca_file),
        headers={"x-private": "stays at home"},
        cookies={"private": "stays at home"},
        auth=("private", "stays at home"),
        params={"private": "stays at home"},
        event_hooks={"request": [hook], "response": [hook]},
    )
    answer = _ask_with(own, trusted_by_few)
    assert answer.message == "JOB_STATE_RUNNING"
    (asked,) = (one for one in trusted_by_few.exchanges if one.kind == "control_plane")
    assert "stays at home" not in str(asked.headers)
    assert "private" not in asked.path
    assert asked.headers["authorization"] == f"Bearer {programs.CANARY}"


def test_own_client_follows_no_redirect_with_the_keys(trusted_by_few: Lab) -> None:
    trusting = ssl.create_default_context(cafile=trusted_by_few.ca_file)
    trusted_by_few.control_plane.mode = "redirect"
    own = functools.partial(httpx.AsyncClient, verify=trusting, follow_redirects=True)
    answer = _ask_with(own, trusted_by_few)
    assert answer.message == "HTTP 302"
    assert trusted_by_few.control_plane.questions == 1


class Refusing(httpx.AsyncBaseTransport):
    """Reaches one host, and no other."""

    async def handle_async_request(self, _: httpx.Request) -> httpx.Response:
        raise RuntimeError("not this host")


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (httpx.AsyncClient, "is closed"),
        (object, "is no httpx.AsyncClient"),
        (lambda: httpx.AsyncClient(mounts={"all://": Refusing()}), "failed with RuntimeError"),
        # The second: with httpx 0.23.
        (
            lambda: httpx.AsyncClient(trust_env=False),
            "failed with (ConnectError|SSLCertVerificationError)",
        ),
    ],
    ids=["closed", "another kind", "refusing", "not trusting"],
)
def test_own_client_that_cannot_ask_is_warned_of_and_the_environment_is_used(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, own: Any, why: str
) -> None:
    lab = make_lab(tls=True)
    monkeypatch.setattr(_question, "_tls", None)
    with pytest.warns(tinker_routefix.RoutefixWarning, match=why):
        answer = _ask_with(own, lab, closed=why == "is closed")
    assert answer.message == "JOB_STATE_RUNNING"


def test_own_client_that_cannot_ask_is_warned_of_once(overheard: Overheard) -> None:
    """Each pool of the SDK's brings it along."""
    control_plane = ControlPlane(JOB)
    with pytest.warns(tinker_routefix.RoutefixWarning):
        control_plane.connections.use(object())
    # A second warning would be an error here.
    control_plane.connections.use(object())
    assert overheard.events.count("control_plane.own_client") == 1


class Hanging(httpx.AsyncBaseTransport):
    """As where all connections of a pool are held by polls."""

    async def handle_async_request(self, _: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError("nobody waits so long")


def test_own_client_that_hangs_is_overtaken_by_a_question_as_the_environment_says(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(tls=True)
    monkeypatch.setattr(_question, "_tls", None)
    answer = _ask_with(functools.partial(httpx.AsyncClient, mounts={"all://": Hanging()}), lab)
    assert answer.message == "JOB_STATE_RUNNING"
    assert lab.control_plane.questions == 1


class Slow(httpx.AsyncBaseTransport):
    """Answers once another way has failed."""

    def __init__(self, later: float = 0.0) -> None:
        self.failed = asyncio.Event()
        self.later = later

    async def fail(self, _: object) -> httpx.AsyncClient:
        self.failed.set()
        raise httpx.ConnectError("only through the program's own proxy")

    async def handle_async_request(self, _: httpx.Request) -> httpx.Response:
        await self.failed.wait()
        await asyncio.sleep(self.later)
        said = httpx.ByteStream(b'{"state": "JOB_STATE_RUNNING"}')
        return httpx.Response(200, stream=said)


@pytest.mark.parametrize("later", [0, 0.2])
def test_slow_own_client_is_heard_although_the_environments_way_fails(
    monkeypatch: pytest.MonkeyPatch, later: float
) -> None:
    async def said() -> str:
        control_plane, slow = ControlPlane(JOB), Slow(later)
        monkeypatch.setattr(_question, "_new_client", slow.fail)
        async with httpx.AsyncClient(transport=slow) as own:
            control_plane.connections.use(own)
            return (await control_plane.ask({})).message

    assert asyncio.run(said()) == "JOB_STATE_RUNNING"


def test_own_client_that_answers_is_asked_with_time_after_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def questions() -> list[int]:
        connections, own = Connections(JOB), Slow()
        monkeypatch.setattr(_question, "_new_client", own.fail)
        own.failed.set()
        async with httpx.AsyncClient(transport=own) as client:
            connections.use(client)
            address = Address(JOB.gateway, None, verify=True)
            return [(await connections.fetch(address, {}))[0] for _ in range(3)]

    assert asyncio.run(questions()) == [200, 200, 200]


def test_own_client_is_asked_with_again_where_the_environments_way_has_hung(
    trusted_by_few: Lab, settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that drops what does not go through the program's own proxy."""
    settings(control_plane_timeout=2.5)
    trusting = ssl.create_default_context(cafile=trusted_by_few.ca_file)
    trusted_by_few.fault(Fault(kinds=["control_plane"], at="control_plane", hang=True, count=1))

    async def dropped(_: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=Hanging(), timeout=None)

    monkeypatch.setattr(_question, "_new_client", dropped)

    async def questions() -> list[str]:
        control_plane = _control_plane_of(trusted_by_few)
        async with httpx.AsyncClient(verify=trusting, timeout=None) as own:
            control_plane.connections.use(own)
            first = await control_plane.ask(httpx.Headers(HEADERS))
            await asyncio.sleep(first.ask_again_at - time.monotonic())
            return [first.message, (await control_plane.ask(httpx.Headers(HEADERS))).message]

    assert asyncio.run(questions()) == ["no answer within 2.5 s", "JOB_STATE_RUNNING"]


@pytest.mark.parametrize("certificates", [None, "missing.pem"], ids=["not trusted", "missing"])
def test_own_client_is_asked_with_again_once_the_environments_way_has_failed(
    trusted_by_few: Lab, monkeypatch: pytest.MonkeyPatch, certificates: str | None
) -> None:
    if certificates is not None:
        monkeypatch.setenv("SSL_CERT_FILE", certificates)
    trusting = ssl.create_default_context(cafile=trusted_by_few.ca_file)

    async def questions() -> list[str]:
        control_plane = _control_plane_of(trusted_by_few)
        control_plane.connections._over_own = False
        async with httpx.AsyncClient(verify=trusting) as own:
            control_plane.connections.use(own)
            first = await control_plane.ask(httpx.Headers(HEADERS))
            await asyncio.sleep(1.1)
            return [first.message, (await control_plane.ask(httpx.Headers(HEADERS))).message]

    failed, said = asyncio.run(questions())
    assert failed.startswith("no answer (")
    assert said == "JOB_STATE_RUNNING"


def test_question_over_http_is_not_asked_with_an_own_client(lab: Lab) -> None:
    """Its proxy would see the keys."""
    refusing = functools.partial(httpx.AsyncClient, transport=Refusing())
    assert _ask_with(refusing, lab).message == "JOB_STATE_RUNNING"


def test_own_client_is_not_kept_alive() -> None:
    control_plane = ControlPlane(JOB)
    control_plane.connections.use(httpx.AsyncClient())
    gc.collect()
    assert control_plane.connections._own is not None
    assert control_plane.connections._own() is None
