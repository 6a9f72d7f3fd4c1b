"""The lab itself, with plain HTTP clients: what the other tests are built on has to be right."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
import pytest
import zstandard

from tests.common import unexplained_executions
from tinker_routefix.lab import (
    GATEWAY_404,
    KINDS,
    Answer,
    Exchange,
    Execution,
    Fault,
    Lab,
    Ledger,
    _wire,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.trains_twice


class Client:
    """A trainer's client in the smallest sense: it sends, and never retries."""

    def __init__(self, base_url: str) -> None:
        self.http = httpx.Client(base_url=base_url, trust_env=False, timeout=10)

    def post(self, path: str, /, **said: Any) -> httpx.Response:
        return self.http.post(f"/api/v1/{path}", json=said)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(f"/api/v1/{path}")

    def session(self) -> str:
        return str(self.post("create_session", tags=[]).json()["session_id"])

    def model(self) -> str:
        submitted = self.post(
            "create_model", session_id=self.session(), model_seq_id=0, base_model="lab/base"
        )
        return str(self.result(submitted)["model_id"])

    def step(self, path: str, model_id: str, seq_id: int, /, **said: Any) -> httpx.Response:
        return self.post(path, model_id=model_id, seq_id=seq_id, **said)

    def result(self, submitted: httpx.Response) -> Any:
        request_id = submitted.json()["request_id"]
        return self.post("retrieve_future", request_id=request_id).json()


@pytest.fixture
def connect() -> Iterator[Callable[[str], Client]]:
    clients: list[Client] = []

    def connect(base_url: str) -> Client:
        clients.append(Client(base_url))
        return clients[-1]

    yield connect
    for client in clients:
        client.http.close()


@pytest.fixture
def client(lab: Lab, connect: Callable[[str], Client]) -> Client:
    return connect(lab.base_url)


DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}},
}


def batch(datums: int = 2) -> dict[str, Any]:
    return {"forward_backward_input": {"data": [DATUM] * datums, "loss_fn": "cross_entropy"}}


def request_message(model_id: str, *, forward_only: bool = False) -> bytes:
    message = _wire._CLASSES["ForwardBackwardRequest"](
        model_id=model_id, seq_id=1, forward_only=forward_only
    )
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(12)
    datum.loss_fn_inputs["target_tokens"].shape.append(3)
    return bytes(message.SerializeToString())


# -- the trainer -------------------------------------------------------------------------------


def test_training_step_is_executed_once_and_in_order(lab: Lab, client: Client) -> None:
    model = client.model()
    trained = client.result(client.step("forward_backward", model, 1, **batch()))
    client.result(client.step("optim_step", model, 2))
    saved = client.result(client.step("save_weights", model, 3, path="one"))
    client.result(client.step("load_weights", model, 4, path=saved["path"], optimizer=True))

    assert [len(one["logprobs"]["data"]) for one in trained["loss_fn_outputs"]] == [3, 3]
    assert trained["metrics"] == {"loss:sum": 1.0}
    assert saved["path"] == f"tinker://{model}/weights/one"
    ledger = lab.ledger
    kinds = ["create_session", "create_model", "forward_backward", "optim_step", "save", "load"]
    assert [execution.kind for execution in ledger.executions] == kinds
    assert (ledger.gradients, ledger.optim_steps) == (1, 1)
    assert ledger.of("forward_backward")[0].datums == 2
    assert ledger.duplicates() == ledger.out_of_order() == []
    assert ledger.missing() == []
    assert ledger.retrieved(ledger.of("save")[0].request_id or "") == 1
    assert lab.count(status=200) == len(lab.exchanges)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("", bytes),
        ("zstd", lambda body: zstandard.ZstdCompressor().compress(body)),
        ("gzip", gzip.compress),
    ],
)
def test_protobuf_request_is_read_and_answered(
    lab: Lab,
    client: Client,
    encoding: str,
    compress: Callable[[bytes], bytes],
    forward_only: bool,
) -> None:
    model = client.model()
    body = compress(request_message(model, forward_only=forward_only))
    headers = {"Content-Type": "application/x-protobuf"}
    if encoding:
        headers["Content-Encoding"] = encoding
    submitted = client.http.post("/api/v1/forward_backward", content=body, headers=headers)
    answer = client.http.post(
        "/api/v1/retrieve_future",
        json={"request_id": submitted.json()["request_id"]},
        headers={"Accept": "application/x-protobuf"},
    )
    assert answer.headers["content-type"] == "application/x-protobuf"
    output = _wire._CLASSES["ForwardBackwardOutput"].FromString(answer.content)
    assert output.loss_fn_outputs[0].num_datums == 1
    assert len(output.loss_fn_outputs[0].fields["logprobs"].data) == 12

    kind = "forward" if forward_only else "forward_backward"
    assert lab.ledger.count(kind) == 1
    assert lab.ledger.gradients == (not forward_only)
    (exchange,) = [one for one in lab.exchanges if one.path.endswith("forward_backward")]
    assert (exchange.kind, exchange.seq_id, exchange.model_id) == (kind, 1, model)
    assert exchange.body == body


