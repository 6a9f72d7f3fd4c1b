"""The policies by themselves, on a fake clock: nothing in here waits or sends.

The clock is moved by the sleeps of the policies alone, so every wait can be read off it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import time
import weakref
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from tests.clock import FakeClock
from tests.common import notes
from tinker_routefix import (
    _control_plane,
    _prober,
    _question,
    _requests,
    _settings,
    _waiters,
    _warmup,
    events,
)
from tinker_routefix._answers import Kind
from tinker_routefix._connecting import ConnectBudget
from tinker_routefix._connections import MARK, PooledClient
from tinker_routefix._counters import Counters
from tinker_routefix._job import Job
from tinker_routefix._job_state import Answer, Told
from tinker_routefix._refused import ReplayableRequest
from tinker_routefix._replay import Replay
from tinker_routefix._route import Route
from tinker_routefix._waiting import RouteWait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from pytest_mock import MockerFixture

    Probe = Callable[[], Awaitable[None]]

JOB = Job("https://gateway.example", "acct", "job")


class RefusedError(Exception):
    """Stands for the SDK's 404 of the gateway."""


class Clock(FakeClock):
    """Time that passes only where a policy waits."""

    def __init__(self, mocker: MockerFixture) -> None:
        super().__init__(mocker)
        self.waits: list[float] = []
        mocker.patch.object(
            Route, "wait_until_reachable", lambda on, seconds, **_: self.pause(on, seconds)
        )
        mocker.patch.object(_waiters.Waiters, "sleep", self.rest)
        self.on_wait: Callable[[float], bool] = lambda _: False
        """Whether the route answers during a wait that began at this moment."""

    async def rest(self, seconds: float) -> None:
        self.now += max(seconds, 0)
        await asyncio.sleep(0)

    async def pause(self, on: Route, seconds: float) -> bool:
        early = self.on_wait(self.now)
        self.waits.append(seconds)
        self.now += 1.0 if early else seconds
        if early:
            on.mark_reachable(proof=True)
        await asyncio.sleep(0)
        return early


@pytest.fixture
def clock(mocker: MockerFixture) -> Clock:
    return Clock(mocker)


class ControlPlane:
    """Says what the test wants, as the real one does, and counts how often it was asked."""

    def __init__(self, *told: Told) -> None:
        self.told = list(told) or [Told.RUNNING]
        self.questions = 0
        self.ago = 0.0
        """How old its answers are."""
        self._flight = _control_plane._Flight()
        self.connections = SimpleNamespace(let_go=lambda: None)

    async def ask(self, _: object) -> Answer:
        answer = self._flight.answer
        if time.monotonic() >= answer.ask_again_at:
            told = self.told[min(self.questions, len(self.told) - 1)]
            self.questions += 1
            answer = self._flight.note(told, f"JOB_STATE_{told.name}", 0.0)
        await asyncio.sleep(0)
        at, since = answer.answered_at - self.ago, answer.since - self.ago
        return dataclasses.replace(answer, answered_at=at, since=since)


def route(*told: Told) -> Route:
    return Route(JOB, ControlPlane(*told))  # type: ignore[arg-type]


async def no_probe() -> None:
    await asyncio.Event().wait()


def replay(
    on: Route,
    send: Callable[[], Awaitable[Any]],
    error: Exception | None = None,
    *,
    budget: ConnectBudget | None = None,
    probe: Probe | None = None,
) -> Replay:
    """One of a request that is made later or, with a budget, as a part of connecting."""
    return Replay(
        on, Request(send), error or RefusedError("first"), budget=budget, probe=probe or no_probe
    )


class Request:
    """A request that was refused."""

    name = "forward_backward"

    def __init__(self, send: Callable[[], Awaitable[Any]]) -> None:
        self.headers: Mapping[str, str] = {}
        self._send = send

    async def send_again(self, replay: Replay) -> Any:
        replay.count()
        return await self._send()

    def is_refusal(self, error: BaseException) -> bool:
        return isinstance(error, RefusedError)

    def uncertain(self) -> str | None:
        return None


