"""Policies, route and prober together, in virtual time.

The event loop is asyncio's own, but where it would sleep, the clock is put forward instead. So
half a minute of waiting takes no time, every moment is exact, and a loop in which nothing
would ever happen again is an error and not a hang.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import weakref
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

import tinker_routefix
from tests.clock import FakeClock
from tests.common import notes
from tests.test_policy import (
    JOB,
    ControlPlane,
    FakeProber,
    RefusedError,
    Sender,
    no_probe,
    replay,
    route,
    waiting,
)
from tinker_routefix import _prober, _routes, _waiters, _warmup, events
from tinker_routefix._connecting import ConnectBudget
from tinker_routefix._connections import PooledClient
from tinker_routefix._counters import Counters
from tinker_routefix._errors import RouteTimeoutError
from tinker_routefix._job import Job
from tinker_routefix._job_state import Answer, Told
from tinker_routefix._prober import light_prober
from tinker_routefix._route import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pytest_mock import MockerFixture

    from tests.test_policy import Probe
    from tinker_routefix._replay import Replay

FOREVER = float("inf")


def answered(on: Route) -> None:
    """As where a request of the program's succeeds."""
    on.mark_reachable(proof=True)


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-3)


@pytest.fixture
def time(mocker: MockerFixture) -> FakeClock:
    return FakeClock(mocker)


class Gateway:
    """Refuses what comes before a moment, and notes when something came."""

    def __init__(self, time: FakeClock, *, heals: float, seconds: float = 0.0) -> None:
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


def prober(time: FakeClock, *, heals: float, seconds: float = 0.0) -> Prober:
    return Prober(Gateway(time, heals=heals, seconds=seconds))


def request(on: Route, send: Any, probe: Probe, *, budget: ConnectBudget | None = None) -> Replay:
    """A request that has just been refused."""
    return replay(on, send, budget=budget, probe=probe)


async def warm_up(on: Route, open_prober: Any, budget: ConnectBudget | None = None) -> None:
    await _warmup.warm_up(on, open_prober, budget or ConnectBudget())


async def in_parallel(requests: list[Replay]) -> list[Any]:
    return await asyncio.gather(*(one.run() for one in requests), return_exceptions=True)


def test_answer_at_the_very_moment_of_the_refusal_ends_the_wait(time: FakeClock) -> None:
    """An answer in the very moment of a refusal may have come after it."""
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> bool:
        on.answered_at = time.now
        with on.incident():
            return await on.wait_until_reachable(
                60, since=time.now, not_before=time.now, probe=light_prober(on, light.open)
            )

    assert time.run(wait())
    assert time.passed < 1


# --- One request and the prober ----------------------------------------------------------


def test_replay_is_sent_when_a_probe_succeeds(time: FakeClock) -> None:
    on, light, gateway = route(), prober(time, heals=5.25), Gateway(time, heals=5.25)
    replayed = request(on, gateway, light_prober(on, light.open))
    assert time.run(replayed.run()) == "answer"
    # The first wait is over before the route is back, the second one ends with it.
    assert gateway.came == [2, 5.25]
    assert light.gateway.came[-1] == 5.25
    assert replayed.wait.backoff.counted_waits == 1
    assert on.counters.probes == len(light.gateway.came)
    assert (light.opened, light.closed) == (1, 1)


def test_prober_slows_from_four_probes_a_second_to_one(time: FakeClock) -> None:
    """Four probes in the first second, two a second for half a minute, then one."""
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> None:
        with on.incident():
            await waiting(on, light_prober(on, light.open)).sleep(40)

    time.run(wait())
    came = light.gateway.came
    assert came[:6] == [0, 0.25, 0.5, 0.75, 1.25, 1.75]
    per_second = Counter(int(at) for at in came)
    assert [per_second[second] for second in range(40)] == [4] + [2] * 29 + [1] * 10


def test_prober_pauses_while_nobody_waits(time: FakeClock) -> None:
    """A replay that is on its way is as good as a probe."""
    on, light = route(), prober(time, heals=FOREVER)
    slow = Gateway(time, heals=3, seconds=10)
    assert time.run(request(on, slow, light_prober(on, light.open)).run()) == "answer"
    assert slow.came == [2, 16]
    assert not [at for at in light.gateway.came if 2 < at < 12]
    assert [at for at in light.gateway.came if 12 <= at < 16]


def test_incidents_in_quick_succession_cause_no_burst_of_probes(time: FakeClock) -> None:
    on, light = route(), prober(time, heals=FOREVER)

    async def wait() -> None:
        for _ in range(20):
            with on.incident():
                await waiting(on, light_prober(on, light.open)).sleep(0.1)

    time.run(wait())
    assert light.opened == light.closed == 20
    assert all(later - earlier > 0.22 for earlier, later in pairwise(light.gateway.came))
    assert len(light.gateway.came) == 9


def test_slow_probes_are_overtaken_by_few(time: FakeClock) -> None:
    on, light = route(), prober(time, heals=FOREVER, seconds=3)

    async def wait() -> None:
        with on.incident():
            await waiting(on, light_prober(on, light.open)).sleep(10)

    time.run(wait())
    came = light.gateway.came
    assert max(sum(at <= now < at + 3 for at in came) for now in came) == _prober.PROBES_AT_ONCE
    assert all(later - earlier > 0.22 for earlier, later in pairwise(came))


