"""What may have been carried out is not sent again: an answer is lost, and then the route is stale.

That is what a gateway replica looks like that restarts. tinker repeats the submission whose answer
was lost, and its repeat gets the 404. Plain tinker ends there, loudly; so must the shim, because
the 404 says nothing about the try before it. The judge: the trainer's ledger, and what was sent.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

import tinker_routefix
from tests import programs
from tinker_routefix import _raised, _submissions, events
from tinker_routefix.lab import GATEWAY_404, Answer, Exchange, Fault, Lab

if TYPE_CHECKING:
    from tests.conftest import Overheard

MakeLab = Callable[..., Lab]
Plain = Callable[[], AbstractContextManager[None]]
Call = Callable[[Any], object]


def _load(client: Any) -> object:
    return programs.load(client, "tinker://lab/weights/none")


def _split_batch(client: Any) -> object:
    return programs.forward_backward(client, programs.many_parts()).result(programs.PATIENCE)


def _custom_loss(client: Any) -> object:
    """A `forward`, the program's loss of what it returns, and its gradients as submissions."""
    torch = pytest.importorskip("torch", reason="needs torch: nox -s torch")
    if not hasattr(torch, "tensor"):
        pytest.skip("needs torch, and there is a stand-in for it: nox -s torch")
    made = client.forward_backward_custom(
        [programs.datum()], lambda _, logprobs: (sum(one.sum() for one in logprobs), {})
    )
    return made.result(programs.PATIENCE)


def _raw(endpoint: str) -> Call:
    """A request that no method of tinker's makes, as the SDKs on top of it do."""

    def call(client: Any) -> object:
        path, body = f"/api/v1/{endpoint}", {"model_id": client.model_id}
        return programs.on_loop(
            client, lambda http: http.post(path, body=body, cast_to=httpx.Response)
        )

    return call


SUBMISSIONS: dict[str, tuple[str, Call]] = {
    "forward_backward": (
        "forward_backward",
        lambda client: programs.forward_backward(client).result(programs.PATIENCE),
    ),
    "split batch": ("forward_backward", _split_batch),
    "optim_step": (
        "optim_step",
        lambda client: programs.optim_step(client).result(programs.PATIENCE),
    ),
    "save": ("save", lambda client: programs.save(client, "name")),
    "save for sampler": ("save_sampler", programs.sampler),
    "load": ("load", _load),
    "unload": ("other", _raw("unload_model")),
    "custom loss": ("forward_backward", _custom_loss),
    "unknown endpoint": ("other", _raw("weight_sync")),
}
"""Kind of request in the lab, and the call that makes it."""

LOST = {
    "dropped": None,
    "HTTP 502": Answer(502, b"<html>bad gateway</html>", "text/html"),
    "HTTP 504": Answer(504, b""),
}


def transports() -> list[str]:
    known = getattr(tinker.types, "ClientConfigResponse", None)
    both = known is not None and "use_pyqwest_transport" in known.model_fields
    return ["httpx", "pyqwest"] if both else ["httpx"]