def waiting(on: Route, probe: Probe = no_probe, *, connecting: bool = False) -> RouteWait:
    return RouteWait(on, probe, ConnectBudget() if connecting else None)


class Sender:
    """Answers replays from a script; sends a `RefusedError` for each None."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.sent = 0

    async def __call__(self) -> Any:
        step = self.script[min(self.sent, len(self.script) - 1)]
        self.sent += 1
        if step is None:
            raise RefusedError(f"replay {self.sent}")
        if isinstance(step, BaseException):
            raise step
        return step


# --- Replays -----------------------------------------------------------------------------


async def run(made: Replay) -> Any:
    return await made.run()


async def first_try(on: Route, send: Callable[[], Awaitable[Any]]) -> Any:
    """What the program gets that sends a request."""
    client, pool = SimpleNamespace(), cast("Any", SimpleNamespace(route=on))
    setattr(client, MARK, PooledClient(client, pool, 0))

    async def request(*_: object) -> Any:
        return await send()

    options = SimpleNamespace(url="/api/v1/forward_backward")
    return await _requests.guard_request(request, client, (object, options), {})


def test_retry_succeeds_immediately_when_no_404(clock: Clock) -> None:
    """The request is sent once, and that is all: no question, no wait, nothing counted."""
    on, send = route(), Sender("answer")
    assert asyncio.run(first_try(on, send)) == "answer"
    assert send.sent == 1
    assert on.control_plane.questions == 0
    assert clock.waits == []
    assert on.counters == Counters()


def test_retry_exhausts_when_404_persists(clock: Clock) -> None:
    on, send = route(), Sender(None)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(on, send)))
    assert clock.waits == [2, 4, 8, 15]
    assert send.sent == 4
    assert on.counters.given_up == 1


def test_retry_jitter_only_shortens_waits(mocker: MockerFixture, clock: Clock) -> None:
    mocker.patch("random.uniform", lambda low, _: low)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), Sender(None))))
    assert clock.waits == pytest.approx([1.8, 3.6, 7.2, 13.5])


def test_retry_budget_shortens_the_last_wait_and_ends_it(
    clock: Clock, settings: Callable[..., None]
) -> None:
    settings(retry_budget=9, max_replays=10)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), Sender(None))))
    assert clock.waits == [2, 4, 3]


def test_retry_budget_spent_exactly_ends_it(clock: Clock, settings: Callable[..., None]) -> None:
    settings(retry_budget=14, max_replays=10)
    send = Sender(None)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), send)))
    assert clock.waits == [2, 4, 8]
    assert send.sent == 3


@pytest.mark.parametrize("connecting", [True, False], ids=["at-connect", "later"])
def test_retry_asks_control_plane_before_and_after_each_wait(
    clock: Clock, connecting: bool
) -> None:
    """The answer after one wait is that before the next: it stays good for a second."""
    on, budget = route(), ConnectBudget() if connecting else None
    made = replay(on, Sender(None, None, "answer"), budget=budget)
    assert asyncio.run(run(made)) == "answer"
    assert clock.waits == [2, 4, 8]
    assert on.control_plane.questions == 4


@pytest.mark.parametrize("refusals", [0, 1, 2, 3])
def test_retry_recovers_after_transient_404_when_still_running(clock: Clock, refusals: int) -> None:
    on, send = route(), Sender(*[None] * refusals, "answer")
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert send.sent == refusals + 1
    assert on.counters.recovered == 1
    assert on.counters.refused == refusals + 1
    assert on.counters.given_up == on.counters.failed_fast == 0


@pytest.mark.parametrize(
    ("told", "waits"),
    # A 404 of the API's can be that of a replica that does not know the job yet.
    [(Told.ENDED, []), (Told.STARTING, []), (Told.GONE, [1])],
)
def test_retry_fails_fast_when_job_no_longer_running(
    clock: Clock, told: Told, waits: list[float]
) -> None:
    on, send, error = route(told), Sender("answer"), RefusedError("original")
    with pytest.raises(RefusedError) as caught:
        asyncio.run(run(replay(on, send, error)))
    assert caught.value is error
    assert send.sent == 0
    assert clock.waits == waits
    assert on.counters.failed_fast == 1
    assert f"JOB_STATE_{told.name}; 0 replays" in notes(error)


@pytest.mark.parametrize("told", [Told.GONE, Told.QUESTION_REFUSED, Told.NOTHING])
def test_retry_recovers_after_one_strange_answer(clock: Clock, told: Told) -> None:
    """Nothing that the control plane says once ends a run, but a state of the job."""
    on, send = route(told, Told.RUNNING), Sender("answer")
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert send.sent == 1
    assert on.counters.failed_fast == on.counters.given_up == 0


def asks_for_real(on: Route, mocker: MockerFixture, answer: Any) -> None:
    """Have it ask a control plane that answers every question the same."""
    fetch = mocker.patch.object(_question.Connections, "fetch")
    fetch.side_effect = answer if isinstance(answer, Exception) else None
    fetch.return_value = answer
    on.control_plane = _control_plane.ControlPlane(JOB)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b'{"error": "unauthorized"}', "the key was refused (HTTP 401)"),
        (403, b"<html>WAF</html>", "HTTP 403"),
        (404, b'{"message": "no Route matched with those values"}', "HTTP 404"),
        (200, b"<html>RUNNING</html>", "an answer without a job state"),
    ],
    ids=["unauthorized", "firewall", "kong", "unreadable"],
)
def test_retry_fails_fast_when_control_plane_probe_errors(
    clock: Clock, mocker: MockerFixture, status: int, body: bytes, said: str
) -> None:
    """A refused question, or an answer that cannot be read, twice a second apart is no proof."""
    on, send, error = route(), Sender("answer"), RefusedError("original")
    asks_for_real(on, mocker, (status, body, None))
    with pytest.raises(RefusedError) as caught:
        asyncio.run(run(replay(on, send, error)))
    assert caught.value is error
    assert send.sent == 0
    assert clock.waits == [1]
    assert on.counters.failed_fast == 1
    assert f": {said}; 0 replays" in notes(error)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b"{}", None), "HTTP 500"),
        ((429, b"{}", None), "HTTP 429"),
        ((408, b"{}", None), "HTTP 408"),
        ((200, b'{"state": "JOB_STATE_HIBERNATING"}', None), "JOB_STATE_HIBERNATING"),
        (ConnectionError("refused"), "no answer (ConnectionError)"),
    ],
    ids=["failure", "overload", "timeout", "new-state", "no-connection"],
)
def test_retry_waits_out_its_budget_when_control_plane_cannot_tell(
    clock: Clock, mocker: MockerFixture, answer: Any, said: str
) -> None:
    """Without proof nothing is sent; the question is put again, ever less often."""
    on, send, error = route(), Sender("answer"), RefusedError("original")
    asks_for_real(on, mocker, answer)
    with pytest.raises(RefusedError) as caught:
        asyncio.run(run(replay(on, send, error)))
    assert caught.value is error
    assert send.sent == 0
    # The first wait of the policy, and then from question to question.
    assert clock.waits == pytest.approx([2, 2, 4, 4, 4, 4, 4, 4, 2])
    assert (on.counters.given_up, on.counters.failed_fast) == (1, 0)
    assert f": {said}; 0 replays in 30.0 s" in notes(error)


def test_retry_replays_when_the_pod_answers_while_control_plane_cannot_tell(clock: Clock) -> None:
    """A success of the pod's through the route is proof as well."""
    clock.on_wait = lambda now: now >= 1008
    on, send = route(Told.NOTHING), Sender("answer")
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert (send.sent, clock.now) == (1, 1009)


