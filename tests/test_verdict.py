"""Whose 404 it is, which job a URL leads to, and what the control plane's responses mean."""

from __future__ import annotations

import asyncio
import json
import string
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tinker_routefix._job import Job, base_of
from tinker_routefix._job_state import JobState, Told, read_answer, state_of
from tinker_routefix._verdict import MAX_BODY, Verdict, is_route_not_ready, is_the_pods, of_body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_mock import MockerFixture

# Threads of clients that other tests have left draw their own numbers meanwhile.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")

fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
"""The same examples in every run."""

GATEWAY = {
    "error": {
        "message": "Trainer job not found or not running",
        "param": "jobId",
        "code": "NOT_FOUND",
    }
}


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (GATEWAY, Verdict.GATEWAY),
        ({"error": {"code": "NOT_FOUND"}}, Verdict.GATEWAY),
        ({"error": {"code": "NOT_FOUND"}, "detail": "both"}, Verdict.GATEWAY),
        ({"detail": "Not Found"}, Verdict.POD),
        ({"detail": [{"loc": ["body"], "msg": "?"}]}, Verdict.POD),
        ({"detail": None}, Verdict.POD),
        ({"error": {"code": "ROUTE_NOT_READY"}}, Verdict.UNKNOWN),
        ({"error": "NOT_FOUND"}, Verdict.UNKNOWN),
        ({"error": {"code": 404}}, Verdict.UNKNOWN),
        ({"error": None, "detail": "x"}, Verdict.UNKNOWN),
        ({}, Verdict.UNKNOWN),
        ([], Verdict.UNKNOWN),
        (["detail"], Verdict.UNKNOWN),
        ("detail", Verdict.UNKNOWN),
        (404, Verdict.UNKNOWN),
        (None, Verdict.UNKNOWN),
    ],
)
def test_404_body_is_attributed_to_gateway_pod_or_nobody(body: object, verdict: Verdict) -> None:
    assert of_body(json.dumps(body).encode()) is verdict
    assert of_body(json.dumps(body, indent=2).encode("utf-16")) is verdict


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"<html>404</html>",
        b'{"error": {"code": "NOT_FO',
        b"\xff\xfe\x00\x01binary",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"detail": "' + b"x" * 10_000_000 + b'"}',
        b'{"detail": "\xff"}',
        b"9" * 5000,
    ],
    ids=range(10),
)
def test_broken_body_is_unknown_and_never_raises(body: bytes) -> None:
    assert of_body(body) is Verdict.UNKNOWN


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)
OBJECTS = st.dictionaries(st.sampled_from(["error", "detail", "message", "code"]), DOCUMENTS)


SPELLINGS = st.tuples(st.sampled_from(ENCODINGS), st.booleans(), st.sampled_from([None, 3]))


def spelt(document: object, spelling: tuple[str, bool, int | None]) -> bytes:
    encoding, escaped, indent = spelling
    text = json.dumps(document, ensure_ascii=escaped, indent=indent)
    return text.encode(encoding, "surrogatepass")


@pytest.mark.slow
@fuzz
@given(OBJECTS, st.dictionaries(st.text(), DOCUMENTS), SPELLINGS)
def test_body_with_the_gateways_code_is_the_gateways(
    document: dict[str, Any], error: dict[str, Any], spelling: Any
) -> None:
    document["error"] = {**error, "code": "NOT_FOUND"}
    assert of_body(spelt(document, spelling)) is Verdict.GATEWAY


@fuzz
@given(OBJECTS, DOCUMENTS, SPELLINGS)
def test_body_with_detail_and_no_error_is_the_pods(
    document: dict[str, Any], detail: Any, spelling: Any
) -> None:
    document["detail"] = detail
    document.pop("error", None)
    assert of_body(spelt(document, spelling)) is Verdict.POD


@fuzz
@given(DOCUMENTS | OBJECTS, SPELLINGS)
def test_any_other_body_is_unknown(document: Any, spelling: Any) -> None:
    if isinstance(document, dict):
        error = document.get("error")
        assume(not (isinstance(error, dict) and error.get("code") == "NOT_FOUND"))
        assume("detail" not in document or "error" in document)
    assert of_body(spelt(document, spelling)) is Verdict.UNKNOWN


@fuzz
@given(OBJECTS, st.data())
def test_truncated_body_is_unknown(document: dict[str, Any], data: st.DataObject) -> None:
    body = json.dumps({**document, **GATEWAY}).encode()
    cut = data.draw(st.integers(0, len(body) - 1))
    assert of_body(body[:cut]) is Verdict.UNKNOWN
    assert of_body(body + body[:cut]) is (Verdict.UNKNOWN if cut else Verdict.GATEWAY)