@pytest.fixture(params=transports())
def transport(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The lab's configuration of the client."""
    return {"use_pyqwest_transport": request.param == "pyqwest"}


def sent(lab: Lab, kind: str, seq_id: int | None = None) -> list[int | None]:
    """How every request of a kind, or of one submission, was answered; None: not at all."""
    return [
        exchange.status
        for exchange in lab.exchanges
        if exchange.kind == kind and seq_id in (None, exchange.seq_id)
    ]


class FirstSubmission:
    """Matches the requests of the submission that comes first: a batch can be several."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None

    def __call__(self, exchange: Exchange) -> bool:
        if self.exchange is None:
            self.exchange = exchange
        return exchange.seq_id == self.exchange.seq_id

    def sent(self, lab: Lab) -> list[int | None]:
        assert self.exchange is not None, "the fault has to strike"
        return sent(lab, self.exchange.kind, self.exchange.seq_id)


def lose_then_stale(lab: Lab, kind: str, lost: Answer | None) -> FirstSubmission:
    """The pod carries one out and its answer is lost; what comes after gets the stale route."""
    first = FirstSubmission()
    lab.fault(Fault(kinds=(kind,), count=1, lost_answer=True, answer=lost, when=first))
    lab.fault(Fault(kinds=(kind,), count=2, when=first))
    return first


@pytest.mark.trains_twice
@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
@pytest.mark.parametrize(("kind", "call"), SUBMISSIONS.values(), ids=SUBMISSIONS)
def test_submission_with_lost_answer_then_404_is_not_sent_again(
    make_lab: MakeLab,
    plain: Plain,
    transport: dict[str, Any],
    kind: str,
    call: Call,
    lost: Answer | None,
) -> None:
    def run() -> tuple[Lab, BaseException, list[int | None]]:
        lab = make_lab(config=transport)
        client = programs.connect(lab.base_url)
        first = lose_then_stale(lab, kind, lost)
        with pytest.raises(Exception) as caught:
            call(client)
        programs.gateway_404(caught.value)
        return lab, caught.value, first.sent(lab)

    with plain():
        plain_lab, _, expected = run()
    lab, error, tries = run()
    assert tinker_routefix.may_have_been_carried_out(error)
    assert "do not repeat the step" in programs.notes(error)
    assert tries == expected
    assert tries[-1] == 404
    assert lab.control_plane.questions == 0, "it is raised at once"
    assert len(lab.ledger.duplicates()) == len(plain_lab.ledger.duplicates())
    job = programs.job_of(lab)
    assert (job.uncertain, job.replays, job.given_up, job.failed_fast) == (1, 0, 0, 0)


@pytest.mark.trains_twice  # A redirect explains a second try as well.
def test_redirect_to_where_nobody_listens_may_have_been_carried_out(make_lab: MakeLab) -> None:
    """The request has been at the first address, though the last one was never connected to."""
    # The other transport follows redirects by itself and does not tell.
    lab = make_lab(config={"use_pyqwest_transport": False})
    client = programs.connect(lab.base_url)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        elsewhere = f"http://127.0.0.1:{nobody.getsockname()[1]}/elsewhere"
        moved = Answer(307, b"", headers={"Location": elsewhere})
        lab.fault(Fault(kinds=("optim_step",), count=1, answer=moved))
        lab.fault(Fault(kinds=("optim_step",), count=1))
        with pytest.raises(tinker.NotFoundError) as caught:
            programs.optim_step(client).result(programs.PATIENCE)
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, "optim_step") == [307, 404]
    assert programs.job_of(lab).uncertain == 1


REFUSALS = {"gateway": GATEWAY_404, "unknown shape": Answer(404, "<html>404</html>")}


# What tinker repeats inside of the request, and outside.
@pytest.mark.core
@pytest.mark.trains_twice
@pytest.mark.parametrize("again", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("kind", ["forward_backward", "save"])
def test_answer_lost_within_a_replay_ends_the_replays(
    make_lab: MakeLab, kind: str, refusal: Answer, again: Answer
) -> None:
    """404, replay, its answer is lost, tinker's repeat gets a 404 again."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=(kind,), count=1, answer=refusal))
    lab.fault(Fault(kinds=(kind,), count=1, lost_answer=True, answer=None))
    lab.fault(Fault(kinds=(kind,), count=3, answer=again))
    with pytest.raises(Exception) as caught:
        SUBMISSIONS[kind][1](client)
    assert isinstance(caught.value, tinker.NotFoundError)
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, kind) == [404, None, 404]
    assert lab.ledger.count(kind) == 1
    assert programs.job_of(lab).replays == 1


