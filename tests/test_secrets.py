"""No key comes out: not in a log, a note, a repr, a counter, an output, nor to another origin.

Every test of the suite is watched for that (the fixture `overheard`). Here are the tests that
this watch can fail, and those that give it something to see.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker

from tests import programs
from tests.common import CANARIES, CANARY, RUNNING, Listener, http, leaks
from tests.conftest import of_the_shim, run_python
from tests.programs import exact, train
from tinker_routefix import RoutefixWarning, SettingError, _addresses, _log, _routes, events
from tinker_routefix._addresses import Address, Manager
from tinker_routefix._control_plane import ControlPlane
from tinker_routefix._job import Job
from tinker_routefix._job_state import Answer, JobState, Told
from tinker_routefix._question import Connections
from tinker_routefix._settings import Settings
from tinker_routefix.lab import Answer as HttpAnswer
from tinker_routefix.lab import Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Overheard

    MakeLab = Callable[..., Lab]
    Change = Callable[..., None]

USER, PASSWORD = CANARIES["a user name in a URL"], CANARIES["a password in a URL"]
HEADER, TOKEN = CANARIES["a key in a default header"], CANARIES["a token in a query"]
JOB = Job("http://127.0.0.1:9", "acct", "job-1")


def ask(job: Job, headers: dict[str, str] | None = None) -> Answer:
    async def question() -> Answer:
        return await ControlPlane(job).ask(httpx.Headers(headers or {"X-API-Key": CANARY}))

    return asyncio.run(question())


def with_credentials(url: str, *, query: bool = False) -> str:
    return url.replace("://", f"://{USER}:{PASSWORD}@") + (f"?token={TOKEN}" if query else "")


# --- The watch can fail ------------------------------------------------------------------


@pytest.mark.parametrize("secret", CANARIES.values(), ids=CANARIES)
def test_leak_check_finds_a_secret_in_any_encoding(secret: str) -> None:
    for before in ("", "x", "xy", "user:"):
        for text in (secret, secret.upper(), f"({secret!r})", f"<{secret}>"):
            assert leaks(f"{before}{text}")
            assert leaks(f"{before}{text}".encode())
        assert leaks(base64.b64encode(f"{before}{secret}:more".encode()))
        assert leaks(base64.urlsafe_b64encode(f"{before}{secret}".encode()))
    assert not leaks(secret[:-4])


def log_a_line() -> None:
    _log.event(logging.DEBUG, "test", f"the key is {CANARY}")


def log_a_field() -> None:
    _log.event(logging.INFO, "test", "innocent", request=CANARY)


def log_an_error() -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        _log.logger.exception("innocent")


def log_by_httpx() -> None:
    with Listener() as listener:
        ask(Job(listener.url, "acct", CANARY))


def log_by_httpcore() -> None:
    with Listener(http(headers=f"X-Echo: {CANARY}\r\n".encode())) as listener:
        ask(Job(listener.url, "acct", "job-1"))


def publish_it() -> None:
    events.publish(events.Recovered(job=CANARY, request="x", replays=1, seconds=1.0))


def raise_it() -> None:
    with pytest.raises(ValueError, match="canary"):
        raise ValueError(CANARY)


def note_it() -> None:
    error = ValueError("innocent")
    error.add_note(f"seen with {CANARY}")
    with pytest.raises(ValueError, match="innocent"):
        raise error


def cause_it() -> None:
    with pytest.raises(ValueError, match="innocent"):
        raise ValueError("innocent") from KeyError(CANARY)


def warn_of_it() -> None:
    with pytest.warns(RoutefixWarning):
        warnings.warn(f"not with {CANARY}", RoutefixWarning, stacklevel=1)


def print_it() -> None:
    assert run_python(f"print({CANARY!r})").returncode == 0


def complain_of_it() -> None:
    code = f"import sys; sys.stderr.write({CANARY!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        process.communicate()


def send_it_away(foreign: Listener) -> None:
    httpx.get(foreign.url, headers={"x-api-key": CANARY})


def send_it_away_in_base64(foreign: Listener) -> None:
    httpx.get(foreign.url, auth=("user", PASSWORD))


@pytest.mark.parametrize(
    ("way", "leak"),
    [
        ("log", log_a_line),
        ("log", log_a_field),
        ("log", log_an_error),
        ("log of httpx", log_by_httpx),
        ("log of httpx", log_by_httpcore),
        ("event", publish_it),
        ("exception", raise_it),
        ("exception", note_it),
        ("exception", cause_it),
        ("warning", warn_of_it),
        ("output", print_it),
        ("output", complain_of_it),
        ("foreign origin", send_it_away),
        ("foreign origin", send_it_away_in_base64),
    ],
)
def test_leak_in_each_channel_is_noticed(
    overheard: Overheard, foreign: Listener, way: str, leak: Callable[..., None]
) -> None:
    takes_it_away = leak.__code__.co_argcount
    leak(*[foreign] * takes_it_away)
    assert [found for found in overheard.leaks() if way in found]
    # It was on purpose.
    overheard.forget()
    foreign.heard.clear()
    assert not overheard.leaks()


@pytest.mark.parametrize("shown", ["job", "counter", "answer", "address"])
def test_leak_in_status_is_noticed(
    overheard: Overheard, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    async def look() -> list[str]:
        route = _routes.route_to(Job(JOB.gateway, "acct", CANARY if shown == "job" else "job-1"))
        flight = route.control_plane._flight(Address("", None, verify=True), {})
        if shown == "counter":
            route.counters.replays = CANARY  # type: ignore[assignment]
        if shown == "answer":
            flight.answer = Answer(Told.ENDED, CANARY, 0.0)
        if shown == "address":
            address = Address(f"https://{CANARY}.example", None, verify=True)
            known = {"gateway": [Manager(lambda: address)]}
            monkeypatch.setattr(_addresses, "_managers", known)
        found = overheard.leaks()
        # Its counters outlive it.
        route.counters.replays = 0
        _routes._counters.clear()
        return found

    assert [found for found in asyncio.run(look()) if "in status" in found]
    monkeypatch.undo()


def test_request_of_the_program_itself_is_no_leak(overheard: Overheard) -> None:
    """httpx prints every URL that it is given, and tinker gives it the base URL as it is."""
    with Listener() as listener:
        httpx.get(f"{listener.url}/{CANARY}")
    assert not overheard.requests


LEAKY = f"""
import logging

