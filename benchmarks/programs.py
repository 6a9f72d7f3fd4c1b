"""What the contenders run: the same program for all of them, in a process of its own.

``python -m benchmarks.programs NAME`` reads its arguments as JSON from standard input and
writes what it measured as JSON to standard output. Importing this module loads neither tinker
nor the shim: the programs do, each for its contender.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import runpy
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import labs
from benchmarks.figures import lot
from benchmarks.suite import SHIM, STRATEGY_A, STRATEGY_B

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.labs import Seen

PATIENCE = 120.0
"""Seconds after which a result that does not come is taken for one that never will."""
EARLIER = Path(__file__).parents[1] / "tinker_routefix" / "demo" / "earlier.py"
TICK = 0.01
"""Seconds between two ticks of the ticker that sees how long tinker's loop stands still."""


# --- Clients -----------------------------------------------------------------------------


def load(contender: str) -> None:
    """Import what the contender's program would import."""
    if contender == SHIM:
        importlib.import_module("tinker_routefix")
    importlib.import_module("tinker")


def connect(contender: str, url: str) -> Any:
    """A training client, as the contender makes it."""
    import tinker

    # The strategies look there for the job.
    os.environ["TINKER_BASE_URL"] = url
    service = tinker.ServiceClient(base_url=url)
    client: Any = service.create_lora_training_client(base_model="lab/base", rank=8)
    # 0.38 returns futures of its clients.
    client = client.result(PATIENCE) if hasattr(client, "result") else client
    strategy = {STRATEGY_A: "StrategyA", STRATEGY_B: "StrategyB"}.get(contender)
    # Without the rest of the demo and its lab, which an import would load.
    return client if strategy is None else runpy.run_path(str(EARLIER))[strategy](client)


def gradient(client: Any, length: int = 8) -> Any:
    """Submit a forward_backward of one example."""
    from tinker import types

    tokens = list(range(1, length + 1))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens, dtype="int64", shape=[length]),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
        },
    )
    return client.forward_backward([datum], "cross_entropy")


def update(client: Any) -> Any:
    """Submit an optim_step."""
    from tinker import types

    return client.optim_step(types.AdamParams(learning_rate=1e-4))


class Tally:
    """What a program has asked for, and what it was told is done."""

    def __init__(self) -> None:
        self.asked = self.done = 0

    def step(self, client: Any) -> None:
        """Have one step done, one operation after the other."""
        for submit in (gradient, update):
            self.asked += 1
            submit(client).result()
            self.done += 1

    def verdict(self, account: labs.Account) -> dict[str, int]:
        """Compare it with the trainer's account."""
        executed = account.gradients + account.updates
        return {
            "asked": self.asked,
            "done": self.done,
            "twice": max(account.twice, executed - self.asked, 0),
            "lost": max(self.done - executed, 0),
            "skipped": account.missing,
            "out_of_order": account.out_of_order,
        }


# --- Instruments -------------------------------------------------------------------------


def on_tinkers_loop(coroutine: Any) -> Any:
    """Run something on the loop that has all of tinker's requests; started when it is not."""
    holder: Any = importlib.import_module("tinker.lib.internal_client_holder")
    loop = holder._internal_client_holder_thread_singleton.get_loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE)


class Ticker:
    """Ticks on tinker's loop, and remembers the longest pauses between two ticks."""

    def __init__(self) -> None:
        self._collected = self._collected_here = self._collection_began = 0.0
        self._thread: int | None = None
        self._lap: dict[str, float] = {}
        self.lap()
        gc.callbacks.append(self._collection)
        on_tinkers_loop(self._start())

    def _collection(self, phase: str, _: object) -> None:
        # Whichever thread it happens to be in, all others wait.
        if phase == "start":
            self._collection_began = time.thread_time()
            return
        seconds = time.thread_time() - self._collection_began
        self._collected += seconds
        if threading.get_ident() == self._thread:
            self._collected_here += seconds

    async def _start(self) -> None:
        self._thread = threading.get_ident()
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        before = self._clocks()
        while True:
            await asyncio.sleep(TICK)
            now = self._clocks()
            gap, cpu, collected, here = (
                (new - old) * 1e3 for new, old in zip(now, before, strict=True)
            )
            pause = {"gap_ms": gap, "collection_ms": collected, "busy_ms": cpu - here}
            for name, milliseconds in pause.items():
                self._lap[name] = max(self._lap[name], milliseconds)
            before = now

    def _clocks(self) -> tuple[float, ...]:
        return time.monotonic(), time.thread_time(), self._collected, self._collected_here

    def start_lap(self) -> None:
        """Begin to measure, with no garbage that was made before."""
        gc.collect()
        time.sleep(5 * TICK)
        self.lap()

    def lap(self) -> dict[str, float]:
        """What the longest pause since the last lap was, in milliseconds.

        ``gap_ms`` is the pause as a whole, with whatever else the machine did meanwhile;
        ``collection_ms`` the longest garbage collection, which stops every thread;
        ``busy_ms`` the most CPU time that the loop used between two ticks, collections apart.
        """
        lap, self._lap = self._lap, {"gap_ms": 0.0, "collection_ms": 0.0, "busy_ms": 0.0}
        return lap