def test_sample_completions_are_announced_per_clone(make_lab: MakeLab, connect: Any) -> None:
    lab = make_lab(work_seconds=2, poll_seconds=30)
    client = connect(lab.base_url)
    sampler = client.post(
        "create_sampling_session",
        session_id=client.session(),
        sampling_session_seq_id=0,
        base_model="lab/base",
    ).json()["sampling_session_id"]
    prompt = {"chunks": [{"tokens": [1, 2, 3]}]}
    submitted = client.post(
        "asample",
        sampling_session_id=sampler,
        seq_id=10**9,
        num_samples=2,
        prompt=prompt,
        prompt_logprobs=True,
        sampling_params={"max_tokens": 4},
    )
    assert len(submitted.json()["sample_sequence_ids"]) == 2

    target = {"sampling_session_id": sampler, "cloned_sampler_id": 1}
    early = client.post("retrieve_futures", target=target, prev_cursor=0, timeout=0).json()
    assert early == {"completions": [], "cursor": 0}
    done = client.post("retrieve_futures", target=target, prev_cursor=0).json()
    assert [one["request_id"] for one in done["completions"]] == [submitted.json()["request_id"]]
    result = client.result(submitted)
    assert [one["tokens"] for one in result["sequences"]] == [[1, 2, 3, 4]] * 2
    assert result["prompt_logprobs"] == [None, -0.5, -0.5]


def test_poll_of_unfinished_work_waits_and_answers_try_again(
    make_lab: MakeLab, connect: Any
) -> None:
    client = connect(make_lab(work_seconds=5, poll_seconds=0.05).base_url)
    submitted = client.post(
        "create_model", session_id=client.session(), model_seq_id=0, base_model="lab/base"
    ).json()
    answer = client.post("retrieve_future", request_id=submitted["request_id"])
    assert answer.status_code == 408
    assert answer.json()["type"] == "try_again"
    time.sleep(5.05)
    assert client.post("retrieve_future", request_id=submitted["request_id"]).status_code == 200


def test_operations_of_one_model_run_one_after_another(make_lab: MakeLab, connect: Any) -> None:
    lab = make_lab(poll_seconds=30)
    client = connect(lab.base_url)
    model = client.model()
    lab.work_seconds = 2
    assert lab.work_seconds == 2
    before = time.monotonic()
    steps = [client.step("optim_step", model, seq) for seq in (1, 2, 3)]
    assert time.monotonic() - before < 6, "none of them was waited for"
    client.result(steps[-1])
    assert time.monotonic() - before >= 5.9


def test_pod_answers_unknown_things_with_its_own_404(lab: Lab, client: Client) -> None:
    model = client.model()
    cases = {
        "Future not found": client.post("retrieve_future", request_id="nope"),
        "Checkpoint not found": client.step("load_weights", model, 1, path="tinker://no/weights/x"),
        "Model not found": client.step("optim_step", "nope", 1),
        "Session not found": client.post("session_heartbeat", session_id="nope"),
        "Not Found": client.post("no_such_endpoint"),
    }
    for detail, answer in cases.items():
        assert (answer.status_code, answer.json()) == (404, {"detail": detail})
    assert lab.count(refused=True) == 0
    assert client.get("create_session").status_code == 405
    assert client.step("optim_step", "", 1).status_code == 404
    assert client.post("optim_step").status_code == 422
    broken = client.http.post("/api/v1/optim_step", content=b"{", headers={"content-type": "x"})
    assert broken.status_code == 422
    assert lab.ledger.optim_steps == 0


def test_lab_without_dynamic_config_answers_as_an_older_server(
    make_lab: MakeLab, connect: Any
) -> None:
    lab = make_lab(without=("dynamic_config",), config={"parallel_fwdbwd_chunks": False})
    client = connect(lab.base_url)
    assert client.post("client/dynamic_config").json() == {"detail": "Not Found"}
    assert client.post("client/config").json() == {
        "pjwt_auth_enabled": False,
        "parallel_fwdbwd_chunks": False,
    }
    with pytest.raises(ValueError, match="no_such_kind"):
        Lab(without=("no_such_kind",))


def test_restarted_trainer_knows_only_its_checkpoints(lab: Lab, client: Client) -> None:
    model = client.model()
    saved = client.result(client.step("save_weights", model, 1, path="one"))
    lab.drop_session()
    assert client.step("optim_step", model, 2).json() == {"detail": "Model not found"}
    created = client.post(
        "load_weights",
        session_id=client.session(),
        model_seq_id=0,
        path=saved["path"],
        optimizer=True,
    )
    assert created.status_code == 200


