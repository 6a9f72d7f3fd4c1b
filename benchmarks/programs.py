"""What the contenders run: the same program for all of them, in a process of its own.

``python -m benchmarks.programs NAME`` reads its arguments as JSON from standard input and
writes what it measured as JSON to standard output. Importing this module loads neither tinker
nor the shim: the programs do, each for its contender.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import json
import logging
import os
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, cast

from benchmarks import labs
from benchmarks.contenders import SHIM, STRATEGY_A, STRATEGY_B
from benchmarks.figures import lot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.labs import Lab, Seen

PATIENCE = 120.0
"""Seconds after which a result that does not come is taken for one that never will."""
TICK = 0.01
"""Seconds between two ticks of the ticker that sees how long tinker's loop stands still."""


# --- Clients -----------------------------------------------------------------------------


def load(contender: str) -> None:
    """Import what the contender's program would import."""
    if contender == SHIM:
        importlib.import_module("tinker_routefix")
    importlib.import_module("tinker")


def _earlier() -> Any:
    """The module with the earlier strategies, without the rest of the demo and its lab."""
    package = importlib.util.find_spec("tinker_routefix")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = os.path.join(package.submodule_search_locations[0], "demo", "earlier.py")  # noqa: PTH118
    spec = importlib.util.spec_from_file_location("earlier", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settled(value: Any) -> Any:
    """The value itself, or what a future of it holds: 0.38 returns futures of its clients."""
    result = getattr(value, "result", None)
    return value if result is None else result(PATIENCE)


def plainly(url: str) -> Any:
    """A training client, as tinker makes it."""
    import tinker

    # The strategies look there for the job.
    os.environ["TINKER_BASE_URL"] = url
    service = tinker.ServiceClient(base_url=url)
    return settled(service.create_lora_training_client(base_model="lab/base", rank=8))


def connect(contender: str, url: str, *, before_warm_up: Callable[[], None] | None = None) -> Any:
    """A training client, as the contender makes it.

    Args:
        contender: Who.
        url: The job's route.
        before_warm_up: What goes wrong before the warm-up. It also has strategy B's warm-up
            send its requests where this tinker answers ``get_info()`` from memory.
    """
    if before_warm_up is not None and contender == SHIM:
        # It warms up while tinker makes the client.
        before_warm_up()
    client = plainly(url)
    if before_warm_up is not None and contender != SHIM:
        before_warm_up()
    if contender == STRATEGY_A:
        return _earlier().StrategyA(client)
    if contender == STRATEGY_B:
        return _earlier().StrategyB(client if before_warm_up is None else _Asking(client))
    return client


class _Asking:
    """A training client whose ``get_info`` is a request, as it was in older releases."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def get_info(self) -> Any:
        from tinker import types
        from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

        holder = self._client.holder

        async def ask() -> Any:
            request = types.GetInfoRequest(model_id=self._client.model_id)
            with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
                return await client.models.get_info(request=request)

        return holder.run_coroutine_threadsafe(ask()).result(PATIENCE)


def datum(length: int = 8) -> Any:
    """A training example."""
    from tinker import types

    tokens = list(range(1, length + 1))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens, dtype="int64", shape=[length]),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
        },
    )


def gradient(client: Any, data: Sequence[Any] | None = None) -> Any:
    """Submit a forward_backward."""
    return client.forward_backward(list(data or [datum()]), "cross_entropy")


def adam() -> Any:
    """The optimizer's parameters."""
    from tinker import types

    return types.AdamParams(learning_rate=1e-4)


def update(client: Any) -> Any:
    """Submit an optim_step."""
    return client.optim_step(adam())


class Tally:
    """What a program has asked for, and what it was told is done."""

    def __init__(self) -> None:
        self.asked = self.done = 0

    def operate(self, submit: Callable[[Any], Any], client: Any) -> None:
        """Have one operation carried out, and wait for it."""
        self.asked += 1
        submit(client).result()
        self.done += 1

    def step(self, client: Any) -> None:
        """Have one step done, one operation after the other."""
        self.operate(gradient, client)
        self.operate(update, client)

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


def tinkers_loop() -> asyncio.AbstractEventLoop:
    """The loop that tinker runs all its requests on, started when it is not."""
    holder: Any = importlib.import_module("tinker.lib.internal_client_holder")
    loop: asyncio.AbstractEventLoop = holder._internal_client_holder_thread_singleton.get_loop()
    return loop


class Ticker:
    """Ticks on tinker's loop, and remembers the longest pauses between two ticks."""

    def __init__(self) -> None:
        self._collected = self._collected_here = self._collection_began = 0.0
        self._thread: int | None = None
        self._lap: dict[str, float] = {}
        self.lap()
        gc.callbacks.append(self._collection)
        asyncio.run_coroutine_threadsafe(self._start(), tinkers_loop()).result(PATIENCE)

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


def memory() -> float:
    """What the process has in memory, in MB."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return peak_memory()


def peak_memory() -> float:
    """The most that the process ever had in memory, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def most_within(moments: Iterable[float], seconds: float = 0.9) -> int:
    """How many of some moments lie within a second at most; a tenth is for uneven arrivals."""
    ordered = sorted(moments)
    most = first = 0
    for last, moment in enumerate(ordered):
        while moment - ordered[first] >= seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def tasks_on_loop() -> int:
    """How many tasks tinker's loop has."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), tinkers_loop()).result(PATIENCE)


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
    programs = _of_programs(seen)
    incidents: list[list[float]] = []
    trouble = False
    for one in sorted(seen):
        if one.refused and not trouble:
            trouble = True
            incidents.append([])
        if trouble and one.kind in labs.PROBES and one not in programs:
            incidents[-1].append(one.at)
        if one in programs and not one.refused:
            trouble = False
    return [probes for probes in incidents if probes]


def _of_programs(seen: Sequence[Seen]) -> set[Seen]:
    """What tinker itself has sent of some requests, and somebody waits for."""
    # The shim's have a connection each; tinker asks for the same things over those it keeps.
    used = Counter(one.connection for one in seen)
    return {
        one
        for one in seen
        if one.kind not in ("control_plane", "heartbeat")
        and (one.kind not in labs.PROBES or used[one.connection] > 1)
    }


# --- Healthy -----------------------------------------------------------------------------


def healthy(*, contender: str, steps: int, round_trip: float) -> dict[str, Any]:
    """Connect and train on a route that never fails."""
    with labs.opened() as lab:
        if round_trip:
            lab.far_away(round_trip)
        load(contender)
        ticker = Ticker()
        tally = Tally()
        began = time.perf_counter()
        client = connect(contender, lab.url())
        connected = time.perf_counter()
        requests_to_connect = lab.count()
        lag_connecting = ticker.lap()
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
            "connecting": lag_connecting,
            **lag,
            **tally.verdict(lab.account()),
        }


# --- What the shim adds to a request -----------------------------------------------------


def overhead(*, contender: str, blocks: int, requests: int) -> dict[str, Any]:
    """Blocks of requests, with the shim and without in turns, in one process."""
    import tinker_routefix

    with labs.opened() as lab:
        load(contender)
        client = plainly(lab.url())
        holder = client.holder
        pools: Any = importlib.import_module("tinker.lib.client_connection_pool_type")
        pool = pools.ClientConnectionPoolType.SESSION

        async def one() -> None:
            with holder.aclient(pool) as http:
                await http.service.get_server_capabilities()

        async def block(count: int) -> tuple[float, float]:
            for _ in range(10):
                await one()
            taken = []
            cpu = time.thread_time()
            for _ in range(count):
                began = time.perf_counter()
                await one()
                taken.append(time.perf_counter() - began)
            cpu = time.thread_time() - cpu
            return cpu / count * 1e6, statistics.median(taken) * 1e6

        def measure(switch: Callable[[], None]) -> tuple[float, float]:
            # Both ways the classes have just been changed: what that costs is the same.
            tinker_routefix.uninstall()
            tinker_routefix.install()
            switch()
            running = asyncio.run_coroutine_threadsafe(block(requests), tinkers_loop())
            return running.result(PATIENCE)

        def on() -> None:
            tinker_routefix.uninstall()
            tinker_routefix.install()

        ways: dict[str, tuple[Callable[[], None], list[tuple[float, float]]]] = {
            "plain": (tinker_routefix.uninstall, []),
            "shim": (on, []),
        }
        order = list(ways)
        for _ in range(blocks):
            for name in order:
                switch, results = ways[name]
                results.append(measure(switch))
            order.reverse()
        on()
        return {
            name: {"cpu_us": [cpu for cpu, _ in results], "wall_us": [wall for _, wall in results]}
            for name, (_, results) in ways.items()
        }


def wrappers(*, contender: str, blocks: int, calls: int) -> dict[str, Any]:
    """The wrappers alone, around a loan and a request that return at once."""
    del contender
    import contextlib

    import wrapt

    from tinker_routefix import _sdk, _seams

    class Options:
        url = "/api/v1/retrieve_future"

    class Client:
        base_url = "https://gateway.invalid/training/v1/rlorTrainerJobs/account/job"

        async def request(self, cast_to: object, options: object) -> None:
            del cast_to, options

    class Pool:
        _constructor_kwargs: ClassVar[dict[str, Any]] = {}

        def __init__(self) -> None:
            self._clients = [Client()]

        @contextlib.contextmanager
        def aclient(self) -> Any:
            yield self._clients[0]

    class WrappedClient(Client):
        request = wrapt.FunctionWrapper(
            Client.request, _sdk.guard_request, enabled=_seams.is_active
        )

    class WrappedPool(Pool):
        aclient: Any = wrapt.FunctionWrapper(
            Pool.aclient,
            cast("Any", _sdk.lend_client),
            enabled=_seams.is_active,
        )

        def __init__(self) -> None:
            self._clients = [WrappedClient()]

    options = Options()

    async def block(pool: Any) -> float:
        began = time.thread_time()
        for _ in range(calls):
            with pool.aclient() as client:
                await client.request(None, options)
        return (time.thread_time() - began) / calls * 1e6

    async def run() -> dict[str, Any]:
        ways: dict[str, Callable[[], Any]] = {"plain": Pool, "shim": WrappedPool}
        results: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(blocks):
            for name, pool in ways.items():
                results[name].append(await block(pool()))
        return {name: {"cpu_us": values} for name, values in results.items()}

    return asyncio.run(run())


# --- Recovery ----------------------------------------------------------------------------


def recovery(*, contender: str, outage: float, on: str, seed: int) -> dict[str, Any]:
    """Train; lose the route at a random moment for so long; train on."""
    kinds = {"everything": None, "polls": labs.POLLS, "submissions": labs.SUBMISSIONS}[on]
    chance = lot(f"{outage}/{on}/{seed}")
    # Neither the moment nor the length keeps time with anybody's retries.
    seconds = outage * chance.uniform(0.9, 1.1)
    phase = 0.5 + chance.random()
    with labs.opened(work_seconds=0.1, poll_seconds=0.5, seed=seed) as lab:
        load(contender)
        client = connect(contender, lab.url())
        tally = Tally()
        healed: list[float] = []
        timer = threading.Timer(phase, lambda: healed.append(lab.lose(seconds, kinds=kinds)))
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
            "outage": outage,
            "on": on,
            "survived": error is None,
            "error": error,
            "overshoot": min(through) - healed[0] if through and error is None else None,
            "met": sum(one.refused for one in seen if one.kind in names),
            **_asked(seen),
            **tally.verdict(lab.account()),
        }


# --- Leaks -------------------------------------------------------------------------------


class _Rounds(logging.Handler):
    """How many rounds each job's warm-up took, by what the shim logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.of: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        rounds = getattr(record, "routefix_rounds", None)
        if rounds is not None:
            self.of[str(vars(record)["routefix_job"]).rpartition("/")[2]] = rounds


def leaks(*, contender: str, cells: list[tuple[int, int]], runs: int, seed: int) -> dict[str, Any]:
    """Connect while some replicas have lost the route; take one step; see what leaks through."""
    load(contender)
    rounds = _Rounds()
    logger = logging.getLogger("tinker_routefix")
    logger.addHandler(rounds)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    results: list[dict[str, Any]] = []

    def run(lab: Lab, replicas: int, stale: int, number: int) -> None:
        job = f"job-{stale}-{number}"
        chance = lot(f"{seed}/{replicas}/{stale}/{number}")
        url = lab.url(job)
        lost = chance.sample(range(replicas), stale)
        # Longer than a warm-up that meets none of them takes.
        seconds = chance.uniform(3, 6)
        tally = Tally()
        error = None
        warm_at = None

        def lose() -> None:
            # The shim's warm-up is a part of making the model, strategy B's comes after it.
            lab.lose_replicas(seconds, lost, job, after_model=contender == SHIM)

        try:
            client = connect(contender, url, before_warm_up=lose)
            warm_at = time.monotonic()
            tally.step(client)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the run did not survive
            error = type(failure).__name__
        seen = lab.seen(job)
        asked = [one.at for one in seen if one.kind == "get_info"]
        began = min(asked, default=0.0)
        # What comes next of the program's own ends the warm-up, and may meet trouble of its own.
        ended = min((one.at for one in _of_programs(seen) if one.at > began), default=began)
        results.append(
            {
                "replicas": replicas,
                "stale": stale,
                "early": warm_at is not None and warm_at < lab.healed(job),
                "met": warm_at is not None
                and any(
                    one.refused and one.at >= warm_at and one.kind not in labs.PROBES
                    for one in seen
                ),
                "crashed": error is not None,
                "error": error,
                "warm_up": warm_at - began if warm_at is not None and asked else 0.0,
                "rounds": rounds.of.get(job),
                **_asked([one for one in seen if one.at < ended]),
                **tally.verdict(lab.account(job)),
            }
        )

    with ThreadPoolExecutor(12) as threads:
        for replicas in sorted({replicas for replicas, _ in cells}):
            with labs.opened(replicas=replicas, pinning="random", seed=seed) as lab:
                waiting = [
                    threads.submit(run, lab, replicas, stale, number)
                    for number in range(runs)
                    for count, stale in cells
                    if count == replicas
                ]
                for one in waiting:
                    one.result()
    return {"runs": results}


# --- Stampede ----------------------------------------------------------------------------

HELD = 3.0
"""Seconds that a poll waits in vain, and so the time within which all that wait have polled
again, and have been refused."""
LOST = HELD + 1.0
"""Seconds that the route is lost."""


def stampede(*, contender: str, waiting: int, outage: bool, give_up: float) -> dict[str, Any]:
    """Have so many results polled for, and lose the route to all of them at once."""
    with labs.opened() as lab:
        load(contender)
        client = connect(contender, lab.url())
        ticker = Ticker()
        lab.hold(HELD)
        futures = [gradient(client, [datum(1)]) for _ in range(waiting)]
        until(lambda: lab.accepted("forward_backward") >= waiting)
        time.sleep(1)
        before = lab.count()
        ticker.start_lap()
        memory_before = memory()
        if outage:
            healed = lab.lose(LOST)
            time.sleep(healed - time.monotonic() - 0.5)
            lab.hand_out()
        else:
            lab.hand_out()
            healed = time.monotonic()
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
            peak = peak_memory()
            during = lab.seen()[before:]
            account = lab.account()
            said = {
                "waiting": waiting,
                "outage": outage,
                "done": done,
                "failed": failed,
                "through": last - healed if outage and done == waiting else None,
                "requests": sum(one.kind != "control_plane" for one in during),
                "connections": len({one.connection for one in during}),
                "met": sum(one.refused for one in during),
                **_asked(during),
                "memory_mb": peak - memory_before,
                **lag,
                "twice": max(account.twice, account.gradients - waiting, 0),
                "lost": max(done - account.gradients, 0),
                "skipped": account.missing,
                "out_of_order": account.out_of_order,
            }
            if done + failed < waiting:
                # Threads are still waiting for results that may take minutes.
                say(said)
                os._exit(0)
    return said


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to be so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


# --- Scale -------------------------------------------------------------------------------


def scale(*, contender: str, jobs: int, outage: float) -> dict[str, Any]:
    """Train so many jobs in one process, and lose the routes of all of them at once."""
    names = [f"job-{number}" for number in range(jobs)]
    with labs.opened(work_seconds=0.05) as lab, ThreadPoolExecutor(max(jobs, 8)) as threads:
        load(contender)
        urls = [lab.url(name) for name in names]
        ticker = Ticker()
        memory_before = memory()
        clients = []
        for start in range(0, jobs, 8):
            batch = urls[start : start + 8]
            clients += list(threads.map(lambda url: connect(contender, url), batch))
        memory_connected = memory()
        tasks_connected = tasks_on_loop()
        tallies = [Tally() for _ in names]

        def steps(number: int) -> str | None:
            try:
                for _ in range(3):
                    tallies[number].step(clients[number])
            except Exception as error:  # noqa: BLE001 - whatever it is, the job did not survive
                return type(error).__name__
            return None

        healthy_began = time.monotonic()
        errors = list(threads.map(steps, range(jobs)))
        healthy_seconds = time.monotonic() - healthy_began
        ticker.start_lap()
        healed = lab.lose(outage)
        errors += list(threads.map(steps, range(jobs)))
        through = time.monotonic() - healed
        lag = ticker.lap()
        # Whatever has only to be closed or cancelled is gone by then.
        time.sleep(1.5)
        verdicts = [
            tally.verdict(lab.account(name)) for tally, name in zip(tallies, names, strict=True)
        ]
        asked = [_asked(lab.seen(name)) for name in names]
        return {
            "jobs": jobs,
            "survived": jobs - sum(error is not None for error in errors),
            "steps_seconds": healthy_seconds,
            "through": through,
            **lag,
            "memory_mb": memory_connected - memory_before,
            "memory_grown_mb": memory() - memory_connected,
            "tasks": tasks_connected,
            "tasks_grown": tasks_on_loop() - tasks_connected,
            "threads": threading.active_count(),
            "questions_a_second": max(one["questions_a_second"] for one in asked),
            "probes_a_second": max(one["probes_a_second"] for one in asked),
            **{
                name: sum(verdict[name] for verdict in verdicts)
                for name in ("twice", "lost", "skipped", "out_of_order")
            },
        }


# --- Being a program ---------------------------------------------------------------------


def say(said: dict[str, Any]) -> None:
    """Hand in what was measured."""
    sys.stdout.write("\n" + json.dumps(said) + "\n")
    sys.stdout.flush()


def day(*, contender: str, **about: Any) -> dict[str, Any]:
    """A day of traffic on a clock of its own."""
    load(contender)
    from benchmarks import day as simulated

    return simulated.simulate(**about)


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one
    for one in (day, healthy, leaks, overhead, recovery, scale, stampede, wrappers)
}

if __name__ == "__main__":
    # Tinker warns about heartbeats and connections of labs that are gone.
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    say(PROGRAMS[sys.argv[1]](**json.load(sys.stdin)))
