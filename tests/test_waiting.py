"""Policies, route and prober together, in virtual time.

The event loop is asyncio's own, but where it would sleep, the clock is put forward instead. So
half a minute of waiting takes no time, every moment is exact, and a loop in which nothing
would ever happen again is an error and not a hang.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import tinker_routefix
from tests.test_policy import (
    JOB,
    ControlPlane,
    FakeProber,
    RefusedError,
    Sender,
    no_probe,
    replay,
    route,
)
from tinker_routefix import _log, _route, events
from tinker_routefix._control_plane import Answer, JobState
from tinker_routefix._retry import Waiting
from tinker_routefix._route import Route
from tinker_routefix._warmup import RouteTimeoutError, light_prober, warm_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from tinker_routefix._retry import Probe, Replay

FOREVER = float("inf")


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-3)


class Time:
    """The clock, and an event loop that lives by it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr("time.monotonic", lambda: self.now)
        patch.setattr("random.uniform", lambda _, high: high)
        # It has noted moments of other clocks.
        patch.setattr(_log, "_own_failures", _log.RateLimit(seconds=60.0))

    @property
    def passed(self) -> float:
        """Seconds since the test began."""
        return round(self.now - 1000.0, 3)

    def run(self, program: Coroutine[Any, Any, Any]) -> Any:
        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(Selector(self))

        failed: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: failed.append(context))
            outcome = runner.run(program)
        # In a callback, or in a task that nobody waits for.
        assert not failed
        return outcome


class Selector(selectors.DefaultSelector):
    def __init__(self, time: Time) -> None:
        super().__init__()
        self.time = time
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        self.turns += 1
        assert self.turns < 100_000, "this goes on for ever"
        if not ready:
            assert timeout is not None, "nothing will ever happen again"
            self.time.now += timeout
        # No two turns of a loop are ever at the same moment.
        self.time.now += 1e-7
        return ready


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


class Gateway:
    """Refuses what comes before a moment, and notes when something came."""

    def __init__(self, time: Time, *, heals: float, seconds: float = 0.0) -> None:
        self.time = time
        self.heals = heals
        self.seconds = seconds
        """How long it takes to answer."""
        self.came: list[float] = []

    async def __call__(self) -> str:
        self.came.append(self.time.passed)
        stale = self.time.passed < self.heals
        await asyncio.sleep(self.seconds)
        if stale:
            raise RefusedError(f"at {self.came[-1]}")
        return "answer"