def test_listings_show_what_was_saved_and_not_what_was_deleted(client: Client) -> None:
    model = client.model()
    client.result(client.step("save_weights", model, 1, path="one"))
    listed = client.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]
    assert [one["checkpoint_id"] for one in listed] == ["weights/one"]
    assert client.get("training_runs").json()["cursor"]["total_count"] == 1
    session = model.partition(":")[0]
    assert client.get(f"sessions/{session}").json()["training_run_ids"] == [model]
    gone = client.http.delete(f"/api/v1/training_runs/{model}/checkpoints/weights/one")
    assert gone.status_code == 200
    assert client.get("checkpoints").json()["checkpoints"] == []


# -- kinds and jobs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "healthz", "healthz"),
        ("POST", "client/config", "config"),
        ("POST", "client/dynamic_config", "dynamic_config"),
        ("POST", "auth/token", "auth_token"),
        ("POST", "create_session", "create_session"),
        ("POST", "session_heartbeat", "heartbeat"),
        ("POST", "telemetry", "telemetry"),
        ("GET", "get_server_capabilities", "capabilities"),
        ("POST", "create_model", "create_model"),
        ("POST", "get_info", "get_info"),
        ("POST", "forward", "forward"),
        ("POST", "forward_backward", "forward_backward"),
        ("POST", "optim_step", "optim_step"),
        ("POST", "save_weights", "save"),
        ("POST", "save_weights_for_sampler", "save_sampler"),
        ("POST", "save_weights_external", "save_external"),
        ("POST", "load_weights", "load"),
        ("POST", "create_sampling_session", "sampling_session"),
        ("POST", "join_sampling_session", "join_sampling_session"),
        ("POST", "asample", "sample"),
        ("POST", "retrieve_future", "poll"),
        ("POST", "retrieve_futures", "polls"),
        ("POST", "cancel_future", "cancel"),
        ("GET", "training_runs/a:train:0/checkpoints", "checkpoints"),
        ("DELETE", "training_runs/a:train:0/checkpoints/weights/x", "checkpoints"),
        ("GET", "training_runs", "other"),
        ("GET", "nothing/at/all", "other"),
    ],
)
def test_request_on_each_path_is_recorded_as_its_kind(
    lab: Lab, client: Client, method: str, path: str, kind: str
) -> None:
    client.http.request(method, f"/api/v1/{path}", json={})
    (exchange,) = lab.exchanges
    assert exchange.kind == kind
    assert kind in KINDS
    assert (exchange.method, exchange.job) == (method, "job-1")
    assert exchange.path == f"/training/v1/rlorTrainerJobs/lab/job-1/api/v1/{path}"
    assert exchange.seconds >= 0


def test_fault_on_polls_can_name_their_subject(lab: Lab, client: Client) -> None:
    model = client.model()
    steps = lab.fault(Fault(kinds={"poll:optim_step"}))
    submitted = client.step("optim_step", model, 1)
    assert client.result(submitted) == GATEWAY_404.body
    client.result(client.step("save_weights", model, 2))
    assert steps.hits == 1
    assert lab.count("poll:optim_step") == 1
    assert lab.count("poll") == 3
    lab.clear()
    every = lab.fault(Fault(kinds={"poll"}, excluding={"poll:save"}))
    client.result(client.step("save_weights", model, 3))
    assert every.hits == 0


def test_each_job_has_a_trainer_of_its_own(lab: Lab, client: Client, connect: Any) -> None:
    other = connect(lab.job_url("job-2"))
    other.session()
    assert (lab.ledger.count("create_session"), len(lab.ledger_of("job-2").executions)) == (0, 1)
    fault = lab.fault(Fault(job="job-2"))
    assert other.get("get_server_capabilities").status_code == 404
    assert client.get("get_server_capabilities").status_code == 200
    assert fault.hits == 1
    for path in ("lab/job-3", "elsewhere/job-1"):
        unknown = httpx.get(f"{lab.origin}/training/v1/rlorTrainerJobs/{path}/api/v1/healthz")
        assert unknown.json() == GATEWAY_404.body
    assert lab.count(refused=True) == 3


def test_direct_url_bypasses_the_gateway(lab: Lab, connect: Any) -> None:
    client = connect(lab.direct_url)
    lab.stale(60)
    client.session()
    assert lab.ledger.count("create_session") == 1
    assert lab.exchanges[0].replica is None
    lab.fault(Fault(at="pod", answer=Answer(503, "busy", "text/plain")))
    assert client.post("create_session").text == "busy"
    assert lab.ledger.count("create_session") == 1
    assert httpx.get(f"{lab.origin}/api/v1/healthz").status_code == 404


# -- replicas ----------------------------------------------------------------------------------