def test_retry_with_proof_older_than_the_refusal_waits_for_another(clock: Clock) -> None:
    on, send = route(Told.RUNNING, Told.NOTHING, Told.NOTHING, Told.RUNNING), Sender("answer")
    on.mark_reachable(proof=True)
    on.control_plane.ago = 0.5  # type: ignore[attr-defined]
    clock.now += 0.1
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert on.control_plane.questions == 4


def test_retry_sends_nothing_on_proof_from_before_the_refusal(clock: Clock) -> None:
    on, send = route(), Sender("trained twice")
    on.control_plane.ago = 100  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="first"):
        asyncio.run(run(replay(on, send)))
    assert send.sent == 0


@pytest.mark.parametrize("told", [Told.RUNNING, Told.NOTHING])
def test_retry_takes_proof_from_the_very_moment_of_the_refusal(clock: Clock, told: Told) -> None:
    """The control plane's, or a success of the pod's."""
    on, send = route(told), Sender("answer")
    on.control_plane.ago = 2  # type: ignore[attr-defined]
    if told is Told.NOTHING:
        on.mark_reachable(proof=True)
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert clock.waits == [2]
    assert on.proven_at == clock.now


def test_retry_neither_waits_nor_sends_after_a_try_that_may_have_been_carried_out(
    clock: Clock, mocker: MockerFixture
) -> None:
    on, send = route(), Sender("trained twice")
    mocker.patch.object(Request, "uncertain", return_value="was answered HTTP 502")
    with pytest.raises(RefusedError, match="first"):
        asyncio.run(run(replay(on, send)))
    assert (send.sent, clock.waits, on.counters.uncertain) == (0, [], 1)