def test_hanging_probe_does_not_keep_the_others_back(time: FakeClock) -> None:
    """A connection that is dead to one probe blinds nobody who waits."""
    on, light, hung = route(), prober(time, heals=2), 0
    answers = light.gateway

    async def hang_at_first() -> str:
        nonlocal hung
        if not hung:
            hung += 1
            await asyncio.sleep(FOREVER)
        return await answers()

    light.gateway = hang_at_first  # type: ignore[assignment]

    async def wait() -> None:
        with on.incident():
            await waiting(on, light_prober(on, light.open)).sleep(60)
        await asyncio.sleep(0.01)
        # Nor is it left behind.
        assert len(asyncio.all_tasks()) == 1

    time.run(wait())
    assert hung == 1
    assert time.passed < 3


@pytest.mark.parametrize("proves", [True, False])
def test_only_a_probe_of_get_info_proves_that_the_job_runs(time: FakeClock, proves: bool) -> None:
    on, light = route(), prober(time, heals=0)
    light.proves = proves

    async def wait() -> None:
        with on.incident():
            await waiting(on, light_prober(on, light.open)).sleep(60)

    time.run(wait())
    assert time.passed < 1
    assert (on.proven_at == on.answered_at) is proves


def test_waits_without_a_prober_run_their_full_length(
    time: FakeClock, settings: Callable[..., None], overheard: Any
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
    requests = [one for one in told if isinstance(one, events.RequestEvent)]
    return [(type(one), one.replays, getattr(one, "seconds", None)) for one in requests]


def test_replay_events_carry_seconds_to_the_millisecond(
    time: FakeClock, settings: Callable[..., None], told: list[Any]
) -> None:
    settings(base_delay=1.2345678)
    on, gateway = route(), Gateway(time, heals=2)
    assert time.run(request(on, gateway, no_probe).run()) == "answer"
    assert facts(told) == [
        (events.Refused, 0, None),
        (events.Replayed, 1, 1.235),
        (events.Refused, 1, None),
        (events.Replayed, 2, 3.704),
        (events.Recovered, 2, 3.704),
    ]
    assert on.counters.longest_wait == about(3.7037)
    assert on.counters.last_intervention is not None


def test_waiting_lines_carry_seconds_to_the_millisecond(
    time: FakeClock, settings: Callable[..., None], overheard: Any
) -> None:
    settings(retry_budget=30.12345)
    time.run(in_parallel([request(route(), Gateway(time, heals=7), no_probe)]))
    (waiting,) = [line for line in overheard.lines if "'route.waiting'" in line]
    assert "for 2 s (HTTP 404)" in waiting
    assert "'routefix_seconds': 2.0," in waiting
    assert "'routefix_at_most': 28.123," in waiting


def told_waits(told: list[Any]) -> list[tuple[Any, ...]]:
    """Each line that a person gets of a wait: how long it has been, and what is left or came."""
    return [
        (round(one.seconds, 1), round(one.at_most, 1))
        if isinstance(one, events.Waiting)
        else (round(one.seconds, 1), one.outcome)
        for one in told
        if isinstance(one, events.Waiting | events.WaitOver)
    ]


def test_wait_is_told_after_2_seconds_and_every_15_once_for_all(
    time: FakeClock, told: list[Any], settings: Callable[..., None]
) -> None:
    settings(retry_budget=60, max_replays=9)
    on = route()
    time.run(in_parallel([request(on, Gateway(time, heals=35), no_probe) for _ in range(100)]))
    assert told_waits(told)[:3] == [(2.0, 58.0), (17.0, 43.0), (32.0, 28.0)]
    ((_, outcome),) = told_waits(told)[3:]
    assert outcome == "recovered"


def test_wait_below_2_seconds_is_not_told(
    time: FakeClock, told: list[Any], settings: Callable[..., None]
) -> None:
    settings(base_delay=1.5)
    assert time.run(request(route(), Gateway(time, heals=1), no_probe).run()) == "answer"
    assert time.passed < 2
    assert told_waits(told) == []


def test_replay_that_the_pod_holds_is_not_told_as_a_wait(
    time: FakeClock, told: list[Any], settings: Callable[..., None]
) -> None:
    """A long poll that has got through: the route is there, and the answer is the pod's to give."""
    settings(base_delay=1)
    on = route()

    async def held() -> str:
        await asyncio.sleep(40)
        return "answer"

    assert time.run(replay(on, held).run()) == "answer"
    assert told_waits(told) == []


def test_routes_that_come_and_go_are_not_told_more_often(time: FakeClock, told: list[Any]) -> None:
    on = route()

    async def program() -> None:
        for _ in range(10):
            await request(on, Gateway(time, heals=time.passed + 3), no_probe).run()

    time.run(program())
    began = [seconds for seconds, left in told_waits(told) if not isinstance(left, str)]
    assert time.passed > 30
    assert 2 <= len(began) <= time.passed / 15 + 1
    assert len(told_waits(told)) == 2 * len(began)


def test_wait_that_is_given_up_is_told_at_once_and_others_go_on(
    time: FakeClock, told: list[Any]
) -> None:
    on = route()

    async def later() -> None:
        await asyncio.sleep(20)
        await request(on, Gateway(time, heals=FOREVER), no_probe).run()

    async def program() -> None:
        first = request(on, Gateway(time, heals=FOREVER), no_probe).run()
        both = await asyncio.gather(first, later(), return_exceptions=True)
        assert all(isinstance(one, RefusedError) for one in both)

    time.run(program())
    outcomes = [outcome for _, outcome in told_waits(told)]
    assert outcomes.count("given up") == 2
    assert outcomes.index("given up") == 2


def test_wait_that_the_program_ends_is_told_so_and_leaves_no_timer(
    time: FakeClock, told: list[Any]
) -> None:
    on = route()

    async def program() -> None:
        running = asyncio.ensure_future(request(on, Gateway(time, heals=FOREVER), no_probe).run())
        await asyncio.sleep(5)
        running.cancel()
        await asyncio.sleep(0)
        assert on.voice._timer is None
        assert len(asyncio.all_tasks()) <= 2

    time.run(program())
    assert [outcome for _, outcome in told_waits(told)][1:] == ["ended"]


def test_slow_warm_up_without_a_404_is_not_told(time: FakeClock, told: list[Any]) -> None:
    on, light = route(), prober(time, heals=0, seconds=8)
    time.run(warm_up(on, light.open))
    assert told_waits(told) == []
    assert on.voice._timer is None


def test_warm_up_that_has_met_404s_and_another_error_is_told_as_ended(
    time: FakeClock, told: list[Any]
) -> None:
    on, light = route(), prober(time, heals=5)
    refuse = light.gateway

    async def break_off() -> str:
        await refuse()
        raise OSError

    light.gateway = break_off  # type: ignore[assignment]
    time.run(warm_up(on, light.open))
    assert told_waits(told)[-1][1] == "ended"


def test_warm_up_events_carry_seconds_to_the_millisecond(time: FakeClock, told: list[Any]) -> None:
    on, light = route(), prober(time, heals=0, seconds=0.12345)
    time.run(warm_up(on, light.open))
    started, probed, ended = told
    assert type(started) is events.WarmupStarted
    assert (type(probed), probed.number) == (events.ProbesSent, 3)
    assert (ended.outcome, ended.rounds, ended.seconds, ended.error) == ("warm", 1, 0.123, None)
    assert on.counters.longest_wait == 0


def test_longest_wait_is_that_of_the_worst_request(
    time: FakeClock, settings: Callable[..., None]
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
    [(Told.RUNNING, events.GivenUp), (Told.ENDED, events.FailedFast)],
)
def test_final_event_and_exception_note_agree(
    time: FakeClock,
    settings: Callable[..., None],
    told: list[Any],
    state: Told,
    kind: type[events.GivenUp],
) -> None:
    settings(max_replays=1)
    with pytest.raises(RefusedError) as caught:
        time.run(request(route(state), Gateway(time, heals=FOREVER), no_probe).run())
    last: Any = told[-1]
    assert type(last) is kind
    assert last.control_plane_said == f"JOB_STATE_{state.name}"
    assert len(caught.value.__notes__) == 1
    note = notes(caught.value)
    assert note.startswith(f"tinker_routefix: {last}. ")


# --- Some replicas know the route, others do not -----------------------------------------


def half_healed(
    time: FakeClock, *, heals: float, proves: bool = True
) -> tuple[Route, Gateway, Replay]:
    """Every probe comes through, and every replay up to a moment gets the 404."""
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=heals)
    light.proves = proves
    return on, gateway, request(on, gateway, light_prober(on, light.open))