class Prober(FakeProber):
    """Probes a gateway; to be opened as the shim opens one."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self.gateway = gateway
        self.opened = self.closed = 0

    async def __call__(self) -> None:
        await self.gateway()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        self.opened += 1
        try:
            yield self
        finally:
            self.closed += 1


def prober(time: Time, *, heals: float, seconds: float = 0.0) -> Prober:
    return Prober(Gateway(time, heals=heals, seconds=seconds))


def request(on: Route, send: Any, probe: Probe) -> Replay:
    """A request that has just been refused."""
    made = replay(on, send)
    made._probe = probe
    return made


async def in_parallel(requests: list[Replay]) -> list[Any]:
    return await asyncio.gather(*(one.run() for one in requests), return_exceptions=True)


def test_answer_at_the_very_moment_of_the_refusal_ends_the_wait(time: Time) -> None:
    """An answer in the very moment of a refusal may have come after it."""
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> bool:
        on.answered_at = time.now
        with on.incident():
            return await on.pause(
                60, since=time.now, not_before=time.now, probe=light_prober(on, light.open)
            )

    assert time.run(wait())
    assert time.passed < 1


# --- One request and the prober ----------------------------------------------------------


def test_replay_is_sent_when_a_probe_succeeds(time: Time) -> None:
    on, light, gateway = route(), prober(time, heals=5), Gateway(time, heals=5)
    replayed = request(on, gateway, light_prober(on, light.open))
    assert time.run(replayed.run()) == "answer"
    # The first wait is over before the route is back, the second one ends with it.
    assert gateway.came == [2, 5]
    assert light.gateway.came[-1] == 5
    assert replayed.full_waits == 1
    assert on.counters.probes == len(light.gateway.came)
    assert (light.opened, light.closed) == (1, 1)


def test_prober_slows_from_four_probes_a_second_to_one(time: Time) -> None:
    """Four probes in the first second, two a second for half a minute, then one."""
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> None:
        with on.incident():
            waiting = Waiting(on, light_prober(on, light.open), longest=60)
            await waiting.sleep(40)

    time.run(wait())
    came = light.gateway.came
    assert came[:6] == [0, 0.25, 0.5, 0.75, 1, 1.5]
    per_second = Counter(int(at) for at in came)
    assert [per_second[second] for second in range(40)] == [4] + [2] * 29 + [1] * 10


def test_prober_pauses_while_nobody_waits(time: Time) -> None:
    """A replay that is on its way is as good as a probe."""
    on, light = route(), prober(time, heals=FOREVER)
    slow = Gateway(time, heals=3, seconds=10)
    assert time.run(request(on, slow, light_prober(on, light.open)).run()) == "answer"
    assert slow.came == [2, 16]
    assert not [at for at in light.gateway.came if 2 < at < 12]
    assert [at for at in light.gateway.came if 12 <= at < 16]


def test_incidents_in_quick_succession_cause_no_burst_of_probes(time: Time) -> None:
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> None:
        for _ in range(20):
            with on.incident():
                await Waiting(on, light_prober(on, light.open), longest=60).sleep(0.1)

    time.run(wait())
    assert light.opened == light.closed == 20
    assert all(later - earlier > 0.22 for earlier, later in pairwise(light.gateway.came))
    assert len(light.gateway.came) == 7


def test_slow_probe_is_not_overtaken(time: Time) -> None:
    on, light = route(), prober(time, heals=FOREVER, seconds=3)

    async def wait() -> None:
        with on.incident():
            await Waiting(on, light_prober(on, light.open), longest=60).sleep(10)

    time.run(wait())
    assert all(later - earlier >= 3 for earlier, later in pairwise(light.gateway.came))


def test_waits_without_a_prober_run_their_full_length(
    time: Time, settings: Callable[..., None], overheard: Any
) -> None:
    settings(strict=False)
    on, gateway, opened = route(), Gateway(time, heals=5), 0

    @asynccontextmanager
    async def broken() -> AsyncIterator[Any]:
        nonlocal opened
        opened += 1
        raise OSError("too many open files")
        yield

    assert time.run(request(on, gateway, light_prober(on, broken)).run()) == "answer"
    assert gateway.came == [2, 6]
    # Whoever waits next tries again.
    assert opened == 2
    assert "shim.failed" in overheard.events


# --- What is told ------------------------------------------------------------------------


@pytest.fixture
def told() -> Iterator[list[Any]]:
    seen: list[Any] = []
    unsubscribe = tinker_routefix.subscribe(seen.append)
    yield seen
    unsubscribe()


def facts(told: list[Any]) -> list[tuple[Any, ...]]:
    """Class, number of replays and seconds of each event."""
    return [(type(one), one.replays, getattr(one, "seconds", None)) for one in told]


def test_replay_events_carry_seconds_to_the_millisecond(
    time: Time, settings: Callable[..., None], told: list[Any]
) -> None:
    settings(base_delay=0.1239)
    on, gateway = route(), Gateway(time, heals=0.2)
    assert time.run(request(on, gateway, no_probe).run()) == "answer"
    assert facts(told) == [
        (events.Refused, 0, None),
        (events.Replayed, 1, 0.124),
        (events.Refused, 1, None),
        (events.Replayed, 2, 0.372),
        (events.Recovered, 2, 0.372),
    ]
    assert on.counters.longest_wait == about(0.3717)
    assert on.counters.last_intervention is not None


def test_waiting_lines_carry_seconds_to_the_millisecond(
    time: Time, settings: Callable[..., None], overheard: Any
) -> None:
    settings(base_delay=6.12345)
    time.run(in_parallel([request(route(), Gateway(time, heals=7), no_probe)]))
    waiting = [line for line in overheard.lines if "'route.waiting'" in line]
    assert len(waiting) == 2
    assert "not there yet after 6.1 s" in waiting[1]
    assert "'routefix_seconds': 6.123," in waiting[1]


def test_warm_up_events_carry_seconds_to_the_millisecond(time: Time, told: list[Any]) -> None:
    on, light = route(warm=False), prober(time, heals=0, seconds=0.12345)
    time.run(warm_up(on, light.open))
    started, ended = told
    assert type(started) is events.WarmupStarted
    assert (ended.outcome, ended.rounds, ended.seconds, ended.error) == ("warm", 1, 0.123, None)
    assert on.counters.longest_wait == 0


def test_longest_wait_is_that_of_the_worst_request(
    time: Time, settings: Callable[..., None]
) -> None:
    settings(max_replays=1)
    on = route()
    for heals, longest in ((2, 2), (0, 2), (FOREVER, 2)):
        gateway = Gateway(time, heals=time.passed + heals)
        time.run(in_parallel([request(on, gateway, no_probe)]))
        assert on.counters.longest_wait == about(longest)
    settings(max_replays=2)
    time.run(in_parallel([request(on, Gateway(time, heals=FOREVER), no_probe)]))
    assert on.counters.longest_wait == about(6)


@pytest.mark.parametrize(
    ("state", "kind"),
    [(JobState.RUNNING, events.GivenUp), (JobState.OVER, events.FailedFast)],
)
def test_final_event_and_exception_note_agree(
    time: Time,
    settings: Callable[..., None],
    told: list[Any],
    state: JobState,
    kind: type[events.GivenUp],
) -> None:
    settings(max_replays=1)
    with pytest.raises(RefusedError) as caught:
        time.run(request(route(state), Gateway(time, heals=FOREVER), no_probe).run())
    last: Any = told[-1]
    assert type(last) is kind
    assert last.said == f"JOB_STATE_{state.name}"
    (note,) = caught.value.__notes__
    assert note.startswith(f"tinker_routefix: {last}. ")


# --- Some replicas know the route, others do not -----------------------------------------


def test_half_healed_route_costs_pace_and_no_counted_wait(time: Time) -> None:
    """Every probe comes through and every replay but the last meets the 404."""
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=20)
    replayed = request(on, gateway, light_prober(on, light.open))
    assert time.run(replayed.run()) == "answer"
    assert replayed.full_waits == 0
    assert gateway.came[:5] == [0, 0.5, 1, 1.5, 2]
    assert gateway.came[-1] == 20
    assert max(Counter(int(at) for at in gateway.came).values()) == 2
    assert replayed.replays == len(gateway.came) == on.counters.replays


def test_half_healed_route_is_retried_for_exactly_the_budget(time: Time) -> None:
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=FOREVER)
    with pytest.raises(RefusedError) as caught:
        time.run(request(on, gateway, light_prober(on, light.open)).run())
    assert time.passed == 30
    assert len(gateway.came) in (60, 61)
    assert f"{len(gateway.came)} replays in 30.0 s" in caught.value.__notes__[0]
    assert on.counters.given_up == 1


def test_answer_after_giving_up_marks_the_route_reachable(
    time: Time, settings: Callable[..., None]
) -> None:
    """It says that the route works again, and telemetry need not be dropped any more."""
    settings(retry_budget=1)
    on = route()
    with pytest.raises(RefusedError):
        time.run(request(on, Gateway(time, heals=FOREVER), no_probe).run())
    assert on.given_up
    assert on.watched
    assert not on.connecting
    on.answered()
    assert not on.given_up


def test_second_replay_of_a_release_keeps_within_the_budget(
    time: Time, settings: Callable[..., None]
) -> None:
    settings(retry_budget=0.3)
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=FOREVER)
    with pytest.raises(RefusedError):
        time.run(request(on, gateway, light_prober(on, light.open)).run())
    assert gateway.came == [0, 0.3]


def test_pace_does_not_lengthen_a_shorter_wait(time: Time, settings: Callable[..., None]) -> None:
    """The shorter one of the two holds."""
    settings(base_delay=0.2, max_delay=0.2)
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=3)
    assert time.run(request(on, gateway, light_prober(on, light.open)).run()) == "answer"
    assert all(later - earlier <= 0.201 for earlier, later in pairwise(gateway.came))


def test_answer_before_the_last_refusal_does_not_end_the_wait(time: Time) -> None:
    """The first replay is on its way for a second, and meanwhile another request got through."""
    on, gateway = route(), Gateway(time, heals=6, seconds=1)

    async def program() -> None:
        asyncio.get_running_loop().call_later(2.5, on.answered)
        assert await request(on, gateway, no_probe).run() == "answer"

    time.run(program())
    assert gateway.came == [2, 7]


def test_discarded_404_holds_no_frames(time: Time) -> None:
    """Its frames lead to the request and to its body, and from there back to it."""
    on, gateway = route(), Gateway(time, heals=5)
    replayed = request(on, gateway, no_probe)
    assert time.run(replayed.run()) == "answer"
    assert str(replayed.error) == "at 2.0"
    assert replayed.error.__traceback__ is None


def test_raised_404_is_the_last_one_received(time: Time) -> None:
    """And the others are gone at once, with all that their frames hold."""
    on, gateway = route(*[JobState.RUNNING] * 5, JobState.OVER), Gateway(time, heals=FOREVER)
    first = RefusedError("the first")
    replayed = replay(on, gateway, first)
    with pytest.raises(RefusedError, match=r"at 6\.0") as caught:
        time.run(replayed.run())
    assert caught.value is replayed.error
    assert first.__traceback__ is None
    assert not getattr(first, "__notes__", None)


# --- Many at once ------------------------------------------------------------------------


def test_hundred_waiters_share_one_prober_and_are_released_together(time: Time) -> None:
    on, light, gateway = route(), prober(time, heals=10), Gateway(time, heals=10)
    probe = light_prober(on, light.open)
    answers = time.run(in_parallel([request(on, gateway, probe) for _ in range(100)]))
    assert answers == ["answer"] * 100
    assert time.passed == 10
    assert light.opened == light.closed == 1
    assert len(light.gateway.came) == 4 + 2 * 9 + 1
    # Those of the full waits, and of the release.
    assert Counter(gateway.came) == {2: 100, 6: 100, 10: 100}
    assert on.sleepers == 0
    assert on.counters.recovered == 100


class OneAnswer(ControlPlane):
    """Asked once for all who ask meanwhile, as the real one is."""

    question: asyncio.Task[Answer] | None = None

    async def ask(self, headers: object) -> Answer:
        if self.question is None or self.question.done():
            self.question = asyncio.ensure_future(self.answer(headers))
        return await asyncio.shield(self.question)

    async def answer(self, headers: object) -> Answer:
        await asyncio.sleep(0.05)
        return await super().ask(headers)


def test_waiters_released_together_are_staggered_over_loop_ticks(time: Time) -> None:
    """A few in each turn of the loop, which has other things to do: tinker's."""
    on, light = route(), prober(time, heals=3)
    on.control_plane = OneAnswer()  # type: ignore[assignment]
    sent: list[float] = []

    async def send() -> None:
        sent.append(time.now)
        if time.passed < 3:
            raise RefusedError("too early")

    probe = light_prober(on, light.open)
    time.run(in_parallel([request(on, send, probe) for _ in range(100)]))
    assert len(sent) == 200
    assert max(Counter(sent).values()) == _route.AT_ONCE
    assert time.passed < 4
    assert on.control_plane.questions < 10


