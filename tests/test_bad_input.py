"""404s and responses of the control plane that nobody expects, with a real tinker.

Whatever stands in them, what comes out is what the table in docs/failures.md says: the request gets
through, or the caller gets plain tinker's own error. What the single functions make of such
input is in `test_verdict` and `test_control_plane`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
import tinker

from tests import programs
from tests.common import RUNNING, Listener, http
from tests.programs import connect, exact, forward_backward, optim_step, train
from tinker_routefix import _routes
from tinker_routefix.lab import GATEWAY_404, Answer, Fault, Lab

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]
Change = Callable[..., None]

GATEWAY = GATEWAY_404.content


def said(body: bytes, content_type: str = "application/json", **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(404, body, content_type, names)


MAYBE_THE_GATEWAYS = {
    "empty": said(b""),
    "blank": said(b" \r\n"),
    "half": said(GATEWAY[:-3]),
    "html": said(b"<html><h1>404 Not Found</h1>nginx</html>", "text/html"),
    "10-mb": said(b'{"detail": "' + b"x" * 10_000_000 + b'"}'),
    "10-mb-of-text": said(b"x" * 10_000_000, "text/plain"),
    "binary": said(bytes(range(256)) * 4, "application/octet-stream"),
    "protobuf": said(b"\x0a\x03404\x12\x09not found", "application/x-protobuf"),
    "nested": said(b"[" * 60_000),
    "nested-objects": said(b'{"detail":' * 6_000 + b"1" + b"}" * 6_000),
    "null": said(b"null"),
    "a-number": said(b"404"),
    "a-huge-number": said(b"9" * 5_000),
    "a-string": said(b'"detail"'),
    "a-list": said(b'[{"detail": "Not Found"}]'),
    "an-error-in-words": said(b'{"error": "NOT_FOUND"}'),
    "an-error-that-is-a-list": said(b'{"error": [{"code": "NOT_FOUND"}]}'),
    "a-code-that-is-a-number": said(b'{"error": {"code": 404}}'),
    "no-content-type": said(GATEWAY, ""),
    "as-text": said(GATEWAY, "text/plain; charset=ascii"),
    "as-html": said(GATEWAY, "text/html; charset=nonsense"),
    "utf-16": said(json.dumps({"error": {"code": "NOT_FOUND"}}).encode("utf-16")),
    "utf-8-with-mark": said(b"\xef\xbb\xbf" + GATEWAY),
    "not-utf-8": said(b'{"error": {"code": "NOT_FOUND", "message": "\xff\xfe"}}'),
    "compressed": said(gzip.compress(GATEWAY), Content_Encoding="gzip"),
    "unknown-encoding": said(GATEWAY, Content_Encoding="rot13"),
    "long-headers": said(GATEWAY, X_Long="x" * 7_000),
    "strange-retry-after": said(GATEWAY, Retry_After="-1e999", Location="//[::1", Link="<>;;"),
}

THE_PODS = {
    "fastapis": said(b'{"detail": "Not Found"}'),
    "as-text": said(b'{"detail": "Not Found"}', "text/plain"),
    "utf-16": said(json.dumps({"detail": "Not Found"}).encode("utf-16")),
    "a-list": said(b'{"detail": [{"loc": ["path", 0], "msg": "unknown"}]}'),
    "nested": said(b'{"detail": ' + b"[" * 500 + b"]" * 500 + b"}"),
    "null": said(b'{"detail": null, "state": "JOB_STATE_RUNNING"}'),
    "compressed": said(gzip.compress(b'{"detail": "Not Found"}'), Content_Encoding="gzip"),
}


def refusing(kind: str, answer: Answer = GATEWAY_404) -> Fault:
    """A route that is not there. Were others let through, they would prove that the job runs."""
    others = ["get_info", "capabilities", "heartbeat", "telemetry"]
    return Fault(kinds=[kind, *others], answer=answer)


BROKEN = {
    "without-end": said(GATEWAY, Content_Length="1000"),
    "not-gzip": said(GATEWAY, Content_Encoding="gzip"),
    "half-of-gzip": said(gzip.compress(GATEWAY)[:-9], Content_Encoding="gzip"),
    "not-zstd": said(GATEWAY, Content_Encoding="zstd"),
}
"""Not a whole answer: tinker sees no 404 in most of them."""


def capabilities(client: Any, timeout: float = 60.0) -> Any:
    """One request that tinker does not repeat by itself, and that no other one waits for."""

    async def get(http: Any) -> Any:
        options = {"max_retries": 0, "timeout": timeout}
        path = "/api/v1/get_server_capabilities"
        return await http.get(path, cast_to=httpx.Response, options=options)

    return programs.on_loop(client, get)


def outcome(client: Any, timeout: float = 60.0) -> tuple[object, ...]:
    """How it ends: what the caller can tell."""
    try:
        answer = capabilities(client, timeout)
    except Exception as error:
        content = getattr(getattr(error, "response", None), "content", None)
        return type(error), str(error), content
    return answer.status_code, answer.json().keys()


@pytest.mark.parametrize("transport", ["httpx", "pyqwest"])
def test_request_survives_a_404_with_any_body(
    make_lab: MakeLab, settings: Change, transport: str
) -> None:
    settings(base_delay=0.05)
    lab = make_lab(config={"use_pyqwest_transport": transport == "pyqwest"})
    client = connect(lab.base_url)
    for number, (name, answer) in enumerate(MAYBE_THE_GATEWAYS.items(), start=1):
        refused = [
            lab.fault(Fault(kinds=[kind], count=1, answer=answer))
            for kind in ("forward_backward", "poll:optim_step")
        ]
        train(client)
        assert [fault.hits for fault in refused] == [1, 1], name
        exact(lab, gradients=number, optim_steps=number)
    assert programs.job_of(lab).recovered == 2 * len(MAYBE_THE_GATEWAYS)


@pytest.mark.parametrize(
    "name", ["empty", "10-mb", "binary", "nested", "utf-16", "unknown-encoding"]
)
@pytest.mark.parametrize("kind", ["config", "create_session", "create_model", "get_info"])
def test_connect_survives_a_404_with_any_body(make_lab: MakeLab, name: str, kind: str) -> None:
    lab = make_lab()
    answer = MAYBE_THE_GATEWAYS[name]
    fault = lab.fault(Fault(kinds=[kind], count=1, answer=answer))
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)
    if fault.hits:  # not every release asks for a config
        assert programs.job_of(lab).last_intervention is not None


def test_request_to_an_ended_job_raises_tinkers_error_for_any_body(
    make_lab: MakeLab, plain: Plain, settings: Change
) -> None:
    def run(lab: Lab) -> list[tuple[object, ...]]:
        client = connect(lab.base_url)
        lab.control_plane.state = "JOB_STATE_DELETED"
        outcomes = []
        for answer in MAYBE_THE_GATEWAYS.values():
            lab.fault(refusing("capabilities", answer))
            outcomes.append(outcome(client))
            lab.clear()
        return outcomes

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    assert {kind for kind, *_ in expected} == {tinker.NotFoundError}
    assert programs.job_of(lab).failed_fast == len(expected)
    assert programs.job_of(lab).replays == 0


@pytest.mark.parametrize("name", ["empty", "10-mb", "nested", "not-utf-8"])
@pytest.mark.parametrize("kind", ["forward_backward", "poll:forward_backward"])
def test_training_on_an_ended_job_raises_tinkers_error_with_a_note(
    make_lab: MakeLab, plain: Plain, name: str, kind: str
) -> None:
    def run(lab: Lab) -> list[BaseException]:
        client = connect(lab.base_url)
        lab.control_plane.state = "JOB_STATE_DELETED"
        lab.fault(refusing(kind, MAYBE_THE_GATEWAYS[name]))
        with pytest.raises(Exception) as caught:
            forward_backward(client).result(programs.PATIENCE)
        return list(programs.chain(caught.value))

    with plain():
        expected = run(make_lab())
    errors = run(make_lab())
    assert [type(error) for error in errors] == [type(error) for error in expected]
    assert "JOB_STATE_DELETED; 0 replays" in programs.notes(errors[0])


def test_pod_404_in_any_encoding_is_raised_at_once(make_lab: MakeLab, plain: Plain) -> None:
    def run(lab: Lab) -> list[tuple[object, ...]]:
        client = connect(lab.base_url)
        outcomes = []
        for answer in THE_PODS.values():
            lab.fault(Fault(kinds=["capabilities"], count=1, answer=answer))
            outcomes.append(outcome(client))
        return outcomes

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    assert {kind for kind, *_ in expected} == {tinker.NotFoundError}
    assert lab.control_plane.questions == 0


@pytest.mark.slow
def test_truncated_404_is_left_to_tinker(make_lab: MakeLab, plain: Plain) -> None:
    """Without a whole answer there is no 404: a lost connection, or what httpx makes of it."""

    def run(lab: Lab) -> list[object]:
        client = connect(lab.base_url)
        lab.control_plane.state = "JOB_STATE_DELETED"
        outcomes = []
        for name, answer in BROKEN.items():
            lab.fault(Fault(kinds=["capabilities"], count=1, answer=answer))
            outcomes.append(outcome(client, 2.0 if name == "without-end" else 60.0)[0])
        return outcomes

    with plain():
        expected = run(make_lab())
    lab = make_lab()
    assert run(lab) == expected
    assert {tinker.APITimeoutError, tinker.APIConnectionError} <= set(expected)
    exact(lab, gradients=0, optim_steps=0)


# --- The control plane -------------------------------------------------------------------

CANNOT_TELL = {
    "nothing": b"",
    "not-http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half-a-body": http(RUNNING, length=1000),
    "empty": http(b""),
    "html": http(b"<html>", headers=b"Content-Type: text/html\r\n"),
    "10-mb": http(b'{"x": "%s", %s' % (b"x" * 10_000_000, RUNNING[1:])),
    "binary": http(bytes(range(256))),
    "nested": http(b"[" * 60_000),
    "not-utf-8": http(RUNNING[:-1] + b', "name": "\xff"}'),
    "compressed": http(gzip.compress(RUNNING), headers=b"Content-Encoding: gzip\r\n"),
    "a-state-that-is-a-list": http(b'{"state": ["JOB_STATE_RUNNING"]}'),
    "a-state-that-is-new": http(b'{"state": "JOB_STATE_HIBERNATING"}'),
    "no-content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a-redirect": http(b"", "302 Found", b"Location: {foreign}/v1/accounts\r\n"),
    "a-404-in-html": http(b"<html>", "404 Not Found"),
    "unauthorized": http(b"{}", "401 Unauthorized"),
}


CANNOT_TELL_FOR_NOW = {"nothing", "not-http", "half-a-body", "a-state-that-is-new"}
"""Asked again within the request's own budget; the others refuse the question."""