def test_half_healed_route_costs_pace_and_no_counted_wait(time: FakeClock) -> None:
    on, gateway, replayed = half_healed(time, heals=20)
    assert time.run(replayed.run()) == "answer"
    assert replayed.wait.backoff.counted_waits == 0
    assert gateway.came[:7] == [0, 1, 2, 3, 4, 5.6, 7.2]
    assert 20 <= gateway.came[-1] < 21.6
    assert replayed.replays == len(gateway.came) == on.counters.replays


@pytest.mark.parametrize("proves", [True, False], ids=["get_info", "capabilities"])
@pytest.mark.parametrize("draw", [0, 0.5, 1])
def test_half_healed_route_is_asked_and_retried_for_the_budget_and_seldom(
    time: FakeClock, monkeypatch: pytest.MonkeyPatch, draw: float, proves: bool
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low + draw * (high - low))
    on, gateway, replayed = half_healed(time, heals=FOREVER, proves=proves)
    with pytest.raises(RefusedError) as caught:
        time.run(replayed.run())
    assert 29 < time.passed <= 30
    assert f"{len(gateway.came)} replays in {time.passed:.1f} s" in notes(caught.value)
    assert on.counters.given_up == 1
    for at in gateway.came:
        assert sum(at <= other < at + 0.999 for other in gateway.came) <= 2
    # On average; by the luck of the draw a few more.
    assert len(gateway.came) <= (30 if draw else 40)
    assert on.control_plane.questions <= (10 if proves else 31)


def test_answer_after_giving_up_marks_the_route_reachable(
    time: FakeClock, settings: Callable[..., None]
) -> None:
    """It says that the route works again, and telemetry need not be dropped any more."""
    settings(retry_budget=1)
    on = route()
    with pytest.raises(RefusedError):
        time.run(request(on, Gateway(time, heals=FOREVER), no_probe).run())
    assert on.given_up
    assert on.needs_notice
    answered(on)
    assert not on.given_up