@pytest.mark.parametrize("kind", ["forward_backward", "save"])
def test_submission_whose_answer_is_lost_while_its_404_is_tried_is_not_sent_again(
    make_lab: MakeLab, kind: str
) -> None:
    """The gateway's 404, then one of unknown shape: sent where probes are answered."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    html = REFUSALS["unknown shape"]
    lab.fault(Fault(kinds=(kind,), count=1))
    lab.fault(Fault(kinds=(kind,), count=1, answer=html))
    lab.fault(Fault(kinds=(kind,), count=1, lost_answer=True, answer=None))
    lab.fault(Fault(kinds=(kind,), count=2, answer=html))
    with pytest.raises(tinker.NotFoundError) as caught:
        SUBMISSIONS[kind][1](client)
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, kind) == [404, 404, None, 404]
    assert lab.ledger.count(kind) == 1


@pytest.mark.trains_twice
@pytest.mark.parametrize("kind", ["forward_backward", "save"])
def test_submission_with_lost_answer_then_404_of_unknown_shape_is_not_sent_again(
    make_lab: MakeLab, kind: str
) -> None:
    """Not over a connection that answers probes either."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=(kind,), count=1, lost_answer=True, answer=None))
    lab.fault(Fault(kinds=(kind,), count=1, answer=REFUSALS["unknown shape"]))
    with pytest.raises(tinker.NotFoundError) as caught:
        SUBMISSIONS[kind][1](client)
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, kind) == [None, 404]
    assert lab.ledger.count(kind) == 1


@pytest.mark.trains_twice
def test_submission_whose_first_try_was_cancelled_is_not_replayed(make_lab: MakeLab) -> None:
    """Whoever does not wait for an answer, and sends it again, cannot know what came of it."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=("other",), at="pod", hang=True, count=1))
    lab.fault(Fault(kinds=("other",), count=1, skip=1))

    async def send(http: Any) -> object:
        body = {"model_id": client.model_id}
        return await http.post("/api/v1/weight_sync", body=body, cast_to=httpx.Response)

    async def twice() -> object:
        with client.holder.aclient(ClientConnectionPoolType.TRAIN) as http:
            with suppress(TimeoutError):
                await asyncio.wait_for(send(http), 0.5)
            return await send(http)

    with pytest.raises(tinker.NotFoundError) as caught:
        client.holder.run_coroutine_threadsafe(client.holder.execute_with_retries(twice)).result(
            programs.PATIENCE
        )
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, "other") == [None, 404]


@pytest.mark.parametrize(
    ("outcome", "counts"),
    [
        (httpx.Response(502), True),
        (httpx.Response(502, stream=httpx.ByteStream(b"never read")), True),
        (httpx.Response(503, json={"detail": "busy"}), True),
        (httpx.Response(503, json={"queue_state": "route_not_ready"}), False),
        (httpx.Response(429), False),
        (httpx.Response(408), True),
        (httpx.Response(409), True),
        (httpx.Response(400, headers={"content-length": "0"}), False),
        (httpx.Response(400, json={"detail": "no"}), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ReadError("reset"), True),
        (httpx.ReadTimeout("late"), True),
        (asyncio.CancelledError(), True),
        (None, True),
    ],
    ids=str,
)
def test_try_counts_unless_it_was_surely_not_carried_out(outcome: Any, counts: bool) -> None:
    submission = _submissions.Submission()
    submission.record_try("optim_step", outcome, None)
    assert (submission.uncertain("optim_step") is not None) is counts
    assert submission.uncertain("save_weights") is None


def test_what_a_submission_has_started_is_no_try_of_it() -> None:
    """It goes on in a copy of its context."""
    seen: list[contextvars.Context] = []

    async def call() -> None:
        assert _submissions.current() is not None
        seen.append(contextvars.copy_context())

    asyncio.run(_submissions.follow(call))
    assert seen[0].run(_submissions.current) is None


def test_task_that_outlives_its_submission_gets_its_own_error(make_lab: MakeLab) -> None:
    """What a submission has started goes on in a copy of its context."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=("other",), at="pod", answer=Answer(422, {"detail": "no"}), delay=1))
    started: list[asyncio.Task[Any]] = []

    async def send() -> object:
        with client.holder.aclient(ClientConnectionPoolType.TRAIN) as http:
            return await http.post("/api/v1/weight_sync", body={}, cast_to=httpx.Response)

    async def start() -> None:
        started.append(asyncio.ensure_future(send()))
        # It has left before the submission ends.
        while not lab.count("other"):  # noqa: ASYNC110 - the lab tells nobody
            await asyncio.sleep(0.01)

    async def outlive() -> None:
        await client.holder.execute_with_retries(start)
        await started[0]

    with pytest.raises(tinker.UnprocessableEntityError):
        client.holder.run_coroutine_threadsafe(outlive()).result(programs.PATIENCE)