def test_retry_sends_nothing_when_job_ends_during_the_wait(clock: Clock) -> None:
    """RUNNING before the wait, deleted after it: nothing is sent."""
    send = Sender("trained twice")
    with pytest.raises(RefusedError, match="first"):
        asyncio.run(run(replay(route(Told.RUNNING, Told.ENDED), send)))
    assert send.sent == 0
    assert clock.waits == [2]


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize(
    "error", [ValueError("no"), ConnectionError("gone"), asyncio.CancelledError(), SystemExit()]
)
def test_retry_propagates_non_404_immediately(
    clock: Clock, error: BaseException, replayed: bool
) -> None:
    """Of the request itself, or of its first replay: after the wait before it, and no other."""
    on, send = route(), Sender(error)
    request = run(replay(on, send)) if replayed else first_try(on, send)
    with pytest.raises(type(error)) as caught:
        asyncio.run(request)
    assert caught.value is error or isinstance(error, asyncio.CancelledError)
    assert send.sent == 1
    assert clock.waits == ([2] if replayed else [])
    assert (on.control_plane.questions > 0) is replayed
    assert not getattr(error, "__notes__", None)


def test_retry_released_early_uses_no_counted_wait_and_asks_no_more(clock: Clock) -> None:
    """Ten early releases that get the 404 again: no full wait is used up by them."""
    clock.on_wait = lambda now: now < 1010
    on, send = route(), Sender(*[None] * 10, "answer")
    assert asyncio.run(run(replay(on, send))) == "answer"
    # One second of the clock's own in each.
    assert clock.waits == [2] * 11
    assert send.sent == 11
    assert clock.now == 1012
    # At the start, after the first release, and after the full wait: probes tell as much.
    assert on.control_plane.questions == 3


def test_retry_with_max_replays_zero_sends_nothing(
    clock: Clock, settings: Callable[..., None]
) -> None:
    settings(max_replays=0)
    send = Sender("answer")
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), send)))
    assert send.sent == 0


