"""The policies by themselves, on a fake clock: nothing in here waits or sends.

The clock is moved by the sleeps of the policies alone, so every wait can be read off it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tinker_routefix import _control_plane, _log, _sdk, _settings, _warmup
from tinker_routefix._connections import Lending
from tinker_routefix._control_plane import Answer, JobState
from tinker_routefix._job import Job
from tinker_routefix._retry import Replay, Waiting
from tinker_routefix._route import Counters, Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pytest_mock import MockerFixture

JOB = Job("https://gateway.example", "acct", "job")


class RefusedError(Exception):
    """Stands for the SDK's 404 of the gateway."""


class Clock:
    """Time that passes only where a policy waits."""

    def __init__(self, mocker: MockerFixture) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        mocker.patch("time.monotonic", side_effect=lambda: self.now)
        mocker.patch("random.uniform", lambda _, high: high)
        # It has noted moments of other clocks.
        mocker.patch.object(_log, "_own_failures", _log.RateLimit(seconds=60.0))
        mocker.patch.object(Route, "pause", self.pause)
        mocker.patch.object(Route, "rest", self.rest)
        self.on_wait: Callable[[float], bool] = lambda _: False
        """Whether the route answers during a wait that began at this moment."""

    async def rest(self, seconds: float) -> None:
        self.now += max(seconds, 0)
        await asyncio.sleep(0)

    async def pause(self, seconds: float, **_: Any) -> bool:
        early = self.on_wait(self.now)
        self.waits.append(seconds)
        self.now += 1.0 if early else seconds
        await asyncio.sleep(0)
        return early


@pytest.fixture
def clock(mocker: MockerFixture) -> Clock:
    return Clock(mocker)


class ControlPlane:
    """Says what the test wants, and counts how often it was asked."""

    def __init__(self, *states: JobState) -> None:
        self.states = list(states) or [JobState.RUNNING]
        self.questions = 0
        self.ago = 0.0
        """How old its answers are."""

    async def ask(self, _: object) -> Answer:
        state = self.states[min(self.questions, len(self.states) - 1)]
        self.questions += 1
        await asyncio.sleep(0)
        return Answer(state, f"JOB_STATE_{state.name}", time.monotonic() - self.ago)


def route(*states: JobState, warm: bool = True) -> Route:
    made = Route(JOB, ControlPlane(*states))  # type: ignore[arg-type]
    made.warm = warm
    return made


async def no_probe() -> None:
    await asyncio.Event().wait()


def replay(on: Route, send: Callable[[], Awaitable[Any]], error: Exception | None = None) -> Replay:
    return Replay(
        on,
        error or RefusedError("first"),
        headers={},
        send=send,
        refused=lambda other: isinstance(other, RefusedError),
        uncertain=lambda: None,
        probe=no_probe,
        what="forward_backward",
    )


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


def test_retry_succeeds_immediately_when_no_404(clock: Clock) -> None:
    """The request is sent once, and that is all: no question, no wait, nothing counted."""
    on, send, client = route(), Sender("answer"), SimpleNamespace()
    pool: Any = SimpleNamespace(route=on)
    setattr(client, _sdk._MARK, Lending(client, pool))

    async def request(*_: object) -> Any:
        return await send()

    options = SimpleNamespace(url="/api/v1/forward_backward")
    answer = asyncio.run(_sdk.guard_request(request, client, (object, options), {}))
    assert (answer, send.sent) == ("answer", 1)
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


@pytest.mark.parametrize(("warm", "questions"), [(True, 6), (False, 3)])
def test_retry_asks_control_plane_before_each_wait_and_after_it_once_warm(
    clock: Clock, warm: bool, questions: int
) -> None:
    """Before each wait; and once there is work to lose, also after it."""
    on = route(warm=warm)
    assert asyncio.run(run(replay(on, Sender(None, None, "answer")))) == "answer"
    assert on.control_plane.questions == questions


