"""What breaks inside of the shim: the program gets what it would get without it.

By default a failure of the shim's own is one line in the log. The tests run strict, where it
is an exception, so that none is overlooked; here are the ones that are meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker

import tinker_routefix
from tests import programs
from tests.programs import connect, exact, train
from tinker_routefix import _clients, _futures, _log, _manager, _refused, _threads
from tinker_routefix._answers import Kind, kind_of
from tinker_routefix._connecting import ConnectBudget
from tinker_routefix._connections import MARK
from tinker_routefix._job import Job
from tinker_routefix.lab import GATEWAY_404, Answer, Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Overheard

    Change = Callable[..., None]
    MakeLab = Callable[..., Lab]


def broken(*_: object, **__: object) -> Any:
    raise OSError("too many open files")


@pytest.fixture(autouse=True)
def _every_failure_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "_own_failures", _log.RateLimit(seconds=0))


def test_uninspectable_client_is_lent_all_the_same(
    lab: Lab, settings: Change, monkeypatch: pytest.MonkeyPatch, overheard: Overheard
) -> None:
    settings(strict=False)
    monkeypatch.setattr(_clients, "_pooled_client", broken)
    train(connect(lab.base_url))
    exact(lab, gradients=1, optim_steps=1)
    assert "shim.failed" in overheard.events
    assert "looking at a client" in "".join(overheard.lines)


def test_uninspectable_client_with_strict_raises_and_is_given_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(lab.base_url)
    with monkeypatch.context() as patch:
        patch.setattr(_clients, "_pooled_client", broken)
        with pytest.raises(OSError, match="too many"):
            programs.on_loop(client, broken)
    for pool in client.holder._client_pools.values():
        assert not any(pool._client_active_refcount)
    train(client)
    exact(lab, gradients=1, optim_steps=1)


def test_failed_replay_preparation_raises_tinkers_404(
    lab: Lab, settings: Change, monkeypatch: pytest.MonkeyPatch, overheard: Overheard
) -> None:
    client = connect(lab.base_url)
    settings(strict=False)
    monkeypatch.setattr(_refused, "Replay", broken)
    lab.fault(Fault(kinds=["forward_backward"]))
    with pytest.raises(tinker.NotFoundError) as caught:
        train(client)
    programs.gateway_404(caught.value)
    assert "shim.failed" in overheard.events


def test_submission_that_cannot_be_compared_is_sent_and_its_404_raised(
    lab: Lab, settings: Change, overheard: Overheard
) -> None:
    """To notice a step that is repeated is not worth an error."""
    settings(strict=False)
    client = connect(lab.base_url)

    def submit(**more: object) -> object:
        body = {"model_id": client.model_id, **more}
        return programs.on_loop(
            client, lambda http: http.post("/api/v1/weight_sync", body=body, cast_to=httpx.Response)
        )

    lab.end_job()
    # Keys of two kinds cannot be sorted.
    for more in ({}, {"names": {1: "one", "two": 2}}):
        with pytest.raises(tinker.NotFoundError) as caught:
            submit(**more)
        programs.gateway_404(caught.value)
    assert lab.count("other", refused=True) == 2
    assert "comparing a submission" in "".join(overheard.lines)
    assert "noting a 404" in "".join(overheard.lines)


def test_replay_without_a_fresh_connection_uses_the_old_one(
    lab: Lab, settings: Change, monkeypatch: pytest.MonkeyPatch, overheard: Overheard
) -> None:
    client = connect(lab.base_url)
    settings(strict=False, base_delay=0.2)
    monkeypatch.setattr(_clients.Pool, "replacement", lambda _: broken)
    lab.fault(Fault(kinds=["forward_backward"], count=2))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    assert "opening a fresh connection" in "".join(overheard.lines)
    sent = [e.connection for e in lab.exchanges if e.kind == "forward_backward"]
    assert len(sent) >= 3


def test_failed_close_of_a_retired_connection_is_harmless(
    lab: Lab, settings: Change, monkeypatch: pytest.MonkeyPatch, overheard: Overheard
) -> None:
    async def unclosable(*_: object) -> None:
        broken()

    client = connect(lab.base_url)
    settings(base_delay=0.2)
    monkeypatch.setattr(_clients.Pool, "close", unclosable)
    lab.fault(Fault(kinds=["forward_backward"], count=2))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    assert "connection.close_failed" in overheard.events
    assert not _threads._tasks


def test_unreadable_job_manager_is_made_all_the_same(
    settings: Change, overheard: Overheard
) -> None:
    class Manager:
        base_url = property(broken)

    made: list[tuple[Any, ...]] = []

    def init(*args: Any, **kwargs: Any) -> None:
        made.append((args, kwargs))

    with pytest.raises(OSError, match="too many"):
        _manager.note_manager(init, Manager(), ("key",), {"verify": False})
    settings(strict=False)
    _manager.note_manager(init, Manager(), ("key",), {"verify": False})
    assert made == [(("key",), {"verify": False})] * 2
    assert "noting a job manager" in "".join(overheard.lines)


# --- What tinker may hand over -----------------------------------------------------------


class AnsweredError(Exception):
    def __init__(self, response: object) -> None:
        super().__init__("404")
        self.response = response


JOB = Job("https://gateway.example", "acct", "job")
URL = f"{JOB.gateway}/training/v1/rlorTrainerJobs/acct/job/api/v1/optim_step"


def test_incomplete_response_is_not_a_gateway_404() -> None:
    request = httpx.Request("POST", URL)
    whole = httpx.Response(404, content=GATEWAY_404.content, request=request)
    assert kind_of(AnsweredError(whole), JOB) is Kind.GATEWAY_404
    without_request = httpx.Response(404, content=GATEWAY_404.content)
    unread = httpx.Response(404, stream=httpx.ByteStream(GATEWAY_404.content), request=request)
    assert kind_of(AnsweredError(without_request), JOB) is Kind.ANSWER
    assert kind_of(AnsweredError(unread), JOB) is Kind.ANSWER
    assert kind_of(AnsweredError(None), JOB) is Kind.NO_ANSWER
    assert kind_of(ValueError("no answer at all"), JOB) is Kind.NO_ANSWER
    not_ready = httpx.Response(503, stream=httpx.ByteStream(b"{}"), request=request)
    assert kind_of(AnsweredError(not_ready), JOB) is Kind.ANSWER


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_error_shows_the_route_unless_it_is_a_gateways_for_want_of_the_pod(
    status: int,
) -> None:
    request = httpx.Request("POST", URL)
    pods = httpx.Response(status, json={"detail": "busy"}, request=request)
    gateways = httpx.Response(status, content=b"<html>Bad Gateway</html>", request=request)
    assert kind_of(AnsweredError(pods), JOB) is Kind.ANSWER
    expected = Kind.ANSWER if status == 500 else Kind.NO_ANSWER
    assert kind_of(AnsweredError(gateways), JOB) is expected


def test_warm_up_of_an_unnamed_model_probes_another_path(lab: Lab) -> None:
    """The name comes from an object of tinker's that no contract says anything of."""

    async def warm_up(http: Any) -> None:
        pooled = getattr(http, MARK)
        await _futures._warm_up(pooled, None, None, ConnectBudget())

    programs.on_loop(programs.service(lab.base_url), warm_up)
    assert [e.kind for e in lab.exchanges][-3:] == ["capabilities"] * 3
    assert programs.job_of(lab).route == "warm"