@fuzz
@given(st.binary(max_size=2000), st.integers(0, 101), st.integers(0, 101))
def test_random_bytes_never_raise(noise: bytes, start: int, end: int) -> None:
    assert of_body(noise) in Verdict
    body = json.dumps(GATEWAY).encode()
    assert of_body(body[:start] + noise + body[end:]) in Verdict
    assert read_answer(200, noise)[0] in Told


ROUTE = "/training/v1/rlorTrainerJobs/acct/job-1"


@pytest.mark.parametrize(
    ("url", "job"),
    [
        (f"https://api.example{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example{ROUTE}/", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example{ROUTE}/api/v1/x", Job("https://api.example", "acct", "job-1")),
        (f"HTTPS://API.Example{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"http://127.0.0.1:8080{ROUTE}", Job("http://127.0.0.1:8080", "acct", "job-1")),
        (f"http://[::1]:8080{ROUTE}", Job("http://[::1]:8080", "acct", "job-1")),
        (f"https://api.example/eu{ROUTE}", Job("https://api.example/eu", "acct", "job-1")),
        (f"https://user:key@api.example{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example{ROUTE}%202", Job("https://api.example", "acct", "job-1%202")),
        (f"https://api.example{ROUTE}?key=1#2", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example:443{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"http://api.example:0080{ROUTE}", Job("http://api.example", "acct", "job-1")),
        (f"http://api.example:443{ROUTE}", Job("http://api.example:443", "acct", "job-1")),
        (f"https://api.example:{ROUTE}//", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example/{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"https://[2001:DB8::1]{ROUTE}", Job("https://[2001:db8::1]", "acct", "job-1")),
        (f"https://a@b:c@api.example{ROUTE}", Job("https://api.example", "acct", "job-1")),
        (f"https://api.example{ROUTE}{ROUTE}2", Job("https://api.example", "acct", "job-1")),
        ("https://api.example", None),
        ("https://tinker.example/services/tinker-prod", None),
        ("https://api.example/training/v1/serverless", None),
        ("https://api.example/training/v1/rlorTrainerJobs/acct", None),
        ("https://api.example/training/v1/rlorTrainerJobs/acct/", None),
        ("https://api.example/training/v1/rlorTrainerJobs//job", None),
        ("https://api.example/training/v1/rlorTrainerJobs/../job", None),
        ("https://api.example/training/v1/rlorTrainerJobs/acct/..", None),
        ("https://api.example/training/v1/RLORTRAINERJOBS/acct/job", None),
        (f"https://api.example/?next={ROUTE}", None),
        (f"ftp://api.example{ROUTE}", None),
        (f"https://{ROUTE}", None),
        (f"https://api.example:port{ROUTE}", None),
        (f"https://[::1{ROUTE}", None),
        (f"https://[fe80::1%25lo]{ROUTE}", None),
        (f"https://api%2eexample{ROUTE}", None),
        (f"https://api.example\\@other.example{ROUTE}", None),
        (f"https://api.example:99999{ROUTE}", None),
        (f"https://bücher.example{ROUTE}", None),
        (f"https://api.exam\nple{ROUTE}", None),
        (f"https://api.example{ROUTE}%2F2", None),
        (f"https://api.example{ROUTE}%5c2", None),
        (f"https://api.example{ROUTE}/../job-2", None),
        (f"https://api.example{ROUTE}/%2e%2E/job-2", None),
        (f"https://api.example/eu/..{ROUTE}", None),
        (f"https://api.example/eu/.%2E{ROUTE}", None),
        ("https://api.example/training/v1/rlorTrainerJobs/acct%2Fx/job", None),
        ("https://api.example/training/v1/rlorTrainerJobs/%2e%2e/job", None),
        ("https://api.example/training/v1/rlorTrainerJobs/acct/.%2e", None),
        ("https://api.example/training/v1%2FrlorTrainerJobs/acct/job", None),
        ("", None),
        ("nonsense", None),
    ],
)
def test_job_from_url_accepts_only_trainer_routes(url: str, job: Job | None) -> None:
    assert Job.from_url(url) == job


# Mostly what is right: of nothing but noise, no URL in a thousand is a route.
SEGMENTS = st.one_of(
    st.text("abz09-._~%:;=@!$&'()*+,", min_size=1, max_size=5),
    st.sampled_from(
        [".", "..", "%2e%2E", "a%2Fb", "a%5Cb", "a%00", "%", "a b", "ä", "\\", "", '"']
    ),
    st.text(max_size=3),
)
HOSTS = st.one_of(
    st.text(string.ascii_letters + string.digits + ".-", min_size=1, max_size=8),
    st.sampled_from(["127.0.0.1", "[::1]", "[2001:DB8::1]", "[::ffff:1.2.3.4]", "LOCALHOST"]),
    st.sampled_from(
        ["", "a%2e", "[::1", "[::1%25lo]", "[v1.x]", "ä.example", "a b", "a\\b", "a;b"]
    ),
)
USERS = st.sampled_from(["", "", "me@", "me:there@", "me:th%40re@", "@", ":@", "a@b@", "\\@", "?@"])
PORTS = st.sampled_from(["", "", ":80", ":443", ":8080", ":0443", ":", ":0", ":65536", ":x", ":-1"])
TAILS = st.sampled_from(["", "", "/", "//", "/api/v1/x", "/../x", "?a=/b", "#/c", "?", ";x"])


@st.composite
def urls(draw: st.DrawFn) -> str:
    scheme = draw(st.sampled_from(["http", "https", "https", "HTTPS", "Http", "ftp", "wss"]))
    prefix = "".join(f"/{segment}" for segment in draw(st.lists(SEGMENTS, max_size=2)))
    account, name = draw(SEGMENTS), draw(SEGMENTS)
    route = f"/training/v1/rlorTrainerJobs/{account}/{name}"
    place = draw(USERS) + draw(HOSTS) + draw(PORTS)
    return f"{scheme}://{place}{prefix}{route}{draw(TAILS)}"


def place_of(url: httpx.URL) -> tuple[str, bytes, int]:
    """Where httpx would connect to."""
    return url.scheme, url.raw_host.lower(), url.port or {"http": 80, "https": 443}[url.scheme]


@pytest.mark.slow
@settings(fuzz, max_examples=2000)
@given(urls() | st.text())
def test_job_from_url_is_where_httpx_sends_its_requests(url: str) -> None:
    """What is taken for a route is taken for the same place and the same path by httpx."""
    job = Job.from_url(url)
    try:
        sent_to = httpx.URL(url)
    except httpx.InvalidURL:
        return
    if job is None:
        return
    asked = httpx.URL(job.control_plane_url())
    assert place_of(asked) == place_of(sent_to)
    assert (asked.userinfo, asked.query, asked.fragment) == (b"", b"", "")
    # Nothing in it that is read in another way further on, or by another party.
    assert str(asked) == job.control_plane_url()
    for path in (asked.path, sent_to.path):
        assert not {".", ".."} & set(path.split("/"))
    account, name = f"/v1/accounts/{job.account}", f"/rlorTrainerJobs/{job.name}"
    assert asked.raw_path.decode().endswith(account + name)
    prefix = asked.raw_path.decode().removesuffix(account + name)
    route = f"{prefix}/training/v1/rlorTrainerJobs/{job.account}/{job.name}"
    path = sent_to.raw_path.decode().partition("?")[0]
    assert f"{path.rstrip('/')}/".startswith((f"{route}/", f"{prefix}/{route}/")) or "//" in path
    assert len(httpx.URL(f"http://h{account}{name}").path.split("/")) == 6
    # The spelling that tinker hands over, and the addresses of its requests.
    assert Job.from_url(str(sent_to)) == job
    assert job.owns(str(sent_to.copy_with(raw_path=f"{route}/api/v1/get_info".encode())))
    assert not job.owns(str(sent_to.copy_with(host="other.example")))
    assert not job.owns(str(sent_to.copy_with(raw_path=f"{route}0/api/v1/get_info".encode())))


PLAIN = st.text("abz09-._~%:;=@!$&'()*+,", min_size=1, max_size=8).filter(
    lambda segment: segment.strip(".") and "%" not in segment
)


@fuzz
@given(
    st.sampled_from([("http", ":80"), ("https", ":443")]),
    st.sampled_from(["api.example", "127.0.0.1", "[2001:db8::1]"]),
    st.lists(PLAIN, max_size=2).map("/".join),
    PLAIN,
    PLAIN,
    st.sampled_from(["", "user@", "user:key@", "@"]),
    st.sampled_from(["", "/", "//", "/api/v1", "?x=1", "#x", "/?x#y"]),
)
def test_job_from_url_is_equal_for_every_spelling(
    scheme: tuple[str, str], host: str, prefix: str, account: str, name: str, user: str, end: str
) -> None:
    gateway = f"{scheme[0]}://{host}/{prefix}".rstrip("/")
    job = Job(gateway, account, name)
    assert base_of(gateway) == gateway
    path = f"{gateway.partition(host)[2]}/training/v1/rlorTrainerJobs/{account}/{name}{end}"
    for port in ("", ":", scheme[1], f":00{scheme[1][1:]}"):
        assert Job.from_url(f"{scheme[0]}://{user}{host}{port}{path}") == job
        assert Job.from_url(f"{scheme[0].upper()}://{user}{host.upper()}{port}{path}") == job
        assert base_of(f"{scheme[0].title()}://{user}{host.upper()}{port}/{prefix}") == gateway
    other = Job.from_url(f"{scheme[0]}://{user}{host}:8080{path}")
    assert other == Job(gateway.replace(host, f"{host}:8080", 1), account, name)


@pytest.mark.parametrize(
    ("url", "route"),
    [
        ("https://h" + "/" * 60_000, False),
        ("https://" + "a" * 60_000, False),
        ("https://h/" + "a/" * 30_000, False),
        ("https://h" + "/training/v1/rlorTrainerJobs" * 2_000, True),
        ("https://h/" + "%2e" * 20_000 + ROUTE, True),
        (f"https://h{ROUTE}" * 1_000 + "\x7f", False),
    ],
    ids=range(6),
)
def test_job_from_a_long_url_is_parsed_quickly(url: str, route: bool) -> None:
    """With a pattern that goes back and forth over it, it would take minutes."""
    assert (Job.from_url(url) is not None) is route


def test_job_knows_its_control_plane_and_its_own_urls() -> None:
    job = Job("https://api.example", "acct", "job-1")
    assert job.control_plane_url() == "https://api.example/v1/accounts/acct/rlorTrainerJobs/job-1"
    assert job.control_plane_url("https://cp.example/x").startswith("https://cp.example/x/v1/acc")
    assert job.owns(f"https://api.example{ROUTE}/api/v1/get_info")
    assert not job.owns(f"https://api.example{ROUTE}0/api/v1/get_info")
    assert not job.owns(f"https://other.example{ROUTE}/api/v1/get_info")
    assert not job.owns("https://store.example/weights")
    assert str(job) == "acct/job-1"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (JobState.RUNNING, ["RUNNING"]),
        (
            JobState.STARTING,
            ["PENDING", "CREATING", "CREATING_INPUT_DATASET", "VALIDATING", "RE_QUEUEING"],
        ),
        (
            JobState.ENDED,
            [
                *("FAILED", "CANCELLING", "CANCELLED", "COMPLETED", "EARLY_STOPPED", "PAUSED"),
                *("IDLE", "EXPIRED", "DELETING", "DELETING_CLEANING_UP", "DELETED", "ARCHIVED"),
                "WRITING_RESULTS",
            ],
        ),
        (JobState.UNKNOWN, ["UNSPECIFIED", "HIBERNATING", "", "running"]),
    ],
)
def test_job_state_words_give_their_class(state: JobState, words: list[str]) -> None:
    for word in words:
        assert state_of(f"JOB_STATE_{word}") is state
        assert state_of(word) is state
        assert (
            read_answer(200, json.dumps({"state": f"JOB_STATE_{word}"}).encode())[0].state is state
        )


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        # About the job: in the API's own shape, a `google.rpc.Status`.
        (404, b'{"code": 5, "message": "no such job", "details": []}', Told.GONE),
        (404, b'{"code": "NOT_FOUND"}', Told.GONE),
        (404, b'{"error": {"code": "NOT_FOUND"}}', Told.GONE),
        (404, b'{"error": {"code": 404, "status": "NOT_FOUND"}}', Told.GONE),
        (403, b'{"code": 7, "message": "permission denied"}', Told.GONE),
        (403, b'{"error": {"code": 403, "status": "PERMISSION_DENIED"}}', Told.GONE),
        # An API may hide a job that is not visible, and name one that is not there.
        (404, b'{"code": 7}', Told.GONE),
        (403, b'{"code": 5}', Told.GONE),
        # Anybody else's: Kong, FastAPI, AWS, a firewall, nginx, Google's own frontend.
        (404, b'{"message": "no Route matched with those values"}', Told.QUESTION_REFUSED),
        (404, b'{"detail": "Not Found"}', Told.QUESTION_REFUSED),
        (404, b'{"error": {"code": 404, "message": "x"}}', Told.QUESTION_REFUSED),
        (404, b'{"error": "NOT_FOUND"}', Told.QUESTION_REFUSED),
        (404, b'{"code": ["NOT_FOUND"], "status": null}', Told.QUESTION_REFUSED),
        (404, b'[{"code": 5}]', Told.QUESTION_REFUSED),
        (404, b"<html>nginx</html>", Told.QUESTION_REFUSED),
        (404, b"", Told.QUESTION_REFUSED),
        (403, b'{"message": "Missing Authentication Token"}', Told.QUESTION_REFUSED),
        (403, b'{"message": "Forbidden"}', Told.QUESTION_REFUSED),
        (403, b"<html>Request blocked</html>", Told.QUESTION_REFUSED),
        (403, b"", Told.QUESTION_REFUSED),
        # Right shape, another status.
        (410, b'{"code": 5}', Told.QUESTION_REFUSED),
        (400, b'{"code": 5}', Told.QUESTION_REFUSED),
        (500, b'{"code": 5}', Told.NOTHING),
        (200, b'{"code": 5}', Told.QUESTION_REFUSED),
        # The question itself.
        (401, b"{}", Told.QUESTION_REFUSED),
        (400, b"{}", Told.QUESTION_REFUSED),
        (405, b"{}", Told.QUESTION_REFUSED),
        (302, b"", Told.QUESTION_REFUSED),
        (204, b'{"state": "JOB_STATE_RUNNING"}', Told.QUESTION_REFUSED),
        # An answer that cannot be read.
        (200, b"", Told.QUESTION_REFUSED),
        (200, b"null", Told.QUESTION_REFUSED),
        (200, b"[]", Told.QUESTION_REFUSED),
        (200, b"{}", Told.QUESTION_REFUSED),
        (200, b'{"state": 2}', Told.QUESTION_REFUSED),
        (200, b'{"state": ["JOB_STATE_RUNNING"]}', Told.QUESTION_REFUSED),
        (200, b"\xff", Told.QUESTION_REFUSED),
        (200, b"[" * 50_000, Told.QUESTION_REFUSED),
        # Nothing for now.
        (408, b"{}", Told.NOTHING),
        (429, b"{}", Told.NOTHING),
        (500, b'{"state": "JOB_STATE_RUNNING"}', Told.NOTHING),
        (502, b"", Told.NOTHING),
        (503, b"", Told.NOTHING),
        (504, b"", Told.NOTHING),
        (200, b'{"state": "JOB_STATE_HIBERNATING"}', Told.NOTHING),
        # A state.
        (200, b'{"state": "JOB_STATE_RUNNING"}', Told.RUNNING),
        (200, b'{"state": "JOB_STATE_CREATING"}', Told.STARTING),
        (200, b'{"state": "JOB_STATE_PAUSED"}', Told.ENDED),
    ],
)
def test_control_plane_status_and_body_give_what_it_tells(
    status: int, body: bytes, told: Told
) -> None:
    assert read_answer(status, body)[0] is told