@pytest.mark.parametrize("refusals", [0, 1, 2, 3])
def test_retry_recovers_after_transient_404_when_still_running(clock: Clock, refusals: int) -> None:
    on, send = route(), Sender(*[None] * refusals, "answer")
    assert asyncio.run(run(replay(on, send))) == "answer"
    assert send.sent == refusals + 1
    assert on.counters.recovered == 1
    assert on.counters.refused == refusals + 1
    assert on.counters.given_up == on.counters.failed_fast == 0


@pytest.mark.parametrize("state", [JobState.OVER, JobState.ON_ITS_WAY])
def test_retry_fails_fast_when_job_no_longer_running(clock: Clock, state: JobState) -> None:
    on, send, error = route(state), Sender("answer"), RefusedError("original")
    with pytest.raises(RefusedError) as caught:
        asyncio.run(run(replay(on, send, error)))
    assert caught.value is error
    assert send.sent == 0
    assert clock.waits == []
    assert on.counters.failed_fast == 1
    assert f"JOB_STATE_{state.name}; 0 replays" in error.__notes__[0]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b'{"error": "unauthorized"}', "HTTP 401"),
        (200, b"<html>RUNNING</html>", "an answer without a job state"),
        (200, b'{"state": "JOB_STATE_HIBERNATING"}', "JOB_STATE_HIBERNATING"),
    ],
    ids=["unauthorized", "unreadable", "new-state"],
)
def test_retry_fails_fast_when_control_plane_probe_errors(
    clock: Clock, mocker: MockerFixture, status: int, body: bytes, said: str
) -> None:
    """An answer that refuses the question or cannot be read is no proof that the job runs."""
    mocker.patch.object(_control_plane.ControlPlane, "_fetch", return_value=(status, body))
    on, send, error = route(), Sender("answer"), RefusedError("original")
    on.control_plane = _control_plane.ControlPlane(JOB)
    with pytest.raises(RefusedError) as caught:
        asyncio.run(run(replay(on, send, error)))
    assert caught.value is error
    assert send.sent == 0
    assert clock.waits == []
    assert on.counters.failed_fast == 1
    assert f": {said}; 0 replays" in error.__notes__[0]


def test_retry_sends_nothing_when_job_ends_during_the_wait(clock: Clock) -> None:
    """RUNNING before the wait, deleted after it: nothing is sent."""
    send = Sender("trained twice")
    with pytest.raises(RefusedError, match="first"):
        asyncio.run(run(replay(route(JobState.RUNNING, JobState.OVER), send)))
    assert send.sent == 0
    assert clock.waits == [2]


@pytest.mark.parametrize(
    "error", [ValueError("no"), ConnectionError("gone"), asyncio.CancelledError(), SystemExit()]
)
def test_retry_propagates_non_404_immediately(clock: Clock, error: BaseException) -> None:
    send = Sender(error)
    with pytest.raises(type(error)) as caught:
        asyncio.run(run(replay(route(), send)))
    assert caught.value is error or isinstance(error, asyncio.CancelledError)
    assert send.sent == 1
    assert not getattr(error, "__notes__", None)


def test_retry_released_early_replays_twice_and_uses_no_counted_wait(clock: Clock) -> None:
    """Seven early releases that meet the 404 again: no full wait is used up by them."""
    clock.on_wait = lambda now: now < 1010
    send = Sender(*[None] * 14, "answer")
    assert asyncio.run(run(replay(route(), send))) == "answer"
    # One second of the clock's own in each, and half of one before its second replay.
    assert clock.waits == [2] * 8
    assert send.sent == 15
    assert clock.now == 1000 + 7 * 1.5 + 2


def test_retry_with_max_replays_zero_sends_nothing(
    clock: Clock, settings: Callable[..., None]
) -> None:
    settings(max_replays=0)
    send = Sender("answer")
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), send)))
    assert send.sent == 0


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.ON_ITS_WAY, JobState.UNKNOWN])
def test_connect_with_persistent_404_waits_out_its_budget(clock: Clock, state: JobState) -> None:
    on, send = route(state, warm=False), Sender(None)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(on, send)))
    assert clock.waits[:5] == [2, 4, 8, 8, 8]
    assert sum(clock.waits) == pytest.approx(120)
    assert on.counters.given_up == 1


