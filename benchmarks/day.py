"""A day of traffic in a minute or two: what grows in a process that runs for long?

Real are tinker (its clients, pools, futures and loop), all of the shim, and the trainer of the
lab. Simulated are the time, which jumps to the next timer whenever nothing is left to do; the
network, which is a function call below httpx; and threads, whose work is done at once. The
gateway has four replicas; again and again some of them lose a job for a while.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import re
import selectors
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import httpx

from benchmarks import programs
from benchmarks.figures import lot
from tinker_routefix import _connections, _route
from tinker_routefix.lab import GATEWAY_404, Exchange, Ledger
from tinker_routefix.lab import _trainer as trainers
from tinker_routefix.lab import _wire as wire

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

HOUR = 3600.0
REPLICAS = 4
LATENCY = 0.02
WORK = 0.5
THINKING = 12.0
"""Seconds between two steps."""
BETWEEN_OUTAGES = 600.0
"""Seconds from one outage of a job to the next, on average."""

_JOB = re.compile(r"/training/v1/rlorTrainerJobs/account/([^/]+)(/.*)")
_CONTROL_PLANE = re.compile(r"/v1/accounts/account/rlorTrainerJobs/([^/]+)")


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def read(self) -> float:
        """What ``time.monotonic()`` says instead."""
        return self.now


class _Skipping(selectors.DefaultSelector):
    """Where the loop would wait for its next timer, it is that time at once."""

    clock: Clock

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select(None)
        events = super().select(0)
        if not events and timeout > 0:
            self.clock.now += timeout
        return events


class _AtOnce(ThreadPoolExecutor):
    """Threads would take real time, which is none here."""

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is for whoever waits for it
            done.set_exception(error)
        return done


class Gateway:
    """The gateway, the control plane and the trainers of some jobs."""

    def __init__(self, clock: Clock, seed: int) -> None:
        self._clock = clock
        self._chance = lot(seed)
        self._replicas: WeakKeyDictionary[httpx.AsyncHTTPTransport, int] = WeakKeyDictionary()
        self.trainers: dict[str, trainers.Trainer] = {}
        self.lost_until: dict[tuple[str, int], float] = {}
        self.requests = self.refused = self.questions = self.probes = 0

    def url(self, job: str) -> str:
        """The base URL of a job."""
        # The other transport would pass by the simulated network.
        config = {"use_pyqwest_transport": False}
        settings = trainers.Settings(work_seconds=WORK, config=config)
        self.trainers[job] = trainers.Trainer(job, settings, self._clock.read)
        return f"http://127.0.0.1/training/v1/rlorTrainerJobs/account/{job}"

    def lose(self, job: str, seconds: float, replicas: int) -> None:
        """Let some replicas lose a job for a while."""
        for replica in self._chance.sample(range(REPLICAS), replicas):
            self.lost_until[job, replica] = self._clock.now + seconds

    def _replica(self, transport: httpx.AsyncHTTPTransport) -> int:
        """A kept connection stays with its replica; the prober's are not kept."""
        pool: Any = transport._pool
        if not pool._max_keepalive_connections:
            return self._chance.randrange(REPLICAS)
        return self._replicas.setdefault(transport, self._chance.randrange(REPLICAS))

    async def answer(self, transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> Any:
        """``httpx.AsyncHTTPTransport.handle_async_request``: every client is a connection."""
        body = await request.aread()
        await asyncio.sleep(LATENCY)
        if _CONTROL_PLANE.fullmatch(request.url.path):
            self.questions += 1
            return _response(200, b'{"state": "JOB_STATE_RUNNING"}', "application/json")
        match = _JOB.fullmatch(request.url.path)
        assert match is not None, request.url
        job, path = match.groups()
        self.requests += 1
        replica = self._replica(transport)
        said = wire.read_body(body, request.headers.get("content-type", ""), "")
        kind = trainers.kind_of_request(request.method, path, said)
        self.probes += kind in ("get_info", "capabilities")
        if self.lost_until.get((job, replica), 0.0) > self._clock.now:
            self.refused += 1
            status, content, kind_of_content = (
                GATEWAY_404.status,
                GATEWAY_404.content,
                GATEWAY_404.content_type,
            )
        else:
            exchange = Exchange(
                at=self._clock.now,
                kind=kind,
                method=request.method,
                path=path,
                job=job,
                body=body,
                said=said,
            )
            accept = request.headers.get("accept", "")
            answer = await self.trainers[job].handle(exchange, path, accept)
            status, content, kind_of_content = answer.status, answer.content, answer.content_type
        return _response(status, content, kind_of_content)


def _response(status: int, content: bytes, content_type: str) -> httpx.Response:
    # As a stream, as it comes from a network: some read it raw.
    headers = {"content-type": content_type, "content-length": str(len(content))}
    return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)