def test_refused_key_is_named_and_another_status_is_not_taken_for_it() -> None:
    assert read_answer(401, b"")[1] == "the key was refused (HTTP 401)"
    assert read_answer(418, b"")[1] == "HTTP 418"


@pytest.mark.parametrize("told", Told)
def test_every_kind_of_answer_means_a_job_state(told: Told) -> None:
    known = {
        Told.RUNNING: JobState.RUNNING,
        Told.STARTING: JobState.STARTING,
        Told.ENDED: JobState.ENDED,
        Told.GONE: JobState.ENDED,
    }
    assert told.state is known.get(told, JobState.UNKNOWN)


@pytest.mark.parametrize(
    "word",
    [
        "tml-secret",
        "JOB_STATE_tml-secret",
        "JOB_STATE_TML-5F2C",
        "JOB_STATE_5F2C",
        "JOB_STATE_",
        "JOB_STATE_X\n",
        "JOB_STATE_X\nroute.recovered: all is well",
        "JOB_STATE_\u202e",
        "JOB_STATE_" + "X" * 1000,
        "\ud800",
    ],
)
def test_malformed_state_word_is_not_repeated(word: str) -> None:
    answer = read_answer(200, json.dumps({"state": word}).encode())
    assert answer == (Told.NOTHING, "a strange state")