def test_calls_at_connect_share_one_budget(clock: Clock) -> None:
    on = route(warm=False)

    async def both() -> None:
        with pytest.raises(RefusedError):
            await run(replay(on, Sender(None)))
        waited = sum(clock.waits)
        with pytest.raises(RefusedError):
            await run(replay(on, Sender(None)))
        assert sum(clock.waits) == waited

    asyncio.run(both())


def test_connect_budget_comes_back_after_a_quiet_minute(clock: Clock) -> None:
    on = route(warm=False)
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(on, Sender(None))))
    clock.now += 61
    assert asyncio.run(run(replay(on, Sender(None, "answer")))) == "answer"


def test_connect_to_an_ended_job_fails_fast(clock: Clock) -> None:
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(JobState.OVER, warm=False), Sender("answer"))))
    assert clock.waits == []


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


# --- The warm-up -------------------------------------------------------------------------


class FakeProber:
    """Answers probes from a script, round after round."""

    def __init__(self, *script: Any) -> None:
        self.send = Sender(*script)

    async def __call__(self) -> None:
        await asyncio.sleep(0)
        await self.send()

    def refused(self, error: BaseException) -> bool:
        return isinstance(error, RefusedError)

    def headers(self, _: BaseException) -> dict[str, str]:
        return {}

    def answered(self, error: BaseException) -> bool:
        return isinstance(error, RefusedError | ValueError)


def warm_up(on: Route, prober: FakeProber) -> None:
    @asynccontextmanager
    async def open_prober() -> Any:
        yield prober

    asyncio.run(_warmup.warm_up(on, open_prober))


def test_warmup_returns_after_required_consecutive_successes(clock: Clock) -> None:
    on, prober = route(warm=False), FakeProber("ok")
    warm_up(on, prober)
    assert prober.send.sent == 3
    assert clock.waits == []
    assert on.warm


def test_warmup_recovers_after_transient_404s(clock: Clock) -> None:
    # Three at once at first, and then one after the other, up to the first that fails.
    on, prober = route(warm=False), FakeProber("ok", "ok", None, "ok", None, "ok", "ok", "ok")
    warm_up(on, prober)
    assert prober.send.sent == 8
    assert clock.waits == [2, 4]
    assert on.warm
    assert on.counters.recovered == 1


def test_warmup_raises_on_persistent_404_after_timeout(clock: Clock) -> None:
    on = route(warm=False)
    with pytest.raises(TimeoutError) as caught:
        warm_up(on, FakeProber(None))
    assert isinstance(caught.value.__cause__, RefusedError)
    assert clock.waits[:5] == [2, 4, 8, 8, 8]
    assert sum(clock.waits) == pytest.approx(120)
    assert not on.warm
    assert on.counters.given_up == 1


def test_warmup_has_only_the_connect_budget_that_is_left(clock: Clock) -> None:
    on = route(warm=False)
    assert asyncio.run(run(replay(on, Sender(None, None, None, "answer")))) == "answer"
    spent = sum(clock.waits)
    with pytest.raises(TimeoutError):
        warm_up(on, FakeProber(None))
    assert sum(clock.waits) == pytest.approx(120)
    assert spent == 22


@pytest.mark.parametrize("script", [(ValueError("500"),), ("ok", ValueError("500"), "ok")])
def test_warmup_skips_on_non_404_error(clock: Clock, script: tuple[Any, ...]) -> None:
    on, prober = route(warm=False), FakeProber(*script)
    warm_up(on, prober)
    assert prober.send.sent == 3
    assert not on.warm