def _take_over(clock: Clock) -> asyncio.AbstractEventLoop:
    """Give tinker a loop that lives on the simulated clock."""
    time.monotonic = clock.read
    selector = _Skipping()
    selector.clock = clock
    loop = asyncio.SelectorEventLoop(selector)
    loop.set_default_executor(_AtOnce(1))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    holder: Any = importlib.import_module("tinker.lib.internal_client_holder")
    singleton = holder._internal_client_holder_thread_singleton
    singleton._loop, singleton._thread, singleton._started = loop, thread, True
    return loop


def simulate(*, jobs: int, hours: int, seed: int) -> dict[str, Any]:
    """Train so many jobs for so many hours, and look at the process every hour."""
    began = time.perf_counter()
    clock = Clock()
    gateway = Gateway(clock, seed)
    loop = _take_over(clock)

    async def answer(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> Any:
        return await gateway.answer(transport, request)

    transport: Any = httpx.AsyncHTTPTransport
    transport.handle_async_request = answer
    clients = {f"job-{number}": gateway.url(f"job-{number}") for number in range(jobs)}
    connected = {job: programs.plainly(url) for job, url in clients.items()}
    end = clock.now + hours * HOUR
    outages = 0
    steps = 0
    wrong = {"twice": 0, "skipped": 0, "out_of_order": 0}

    async def train(client: Any) -> None:
        nonlocal steps
        while clock.now < end:
            # On the loop itself: nothing waits for another thread, and time cannot run away.
            await programs.gradient(client)
            await programs.update(client)
            steps += 1
            await asyncio.sleep(THINKING)

    async def disturb(job: str) -> None:
        nonlocal outages
        chance = lot(f"{seed}/{job}")
        while clock.now < end - 60:
            await asyncio.sleep(chance.expovariate(1 / BETWEEN_OUTAGES))
            outages += 1
            gateway.lose(job, chance.uniform(0.5, 20), chance.randint(1, REPLICAS))

    def audit() -> None:
        """Take the trainers' accounts and have them forget: they must not be what grows."""
        for trainer in gateway.trainers.values():
            ledger, trainer.ledger = trainer.ledger, Ledger()
            for execution in ledger.of("forward_backward", "optim_step"):
                last = latest.get(trainer.job, 0)
                sequence = execution.seq_id or 0
                wrong["twice"] += sequence == last
                wrong["out_of_order"] += sequence < last
                wrong["skipped"] += max(0, sequence - last - 1)
                latest[trainer.job] = max(last, sequence)
                executed[trainer.job] = executed.get(trainer.job, 0) + 1
            for request_id in list(trainer._futures)[:-50]:
                del trainer._futures[request_id]

    latest: dict[str, int] = {}
    executed: dict[str, int] = {}
    samples: list[dict[str, float]] = []

    def look() -> None:
        audit()
        gc.collect()
        routes = _route.all_routes()
        samples.append(
            {
                "hour": len(samples),
                "memory_mb": programs.memory(),
                "blocks": sys.getallocatedblocks(),
                "tasks": len(asyncio.all_tasks(loop)),
                "routes": len(routes),
                "waiting": sum(route.sleepers for route in routes),
                "closing": len(_connections._closing),
                "clients": sum(isinstance(one, httpx.AsyncClient) for one in gc.get_objects()),
                "requests": gateway.requests,
                "refused": gateway.refused,
                "questions": gateway.questions,
                "probes": gateway.probes,
                "replays": sum(route.counters.replays for route in routes),
                "recovered": sum(route.counters.recovered for route in routes),
                "given_up": sum(route.counters.given_up for route in routes),
            }
        )

    async def run() -> None:
        running = [asyncio.ensure_future(train(client)) for client in connected.values()]
        running += [asyncio.ensure_future(disturb(job)) for job in clients]
        look()
        for _ in range(hours):
            await asyncio.sleep(HOUR)
            look()
        await asyncio.gather(*running)
        audit()

    asyncio.run_coroutine_threadsafe(run(), loop).result()
    return {
        "hours": hours,
        "jobs": jobs,
        "steps": steps,
        "outages": outages,
        "samples": samples,
        "seconds": time.perf_counter() - began,
        **wrong,
        "lost": max(0, 2 * steps - sum(executed.values())),
    }