def test_waiters_that_start_together_are_staggered_over_loop_ticks(
    time: Time, told: list[Any]
) -> None:
    """Their polls end in one turn where the gateway closes what it held open."""
    on = route()
    moments: list[float] = []
    unsubscribe = tinker_routefix.subscribe(lambda _: moments.append(time.now))
    waiting = [request(on, Gateway(time, heals=0), no_probe) for _ in range(100)]
    time.run(in_parallel(waiting))
    unsubscribe()
    met = [at for at, one in zip(moments, told, strict=True) if type(one) is events.Refused]
    assert len(met) == 100
    assert max(Counter(met).values()) == _route.AT_ONCE


def test_successful_request_releases_the_other_waiters(time: Time) -> None:
    """Whatever it was: no probe is needed, and nobody waits to the end."""
    on, gateway = route(), Gateway(time, heals=3)

    async def program() -> None:
        asyncio.get_running_loop().call_later(3, on.answered)
        assert (
            await in_parallel([request(on, gateway, no_probe) for _ in range(5)]) == ["answer"] * 5
        )

    time.run(program())
    assert Counter(gateway.came) == {2: 5, 3: 5}


def test_prober_stays_until_the_last_waiter_is_through(time: Time) -> None:
    on, light = route(), prober(time, heals=9)
    probe = light_prober(on, light.open)
    first, last = Sender("at once"), Gateway(time, heals=9)
    answers = time.run(in_parallel([request(on, first, probe), request(on, last, probe)]))
    assert answers == ["at once", "answer"]
    assert light.opened == light.closed == 1
    assert last.came == [2, 6, 9]