def test_warmup_of_an_ended_job_fails_fast(clock: Clock) -> None:
    on = route(JobState.OVER, warm=False)
    with pytest.raises(RefusedError) as caught:
        warm_up(on, FakeProber(None))
    assert clock.waits == []
    assert "JOB_STATE_OVER" in caught.value.__notes__[0]


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.ON_ITS_WAY, JobState.UNKNOWN])
def test_warmup_waits_unless_the_job_has_ended(clock: Clock, state: JobState) -> None:
    on = route(state, warm=False)
    warm_up(on, FakeProber(None, None, None, "ok"))
    assert on.warm


def test_warmup_with_zero_successes_sends_nothing(
    clock: Clock, settings: Callable[..., None]
) -> None:
    settings(warmup_successes=0)
    on, prober = route(warm=False), FakeProber(None)
    warm_up(on, prober)
    assert prober.send.sent == 0
    # So nothing is known of the route.
    assert on.connecting
    assert on.counters.warmups == 0


def test_warmup_failure_of_its_own_does_not_stop_the_connect(
    clock: Clock, settings: Callable[..., None], overheard: Any
) -> None:
    @asynccontextmanager
    async def broken() -> Any:
        raise OSError("too many open files")
        yield

    with pytest.raises(OSError, match="too many"):
        asyncio.run(_warmup.warm_up(route(), broken))
    settings(strict=False)
    asyncio.run(_warmup.warm_up(route(), broken))
    assert "shim.failed" in overheard.events


# --- Waiting on a real clock -------------------------------------------------------------


def test_one_answer_releases_all_waiters() -> None:
    async def program() -> list[int]:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
        waits = [Waiting(on, no_probe, longest=60) for _ in range(100)]
        with on.incident():
            sleeping = [asyncio.ensure_future(wait.sleep(60)) for wait in waits]
            await asyncio.sleep(0.05)
            assert on.sleepers == 100
            on.answered()
            await asyncio.wait_for(asyncio.gather(*sleeping), 10)
        assert on.sleepers == 0
        return [wait.full_waits for wait in waits]

    assert asyncio.run(program()) == [0] * 100


def test_answer_since_the_refusal_ends_the_wait_and_an_older_one_does_not() -> None:
    async def program() -> None:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
        on.answered()
        await asyncio.sleep(0.01)
        wait = Waiting(on, no_probe, longest=60)
        with on.incident():
            await wait.sleep(0.05)
            assert wait.full_waits == 1
            on.answered()
            await asyncio.wait_for(wait.sleep(60), 10)
            assert wait.full_waits == 1

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
            await Waiting(on, probe, longest=60).sleep(0.02)
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(program())


def test_prober_releases_waiters_on_any_answer_but_a_gateway_404(
    mocker: MockerFixture,
) -> None:
    mocker.patch.object(_warmup, "_cadence", return_value=0.01)

    async def program(prober: FakeProber) -> int:
        on = Route(JOB, ControlPlane())  # type: ignore[arg-type]

        @asynccontextmanager
        async def open_prober() -> Any:
            yield prober

        with on.incident():
            wait = Waiting(on, _warmup.light_prober(on, open_prober), longest=60)
            await wait.sleep(1.0)
        return wait.full_waits

    assert asyncio.run(program(FakeProber(None, None, "ok"))) == 0
    assert asyncio.run(program(FakeProber(None, ValueError("500"), None))) == 0
    # Neither the gateway's 404 nor a connection that fails is an answer.
    assert asyncio.run(program(FakeProber(None))) == 1
    assert asyncio.run(program(FakeProber(ConnectionError("refused")))) == 1


def test_prober_cadence_slows_down_over_time() -> None:
    assert [_warmup._cadence(at) for at in (0, 0.9, 1, 29, 30)] == [0.25, 0.25, 0.5, 0.5, 1.0]


def test_changed_settings_reach_the_retry_policy(
    settings: Callable[..., None], clock: Clock
) -> None:
    settings(base_delay=1, max_delay=2)
    assert _settings.current().base_delay == 1
    with pytest.raises(RefusedError):
        asyncio.run(run(replay(route(), Sender(None))))
    assert clock.waits == [1, 2, 2, 2]