def test_paced_replay_keeps_within_the_budget(
    time: FakeClock, settings: Callable[..., None]
) -> None:
    settings(retry_budget=0.3)
    on, light, gateway = route(), prober(time, heals=0), Gateway(time, heals=FOREVER)
    with pytest.raises(RefusedError):
        time.run(request(on, gateway, light_prober(on, light.open)).run())
    assert gateway.came == [0, 0.3]


def test_pace_does_not_lengthen_a_shorter_wait(time: FakeClock) -> None:
    """The shorter one of the two holds."""
    on, light, woke = route(), prober(time, heals=0), []

    async def wait() -> None:
        made = waiting(on, light_prober(on, light.open))
        with on.incident():
            for _ in range(5):
                made.refused_at = time.now - 1
                await made.sleep(0.2)
                woke.append(time.passed)
        assert made.backoff.counted_waits == 0

    on.answered_at = time.now
    time.run(wait())
    assert woke == [0, 0.2, 0.4, 0.6, 0.8]


def test_answer_before_the_last_refusal_does_not_end_the_wait(time: FakeClock) -> None:
    """The first replay is on its way for a second, and meanwhile another request got through."""
    on, gateway = route(), Gateway(time, heals=6, seconds=1)

    async def program() -> None:
        asyncio.get_running_loop().call_later(2.5, answered, on)
        assert await request(on, gateway, no_probe).run() == "answer"

    time.run(program())
    assert gateway.came == [2, 7]


def test_discarded_404_holds_no_frames(time: FakeClock) -> None:
    """Its frames lead to the request and to its body, and from there back to it."""
    on, gateway = route(), Gateway(time, heals=5)
    replayed = request(on, gateway, no_probe)
    assert time.run(replayed.run()) == "answer"
    assert str(replayed.error) == "at 2.0"
    assert replayed.error.__traceback__ is None


def test_raised_404_is_the_last_one_received(time: FakeClock) -> None:
    """And the others are gone at once, with all that their frames hold."""
    on, gateway = route(*[Told.RUNNING] * 3, Told.ENDED), Gateway(time, heals=FOREVER)
    first = RefusedError("the first")
    replayed = replay(on, gateway, first)
    with pytest.raises(RefusedError, match=r"at 6\.0") as caught:
        time.run(replayed.run())
    assert caught.value is replayed.error
    assert first.__traceback__ is None
    assert not getattr(first, "__notes__", None)


# --- Many at once ------------------------------------------------------------------------


def test_hundred_waiters_share_one_prober_and_are_released_together(time: FakeClock) -> None:
    on, light, gateway = route(), prober(time, heals=10.25), Gateway(time, heals=10.25)
    probe = light_prober(on, light.open)
    answers = time.run(in_parallel([request(on, gateway, probe) for _ in range(100)]))
    assert answers == ["answer"] * 100
    assert time.passed == 10.25
    assert light.opened == light.closed == 1
    assert len(light.gateway.came) == 4 + 2 * 9 + 1
    # Those of the full waits, and of the release.
    assert Counter(gateway.came) == {2: 100, 6: 100, 10.25: 100}
    assert on.waiters.count == 0
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


def test_waiters_released_together_are_staggered_over_loop_ticks(time: FakeClock) -> None:
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
    assert max(Counter(sent).values()) == _waiters.WAKEUPS_PER_TICK
    assert time.passed < 4
    assert on.control_plane.questions < 10