def test_cancelled_waiter_leaves_the_others_waiting(time: Time) -> None:
    on, light, gateway = route(), prober(time, heals=5), Gateway(time, heals=5)
    probe = light_prober(on, light.open)

    async def program() -> tuple[int, Any]:
        leaves = asyncio.ensure_future(request(on, gateway, probe).run())
        stays = asyncio.ensure_future(request(on, gateway, probe).run())
        await asyncio.sleep(3)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        return on.sleepers, await stays

    assert time.run(program()) == (1, "answer")
    assert (on.counters.cancelled, on.counters.recovered) == (1, 1)
    assert light.opened == light.closed == 1
    assert Counter(gateway.came) == {2: 2, 5: 1}


def test_cancelling_the_last_waiter_ends_the_prober(time: Time) -> None:
    on, light = route(), prober(time, heals=FOREVER)

    async def program() -> None:
        alone = request(on, Sender(None), light_prober(on, light.open))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(alone.run(), 3)
        probes = len(light.gateway.came)
        await asyncio.sleep(10)
        assert len(light.gateway.came) == probes
        assert len(asyncio.all_tasks()) == 1

    time.run(program())
    assert (light.opened, light.closed) == (1, 1)
    assert not on.watched


# --- What connecting may cost ------------------------------------------------------------