def test_connection_stays_with_one_replica(make_lab: MakeLab, connect: Any) -> None:
    lab = make_lab(replicas=2)
    clients = [connect(lab.base_url) for _ in range(4)]
    for _, one in itertools.product(range(3), clients):
        one.get("healthz")
    seen = {(exchange.connection, exchange.replica) for exchange in lab.exchanges}
    assert seen == {(0, 0), (1, 1), (2, 0), (3, 1)}


def test_stale_replica_answers_404_to_all_but_healthz(make_lab: MakeLab, connect: Any) -> None:
    lab = make_lab(replicas=2)
    first, second = connect(lab.base_url), connect(lab.base_url)
    first.get("healthz")
    lab.stale(60, replica=1)
    statuses = [one.get("get_server_capabilities").status_code for one in (first, second)]
    assert statuses == [200, 404]
    assert second.get("healthz").status_code == 200
    second.http.close()
    third = connect(lab.base_url)
    assert third.get("get_server_capabilities").status_code == 200


def test_control_plane_question_takes_no_replica(make_lab: MakeLab, connect: Any) -> None:
    lab = make_lab(replicas=2)
    httpx.get(f"{lab.origin}/v1/accounts/lab/rlorTrainerJobs/job-1")
    connect(lab.base_url).get("healthz")
    assert [exchange.replica for exchange in lab.exchanges] == [None, 0]


def test_random_pinning_is_seeded(make_lab: MakeLab, connect: Any) -> None:
    def replicas(seed: int) -> list[int | None]:
        lab = make_lab(replicas=4, pinning="random", seed=seed)
        for _ in range(12):
            connect(lab.base_url).get("healthz")
        return [exchange.replica for exchange in lab.exchanges]

    assert replicas(1) == replicas(1) != replicas(2)
    with pytest.raises(ValueError, match="replica"):
        Lab(replicas=0)


# -- faults ------------------------------------------------------------------------------------


def statuses(client: Client, times: int, path: str = "get_server_capabilities") -> list[int]:
    return [client.get(path).status_code for _ in range(times)]


def test_stale_route_answers_with_the_gateways_404(lab: Lab, client: Client) -> None:
    lab.stale(60)
    answer = client.get("get_server_capabilities")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json() == {
        "error": {
            "message": "Trainer job not found or not running",
            "param": "jobId",
            "code": "NOT_FOUND",
        }
    }
    (exchange,) = lab.exchanges
    assert (exchange.refused, exchange.reached, exchange.status) == (True, False, 404)
    assert client.get("healthz").status_code == 200
    lab.clear()
    assert statuses(client, 1) == [200]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(count=2), [404, 404, 200, 200]),
        (Fault(skip=1), [200, 404, 404, 404]),
        (Fault(skip=1, count=1), [200, 404, 200, 200]),
        (Fault(kinds={"capabilities"}, count=1, answer=Answer(502, "bad")), [502, 200, 200, 200]),
        (Fault(kinds={"poll"}), [200] * 4),
        (Fault(excluding={"capabilities"}), [200] * 4),
        (Fault(starts=60), [200] * 4),
        (Fault(chance=0.0), [200] * 4),
        (Fault(when=lambda exchange: exchange.connection == 7), [200] * 4),
    ],
    ids=range(9),
)
def test_fault_strikes_exactly_the_requests_it_describes(
    lab: Lab, client: Client, fault: Fault, expected: list[int]
) -> None:
    lab.fault(fault)
    assert statuses(client, 4) == expected
    assert fault.hits == sum(status != 200 for status in expected)


def test_fault_of_an_unknown_kind_raises_value_error(lab: Lab) -> None:
    for kinds in ({"optim_steps"}, {"polls:x", "pol:x"}, "poll"):
        with pytest.raises(ValueError, match="kind of requests"):
            lab.fault(Fault(kinds=kinds))


def test_spent_fault_can_be_armed_again(lab: Lab, client: Client) -> None:
    fault = lab.fault(Fault(count=1))
    assert statuses(client, 2) == [404, 200]
    assert lab.fault(fault) is fault
    assert statuses(client, 2) == [404, 200]


def test_first_of_two_matching_faults_wins(lab: Lab, client: Client) -> None:
    lab.fault(Fault(count=1, answer=Answer(503)))
    lab.stale(60)
    assert statuses(client, 2) == [503, 404]


def test_random_faults_are_seeded(make_lab: MakeLab, connect: Any) -> None:
    def run(seed: int) -> list[int]:
        lab = make_lab(seed=seed)
        fault = lab.flap(0.5)
        seen = statuses(connect(lab.base_url), 40)
        assert 5 < fault.hits == seen.count(404) < 35
        return seen

    assert run(1) == run(1) != run(2)


def test_fault_with_start_and_length_strikes_only_then(lab: Lab, client: Client) -> None:
    fault = lab.fault(Fault(starts=100, seconds=200))
    assert statuses(client, 1) == [200]
    fault._armed -= 150
    assert statuses(client, 1) == [404]
    fault._armed -= 200
    assert statuses(client, 1) == [200]