def test_innocent(overheard):
    logging.getLogger("tinker_routefix").info("nothing")

def test_prints():
    print("{CANARY}")

def test_logs():
    logging.getLogger("tinker_routefix").debug("{CANARY}")
"""


def test_leak_fails_the_test_in_which_it_happened(overheard: Overheard, tmp_path: Any) -> None:
    """A leak fails the test in which it happened, also one that did nothing but print."""
    (tmp_path / "test_leaky.py").write_text(LEAKY, encoding="utf-8")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-q", "-rE", "-c", "/dev/null"]
    code = f"import pytest; raise SystemExit(pytest.main({[*options, str(tmp_path)]!r}))"
    # What nox keeps is not told of these.
    ended = run_python(code, NOX_RUN="")
    overheard.printed.clear()
    assert ended.returncode == 1, ended.stdout + ended.stderr
    failed = [line for line in ended.stdout.splitlines() if line.startswith("ERROR ")]
    assert [line.rpartition("::")[2].split()[0] for line in failed] == ["test_prints", "test_logs"]


# --- Credentials in the base URL ---------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("transport", ["httpx", "pyqwest"])
def test_base_url_credentials_are_never_printed(
    make_lab: MakeLab, overheard: Overheard, transport: str
) -> None:
    """Through everything that the shim has to say, from connecting to failing fast."""
    lab = make_lab(config={"use_pyqwest_transport": transport == "pyqwest"})
    lab.fault(Fault(kinds=["create_session"], count=2))
    lab.fault(Fault(kinds=["get_info"], count=1))
    client = programs.connect(with_credentials(lab.base_url))
    lab.fault(Fault(kinds=["forward_backward"], count=1))
    lab.fault(Fault(kinds=["poll:optim_step"], count=1))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    assert programs.job_of(lab).recovered >= 3
    lab.end_job()
    with pytest.raises(tinker.NotFoundError) as caught:
        train(client)
    assert "JOB_STATE_DELETED" in programs.notes(caught.value)
    assert {"route.refused", "route.recovered", "route.failed_fast"} <= set(overheard.events)
    assert overheard.requests, "questions and probes have been looked at"
    sent = [e.headers.get("authorization") for e in lab.exchanges if e.kind != "control_plane"]
    assert len(set(sent)) == 1, "the probes are let in like all else"


def test_token_in_the_query_is_never_printed(make_lab: MakeLab, overheard: Overheard) -> None:
    """Such a base URL leads nowhere in plain tinker either: the path ends up in the query."""
    lab = make_lab()
    with pytest.raises(tinker.APIError):
        programs.connect(with_credentials(lab.base_url, query=True))
    assert not [e for e in lab.exchanges if TOKEN in str(e.headers)]


@pytest.mark.core
def test_keys_in_default_headers_go_to_the_control_plane_only(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.fault(Fault(kinds=["create_session"], count=1))
    keys = {"X-API-Key": HEADER, "Authorization": f"Bearer {HEADER}", "X-Other": HEADER}
    try:
        service = tinker.ServiceClient(base_url=lab.base_url, default_headers=keys)
    except FutureWarning:
        pytest.skip("this release takes no headers")
    client = programs.settled(service.create_lora_training_client(base_model="lab/base", rank=8))
    lab.fault(Fault(kinds=["poll:forward_backward"], count=1))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    question = next(e for e in lab.exchanges if e.kind == "control_plane")
    assert question.headers["authorization"] == f"Bearer {HEADER}"
    assert "x-other" not in question.headers


# --- Elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temp", "308 Perm"])
@pytest.mark.parametrize("to", ["{url}", "//{host}", "http://me:there@{host}"])
def test_control_plane_redirect_is_not_followed(foreign: Listener, status: str, to: str) -> None:
    where = to.format(url=foreign.url, host=foreign.url.removeprefix("http://"))
    headers = f"Location: {where}/v1/accounts/acct/rlorTrainerJobs/job-1\r\n".encode()
    with Listener(http(b"", status, headers)) as listener:
        answer = ask(Job(listener.url, "acct", "job-1"))
    assert answer.state is JobState.UNKNOWN
    assert not foreign.heard


@pytest.mark.core
def test_probe_redirect_is_not_followed(make_lab: MakeLab, foreign: Listener) -> None:
    lab = make_lab()
    away = HttpAnswer(307, b"", headers={"Location": f"{foreign.url}/elsewhere"})
    # The three of the warm-up; what the program asks afterwards is tinker's.
    lab.fault(Fault(kinds=["get_info"], count=3, answer=away))
    train(programs.connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)
    assert not foreign.heard


def test_links_in_a_control_plane_answer_are_not_followed(foreign: Listener) -> None:
    headers = f'Link: <{foreign.url}>; rel="next"\r\nRefresh: 0; url={foreign.url}\r\n'
    headers += f'Content-Location: {foreign.url}\r\nAlt-Svc: http/1.1="{foreign.url}"\r\n'
    body = b'{"next": "%s", "state": "JOB_STATE_RUNNING"}' % foreign.url.encode()
    with Listener(http(body, headers=headers.encode())) as listener:
        for _ in range(2):
            assert ask(Job(listener.url, "acct", "job-1")).state is JobState.RUNNING
    assert not foreign.heard


def test_environment_proxies_and_netrc_are_not_used(
    foreign: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, foreign.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Listener() as listener:
        assert ask(Job(listener.url, "acct", "job-1")).state is JobState.RUNNING
        (heard,) = listener.heard
    assert not foreign.heard
    assert leaks(heard) == ["the key"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"state": "%s"}' % CANARY.encode(),
        b'{"state": "JOB_STATE_%s"}' % CANARY.encode(),
        b'{"state": "JOB_STATE_%s"}' % CANARY.upper().encode(),
        b'{"state": ["%s"], "%s": 1}' % (CANARY.encode(), CANARY.encode()),
        CANARY.encode(),
    ],
    ids=range(5),
)
def test_key_echoed_by_the_control_plane_is_not_repeated(body: bytes) -> None:
    with Listener(http(body)) as listener:
        answer = ask(Job(listener.url, "acct", "job-1"))
    assert answer.state is JobState.UNKNOWN
    assert not leaks(repr(answer))


def test_failure_of_the_shim_is_logged_without_its_text(overheard: Overheard) -> None:
    _log.own_failure("testing", RuntimeError(with_credentials("https://api.example")), strict=False)
    assert "shim.failed" in overheard.events


# --- Whom the question may be put to -----------------------------------------------------

NOT_ASKED = "not asked, because its URL is not https"


@pytest.mark.parametrize(
    ("gateway", "configured", "asked"),
    [
        # The gateway's own origin.
        ("https://gateway.example", None, True),
        ("https://127.0.0.1:8443", None, True),
        ("http://127.0.0.1:8080", None, True),
        ("http://127.9.9.9:8080", None, True),
        ("http://[::1]:8080", None, True),
        ("http://localhost:8080", None, True),
        ("http://gateway.example", None, False),
        ("http://10.0.0.1:8080", None, False),
        ("http://127.0.0.1.example", None, False),
        ("http://localhost.example", None, False),
        ("http://0.0.0.0:8080", None, False),
        # What somebody said.
        ("http://gateway.example", "https://api.example", True),
        ("http://127.0.0.1:8080", "https://api.example", True),
        ("https://gateway.example", "https://api.example", True),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8081", True),
        ("http://localhost:8080", "http://[::1]:8081", True),
        ("https://gateway.example", "http://127.0.0.1:8081", False),
        ("https://127.0.0.1:8080", "http://127.0.0.1:8081", False),
        ("http://gateway.example", "http://127.0.0.1:8081", False),
    ],
)
@pytest.mark.parametrize("by", ["settings", "manager"])
def test_control_plane_is_asked_only_over_https_or_on_loopback(
    settings: Change,
    monkeypatch: pytest.MonkeyPatch,
    mocker: Any,
    overheard: Overheard,
    gateway: str,
    configured: str | None,
    asked: bool,
    by: str,
) -> None:
    settings(strict=False)
    if configured is not None and by == "settings":
        settings(control_plane_url=configured)
    elif configured is not None:
        address = Address(f"{configured}/", None, verify=True)
        _addresses.register(f"{gateway}/", Manager(lambda: address))
    # No host but this one may be asked here.
    fetch = mocker.patch.object(Connections, "fetch", return_value=(200, RUNNING, None))
    answer = ask(Job(gateway, "acct", "job-1"))
    assert (answer.state is JobState.RUNNING) is asked
    assert (answer.message == NOT_ASKED) is not asked
    assert fetch.call_count == asked
    if asked:
        assert fetch.call_args.args[0].root == (configured or gateway)
    assert overheard.events.count("control_plane.not_asked") == (not asked)


@pytest.mark.parametrize("root", ["http://api.example", "ftp://api.example", "api.example", ""])
def test_insecure_control_plane_of_a_manager_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, overheard: Overheard, root: str
) -> None:
    address = Address(root, {"x-api-key": CANARY}, verify=True)
    _addresses.register(JOB.gateway, Manager(lambda: address))
    control_plane = ControlPlane(JOB)

    async def questions() -> set[str]:
        first = await control_plane.ask({})
        control_plane._flights.clear()
        return {first.message, (await control_plane.ask({})).message}

    assert asyncio.run(questions()) == {NOT_ASKED}
    assert control_plane.questions == 0
    assert overheard.events.count("control_plane.not_asked") == 1


def test_managers_url_is_asked_without_its_credentials(
    monkeypatch: pytest.MonkeyPatch, overheard: Overheard
) -> None:
    with Listener() as listener:
        root = with_credentials(f"{listener.url}/eu/", query=True)
        address = Address(root, {"x-api-key": CANARY}, verify=True)
        _addresses.register(with_credentials(JOB.gateway), Manager(lambda: address))
        assert ask(JOB, {"X-API-Key": HEADER}).state is JobState.RUNNING
        (heard,) = listener.heard
    assert heard.startswith(b"GET /eu/v1/accounts/acct/rlorTrainerJobs/job-1 HTTP/1.1\r\n")
    assert leaks(heard) == ["the key"]
    assert overheard.requests
    # The address is as the program wrote it, and so would be shown.
    _addresses._managers.clear()


def test_insecure_control_plane_warns_at_the_first_connect(
    settings: Change, overheard: Overheard
) -> None:
    settings(strict=False)
    with pytest.warns(RoutefixWarning, match=r"http://gateway\.example is not https") as warned:
        ControlPlane(Job("http://gateway.example", "acct", "job-1"))
    (message,) = of_the_shim(warned)
    assert "TINKER_ROUTEFIX_CONTROL_PLANE_URL" in message


def test_insecure_control_plane_with_strict_refuses_to_connect(settings: Change) -> None:
    """Before one request is sent: nothing listens there."""
    settings(control_plane_url="http://127.0.0.1:8080")
    with pytest.raises(SettingError) as caught:
        programs.connect(with_credentials("https://127.0.0.1:9/training/v1/rlorTrainerJobs/a/j"))
    assert caught.value.value == "http://127.0.0.1:8080"
    assert "https URL for jobs behind https://127.0.0.1:9" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (with_credentials("https://api.example/v2"), "https://api.example"),
        (with_credentials("http://api.example", query=True), "http://api.example"),
        (f"https://api.example/#{TOKEN}", "https://api.example"),
        (f"https://api.example/?{TOKEN}", "https://api.example"),
        (f"http://api.example/{TOKEN}", "http://api.example"),
        (f"https://https://{USER}:{PASSWORD}@api.example", "https://https"),
        (f"https://{USER}:{PASSWORD}", "(hidden)"),
        (f"{USER}:{PASSWORD}@api.example", "(hidden)"),
        (f"ftp://{USER}:{PASSWORD}@api.example", "(hidden)"),
        (f"https://api.example\\{PASSWORD}", "(hidden)"),
        (f"https://api.example/\n{PASSWORD}", "(hidden)"),
        (CANARY, "(hidden)"),
    ],
)
def test_refused_url_hides_its_secrets(url: str, shown: str) -> None:
    variable = "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
    with pytest.raises(SettingError) as refused:
        Settings.from_environment({variable: url})
    assert (refused.value.name, refused.value.value) == (variable, shown)
    with pytest.raises(SettingError, match="control_plane_url"):
        Settings().replace(control_plane_url=url)


def test_url_refused_at_import_is_printed_without_its_secrets() -> None:
    url = with_credentials("https://api.example", query=True)
    ended = run_python("import tinker_routefix", TINKER_ROUTEFIX_CONTROL_PLANE_URL=url)
    assert ended.returncode == 1
    assert "='https://api.example' is not accepted: expected an https URL" in ended.stderr