def test_concurrent_waits_spend_the_connect_budget_once(time: Time) -> None:
    on = route(warm=False)
    waiting = [request(on, Gateway(time, heals=10), no_probe) for _ in range(10)]
    assert time.run(in_parallel(waiting)) == ["answer"] * 10
    assert time.passed == 14
    assert on.connect_spent() == about(14)


def test_connect_budget_is_spent_only_while_an_incident_lasts(time: Time) -> None:
    on = route(warm=False)
    with on.incident():
        time.now += 5
        assert on.connect_spent() == 5
        with on.incident():
            time.now += 5
        time.now += 5
        assert on.connect_spent() == 15
    time.now += 5
    assert on.connect_spent() == 15
    with on.incident():
        time.now += 1
        assert on.connect_spent() == 16


@pytest.mark.parametrize(("quiet", "spent"), [(59.9, 7), (60.1, 0)])
def test_connect_budget_is_reset_after_a_quiet_minute(
    time: Time, quiet: float, spent: float
) -> None:
    on = route(warm=False)
    with on.incident():
        time.now += 7
    time.now += quiet
    with on.incident():
        assert on.connect_spent() == spent


def test_warm_route_gives_the_next_client_a_whole_budget(time: Time) -> None:
    on = route(warm=False)
    with on.incident():
        time.now += 100
        on.became_warm()
        time.now += 1
        assert on.connect_spent() == 1
    assert on.warm


def test_warm_up_of_the_next_client_has_a_whole_budget_after_an_incident(time: Time) -> None:
    """A later 404 of the running program, and a route that is gone when another one connects."""
    on = route()
    assert time.run(request(on, Gateway(time, heals=10), no_probe).run()) == "answer"
    began, on.answered_at = time.passed, -FOREVER
    light = prober(time, heals=FOREVER)
    with pytest.raises(RouteTimeoutError):
        time.run(warm_up(on, light.open))
    assert time.passed - began == 120


def test_replay_begun_while_connecting_keeps_the_connect_budget(time: Time) -> None:
    """Though another client's first request has been made meanwhile."""
    on, gateway = route(JobState.UNKNOWN, warm=False), Gateway(time, heals=40)

    async def program() -> None:
        asyncio.get_running_loop().call_later(1, setattr, on, "worked", True)
        assert await request(on, gateway, no_probe).run() == "answer"

    time.run(program())
    assert gateway.came == [2, 6, 14, 22, 30, 38, 46]


def test_connecting_ends_with_the_first_work_or_warm_up() -> None:
    assert Route(JOB, ControlPlane()).connecting  # type: ignore[arg-type]
    on = route(warm=False)
    assert on.connecting
    on.worked = True
    assert not on.connecting
    on = route(warm=False)
    on.became_warm()
    assert not on.connecting


# --- The warm-up -------------------------------------------------------------------------