def test_delay_alone_leaves_the_answer_unchanged(lab: Lab, client: Client) -> None:
    slow = lab.fault(Fault(answer=None, delay=0.1))
    lab.fault(Fault(skip=1))
    assert statuses(client, 2) == [200, 404]
    assert slow.hits == 2
    assert all(exchange.seconds >= 0.1 for exchange in lab.exchanges)


def test_request_on_a_dropped_connection_is_not_executed(lab: Lab, client: Client) -> None:
    fault = lab.fault(Fault(drop=True, count=1))
    with pytest.raises(httpx.RemoteProtocolError):
        client.post("create_session")
    assert fault.hits == 1
    assert lab.ledger.executions == []
    assert client.post("create_session").status_code == 200
    first, second = lab.exchanges
    assert (first.status, second.status) == (None, 200)
    assert first.connection != second.connection


def test_hanging_request_gets_no_answer(lab: Lab, client: Client) -> None:
    lab.fault(Fault(hang=True))
    with pytest.raises(httpx.ReadTimeout):
        client.http.get("/api/v1/get_server_capabilities", timeout=1)
    assert lab.exchanges[0].status is None


@pytest.mark.parametrize("answer", [GATEWAY_404, None])
@pytest.mark.parametrize("at", ["gateway", "pod"])
def test_request_with_a_lost_answer_is_executed(
    lab: Lab, client: Client, answer: Any, at: Any
) -> None:
    lab.fault(Fault(lost_answer=True, answer=answer, at=at))
    if answer is None:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("create_session")
    else:
        assert client.post("create_session").status_code == 404
    assert lab.ledger.count("create_session") == 1
    assert lab.exchanges[0].reached


def test_fault_that_strikes_first_arms_the_one_that_follows(lab: Lab, client: Client) -> None:
    stale = Fault(kinds=["telemetry"], count=1)
    lost = Fault(kinds=["telemetry"], count=2, lost_answer=True, answer=Answer(502), then=stale)
    lab.fault(lost)
    sent = [client.post("telemetry").status_code for _ in range(4)]
    assert sent == [502, 502, 404, 200]
    assert [one.error and one.error.status for one in lab.exchanges] == [502, 502, 404, None]


def test_fault_that_follows_with_an_unknown_kind_is_refused(lab: Lab) -> None:
    with pytest.raises(ValueError, match="kind of requests"):
        lab.fault(Fault(then=Fault(kinds=["optim_steps"])))


@pytest.mark.parametrize(
    ("path", "statuses", "found"),
    [
        ("optim_step", [None, 404], 0),
        ("optim_step", [502, 200], 0),
        ("optim_step", [404, 502, 200], 0),
        ("optim_step", [429, 404, 200], 0),
        ("optim_step", [400, 404, 200], 0),
        ("optim_step", [503, 404, 200], 0),
        ("optim_step", [None, 404, 200], 1),
        ("optim_step", [502, 404, 404, 200], 2),
        ("optim_step", [404, None, 404, 502], 1),
        ("optim_step", [500, 429, 404, 200], 1),
        ("optim_step", [200, 200], 2),
        ("forward", [None, 404, 200], 0),
        ("forward", [200, 200], 2),
        ("asample", [None, 404, 200], 0),
    ],
)
def test_executions_that_tinker_does_not_explain_are_found(
    lab: Lab, client: Client, path: str, statuses: list[int | None], found: int
) -> None:
    """`200, 200`: sent again after an answer, and executed twice."""
    model = client.model()
    for status in statuses:
        if status == 404:
            lab.fault(Fault(count=1))
        elif status == 503:
            lab.fault(Fault(count=1, answer=Answer(503, {"queue_state": "route_not_ready"})))
        elif status in (400, 429):
            lab.fault(Fault(count=1, answer=Answer(status)))
        elif status != 200:
            answer = None if status is None else Answer(status)
            lab.fault(Fault(count=1, lost_answer=True, answer=answer))
        with contextlib.suppress(httpx.RemoteProtocolError):
            body: dict[str, Any] = {}
            if path == "asample":
                body = {"prompt": {"chunks": []}, "sampling_params": {}}
            client.step(path, model, 1, **body)
    assert [one.status for one in lab.exchanges[-len(statuses) :]] == statuses
    assert len(unexplained_executions(lab)) == found, unexplained_executions(lab)


def test_fault_predicate_sees_the_request(lab: Lab, client: Client) -> None:
    model = client.model()
    lab.fault(Fault(when=lambda exchange: exchange.seq_id == 2 and exchange.model_id == model))
    sent = [client.step("optim_step", model, seq).status_code for seq in (1, 2, 3)]
    assert sent == [200, 404, 200]
    assert lab.ledger.missing() == [2]