# --- A connection that is not ours to replace --------------------------------------------


def test_users_http_client_is_kept_and_used(make_lab: MakeLab) -> None:
    """Warm-up, probes and replays go over it, and it stays open."""
    lab = make_lab()
    sent: list[str] = []

    async def note(request: httpx.Request) -> None:
        sent.append(request.url.path.rpartition("/")[2])

    own = httpx.AsyncClient(event_hooks={"request": [note]}, follow_redirects=True)
    try:
        service = tinker.ServiceClient(base_url=lab.base_url, http_client=own)
    except (FutureWarning, TypeError):
        pytest.skip("this release takes none")
    client = programs.settled(service.create_lora_training_client(base_model="lab/base", rank=8))
    lab.fault(Fault(kinds=["forward_backward"], seconds=3))
    train(client)
    exact(lab, gradients=1, optim_steps=1)
    assert not own.is_closed
    assert sent.count("get_info") > 3
    assert sent.count("forward_backward") == lab.count("forward_backward") >= 2


async def twice(http: Any) -> None:
    for _ in range(2):
        await http.get("/api/v1/healthz", cast_to=object)


def test_holder_of_a_replaced_client_sends_over_the_new_one(lab: Lab, settings: Change) -> None:
    """The program's loan outlives the client: it is closed once the loan is over."""
    settings(base_delay=0.2)
    client = connect(lab.base_url)
    lab.fault(Fault(kinds=["healthz"], count=1))
    before = len(lab.exchanges)
    programs.on_loop(client, twice)
    refused, replayed, second = [e for e in lab.exchanges[before:] if e.kind == "healthz"]
    assert refused.refused
    assert replayed.connection == second.connection != refused.connection
    train(client)
    exact(lab, gradients=1, optim_steps=1)


def test_probe_with_a_pod_error_releases_the_waiters(lab: Lab, settings: Change) -> None:
    """A full wait would be longer than the test allows."""
    client = connect(lab.base_url)
    settings(base_delay=60, max_delay=60, retry_budget=120)
    lab.fault(Fault(kinds=["get_info"], at="pod", answer=Answer(500, {"detail": "no"})))
    lab.fault(Fault(kinds=["poll"], seconds=1))
    with programs.took(0, 45):
        train(client)
    exact(lab, gradients=1, optim_steps=1)


# --- Settings that come too late ---------------------------------------------------------


def test_configure_after_connect_raises_runtime_error(lab: Lab) -> None:
    connect(lab.base_url)
    with pytest.raises(RuntimeError, match="too late"):
        tinker_routefix.configure(retry_budget=60)