def test_warm_up_goes_on_when_a_light_probe_succeeds(time: Time) -> None:
    on, light = route(warm=False), prober(time, heals=5)
    time.run(warm_up(on, light.open))
    assert on.warm
    # Three at once, and then one after the other: after the first full wait, where the first
    # one fails, and when a light probe has come through.
    came = light.gateway.came
    assert came[:3] == [0, 0, 0]
    assert came[-4:] == [5, 5.5, 6, 6.5]
    assert time.passed == 6.5
    assert on.counters.probes == len(light.gateway.came)
    assert (on.counters.warmups, on.counters.warmup_seconds) == (1, about(6.5))
    assert on.counters.recovered == 1
    assert light.opened == light.closed == 2


def test_healthy_warm_up_is_one_round_and_no_intervention(time: Time) -> None:
    on, light = route(warm=False), prober(time, heals=0, seconds=0.05)
    on.given_up = True
    time.run(warm_up(on, light.open))
    assert light.gateway.came == [0, 0, 0]
    assert on.counters.probes == 3
    assert on.counters.warmups == 1
    assert on.counters.warmup_seconds == about(0.05)
    assert on.counters.recovered == 0
    assert on.counters.last_intervention is None
    assert not on.given_up
    assert light.opened == light.closed == 1


@pytest.mark.parametrize(("heals", "cancelled"), [(FOREVER, 1), (0, 0)])
def test_cancelled_warm_up_is_counted_only_after_a_404(
    time: Time, heals: float, cancelled: int
) -> None:
    """It counts only where a 404 was met."""
    on, light = route(warm=False), prober(time, heals=heals, seconds=0.05)

    async def program() -> None:
        warming = asyncio.ensure_future(warm_up(on, light.open))
        await asyncio.sleep(3 if heals else 0.01)
        warming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await warming

    time.run(program())
    assert on.counters.cancelled == cancelled
    assert on.counters.recovered == on.counters.given_up == 0
    assert not on.warm


@pytest.mark.parametrize("order", [(None, ValueError("500"), "ok"), (ValueError("500"), None)])
def test_warm_up_round_with_a_404_and_another_error_counts_as_a_404(time: Time, order: Any) -> None:
    """The route is stale for sure; the other error may come of that."""
    on, light = route(warm=False), FakeProber(*order, "ok")

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield light

    time.run(warm_up(on, opened))
    assert on.warm
    assert on.counters.last_intervention is not None


def test_answer_before_the_last_refusal_does_not_end_the_warm_up_wait(time: Time) -> None:
    """The probes are on their way for a second, and meanwhile another request got through."""
    on = route(warm=False)
    first, light = prober(time, heals=2, seconds=1), prober(time, heals=FOREVER)
    opened = iter((first, light))

    async def program() -> None:
        asyncio.get_running_loop().call_later(0.5, on.answered)
        await warm_up(on, lambda: next(opened).open())

    time.run(program())
    assert on.warm
    assert first.gateway.came[:3] == [0, 0, 0]
    assert first.gateway.came[3] >= 3


def test_warm_up_with_another_error_emits_outcome_error(time: Time, told: list[Any]) -> None:
    on, light = route(warm=False), FakeProber(ValueError("500"))

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield light

    time.run(warm_up(on, opened))
    assert (told[-1].outcome, told[-1].error) == ("error", "ValueError")
    assert not on.given_up
    assert on.counters.longest_wait == 0


def test_warm_up_timeout_says_what_it_saw(
    time: Time, settings: Callable[..., None], told: list[Any]
) -> None:
    settings(warmup_timeout=9)
    on = route(JobState.ON_ITS_WAY, warm=False)
    light = prober(time, heals=FOREVER)
    with pytest.raises(RouteTimeoutError) as caught:
        time.run(warm_up(on, light.open))
    said = str(caught.value)
    assert "acct/job" in said
    assert "after 9.0 s and 4 rounds" in said
    assert "JOB_STATE_ON_ITS_WAY" in said
    assert on.given_up
    assert (on.counters.given_up, on.counters.failed_fast) == (1, 0)
    assert on.counters.recovered == 0
    assert on.counters.longest_wait == about(9)
    assert (told[-1].outcome, told[-1].error) == ("timeout", "RefusedError")
    assert on.counters.warmup_seconds == about(9)