NO_END = [Told.RUNNING, Told.STARTING, Told.NOTHING, Told.QUESTION_REFUSED]
"""What is waited for at connect: no proof is needed, for there is nothing to lose."""


@pytest.mark.parametrize("told", NO_END)
def test_connect_with_persistent_404_waits_out_its_budget(clock: Clock, told: Told) -> None:
    on, send = route(told), Sender(None)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(on, send, budget=ConnectBudget())))
    assert clock.waits[:5] == [2, 4, 8, 8, 8]
    assert sum(clock.waits) == pytest.approx(120)
    assert send.sent == len(clock.waits)
    assert on.counters.given_up == 1


@pytest.mark.slow
def test_connect_waits_thousands_of_times_without_overflow(
    clock: Clock, settings: Callable[..., None]
) -> None:
    """`2.0**1024` is no float any more: two hours of 8 s."""
    settings(warmup_timeout=10_000)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), Sender(None), budget=ConnectBudget())))
    assert len(clock.waits) > 1_024
    assert sum(clock.waits) == pytest.approx(10_000)


def test_calls_of_one_client_share_its_connect_budget(clock: Clock) -> None:
    on, budget = route(), ConnectBudget()

    async def both() -> None:
        with pytest.raises(RefusedError):
            await run(replay(on, Sender(None), budget=budget))
        waited = sum(clock.waits)
        with pytest.raises(RefusedError):
            await run(replay(on, Sender(None), budget=budget))
        assert sum(clock.waits) == waited

    asyncio.run(both())


def test_next_client_has_a_whole_connect_budget_at_once(clock: Clock) -> None:
    """Though the one before it has failed: a program that connects again every 10 s."""
    on = route()
    for number in (1, 2):
        with pytest.raises(RefusedError):
            asyncio.run(run(replay(on, Sender(None), budget=ConnectBudget())))
        assert sum(clock.waits) == pytest.approx(number * 120)


def test_connect_budget_runs_from_the_first_404(clock: Clock) -> None:
    budget = ConnectBudget()
    clock.now += 50
    assert (budget.used, budget.left(120)) == (False, 120)
    budget.start()
    clock.now += 50
    assert (budget.used, budget.left(120)) == (True, 70)
    budget.start()
    assert budget.left(120) == 70


@pytest.mark.parametrize(("told", "waits"), [(Told.ENDED, [2]), (Told.GONE, [1])])
def test_connect_to_an_ended_job_fails_fast(clock: Clock, told: Told, waits: list[float]) -> None:
    on, send = route(told), Sender("answer")
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(on, send, budget=ConnectBudget())))
    assert clock.waits == waits
    assert send.sent == 0
    assert on.counters.failed_fast == 1


def test_connect_to_a_job_that_is_being_resumed_waits_for_it(clock: Clock) -> None:
    """It shows the old state for a while."""
    on, send = route(Told.ENDED, Told.STARTING, Told.RUNNING), Sender(None, "answer")
    assert asyncio.run(run(replay(on, send, budget=ConnectBudget()))) == "answer"
    assert on.counters.recovered == 1


@pytest.mark.parametrize(
    ("told", "connecting", "seconds", "ends"),
    [
        (Told.RUNNING, False, 60, False),
        (Told.RUNNING, True, 60, False),
        (Told.NOTHING, False, 60, False),
        (Told.NOTHING, True, 60, False),
        (Told.STARTING, False, 0, True),
        (Told.STARTING, True, 60, False),
        (Told.ENDED, False, 0, True),
        (Told.ENDED, True, 0, False),
        (Told.ENDED, True, 1.5, False),
        (Told.ENDED, True, 2, True),
        (Told.GONE, False, 0, False),
        (Told.GONE, False, 1, True),
        (Told.GONE, True, 0.8, False),
        (Told.GONE, True, 1, True),
        (Told.QUESTION_REFUSED, False, 0.8, False),
        (Told.QUESTION_REFUSED, False, 1, True),
        (Told.QUESTION_REFUSED, True, 60, False),
    ],
)
def test_answer_ends_the_wait_once_it_was_heard_for_long_enough(
    clock: Clock, told: Told, connecting: bool, seconds: float, ends: bool
) -> None:
    wait = waiting(route(), connecting=connecting)
    wait.answer = Answer(told, "said", clock.now, clock.now - seconds)
    assert wait.is_over() is ends