def test_exchange_keeps_headers_and_body(lab: Lab, client: Client) -> None:
    client.http.post("/api/v1/telemetry", content=b'{"a": 1}', headers={"X-Idempotency-Key": "k"})
    (exchange,) = lab.exchanges
    assert exchange.headers["x-idempotency-key"] == "k"
    assert (exchange.body, exchange.said) == (b'{"a": 1}', {"a": 1})
    assert "telemetry" in str(exchange)


# -- the control plane -------------------------------------------------------------------------


def ask(lab: Lab, job: str = "job-1", account: str = "lab") -> httpx.Response:
    return httpx.get(f"{lab.origin}/v1/accounts/{account}/rlorTrainerJobs/{job}", timeout=10)


def test_control_plane_answers_the_state_of_each_job(lab: Lab) -> None:
    assert ask(lab).json() == {
        "name": "accounts/lab/rlorTrainerJobs/job-1",
        "state": "JOB_STATE_RUNNING",
    }
    assert ask(lab, "job-2").status_code == 404
    assert ask(lab, account="other").status_code == 404
    lab.control_plane.states["job-2"] = "JOB_STATE_FAILED"
    assert ask(lab, "job-2").json()["state"] == "JOB_STATE_FAILED"
    lab.job_url("job-3")
    lab.control_plane.state = "JOB_STATE_CREATING"
    assert ask(lab, "job-3").json()["state"] == "JOB_STATE_CREATING"
    assert lab.control_plane.questions == lab.count("control_plane") == 5
    assert {exchange.kind for exchange in lab.exchanges} == {"control_plane"}


@pytest.mark.parametrize(
    ("mode", "status"),
    [
        ("missing", 404),
        ("forbidden", 403),
        ("unauthorized", 401),
        ("error", 500),
        ("rubbish", 200),
        ("redirect", 302),
    ],
)
def test_control_plane_mode_sets_its_answer(lab: Lab, mode: Any, status: int) -> None:
    lab.control_plane.mode = mode
    answer = ask(lab)
    assert answer.status_code == status
    if mode == "rubbish":
        with pytest.raises(json.JSONDecodeError):
            answer.json()
    elif mode == "redirect":
        followed = httpx.get(f"{lab.origin}{answer.headers['location']}")
        assert followed.status_code == 200
    else:
        assert answer.json()["error"]["code"]


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("hang", httpx.ReadTimeout),
        ("drop", httpx.RemoteProtocolError),
    ],
)
def test_control_plane_mode_without_an_answer_gives_none(
    lab: Lab, mode: Any, error: type[httpx.HTTPError]
) -> None:
    lab.control_plane.mode = mode
    with pytest.raises(error):
        httpx.get(f"{lab.origin}/v1/accounts/lab/rlorTrainerJobs/job-1", timeout=1)


def test_control_plane_mode_slow_drip_never_finishes(lab: Lab) -> None:
    lab.control_plane.mode = "slow_drip"
    begin = time.monotonic()
    with httpx.stream("GET", f"{lab.origin}/v1/accounts/lab/rlorTrainerJobs/job-1") as answer:
        assert answer.status_code == 200
        for _ in answer.iter_bytes():
            if time.monotonic() - begin > 0.5:
                break
    assert time.monotonic() - begin > 0.5


def test_control_plane_delay_and_faults_apply_to_questions(lab: Lab) -> None:
    lab.control_plane.delay = 0.1
    begin = time.monotonic()
    assert ask(lab).status_code == 200
    assert time.monotonic() - begin >= 0.1
    lab.stale(60)
    assert ask(lab).status_code == 200
    lab.fault(Fault(at="control_plane", answer=Answer(429), count=1))
    assert [ask(lab).status_code for _ in range(2)] == [429, 200]


@pytest.mark.parametrize(("mode", "status"), [("ok", 200), ("missing", 404)])
def test_ended_job_is_refused_while_others_go_on(
    lab: Lab, client: Client, connect: Any, mode: Any, status: int
) -> None:
    other = connect(lab.job_url("job-2"))
    lab.end_job(mode=mode)
    assert client.get("healthz").json() == GATEWAY_404.body
    assert client.post("create_session").json() == GATEWAY_404.body
    assert ask(lab).status_code == status
    assert ask(lab).json().get("state") == {"ok": "JOB_STATE_DELETED"}.get(mode)
    assert other.get("healthz").status_code == 200
    assert ask(lab, "job-2").json()["state"] == "JOB_STATE_RUNNING"


# -- the ledger --------------------------------------------------------------------------------


def ledger(*entries: tuple[str, int], model_id: str = "m") -> Ledger:
    made = Ledger()
    for at, (kind, seq_id) in enumerate(entries):
        made.record(Execution(at=at, kind=kind, job="job-1", model_id=model_id, seq_id=seq_id))
    return made