def test_new_state_word_is_shown() -> None:
    answer = read_answer(200, b'{"state": "JOB_STATE_HIBERNATING"}')
    assert answer == (Told.NOTHING, "JOB_STATE_HIBERNATING")


STATES = st.sampled_from(["JOB_STATE_RUNNING", "RUNNING", "JOB_STATE_FAILED", "JOB_STATE_X"])


@fuzz
@given(
    st.sampled_from([200, 200, 200, 201, 202, 204, 206, 300, 304, 403, 404, 410, 418, 500, 599]),
    st.dictionaries(st.sampled_from(["state", "status", "job"]), STATES | DOCUMENTS) | DOCUMENTS,
    SPELLINGS,
)
def test_only_a_200_that_says_running_is_running(status: int, document: Any, spelling: Any) -> None:
    said_so = isinstance(document, dict) and document.get("state") in (
        "JOB_STATE_RUNNING",
        "RUNNING",
    )
    state, said = read_answer(status, spelt(document, spelling))
    assert (state is Told.RUNNING) == (status == 200 and said_so)
    assert said.isprintable()
    assert len(said) <= 80


# --- Cures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "document", "fixed"),
    [
        (503, {"queue_state": "route_not_ready"}, True),
        (503, {"error": {"queue_state": "route_not_ready"}}, True),
        (503, {"detail": {"queue_state": "route_not_ready"}}, True),
        (503, {"queue_state": "paused"}, False),
        (503, {"error": {"code": "ROUTE_STALE"}}, False),
        (503, [], False),
        (503, None, False),
        (404, {"error": {"code": "ROUTE_STALE"}}, False),
        (404, {"error": {"code": "NOT_FOUND"}}, False),
        (404, {"error": {"code": 7}}, False),
        (404, {"error": "ROUTE_STALE"}, False),
        (404, {"detail": "Not Found"}, False),
        (404, {"queue_state": "route_not_ready"}, False),
        (404, None, False),
        (429, {"queue_state": "route_not_ready", "error": {"code": "ROUTE_STALE"}}, False),
        (504, {"queue_state": "route_not_ready"}, False),
    ],
)
def test_fixed_gateway_is_recognised_by_status_and_body(
    status: int, document: Any, fixed: bool
) -> None:
    body = b"\xff{" if document is None else json.dumps(document).encode()
    assert is_route_not_ready(status, body) is fixed