def test_waiters_that_start_together_are_staggered_over_loop_ticks(
    time: FakeClock, told: list[Any]
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
    assert max(Counter(met).values()) == _waiters.WAKEUPS_PER_TICK


def test_successful_request_releases_the_other_waiters(time: FakeClock) -> None:
    """Whatever it was: no probe is needed, and nobody waits to the end."""
    on, gateway = route(), Gateway(time, heals=3)

    async def program() -> None:
        asyncio.get_running_loop().call_later(3, answered, on)
        assert (
            await in_parallel([request(on, gateway, no_probe) for _ in range(5)]) == ["answer"] * 5
        )

    time.run(program())
    assert Counter(gateway.came) == {2: 5, 3: 5}


def test_prober_stays_until_the_last_waiter_is_through(time: FakeClock) -> None:
    on, light = route(), prober(time, heals=9.25)
    probe = light_prober(on, light.open)
    first, last = Sender("at once"), Gateway(time, heals=9.25)
    answers = time.run(in_parallel([request(on, first, probe), request(on, last, probe)]))
    assert answers == ["at once", "answer"]
    assert light.opened == light.closed == 1
    assert last.came == [2, 6, 9.25]


def test_cancelled_waiter_leaves_the_others_waiting(time: FakeClock, told: list[Any]) -> None:
    on, light, gateway = route(), prober(time, heals=5.25), Gateway(time, heals=5.25)
    probe = light_prober(on, light.open)

    async def program() -> tuple[int, Any]:
        leaves = asyncio.ensure_future(request(on, gateway, probe).run())
        stays = asyncio.ensure_future(request(on, gateway, probe).run())
        await asyncio.sleep(3)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        return on.waiters.count, await stays

    assert time.run(program()) == (1, "answer")
    assert (on.counters.cancelled, on.counters.recovered) == (1, 1)
    (cancelled,) = [event for event in told if isinstance(event, events.Cancelled)]
    assert (cancelled.replays, cancelled.seconds) == (1, 3)
    assert str(cancelled).endswith("after 3.0 s and 1 replay")
    assert light.opened == light.closed == 1
    assert Counter(gateway.came) == {2: 2, 5.25: 1}


def test_cancelling_the_last_waiter_ends_the_prober(time: FakeClock) -> None:
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
    assert not on.needs_notice


# --- What connecting may cost ------------------------------------------------------------


def test_concurrent_waits_of_one_client_spend_its_connect_budget_once(time: FakeClock) -> None:
    on, budget = route(), ConnectBudget()
    calls = [request(on, Gateway(time, heals=10), no_probe, budget=budget) for _ in range(10)]
    assert time.run(in_parallel(calls)) == ["answer"] * 10
    assert time.passed == 14
    assert budget.left(120) == about(106)


def test_clients_that_connect_at_the_same_time_have_a_budget_each(
    time: FakeClock, settings: Callable[..., None]
) -> None:
    """Six seconds stay six, whatever the others do."""
    settings(warmup_timeout=6)
    on, ended = route(), []

    async def connect(begins: float) -> None:
        await asyncio.sleep(begins)
        made = request(on, Gateway(time, heals=FOREVER), no_probe, budget=ConnectBudget())
        with pytest.raises(RefusedError):
            await made.run()
        ended.append(time.passed - begins)

    async def program() -> None:
        await asyncio.gather(*(connect(begins) for begins in range(0, 20, 4)))

    time.run(program())
    assert ended == [about(6)] * 5


@pytest.mark.parametrize("told", [Told.ENDED, Told.STARTING, Told.GONE])
def test_route_of_a_job_that_does_not_run_is_no_longer_warm(time: FakeClock, told: Told) -> None:
    on = route(told)
    on.warm = True
    time.run(in_parallel([request(on, Gateway(time, heals=FOREVER), no_probe)]))
    assert not on.warm


def test_warm_up_of_the_next_client_has_a_whole_budget_after_an_incident(time: FakeClock) -> None:
    """A later 404 of the running program, and a route that is gone when another one connects."""
    on = route()
    assert time.run(request(on, Gateway(time, heals=10), no_probe).run()) == "answer"
    began, on.answered_at = time.passed, -FOREVER
    light = prober(time, heals=FOREVER)
    with pytest.raises(RouteTimeoutError):
        time.run(warm_up(on, light.open))
    assert time.passed - began == 120


def test_connecting_on_a_warm_route_keeps_its_budget(time: FakeClock) -> None:
    """Another client of the same job has been at work for long."""
    on, gateway = route(Told.NOTHING), Gateway(time, heals=40)
    on.warm = True
    assert time.run(request(on, gateway, no_probe, budget=ConnectBudget()).run()) == "answer"
    assert gateway.came == [2, 6, 14, 22, 30, 38, 46]


# --- While the control plane is silent ---------------------------------------------------


class Silent(ControlPlane):
    """Asked, it never answers."""

    async def ask(self, _: object) -> Answer:
        self.questions += 1
        await asyncio.sleep(FOREVER)
        raise AssertionError


def test_pod_that_answers_ends_the_wait_for_a_silent_control_plane(time: FakeClock) -> None:
    """A 2xx of the pod's through the route is proof as well."""
    on, light, gateway = route(), prober(time, heals=4), Gateway(time, heals=4)
    on.control_plane = Silent()  # type: ignore[assignment]
    assert time.run(request(on, gateway, light_prober(on, light.open)).run()) == "answer"
    (came,) = gateway.came
    assert 4 <= came < 6


class Late(ControlPlane):
    """Answers after three seconds."""

    async def ask(self, headers: object) -> Answer:
        await asyncio.sleep(3)
        return await super().ask(headers)


@pytest.mark.parametrize(("told", "noted"), [(Told.RUNNING, True), (Told.ENDED, False)])
def test_answer_later_than_the_pods_is_noted_only_where_the_job_runs(
    time: FakeClock, told: Told, noted: bool
) -> None:
    on = route()
    on.control_plane = Late(told)  # type: ignore[assignment]
    wait = waiting(on)

    async def ask() -> bool:
        with on.incident():
            asyncio.get_running_loop().call_later(1, answered, on)
            await wait.ask({})
            early = wait.answer.told is told
            await asyncio.sleep(5)
        return early

    assert not time.run(ask())
    assert (wait.answer.told is told) is noted


def test_silent_control_plane_and_pod_end_with_the_budget(time: FakeClock) -> None:
    on, light, gateway = route(), prober(time, heals=FOREVER), Gateway(time, heals=0)
    on.control_plane = Silent()  # type: ignore[assignment]
    with pytest.raises(RefusedError, match="first"):
        time.run(request(on, gateway, light_prober(on, light.open)).run())
    assert not gateway.came
    assert time.passed == about(30)
    assert on.counters.given_up == 1


def test_answer_that_proves_nothing_sends_nothing_without_the_control_plane(
    time: FakeClock,
) -> None:
    """A pod that answers with its own 404, say: not a success."""
    on, light, gateway = route(Told.NOTHING), prober(time, heals=0), Gateway(time, heals=0)
    light.proves = False
    with pytest.raises(RefusedError, match="first"):
        time.run(request(on, gateway, light_prober(on, light.open)).run())
    assert not gateway.came
    assert time.passed == about(30)
    # Backed off: 1, 2, 4, 4, …
    assert on.control_plane.questions <= 10


# --- The warm-up -------------------------------------------------------------------------


def test_warm_up_goes_on_when_a_light_probe_succeeds(time: FakeClock) -> None:
    on, light = route(), prober(time, heals=5.25)
    time.run(warm_up(on, light.open))
    assert on.warm
    # Three at once, and then one after the other: after the first full wait, where the first
    # one fails, and when a light probe has come through.
    came = light.gateway.came
    assert came[:3] == [0, 0, 0]
    assert came[-4:] == [5.25, 5.75, 6.25, 6.75]
    assert time.passed == 6.75
    assert on.counters.probes == len(light.gateway.came)
    assert (on.counters.warmups, on.counters.warmup_seconds) == (1, about(6.75))
    assert on.counters.recovered == 1
    assert light.opened == light.closed == 2


def test_warm_up_tells_of_each_404_that_it_gets(time: FakeClock, told: list[Any]) -> None:
    on, light = route(), prober(time, heals=5.25)
    time.run(warm_up(on, light.open))
    refused = [event for event in told if isinstance(event, events.Refused)]
    assert {event.request for event in refused} == {"warm-up"}
    assert [event.replays for event in refused] == list(range(len(refused)))
    assert on.counters.refused == len(refused) == told[-1].rounds - 1
    assert (told[-1].outcome, told[-1].refused, told[-1].level) == ("warm", True, logging.INFO)


def test_warm_up_that_fails_itself_tells_so(
    time: FakeClock, settings: Callable[..., None], told: list[Any]
) -> None:
    settings(strict=False)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        raise OSError
        yield

    on = route()
    time.run(warm_up(on, opened))
    ended = told[-1]
    assert (ended.outcome, ended.rounds, ended.error) == ("failed", 0, "OSError")
    assert ended.level == logging.INFO
    assert (on.counters.warmups, on.counters.longest_wait) == (1, 0)


def test_healthy_warm_up_is_one_round_and_no_intervention(time: FakeClock) -> None:
    on, light = route(), prober(time, heals=0, seconds=0.05)
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
    time: FakeClock, told: list[Any], heals: float, cancelled: int
) -> None:
    """It counts only where a 404 was met."""
    on, light = route(), prober(time, heals=heals, seconds=0.05)

    async def program() -> None:
        warming = asyncio.ensure_future(warm_up(on, light.open))
        await asyncio.sleep(3 if heals else 0.01)
        warming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await warming

    time.run(program())
    assert on.counters.cancelled == cancelled
    assert (told[-1].outcome, told[-1].refused) == ("cancelled", bool(cancelled))
    assert told[-1].level == (logging.INFO if cancelled else logging.DEBUG)
    assert on.counters.longest_wait == 0
    assert on.counters.recovered == on.counters.given_up == 0
    assert not on.warm