def seqs(executions: list[Execution]) -> list[int | None]:
    return [execution.seq_id for execution in executions]


FB, FWD, OPT, SAVE = "forward_backward", "forward", "optim_step", "save"


@pytest.mark.parametrize(
    ("entries", "wrong", "twice", "gaps"),
    [
        ([(FB, 1), (OPT, 2), (FB, 3), (OPT, 4)], [], [], []),
        ([(FB, 2), (FB, 3), (FB, 1), (OPT, 4)], [], [], []),
        ([(FWD, 2), (FB, 3), (FWD, 1), (SAVE, 4)], [], [], []),
        ([(FB, 1), (FB, 1), (OPT, 2)], [], [1], []),
        ([(OPT, 2), (FB, 1)], [2, 1], [], []),
        ([(FB, 1), (OPT, 3), (OPT, 2)], [3, 2], [], []),
        ([(FB, 1), (FB, 3), (OPT, 2)], [2], [], []),
        ([(FB, 1), (OPT, 2), (FB, 1), (FB, 3)], [1], [1], []),
        ([(FB, 1), (OPT, 3)], [3], [], [2]),
        ([(FB, 1), (FB, 4)], [], [], [2, 3]),
    ],
)
def test_ledger_finds_duplicates_gaps_and_wrong_order(
    entries: list[tuple[str, int]], wrong: list[int], twice: list[int], gaps: list[int]
) -> None:
    made = ledger(*entries)
    assert seqs(made.out_of_order()) == wrong
    assert seqs(made.duplicates()) == twice
    assert made.missing() == gaps
    assert ("duplicate" in made.summary()) == bool(twice)
    assert ("missing" in made.summary()) == bool(gaps)


def test_ledger_counts_the_sequence_of_each_model_by_itself() -> None:
    made = ledger((FB, 1), (OPT, 2))
    for execution in ledger((FB, 1), (FB, 4), model_id="n").executions:
        made.record(execution)
    assert made.duplicates() == made.out_of_order() == []
    assert made.missing() == made.missing("n") == [2, 3]
    assert made.missing("m") == []
    assert Ledger().summary() == "nothing"


def test_ledger_finds_duplicates_without_a_seq_id(lab: Lab, client: Client) -> None:
    session = client.session()
    for _ in range(2):
        client.post("create_model", session_id=session, model_seq_id=0, base_model="lab/base")
        client.post(
            "create_sampling_session",
            session_id=session,
            sampling_session_seq_id=0,
            base_model="lab/base",
        )
    client.session()
    kinds = [execution.kind for execution in lab.ledger.duplicates()]
    assert kinds == ["create_model", "sampling_session"]


def test_request_sent_twice_is_trained_twice(lab: Lab, client: Client) -> None:
    model = client.model()
    for _ in range(2):
        client.step("forward_backward", model, 1, **batch())
    assert lab.ledger.gradients == 2
    assert seqs(lab.ledger.duplicates()) == [1]


# -- life --------------------------------------------------------------------------------------