def test_forty_concurrent_retries_keep_their_own_errors_and_counts(
    clock: Clock, settings: Callable[..., None]
) -> None:
    # All forty move the one clock.
    settings(retry_budget=3600)
    on = route()

    async def caller(number: int) -> tuple[int, Any, int]:
        script: list[Any] = [None] * (number % 4)
        script.append(f"answer {number}" if number % 2 else KeyError(number))
        send = Sender(*script)
        try:
            return number, await run(replay(on, send)), send.sent
        except KeyError as error:
            return number, error, send.sent

    async def all_of_them() -> list[tuple[int, Any, int]]:
        return await asyncio.gather(*(caller(number) for number in range(40)))

    for number, outcome, sent in asyncio.run(all_of_them()):
        assert sent == number % 4 + 1
        if number % 2:
            assert outcome == f"answer {number}"
        else:
            assert outcome.args == (number,)


@pytest.mark.parametrize("kind", [Kind.GATEWAY_404, Kind.UNKNOWN_404])
def test_refused_request_and_its_replay_are_freed_without_garbage_collection(kind: Kind) -> None:
    """They hold a batch, and rounds of the collector are what makes the loop stand still."""
    options = SimpleNamespace(idempotency_key=None)
    pooled = SimpleNamespace(client=SimpleNamespace())
    call: Any = SimpleNamespace(
        name="optim_step", route=route(), budget=None, options=options, pooled=pooled
    )
    error: Any = RefusedError()
    error.response = httpx.Response(404, request=httpx.Request("POST", JOB.url))
    gc.disable()
    try:
        request = ReplayableRequest(call, error, kind)
        replay = request.replay(error)
        held: list[weakref.ref[Any]] = [weakref.ref(request), weakref.ref(replay)]
        del request, replay
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("clock")
def test_request_that_got_through_is_freed_without_garbage_collection() -> None:
    async def got_through() -> weakref.ref[Any]:
        made = replay(route(), Sender(None, None, "answer"))
        assert await made.run() == "answer"
        return weakref.ref(made)

    gc.disable()
    try:
        assert asyncio.run(got_through())() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("script", [(), (None, None)])
def test_404s_of_a_cancelled_request_are_counted(script: tuple[Any, ...]) -> None:
    on = route()

    async def cancelled() -> None:
        running = asyncio.create_task(run(replay(on, Sender(*script, asyncio.CancelledError()))))
        await asyncio.sleep(0)
        if not script:
            running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancelled())
    assert (on.counters.refused, on.counters.cancelled) == (1 + len(script), 1)


# --- The warm-up -------------------------------------------------------------------------


class FakeProber:
    """Answers probes from a script, round after round."""

    def __init__(self, *script: Any) -> None:
        self.send = Sender(*script)

    async def __call__(self) -> None:
        await asyncio.sleep(0)
        await self.send()

    proves = True
    """Whether a success of its probes shows that the pod is at work."""

    def is_refusal(self, error: BaseException) -> bool:
        return isinstance(error, RefusedError)

    async def is_the_pods(self, _: BaseException) -> bool:
        return False

    def headers(self, _: BaseException) -> dict[str, str]:
        return {}

    def is_answer(self, error: BaseException) -> bool:
        return isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("says", "reachable", "proven"),
    [("ok", True, True), (ValueError("422"), True, False), (None, False, False)],
    ids=["success", "an error of the pod", "the gateway's 404"],
)
def test_probe_tells_a_route_that_works_and_the_proof_of_its_pod(
    says: Any, reachable: bool, proven: bool
) -> None:
    on = route()
    assert asyncio.run(_prober.probe_once(on, FakeProber(says))) is reachable
    assert (on.answered_at > 0, on.proven_at > 0) == (reachable, proven)