@pytest.mark.parametrize("order", [(None, ValueError("500"), "ok"), (ValueError("500"), None)])
def test_warm_up_round_with_a_404_and_another_error_counts_as_a_404(
    time: FakeClock, order: Any
) -> None:
    """The route is stale for sure; the other error may come of that."""
    on, light = route(), FakeProber(*order, "ok")

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield light

    time.run(warm_up(on, opened))
    assert on.warm
    assert on.counters.last_intervention is not None


def test_answer_before_the_last_refusal_does_not_end_the_warm_up_wait(time: FakeClock) -> None:
    """The probes are in flight for a second, and meanwhile another request got through."""
    on = route()
    first, light = prober(time, heals=2, seconds=1), prober(time, heals=FOREVER)
    opened = iter((first, light))

    async def program() -> None:
        asyncio.get_running_loop().call_later(0.5, answered, on)
        await warm_up(on, lambda: next(opened).open())

    time.run(program())
    assert on.warm
    assert first.gateway.came[:3] == [0, 0, 0]
    assert first.gateway.came[3] >= 3


def test_warm_up_with_another_error_emits_outcome_error(time: FakeClock, told: list[Any]) -> None:
    on, light = route(), FakeProber(ValueError("500"))

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield light

    time.run(warm_up(on, opened))
    assert (told[-1].outcome, told[-1].error) == ("error", "ValueError")
    assert not on.given_up
    assert on.counters.longest_wait == 0


def test_warm_up_timeout_says_what_it_saw(
    time: FakeClock, settings: Callable[..., None], told: list[Any]
) -> None:
    settings(warmup_timeout=9)
    on = route(Told.STARTING)
    light = prober(time, heals=FOREVER)
    with pytest.raises(RouteTimeoutError) as caught:
        time.run(warm_up(on, light.open))
    said = unwrapped(caught.value)
    assert "acct/job" in said
    # A probe more, and half a second of pace before it.
    assert re.search(r"after 9\.[0-5] s and 4 rounds", said)
    assert "JOB_STATE_STARTING" in said
    assert on.given_up
    assert (on.counters.given_up, on.counters.failed_fast) == (1, 0)
    assert on.counters.recovered == 0
    assert 9 <= on.counters.longest_wait <= 9.5
    assert (told[-1].outcome, told[-1].error) == ("timeout", "RefusedError")
    assert on.counters.warmup_seconds == about(on.counters.longest_wait)


def test_warm_up_of_an_ended_job_says_what_it_saw(time: FakeClock, told: list[Any]) -> None:
    on, light = route(Told.ENDED), prober(time, heals=FOREVER)
    with pytest.raises(RefusedError) as caught:
        time.run(warm_up(on, light.open))
    # The terminal state has to be seen twice: a job that is resumed shows it for a while.
    assert re.search(r"after 2\.[0-5] s and 2 rounds", notes(caught.value))
    assert on.given_up
    assert (on.counters.given_up, on.counters.failed_fast) == (0, 1)
    assert on.counters.recovered == 0
    assert (told[-1].outcome, told[-1].error) == ("job ended", "RefusedError")


