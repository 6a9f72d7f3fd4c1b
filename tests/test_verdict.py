"""Whose 404 it is, which job a URL leads to, and what the control plane's words mean."""

from __future__ import annotations

import json

import pytest

from tinker_routefix._control_plane import JobState, read_answer, state_of
from tinker_routefix._job import Job
from tinker_routefix._verdict import Verdict, of_body

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
def test_bodies(body: object, verdict: Verdict) -> None:
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
def test_broken_bodies_are_unknown_and_never_raise(body: bytes) -> None:
    assert of_body(body) is Verdict.UNKNOWN


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
        (f"https://api.example{ROUTE}%2F2", Job("https://api.example", "acct", "job-1%2F2")),
        (f"https://api.example{ROUTE}?key=1#2", Job("https://api.example", "acct", "job-1")),
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
        ("", None),
        ("nonsense", None),
    ],
)
def test_which_job_a_url_leads_to(url: str, job: Job | None) -> None:
    assert Job.from_url(url) == job


def test_a_job_knows_its_control_plane_and_its_own_addresses() -> None:
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
            JobState.ON_ITS_WAY,
            ["PENDING", "CREATING", "CREATING_INPUT_DATASET", "VALIDATING", "RE_QUEUEING"],
        ),
        (
            JobState.OVER,
            [
                *("FAILED", "CANCELLING", "CANCELLED", "COMPLETED", "EARLY_STOPPED", "PAUSED"),
                *("IDLE", "EXPIRED", "DELETING", "DELETING_CLEANING_UP", "DELETED", "ARCHIVED"),
                "WRITING_RESULTS",
            ],
        ),
        (JobState.UNKNOWN, ["UNSPECIFIED", "HIBERNATING", "", "running"]),
    ],
)
def test_job_states(state: JobState, words: list[str]) -> None:
    for word in words:
        assert state_of(f"JOB_STATE_{word}") is state
        assert state_of(word) is state
        assert read_answer(200, json.dumps({"state": f"JOB_STATE_{word}"}).encode())[0] is state


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (404, b'{"error": {"code": "NOT_FOUND"}}', JobState.OVER),
        (410, b"{}", JobState.OVER),
        (403, b"", JobState.OVER),
        (404, b"<html>nginx</html>", JobState.UNKNOWN),
        (401, b"{}", JobState.UNKNOWN),
        (302, b"", JobState.UNKNOWN),
        (429, b"{}", JobState.UNKNOWN),
        (500, b'{"state": "JOB_STATE_RUNNING"}', JobState.UNKNOWN),
        (204, b'{"state": "JOB_STATE_RUNNING"}', JobState.UNKNOWN),
        (200, b"", JobState.UNKNOWN),
        (200, b"null", JobState.UNKNOWN),
        (200, b"[]", JobState.UNKNOWN),
        (200, b"{}", JobState.UNKNOWN),
        (200, b'{"state": 2}', JobState.UNKNOWN),
        (200, b'{"state": ["JOB_STATE_RUNNING"]}', JobState.UNKNOWN),
        (200, b"\xff", JobState.UNKNOWN),
        (200, b"[" * 50_000, JobState.UNKNOWN),
    ],
)
def test_answers_of_the_control_plane(status: int, body: bytes, state: JobState) -> None:
    assert read_answer(status, body)[0] is state


def test_strange_words_of_the_control_plane_are_not_repeated() -> None:
    assert read_answer(200, b'{"state": "tml-secret"}')[1] == "a strange state"
    long = json.dumps({"state": "JOB_STATE_" + "X" * 1000}).encode()
    assert len(read_answer(200, long)[1]) <= 80