def _has_protobuf() -> None:
    pytest.importorskip("tinker.proto.tinker_public_pb2", reason="this release sends JSON")


@pytest.mark.trains_twice
def test_compressed_forward_with_lost_answer_then_404_survives(
    make_lab: MakeLab, overheard: Overheard
) -> None:
    """Whether a body in protobuf trains is read from it."""
    known = getattr(tinker.types, "ClientConfigResponse", None)
    if known is None or "proto_compress_fwdbwd" not in known.model_fields:
        pytest.skip("this release does not compress")
    flags = ("proto_write_fwdbwd", "proto_compress_fwdbwd", "fwd_via_fwdbwd")
    lab = make_lab(config={flag: True for flag in flags if flag in known.model_fields})
    lab.fault(Fault(kinds=("forward",), count=1, lost_answer=True, answer=LOST["HTTP 502"]))
    lab.fault(Fault(kinds=("forward",), count=1))
    _forward(lab)
    assert sent(lab, "forward") == [502, 404, 200]
    last = [one for one in lab.exchanges if one.kind == "forward"][-1]
    assert last.headers.get("content-encoding") == "zstd"
    assert not overheard.events.count("route.uncertain")


def test_body_that_cannot_be_read_may_have_been_carried_out(
    make_lab: MakeLab, overheard: Overheard
) -> None:
    """And nobody can tell whether it is submitted once more."""
    _has_protobuf()
    lab = make_lab()
    client = programs.connect(lab.base_url)

    def submit() -> object:
        return programs.on_loop(
            client,
            lambda http: http.post(
                "/api/v1/forward_backward",
                body=b"\xff\xff",
                options={"headers": {"Content-Type": "application/x-protobuf"}},
                cast_to=httpx.Response,
            ),
        )

    kinds = ("forward_backward", "forward", "other")
    lost = lab.fault(Fault(kinds=kinds, count=1, answer=LOST["HTTP 502"]))
    lab.fault(Fault(kinds=kinds, count=1))
    with pytest.raises(tinker.NotFoundError) as caught:
        submit()
    assert lost.hits == 1
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    with suppress(tinker.APIStatusError):
        submit()
    assert "program.step_repeated" not in overheard.events


@pytest.mark.trains_twice
def test_uncertain_404_is_an_event_and_one_warning(make_lab: MakeLab, overheard: Overheard) -> None:
    heard: list[events.Event] = []
    unsubscribe = tinker_routefix.subscribe(heard.append)
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lose_then_stale(lab, "optim_step", LOST["HTTP 502"])
    with pytest.raises(tinker.NotFoundError):
        programs.optim_step(client).result(programs.PATIENCE)
    unsubscribe()
    (uncertain,) = (event for event in heard if isinstance(event, events.Uncertain))
    assert (uncertain.request, uncertain.earlier) == ("optim_step", "was answered HTTP 502")
    assert overheard.events.count("route.uncertain") == 1


def test_other_errors_may_not_have_been_carried_out(make_lab: MakeLab) -> None:
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.end_job()
    with pytest.raises(tinker.NotFoundError) as caught:
        programs.optim_step(client).result(programs.PATIENCE)
    assert not tinker_routefix.may_have_been_carried_out(caught.value)
    assert not tinker_routefix.may_have_been_carried_out(ValueError())