def test_telemetry_is_no_longer_dropped_30_seconds_after_giving_up(time: FakeClock) -> None:
    """And no longer, so that it is not dropped for ever."""
    on = route()
    assert not on.drops_telemetry
    on.record_failure(waiting(on))
    time.now += 1000
    assert on.drops_telemetry
    on.record_failure(waiting(on))
    answered(on)
    time.now += 29.9
    assert on.drops_telemetry
    time.now += 0.2
    assert not on.drops_telemetry
    assert on.counters.telemetry_dropped == 0


def test_repeated_log_line_is_limited_to_one_in_five_seconds(time: FakeClock) -> None:
    on = route()
    assert on.log_rate_limit.skipped("route.refused") == 0
    time.now += 4.9
    assert on.log_rate_limit.skipped("route.refused") is None
    time.now += 0.2
    assert on.log_rate_limit.skipped("route.refused") == 1


def unwrapped(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- Notes --------------------------------------------------------------------------------

GO_ON = "TINKER_ROUTEFIX_MAX_REPLAYS and TINKER_ROUTEFIX_RETRY_BUDGET"
CONNECT = "TINKER_ROUTEFIX_WARMUP_TIMEOUT"
ENDED = (
    "resume from its last checkpoint on one that runs: it has ended, is suspended or is not visible"
)
STARTING = "calls the route healthy: the job does not run yet"
UNKNOWN = "without a usable response of it a request is replayed only after the job has answered"
REFUSED = "What to do: check the key, and with"


@pytest.mark.parametrize("connecting", [False, True], ids=["later", "at-connect"])
@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (Told.RUNNING, None),
        (Told.ENDED, ENDED),
        (Told.GONE, ENDED),
        (Told.STARTING, STARTING),
        (Told.QUESTION_REFUSED, REFUSED),
        (Told.NOTHING, UNKNOWN),
    ],
)
def test_exception_note_says_what_to_do_next(
    time: FakeClock, told: list[Any], said: Told, advice: str | None, connecting: bool
) -> None:
    on = route(said)
    on.control_plane.ago = 0.45678  # type: ignore[attr-defined]
    budget = ConnectBudget() if connecting else None
    made = request(on, Gateway(time, heals=FOREVER), no_probe, budget=budget)
    with pytest.raises(RefusedError) as caught:
        time.run(made.run())
    assert len(caught.value.__notes__) == 1
    note = notes(caught.value)
    last = told[-1]
    assert note.startswith(f"tinker_routefix: {last}. ")
    assert (advice or (CONNECT if connecting else GO_ON)) in note
    assert f"on the job, {last.age_seconds:.1f} s before: JOB_STATE_{said.name}; " in note
    # Where it was backed off from, some seconds longer ago.
    backed_off = said is Told.NOTHING
    assert last.age_seconds == 0.457 or (backed_off and 0.457 < last.age_seconds < 4.5)
    assert last.state == said.state.value
    if advice is not ENDED:
        assert "`tinker-routefix check https://gateway.example/training/v1/rlorTrainer" in note


def test_warm_up_timeout_says_what_to_do_next(time: FakeClock) -> None:
    on = route()
    on.control_plane.ago = 0.45678  # type: ignore[attr-defined]
    with pytest.raises(RouteTimeoutError) as caught:
        time.run(warm_up(on, prober(time, heals=FOREVER).open))
    assert CONNECT in str(caught.value)
    assert "on the job, 0.5 s before: JOB_STATE_RUNNING. " in unwrapped(caught.value)


# --- Loops and jobs ----------------------------------------------------------------------


def test_each_loop_has_one_route_to_a_job() -> None:
    async def routes() -> tuple[Route, Route]:
        return _routes.route_to(JOB), _routes.route_to(JOB)

    first = asyncio.new_event_loop()
    second = asyncio.new_event_loop()
    try:
        one, same = first.run_until_complete(routes())
        other, _ = second.run_until_complete(routes())
        assert one is same
        assert one is not other
        assert {one, other} <= set(_routes.all_routes())
    finally:
        first.close()
        second.close()


def test_paced_request_counts_as_one_that_waits(time: FakeClock) -> None:
    waiters, counts = _waiters.Waiters(), []

    async def wait() -> None:
        waits = asyncio.gather(waiters.wait(2), waiters.pace(1))
        for _ in range(3):
            await asyncio.sleep(0.75)
            counts.append(waiters.count)
        await waits

    time.run(wait())
    assert counts == [2, 1, 0]


def test_route_without_waiters_needs_no_answer() -> None:
    on = Route(JOB, ControlPlane())  # type: ignore[arg-type]
    assert not on.needs_notice
    with on.incident():
        assert on.needs_notice
    assert not on.needs_notice
    on.given_up = True
    assert on.needs_notice
    answered(on)
    assert not on.needs_notice


def use(*jobs: Job) -> None:
    """As clients of a loop that is over by now."""

    async def connect() -> None:
        for job in jobs:
            _routes.route_to(job).record_404("optim_step", 0)

    asyncio.run(connect())


def job(number: int) -> Job:
    return Job(JOB.gateway, "acct", f"job-{number}")