class Tries:
    """What is sent to find out whose a 404 is, in order, and how it ends."""

    def __init__(self, answered: Iterable[bool], refused: Iterable[bool]) -> None:
        self._answered, self._refused = iter(answered), iter(refused)
        self.sent: list[str] = []

    async def probe(self) -> bool:
        self.sent.append("probe")
        return next(self._answered)

    async def request(self) -> bool:
        self.sent.append("request")
        return next(self._refused)

    async def pause(self, seconds: float) -> None:
        self.sent.append(f"{seconds} s")


@pytest.mark.parametrize(("probes", "take"), [(1, min), (2, max)])
def test_404_is_the_pods_after_three_in_a_row_beside_answered_probes(
    mocker: MockerFixture, probes: int, take: Callable[..., int]
) -> None:
    mocker.patch("random.choice", take)
    tries = Tries([True] * 6, [True] * 3)
    assert asyncio.run(is_the_pods(tries.probe, tries.request, tries.pause))
    one = ["probe"] * probes + ["request"]
    assert tries.sent == [*one, "0.5 s", *one, "0.5 s", *one]


@pytest.mark.parametrize(
    ("answered", "refused", "sent"),
    [
        ([True, False], [True], "probe request probe"),
        ([True, True], [True, False], "probe request probe request"),
    ],
    ids=["a probe is not answered", "the request is not refused"],
)
def test_404_is_not_the_pods_where_one_try_speaks_against_it(
    mocker: MockerFixture, answered: list[bool], refused: list[bool], sent: str
) -> None:
    mocker.patch("random.choice", min)
    tries = Tries(answered, refused)
    assert not asyncio.run(is_the_pods(tries.probe, tries.request))
    assert " ".join(tries.sent) == sent


def test_body_over_the_size_limit_shows_no_fixed_gateway() -> None:
    body = json.dumps({"queue_state": "route_not_ready", "more": "x" * MAX_BODY})
    assert not is_route_not_ready(503, body.encode())


@fuzz
@given(st.sampled_from([404, 410, 503]), st.binary(max_size=200) | st.text().map(str.encode))
def test_looking_for_a_fixed_gateway_never_raises(status: int, body: bytes) -> None:
    is_route_not_ready(status, body)