def warm_up(on: Route, prober: FakeProber, budget: ConnectBudget | None = None) -> None:
    @asynccontextmanager
    async def open_prober() -> Any:
        yield prober

    asyncio.run(_warmup.warm_up(on, open_prober, budget or ConnectBudget()))


def test_warmup_returns_after_required_consecutive_successes(clock: Clock) -> None:
    on, prober = route(), FakeProber("ok")
    warm_up(on, prober)
    assert prober.send.sent == 3
    assert clock.waits == []
    assert on.warm
    assert on.proven_at == clock.now


def test_warmup_recovers_after_transient_404s(clock: Clock) -> None:
    # Three at once at first, and then one after the other, up to the first that fails.
    on, prober = route(), FakeProber("ok", "ok", None, "ok", None, "ok", "ok", "ok")
    warm_up(on, prober)
    assert prober.send.sent == 8
    assert clock.waits == [2, 4]
    assert on.warm
    assert on.counters.recovered == 1


def test_warmup_raises_on_persistent_404_after_timeout(clock: Clock) -> None:
    on = route()
    with pytest.raises(TimeoutError) as caught:
        warm_up(on, FakeProber(None))
    assert isinstance(caught.value.__cause__, RefusedError)
    assert clock.waits[:5] == [2, 4, 8, 8, 8]
    assert sum(clock.waits) == pytest.approx(120)
    assert not on.warm
    assert on.counters.given_up == 1


def test_warmup_has_only_the_connect_budget_that_is_left(clock: Clock) -> None:
    on, budget = route(), ConnectBudget()
    model = replay(on, Sender(None, None, None, "answer"), budget=budget)
    assert asyncio.run(run(model)) == "answer"
    spent = sum(clock.waits)
    with pytest.raises(TimeoutError):
        warm_up(on, FakeProber(None), budget)
    assert sum(clock.waits) == pytest.approx(120)
    assert spent == 22


@pytest.mark.parametrize("script", [(ValueError("500"),), ("ok", ValueError("500"), "ok")])
def test_warmup_skips_on_non_404_error(clock: Clock, script: tuple[Any, ...]) -> None:
    on, prober = route(), FakeProber(*script)
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append)
    warm_up(on, prober)
    unsubscribe()
    assert prober.send.sent == 3
    assert clock.waits == []
    assert not on.warm
    (ended,) = [event for event in told if isinstance(event, events.WarmupEnded)]
    assert (ended.outcome, ended.error, ended.level) == ("error", "ValueError", logging.WARNING)


@pytest.mark.parametrize(("told", "waits"), [(Told.ENDED, [2]), (Told.GONE, [1])])
def test_warmup_of_an_ended_job_fails_fast(clock: Clock, told: Told, waits: list[float]) -> None:
    on = route(told)
    with pytest.raises(RefusedError) as caught:
        warm_up(on, FakeProber(None))
    assert clock.waits == waits
    assert f"JOB_STATE_{told.name}" in notes(caught.value)
    assert (on.counters.failed_fast, on.warm) == (1, False)


@pytest.mark.parametrize("told", NO_END)
def test_warmup_waits_unless_the_job_has_ended(clock: Clock, told: Told) -> None:
    on = route(told)
    warm_up(on, FakeProber(None, None, None, "ok"))
    assert on.warm


def test_warmup_with_a_404_of_the_pods_own_ends(clock: Clock, mocker: MockerFixture) -> None:
    """Of unknown shape, and over a connection that answers other probes."""
    on, prober = route(), FakeProber(None)
    mocker.patch.object(prober, "is_the_pods", return_value=True)
    warm_up(on, prober)
    assert clock.waits == []
    assert on.control_plane.questions == 0
    assert not on.warm
    assert on.counters == Counters(probes=3, warmups=1)