def test_route_goes_with_the_last_client_and_its_counters_stay() -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def program() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        route = _routes.route_to(JOB)
        route.record_404("optim_step", 0)
        assert _routes.all_routes() == [route]
        assert tinker_routefix.status().jobs[0].route == "connecting"
        del route
        assert not _routes.all_routes()

    asyncio.run(program())
    gc.collect()
    assert loops[0]() is None, "the table holds no loop"
    (shown,) = tinker_routefix.status().jobs
    assert (shown.route, shown.refused) == ("unused", 1)
    use(JOB)
    assert _routes.all_counters()[JOB].refused == 2


def test_counters_of_unused_jobs_are_bounded_and_the_oldest_go_first() -> None:
    use(*map(job, range(_routes.REMEMBERED + 50)))
    # One is used at the moment when the others are counted.
    assert len(_routes.all_counters()) == _routes.REMEMBERED + 1
    assert job(0) not in _routes.all_counters()
    assert job(_routes.REMEMBERED + 49) in _routes.all_counters()


def test_counters_of_a_used_job_are_never_dropped() -> None:
    async def program() -> None:
        used = _routes.route_to(JOB)
        for number in range(_routes.REMEMBERED + 50):
            _routes.route_to(job(number)).record_404("optim_step", 0)
        assert used.counters is _routes.all_counters()[JOB]

    asyncio.run(program())


def test_job_used_again_is_not_the_oldest() -> None:
    use(*map(job, range(_routes.REMEMBERED)))
    use(job(0))
    use(*map(job, range(1000, 1010)))
    assert job(0) in _routes.all_counters()
    assert job(1) not in _routes.all_counters()


def test_last_intervention_outlives_dropped_counters(mocker: Any) -> None:
    mocker.patch.object(_routes, "_dropped", Counters())
    assert tinker_routefix.status().last_intervention is None
    use(JOB)
    last = _routes.last_intervention()

    async def connect() -> None:
        for number in range(_routes.REMEMBERED + 50):
            _routes.route_to(job(number))

    asyncio.run(connect())
    assert JOB not in _routes.all_counters()
    assert last is not None
    assert tinker_routefix.status().last_intervention == last


@pytest.mark.parametrize(
    ("told", "answered_at", "proven_at", "ended"),
    [
        (Told.ENDED, 2.0, 1.0, True),
        (Told.ENDED, 1.0, 1.0, False),
        (Told.ENDED, 1.0, 2.0, False),
        (Told.RUNNING, 2.0, 1.0, False),
    ],
)
def test_job_has_ended_where_the_control_plane_says_so_after_the_pods_last_success(
    told: Told, answered_at: float, proven_at: float, ended: bool
) -> None:
    on, plane = route(), SimpleNamespace(last_answer=Answer(told, "", answered_at))
    on.control_plane, on.proven_at = cast("Any", plane), proven_at
    assert on.job_ended is ended


class AsksForStatus(logging.Handler):
    """A handler of the program's that adds what the shim is doing."""

    def emit(self, _: logging.LogRecord) -> None:
        tinker_routefix.status()


def test_log_handler_may_ask_for_the_status_when_a_route_is_first_seen(
    settings: Callable[..., None],
) -> None:
    settings(strict=False)
    handler = AsksForStatus()
    logger = logging.getLogger("tinker_routefix")

    async def first_seen() -> None:
        # Its control plane may not be asked, which is logged.
        _routes.route_to(Job("http://gateway.example:8080", "acct", "first-seen"))

    def see() -> None:
        thread = threading.Thread(target=lambda: asyncio.run(first_seen()), daemon=True)
        thread.start()
        thread.join(30)
        if thread.is_alive():
            # For the tests after this one.
            _routes._lock = threading.Lock()
            pytest.fail("it waits for ever")

    logger.addHandler(handler)
    try:
        with pytest.warns(tinker_routefix.RoutefixWarning, match="is not asked"):
            see()
    finally:
        logger.removeHandler(handler)


# --- Fresh connections ----------------------------------------------------------------------


class Pool:
    """As much of a pool as a replacement needs, none of whose connections answers."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.made = 0

    def replacement(self) -> Any:
        return self.make

    def make(self) -> str:
        self.made += 1
        return "client"

    def in_place_of(self, old: PooledClient) -> PooledClient:
        return old

    def swap(self, _: object, new: PooledClient) -> PooledClient:
        return new

    async def answers(self, _: object) -> bool:
        return False

    async def close(self, _: object) -> None:
        pass


def stale_client(pool: Any) -> PooledClient:
    pooled = PooledClient("old", pool, 0)
    pooled.stale = True
    return pooled


@pytest.mark.parametrize(
    ("waiters", "answered_ago", "tries"),
    [(1, 3.0, 1), (1, 1.0, 2), (0, 3.0, 2)],
    ids=["lost everywhere", "some replicas answer", "nobody probes"],
)
def test_second_connection_is_tried_unless_the_route_is_lost_everywhere(
    time: FakeClock, waiters: int, answered_ago: float, tries: int
) -> None:
    """Where nothing gets through, one more would be a connection for nothing."""
    pool = Pool(route())

    async def replace() -> None:
        pool.route.answered_at = time.now - answered_ago
        pool.route.waiters._paced = waiters
        await stale_client(pool).fresh()

    asyncio.run(replace())
    assert pool.made == tries