def most_within(moments: Iterable[float], seconds: float = 0.9) -> int:
    """How many of some moments lie within a second at most; a tenth is for uneven arrivals."""
    ordered = sorted(moments)
    most = first = 0
    for last, moment in enumerate(ordered):
        while moment - ordered[first] >= seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def _asked(seen: Sequence[Seen]) -> dict[str, int]:
    """What of some requests somebody has sent of his own while there was trouble."""
    questions = [one.at for one in seen if one.kind == "control_plane"]
    incidents = _probes(seen)
    return {
        "questions": len(questions),
        "questions_a_second": most_within(questions),
        "probes": sum(map(len, incidents)),
        # The first second is when most routes come back, and has more of them.
        "probes_a_second": max(
            (most_within(at for at in probes if at >= probes[0] + 1) for probes in incidents),
            default=0,
        ),
    }


def _probes(seen: Sequence[Seen]) -> list[list[float]]:
    """When probes were sent, by incident: from a 404 to what next gets through of a program's."""
    # The shim's have a connection each; tinker asks for the same things over those it keeps.
    used = Counter(one.connection for one in seen)
    incidents: list[list[float]] = []
    trouble = False
    for one in sorted(seen):
        probe = one.kind in labs.PROBES and used[one.connection] == 1
        if one.refused and not trouble:
            trouble = True
            incidents.append([])
        if trouble and probe:
            incidents[-1].append(one.at)
        if not probe and not one.refused and one.kind not in ("control_plane", "heartbeat"):
            trouble = False
    return [probes for probes in incidents if probes]


# --- Healthy -----------------------------------------------------------------------------


def healthy(*, contender: str, wire: str, steps: int, round_trip: float) -> dict[str, Any]:
    """Connect and train on a route that never fails."""
    with labs.opened(wire) as lab:
        if round_trip:
            lab.far_away(round_trip)
        load(contender)
        ticker = Ticker()
        tally = Tally()
        began = time.perf_counter()
        client = connect(contender, lab.url())
        connected = time.perf_counter()
        requests_to_connect = lab.count()
        tally.step(client)
        first_step = time.perf_counter()
        requests = lab.count()
        ticker.start_lap()
        taken = []
        cpu = time.process_time()
        for _ in range(steps):
            step_began = time.perf_counter()
            tally.step(client)
            taken.append(time.perf_counter() - step_began)
        cpu = time.process_time() - cpu
        lag = ticker.lap()
        sent = lab.count() - requests
        return {
            "connect_ms": (connected - began) * 1e3,
            "first_step_ms": (first_step - began) * 1e3,
            "step_ms": statistics.median(taken) * 1e3 if taken else None,
            "cpu_us": cpu / sent * 1e6 if sent else None,
            "requests_to_connect": requests_to_connect,
            "requests_a_step": sent / steps if steps else None,
            **lag,
            **tally.verdict(lab.account()),
        }


def overhead(*, contender: str, wire: str, blocks: int, requests: int) -> dict[str, Any]:
    """Blocks of requests, with the shim and without in turns, in one process.

    Two processes differ by more than what is measured here, so that this is not pyperf's.
    """
    import tinker_routefix

    def on() -> None:
        # Both ways the classes have just been changed: what that costs is the same.
        tinker_routefix.uninstall()
        tinker_routefix.install()

    def off() -> None:
        on()
        tinker_routefix.uninstall()

    with labs.opened(wire) as lab:
        load(contender)
        holder = connect(contender, lab.url()).holder
        pools: Any = importlib.import_module("tinker.lib.client_connection_pool_type")
        pool = pools.ClientConnectionPoolType.SESSION

        async def block(count: int) -> tuple[float, float]:
            taken = []
            cpu = 0.0
            for number in range(-10, count):
                if number == 0:
                    cpu = time.thread_time()
                began = time.perf_counter()
                with holder.aclient(pool) as http:
                    await http.service.get_server_capabilities()
                taken.append(time.perf_counter() - began)
            cpu = time.thread_time() - cpu
            return cpu / count * 1e6, statistics.median(taken[10:]) * 1e6

        switches = {"plain": off, "shim": on}
        results: dict[str, dict[str, list[float]]] = {
            name: {"cpu_us": [], "wall_us": []} for name in switches
        }
        for number in range(blocks):
            for name in sorted(switches, reverse=bool(number % 2)):
                switches[name]()
                cpu, wall = on_tinkers_loop(block(requests))
                results[name]["cpu_us"].append(cpu)
                results[name]["wall_us"].append(wall)
        on()
        return results


# --- Recovery ----------------------------------------------------------------------------