def test_warmup_with_zero_successes_sends_nothing(
    clock: Clock, settings: Callable[..., None]
) -> None:
    settings(warmup_successes=0)
    on, prober = route(), FakeProber(None)
    warm_up(on, prober)
    assert prober.send.sent == 0
    # So nothing is known of the route.
    assert not on.warm
    assert on.counters.warmups == 0


def test_warmup_failure_of_its_own_does_not_stop_the_connect(
    clock: Clock, settings: Callable[..., None], overheard: Any
) -> None:
    @asynccontextmanager
    async def broken() -> Any:
        raise OSError("too many open files")
        yield

    with pytest.raises(OSError, match="too many"):
        asyncio.run(_warmup.warm_up(route(), broken, ConnectBudget()))
    settings(strict=False)
    asyncio.run(_warmup.warm_up(route(), broken, ConnectBudget()))
    assert "shim.failed" in overheard.events


# --- Waiting on a real clock -------------------------------------------------------------


def test_one_answer_releases_all_waiters() -> None:
    async def program() -> list[int]:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
        waits = [waiting(on) for _ in range(100)]
        with on.incident():
            sleeping = [asyncio.ensure_future(wait.sleep(60)) for wait in waits]
            await asyncio.sleep(0.05)
            assert on.waiters.count == 100
            on.mark_reachable(proof=False)
            await asyncio.wait_for(asyncio.gather(*sleeping), 10)
        assert on.waiters.count == 0
        return [wait.backoff.counted_waits for wait in waits]

    assert asyncio.run(program()) == [0] * 100


def test_answer_since_the_refusal_ends_the_wait_and_an_older_one_does_not() -> None:
    async def program() -> None:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
        on.mark_reachable(proof=False)
        await asyncio.sleep(0.01)
        wait = waiting(on)
        with on.incident():
            await wait.sleep(0.05)
            assert wait.backoff.counted_waits == 1
            on.mark_reachable(proof=False)
            await asyncio.wait_for(wait.sleep(60), 10)
            assert wait.backoff.counted_waits == 1

    asyncio.run(program())


def test_prober_ends_with_the_incident() -> None:
    async def program() -> None:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
        ended = asyncio.Event()

        async def probe() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        with on.incident():
            await waiting(on, probe).sleep(0.02)
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(program())


def test_prober_releases_waiters_on_any_answer_but_a_gateway_404(
    mocker: MockerFixture,
) -> None:
    mocker.patch.object(_prober, "_cadence", return_value=0.01)

    async def program(prober: FakeProber) -> int:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]

        @asynccontextmanager
        async def open_prober() -> Any:
            yield prober

        with on.incident():
            wait = waiting(on, _prober.light_prober(on, open_prober))
            await wait.sleep(1.0)
        return wait.backoff.counted_waits

    assert asyncio.run(program(FakeProber(None, None, "ok"))) == 0
    assert asyncio.run(program(FakeProber(None, ValueError("500"), None))) == 0
    # Neither the gateway's 404 nor a connection that fails is an answer.
    assert asyncio.run(program(FakeProber(None))) == 1
    assert asyncio.run(program(FakeProber(ConnectionError("refused")))) == 1


def test_prober_cadence_slows_down_over_time() -> None:
    assert [_prober._cadence(at) for at in (0, 0.9, 1, 29, 30)] == [0.25, 0.25, 0.5, 0.5, 1.0]


def test_changed_settings_reach_the_retry_policy(
    settings: Callable[..., None], clock: Clock
) -> None:
    settings(base_delay=1, max_delay=2)
    assert _settings.current().base_delay == 1
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), Sender(None))))
    assert clock.waits == [1, 2, 2, 2]