def test_lab_stops_with_requests_in_flight(connect: Any) -> None:
    lab = Lab(work_seconds=60, poll_seconds=60).start()
    client = connect(lab.base_url)
    lab.fault(Fault(kinds={"capabilities"}, hang=True))
    lab.control_plane.mode = "slow_drip"
    submitted = client.post(
        "create_model", session_id=client.session(), model_seq_id=0, base_model="lab/base"
    ).json()
    errors: list[Exception] = []

    def send(call: Callable[[], object]) -> None:
        try:
            call()
        except httpx.HTTPError as error:
            errors.append(error)

    def poll() -> object:
        return connect(lab.base_url).post("retrieve_future", **submitted)

    calls = [lambda: connect(lab.base_url).get("get_server_capabilities"), poll, lambda: ask(lab)]
    threads = [threading.Thread(target=send, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    while len(lab.exchanges) < 2 + len(calls):
        time.sleep(0.01)
    begin = time.monotonic()
    lab.stop()
    assert time.monotonic() - begin < 20
    for thread in threads:
        thread.join(5)
    assert len(errors) == len(calls)
    lab.stop()


def test_lab_answers_200_requests_in_flight(make_lab: MakeLab) -> None:
    lab = make_lab(work_seconds=0.3, replicas=3)
    api = f"{lab.base_url}/api/v1"
    wanted = 200

    async def run() -> list[int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:

            async def one(_: int) -> int:
                said: dict[str, Any] = {"prompt": {"chunks": []}, "sampling_params": {}}
                async with http.post(f"{api}/asample", json=said) as answer:
                    request_id = (await answer.json())["request_id"]
                said = {"request_id": request_id}
                async with http.post(f"{api}/retrieve_future", json=said) as answer:
                    await answer.read()
                    return answer.status

            return await asyncio.gather(*map(one, range(wanted)))

    assert asyncio.run(run()) == [200] * wanted
    assert lab.ledger.count("sample") == wanted
    assert lab.count() == 2 * wanted


def test_dropped_connections_make_clients_reconnect(lab: Lab, client: Client) -> None:
    client.get("healthz")
    lab.drop_connections()
    # The client may notice before it sends, or when it gets no answer.
    with contextlib.suppress(httpx.HTTPError):
        client.get("healthz")
    assert client.get("healthz").status_code == 200
    assert lab.exchanges[0].connection != lab.exchanges[-1].connection


def test_over_tls_a_client_that_trusts_the_authority_is_served(make_lab: MakeLab) -> None:
    lab = make_lab(tls=True)
    assert lab.base_url.startswith("https://127.0.0.1:")
    assert os.environ["SSL_CERT_FILE"] == str(lab.ca_file)
    assert httpx.get(f"{lab.base_url}/api/v1/healthz").status_code == 200


def test_over_tls_a_client_that_does_not_trust_it_gets_no_connection(make_lab: MakeLab) -> None:
    lab = make_lab(tls=True)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{lab.base_url}/api/v1/healthz", trust_env=False)
    assert lab.count() == 0


def test_over_tls_connections_stay_with_a_replica_and_are_dropped(make_lab: MakeLab) -> None:
    lab = make_lab(tls=True, replicas=2)
    with httpx.Client(base_url=lab.base_url, timeout=10) as client:
        for _ in range(3):
            client.get("/api/v1/get_server_capabilities")
        lab.fault(Fault(kinds={"capabilities"}, count=1, drop=True))
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/api/v1/get_server_capabilities")
        client.get("/api/v1/get_server_capabilities")
    assert [one.replica for one in lab.exchanges] == [0, 0, 0, 0, 1]


def test_all_labs_of_a_process_have_one_authority_and_plain_ones_none(make_lab: MakeLab) -> None:
    assert make_lab(tls=True).ca_file == Lab(tls=True).ca_file is not None
    assert make_lab(tls=False).ca_file is None


def test_the_authority_is_gone_with_its_process() -> None:
    code = "from tinker_routefix.lab import Lab; print(Lab(tls=True).ca_file)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip().endswith("ca.pem")
    assert not Path(said.stdout.strip()).parent.exists()


def test_lab_on_a_taken_port_raises_os_error(lab: Lab) -> None:
    port = int(lab.origin.rpartition(":")[2])
    with pytest.raises(OSError, match="address already in use"):
        Lab(port=port).start()
    with pytest.raises(RuntimeError, match="not been started"):
        Lab().drop_connections()


def test_observer_sees_finished_exchanges(make_lab: MakeLab, connect: Any) -> None:
    seen: list[Exchange] = []
    lab = make_lab(observer=seen.append)
    connect(lab.base_url).get("healthz")
    assert [exchange.status for exchange in seen] == [200]


@pytest.mark.skipif(sys.platform == "win32", reason="sends an interrupt")
@pytest.mark.parametrize("option", ["--stale=0.4", "--stale-from-start --stale=60", "--flap=1"])
def test_lab_command_applies_its_fault_options(option: str) -> None:
    command = [sys.executable, "-u", "-m", "tinker_routefix.lab", *option.split()]
    environment = {**os.environ, "COLUMNS": "120"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().removeprefix("base URL: ").strip()
        refused = httpx.post(f"{base_url}/api/v1/create_session", json={})
        time.sleep(0.5)
        later = httpx.post(f"{base_url}/api/v1/create_session", json={})
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert refused.status_code == 404
    assert later.status_code == (200 if option == "--stale=0.4" else 404)
    assert "stale route" in output
    assert "refused by the gateway" in output
    assert (process.returncode, errors) == (130, "interrupted\n")


@pytest.mark.parametrize("stage", ["gatway", "control plane", None])
def test_a_fault_at_an_unknown_stage_is_refused(stage: Any) -> None:
    with pytest.raises(ValueError, match=r"'gateway', 'pod', 'control_plane'$") as caught:
        Fault(at=stage)
    assert str(caught.value).startswith(f"Fault(at={stage!r}) is not accepted")


@pytest.mark.skipif(sys.platform == "win32", reason="sends an interrupt")
def test_the_command_over_tls_says_how_to_trust_it() -> None:
    command = [sys.executable, "-u", "-m", "tinker_routefix.lab", "--tls"]
    environment = {**os.environ, "COLUMNS": "40"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        base, direct, trust = (process.stdout.readline().split() for _ in range(3))
        ca_file = trust[-1].removeprefix("SSL_CERT_FILE=")
        answer = httpx.get(
            f"{base[-1]}/api/v1/healthz", verify=ssl.create_default_context(cafile=ca_file)
        )
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert answer.status_code == 200
    assert direct[-1].startswith("https://")