def recovery(*, contender: str, wire: str, outage: float, on: str, seed: int) -> dict[str, Any]:
    """Train; lose the route at a random moment for so long; train on."""
    kinds = {"everything": None, "polls": labs.POLLS, "submissions": labs.SUBMISSIONS}[on]
    chance = lot(f"{outage}/{on}/{seed}")
    # Neither the moment nor the length keeps time with anybody's retries.
    seconds = outage * chance.uniform(0.9, 1.1)
    phase = 0.5 + chance.random()
    with labs.opened(wire, work_seconds=0.1, poll_seconds=0.5, seed=seed) as lab:
        load(contender)
        client = connect(contender, lab.url())
        tally = Tally()
        healed: list[float] = []
        timer = threading.Timer(phase, lambda: healed.append(lab.lose(seconds, kinds)))
        timer.start()
        error = None
        try:
            # Until the route has been back for a while, and a step has been done since.
            while not healed or time.monotonic() < healed[0] + 0.5:
                tally.step(client)
            tally.step(client)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the run did not survive
            error = type(failure).__name__
        timer.join()
        seen = lab.seen()
        names = labs.SUBMISSIONS | labs.POLLS if kinds is None else kinds
        through = [
            one.done
            for one in seen
            if one.kind in names and not one.refused and one.at >= healed[0] - 0.005
        ]
        return {
            "survived": error is None,
            "error": error,
            "overshoot": min(through) - healed[0] if through and error is None else None,
            "met": sum(one.refused for one in seen if one.kind in names),
            **_asked(seen),
            **tally.verdict(lab.account()),
        }


# --- Stampede ----------------------------------------------------------------------------

HELD = 3.0
"""Seconds that a poll waits in vain, and so the time within which all that wait have polled
again, and have been refused."""
LOST = HELD + 1.0
"""Seconds that the route is lost."""


def _questions() -> list[float]:
    """How long each question to the control plane takes from now on."""
    import tinker_routefix
    from tinker_routefix import events

    seconds: list[float] = []

    def note(event: events.Event) -> None:
        if isinstance(event, events.QuestionAnswered):
            seconds.append(event.seconds)

    tinker_routefix.subscribe(note)
    return seconds


def stampede(
    *,
    contender: str,
    wire: str,
    waiting: int,
    outage: bool,
    give_up: float,
    lost: float = LOST,
    linger: float = 0.0,
) -> dict[str, Any]:
    """Have so many results polled for, and lose the route to all of them at once."""
    with labs.opened(wire) as lab:
        load(contender)
        questions = _questions() if contender == SHIM else []
        client = connect(contender, lab.url())
        ticker = Ticker()
        lab.hold(HELD)
        futures = [gradient(client, length=1) for _ in range(waiting)]
        while lab.accepted("forward_backward") < waiting:
            time.sleep(0.02)
        time.sleep(1)
        before, opened = lab.count(), lab.opened()
        there = lab.open() if linger else 0
        ticker.start_lap()
        healed = time.monotonic()
        if outage:
            healed = lab.lose(lost)
            time.sleep(healed - time.monotonic() - 0.5)
        lab.hand_out()
        done = failed = 0
        with ThreadPoolExecutor(min(waiting, 100)) as threads:
            results = [threads.submit(lambda one: one.result(), future) for future in futures]
            for result in results:
                try:
                    result.result(max(0.1, healed + give_up - time.monotonic()))
                    done += 1
                except TimeoutError:
                    break
                except Exception:  # noqa: BLE001 - whatever it is, it did not come through
                    failed += 1
            last = time.monotonic()
            lag = ticker.lap()
            during = lab.seen()[before:]
            account = lab.account()
            said = {
                "done": done,
                "failed": failed,
                "through": last - healed if outage and done == waiting else None,
                "requests": sum(one.kind != "control_plane" for one in during),
                "connections": lab.opened() - opened,
                "question_ms": statistics.median(questions[1:]) * 1e3 if questions[1:] else None,
                "met": sum(one.refused for one in during),
                **_asked(during),
                **lag,
                "twice": max(account.twice, account.gradients - waiting, 0),
                "lost": max(done - account.gradients, 0),
                "skipped": account.missing,
                "out_of_order": account.out_of_order,
            }
            if linger:
                time.sleep(linger)
                said["left_open"] = lab.open() - there
            if done + failed < waiting:
                # Threads are still waiting for results that may take minutes.
                say(said)
                os._exit(0)
    return said


# --- Being a program ---------------------------------------------------------------------


def say(said: dict[str, Any]) -> None:
    """Hand in what was measured."""
    sys.stdout.write("\n" + json.dumps(said) + "\n")
    sys.stdout.flush()


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (healthy, overhead, recovery, stampede)
}

if __name__ == "__main__":
    # Tinker warns about heartbeats and connections of labs that are gone.
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    say(PROGRAMS[sys.argv[1]](**json.load(sys.stdin)))