@pytest.mark.slow
def test_request_without_proof_fails_when_control_plane_answer_is_unusable(
    make_lab: MakeLab, plain: Plain, settings: Change, foreign: Listener
) -> None:
    """The original 404, and not one replay; while connecting it is waited for instead."""

    def run(lab: Lab) -> list[tuple[object, ...]]:
        client = connect(lab.base_url)
        optim_step(client).result(programs.PATIENCE)
        outcomes = []
        for says in CANNOT_TELL.values():
            listener.says = says.replace(b"{foreign}", foreign.url.encode())
            heard = len(listener.heard)
            lab.fault(refusing("capabilities"))
            outcomes.append(outcome(client))
            lab.clear()
            asked.append(len(listener.heard) - heard)
            # What was said before confirms nothing, and backs nothing off.
            for route in _routes.all_routes():
                route.control_plane._flights.clear()
        return outcomes

    asked: list[int] = []
    with Listener() as listener:
        with plain():
            expected = run(make_lab())
        assert not listener.heard
        asked.clear()
        # One that cannot tell for now is asked again after 2 s, and after 4 s.
        settings(control_plane_url=listener.url, retry_budget=2.5)
        lab = make_lab()
        assert run(lab) == expected
        assert dict(zip(CANNOT_TELL, asked, strict=True)) == dict.fromkeys(CANNOT_TELL, 2)
    assert {kind for kind, *_ in expected} == {tinker.NotFoundError}
    job = programs.job_of(lab)
    assert job.given_up == len(CANNOT_TELL_FOR_NOW)
    assert job.failed_fast == len(CANNOT_TELL) - len(CANNOT_TELL_FOR_NOW)
    assert job.replays == 0
    assert lab.control_plane.questions == 0
    assert not foreign.heard


@pytest.mark.parametrize("name", ["nothing", "10-mb", "nested", "a-redirect", "compressed"])
def test_connect_waits_when_control_plane_answer_is_unusable(
    make_lab: MakeLab, settings: Change, foreign: Listener, name: str
) -> None:
    says = CANNOT_TELL[name].replace(b"{foreign}", foreign.url.encode())
    with Listener(says) as listener:
        settings(control_plane_url=listener.url)
        lab = make_lab()
        lab.fault(Fault(kinds=["create_session"], count=2))
        train(connect(lab.base_url))
        assert listener.heard
    exact(lab, gradients=1, optim_steps=1)
    assert not foreign.heard