def test_submission_that_waits_is_not_replayed_once_the_shim_is_uninstalled(
    make_lab: MakeLab,
) -> None:
    """Nobody would see any more how its tries end."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=("optim_step",), count=1))
    lab.fault(Fault(kinds=("get_info",), seconds=1))
    future = programs.optim_step(client)
    while not lab.count("optim_step", refused=True):
        time.sleep(0.01)
    tinker_routefix.uninstall()
    with pytest.raises(tinker.NotFoundError) as caught:
        future.result(programs.PATIENCE)
    assert tinker_routefix.may_have_been_carried_out(caught.value)
    assert sent(lab, "optim_step") == [404]


# --- What may be repeated still survives ---------------------------------------------------


def _connect_and_train(lab: Lab) -> None:
    programs.train(programs.connect(lab.base_url))


def _sample(lab: Lab) -> None:
    programs.sample(programs.sampler(programs.connect(lab.base_url)))


def _sampling_session(lab: Lab) -> None:
    service = programs.service(lab.base_url)
    programs.sample(programs.settled(service.create_sampling_client(base_model="lab/base")))


def _forward(lab: Lab) -> None:
    client = programs.connect(lab.base_url)
    client.forward([programs.datum()], "cross_entropy").result(programs.PATIENCE)


REPEATED: dict[str, tuple[str, Callable[[Lab], None]]] = {
    "poll": ("poll", _connect_and_train),
    "session": ("create_session", _connect_and_train),
    "model": ("create_model", _connect_and_train),
    "sampling session": ("sampling_session", _sampling_session),
    "sample": ("sample", _sample),
    "forward": ("forward", _forward),
}


@pytest.mark.trains_twice
@pytest.mark.parametrize(("kind", "run"), REPEATED.values(), ids=REPEATED)
def test_repeatable_request_with_lost_answer_then_404_survives(
    make_lab: MakeLab,
    plain: Plain,
    transport: dict[str, Any],
    kind: str,
    run: Callable[[Lab], None],
) -> None:
    def play() -> Lab:
        lab = make_lab(config=transport)
        lab.fault(Fault(kinds=(kind,), count=1, lost_answer=True, answer=LOST["HTTP 502"]))
        lab.fault(Fault(kinds=(kind,), count=2))
        run(lab)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        play()
    programs.gateway_404(caught.value)
    lab = play()
    assert 404 in sent(lab, kind), "the fault has to have struck"


# --- Tries that were turned away count for nothing -------------------------------------------


TURNED_AWAY = {
    "HTTP 429": Answer(429, {"error": {"code": "RESOURCE_EXHAUSTED"}}),
    "HTTP 503 route_not_ready": Answer(503, {"queue_state": "route_not_ready"}),
}


@pytest.mark.parametrize("answer", TURNED_AWAY.values(), ids=TURNED_AWAY)
@pytest.mark.parametrize("kind", ["forward_backward", "optim_step", "save"])
def test_submission_that_was_turned_away_before_the_404_is_replayed(
    make_lab: MakeLab, plain: Plain, transport: dict[str, Any], kind: str, answer: Answer
) -> None:
    def run() -> Lab:
        lab = make_lab(config=transport)
        client = programs.connect(lab.base_url)
        lab.fault(Fault(kinds=(kind,), count=1, answer=answer))
        lab.fault(Fault(kinds=(kind,), count=1))
        SUBMISSIONS[kind][1](client)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    lab = run()
    assert sent(lab, kind) == [answer.status, 404, 200]
    assert lab.ledger.count(kind) == 1


def test_submission_whose_token_was_turned_away_is_replayed(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange for a new token is refused on its way: the submission itself was not sent."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    lab = make_lab(config={"pjwt_auth_enabled": True})
    # Each request needs a new one.
    claims = {"iat": int(time.time()) - 60, "exp": int(time.time()) - 30}
    parts: tuple[dict[str, Any], ...] = ({"alg": "none"}, claims, {})
    token = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts)
    lab.fault(Fault(kinds=("auth_token",), at="pod", answer=Answer(200, {"jwt": token})))
    client = programs.connect(lab.base_url)
    lab.fault(Fault(kinds=("auth_token",), count=1, answer=Answer(400, b"")))
    lab.fault(Fault(kinds=("optim_step",), count=1))
    try:
        programs.optim_step(client).result(programs.PATIENCE)
    except tinker.BadRequestError:
        pytest.skip("this release does not repeat a bare 400")
    if not lab.count("auth_token"):
        pytest.skip("this release exchanges no key for a token")
    assert lab.count("auth_token", status=400) == 1
    assert sent(lab, "optim_step") == [404, 200]


class Door:
    """A port in front of a lab that can be shut, so that connections to it are refused."""

    HOST = "127.0.0.2"
    """Where no lab gets the port meanwhile."""

    def __init__(self, lab: Lab) -> None:
        self._behind = int(lab.origin.rpartition(":")[2])
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.unlock()

    def unlock(self) -> None:
        self._listener = listener = socket.create_server((self.HOST, self.port))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def lock(self) -> None:
        """Refuse connections, and end those that there are."""
        if self._listener is not None:
            # The thread that waits in `accept` holds the socket open otherwise.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        # The ends that clients hold come first: they have to see it before they send again.
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._behind))
            except OSError:  # shut, or the lab is gone
                return
            self._open += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def door(lab: Lab) -> Iterator[Door]:
    opened = Door(lab)
    yield opened
    opened.lock()


def test_submission_whose_connection_was_never_made_is_replayed(
    make_lab: MakeLab, plain: Plain, transport: dict[str, Any]
) -> None:
    def run() -> Lab:
        lab = make_lab(config=transport)
        with door(lab) as way:
            url = lab.base_url.replace(lab.origin, f"http://{way.HOST}:{way.port}")
            client = programs.connect(url)
            programs.train(client)
            # Idle connections are closed as well, and the client has to have seen it: a request on
            # one of them ends without a byte of an answer, and that counts.
            way.lock()
            time.sleep(0.5)
            lab.fault(Fault(kinds=("optim_step",), count=1))
            threading.Timer(1.5, way.unlock).start()
            programs.optim_step(client).result(programs.PATIENCE)
        return lab

    with plain(), pytest.raises(Exception) as caught:
        run()
    programs.gateway_404(caught.value)
    lab = run()
    assert sent(lab, "optim_step") == [200, 404, 200]
    assert lab.ledger.count("optim_step") == 2


# --- A retry around the SDK, left in place -------------------------------------------------


@pytest.mark.trains_twice
@pytest.mark.parametrize("kind", ["forward_backward", "optim_step"])
def test_program_that_submits_again_after_a_404_is_warned_once(
    make_lab: MakeLab, settings: Callable[..., None], overheard: Overheard, kind: str
) -> None:
    settings(retry_budget=1)
    lab = make_lab()
    client = programs.connect(lab.base_url)
    stale = lab.stale()
    with pytest.raises(tinker.NotFoundError):
        SUBMISSIONS[kind][1](client)
    assert "program.step_repeated" not in overheard.events
    lab.clear()
    del stale
    SUBMISSIONS[kind][1](client)
    SUBMISSIONS[kind][1](client)
    assert overheard.events.count("program.step_repeated") == 1


def test_program_that_goes_on_with_another_step_is_not_warned(
    make_lab: MakeLab, settings: Callable[..., None], overheard: Overheard
) -> None:
    settings(retry_budget=1)
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.stale()
    with pytest.raises(tinker.NotFoundError):
        programs.forward_backward(client).result(programs.PATIENCE)
    lab.clear()
    programs.forward_backward(client, [programs.datum(5)]).result(programs.PATIENCE)
    assert "program.step_repeated" not in overheard.events


def test_program_is_warned_of_one_of_the_last_steps_that_it_submits_again(
    make_lab: MakeLab, overheard: Overheard
) -> None:
    """Of many, the first are forgotten."""
    lab = make_lab()
    client = programs.connect(lab.base_url)
    lab.end_job()

    def submit(number: int) -> None:
        path, body = "/api/v1/weight_sync", {"model_id": client.model_id, "number": number}
        with pytest.raises(tinker.NotFoundError):
            programs.on_loop(
                client, lambda http: http.post(path, body=body, cast_to=httpx.Response)
            )

    many = _raised.RaisedSteps.KEPT + 1
    for number in range(many):
        submit(number)
    submit(0)
    assert "program.step_repeated" not in overheard.events
    submit(many - 1)
    assert overheard.events.count("program.step_repeated") == 1