def test_warm_up_of_an_ended_job_says_what_it_saw(time: Time, told: list[Any]) -> None:
    on, light = route(JobState.OVER, warm=False), prober(time, heals=FOREVER)
    with pytest.raises(RefusedError) as caught:
        time.run(warm_up(on, light.open))
    assert "after 0.0 s and 1 rounds" in caught.value.__notes__[0]
    assert on.given_up
    assert (on.counters.given_up, on.counters.failed_fast) == (0, 1)
    assert on.counters.recovered == 0
    assert (told[-1].outcome, told[-1].error) == ("over", "RefusedError")


def test_telemetry_is_no_longer_dropped_30_seconds_after_giving_up(time: Time) -> None:
    """And no longer, so that it is not dropped for ever."""
    on = route()
    assert not on.drained
    on.give_up()
    time.now += 1000
    assert on.drained
    on.give_up()
    on.answered()
    time.now += 29.9
    assert on.drained
    time.now += 0.2
    assert not on.drained
    assert on.counters.telemetry_dropped == 0


def test_repeated_log_line_is_limited_to_one_in_five_seconds(time: Time) -> None:
    on = route()
    assert on.limit.skipped("route.refused") == 0
    time.now += 4.9
    assert on.limit.skipped("route.refused") is None
    time.now += 0.2
    assert on.limit.skipped("route.refused") == 1


# --- Notes --------------------------------------------------------------------------------

GO_ON = "TINKER_ROUTEFIX_MAX_REPLAYS and TINKER_ROUTEFIX_RETRY_BUDGET make the shim wait longer"
CONNECT = "back, to resume from the last checkpoint; larger TINKER_ROUTEFIX_WARMUP_TIMEOUT make"


@pytest.mark.parametrize(
    ("warm", "state", "advice"),
    [
        (True, JobState.RUNNING, GO_ON),
        (True, JobState.OVER, "The job is over, asleep or not visible with this key"),
        (True, JobState.ON_ITS_WAY, "The job does not run yet: start again when"),
        (True, JobState.UNKNOWN, "Whether the job runs could not be learnt"),
        (False, JobState.RUNNING, CONNECT),
        (False, JobState.OVER, "The job is over, asleep or not visible with this key"),
        (False, JobState.ON_ITS_WAY, "The job does not run yet: start again when"),
        (False, JobState.UNKNOWN, "Whether the job runs could not be learnt"),
    ],
)
def test_exception_note_says_what_to_do_next(
    time: Time, told: list[Any], warm: bool, state: JobState, advice: str
) -> None:
    on = route(state, warm=warm)
    on.control_plane.ago = 0.45678  # type: ignore[attr-defined]
    with pytest.raises(RefusedError) as caught:
        time.run(request(on, Gateway(time, heals=FOREVER), no_probe).run())
    (note,) = caught.value.__notes__
    assert note.startswith(f"tinker_routefix: {told[-1]}. ")
    assert advice in note
    assert f"on the job, 0.5 s before: JOB_STATE_{state.name}; " in note
    assert (told[-1].said_ago, told[-1].state) == (0.457, state.value)
    if state is not JobState.OVER:
        assert "`tinker-routefix check https://gateway.example/training/v1/rlorTrainer" in note


def test_warm_up_timeout_says_what_to_do_next(time: Time) -> None:
    on = route(warm=False)
    on.control_plane.ago = 0.45678  # type: ignore[attr-defined]
    with pytest.raises(RouteTimeoutError) as caught:
        time.run(warm_up(on, prober(time, heals=FOREVER).open))
    assert CONNECT in str(caught.value)
    assert "on the job, 0.5 s before: JOB_STATE_RUNNING. " in str(caught.value)


# --- Loops and jobs ----------------------------------------------------------------------


def test_each_loop_has_one_route_to_a_job() -> None:
    async def routes() -> tuple[Route, Route]:
        return _route.route_to(JOB), _route.route_to(JOB)

    first = asyncio.new_event_loop()
    second = asyncio.new_event_loop()
    try:
        one, same = first.run_until_complete(routes())
        other, _ = second.run_until_complete(routes())
        assert one is same
        assert one is not other
        assert {one, other} <= set(_route.all_routes())
    finally:
        first.close()
        second.close()


def test_route_without_waiters_needs_no_answer() -> None:
    on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
    assert not on.watched
    with on.incident():
        assert on.watched
    assert not on.watched
    on.given_up = True
    assert on.watched
    on.answered()
    assert not on.watched
