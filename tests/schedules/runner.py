"""Plays a schedule: a lab, a real tinker, and what came of every call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import math
import os
import ssl
import threading
import time
import warnings
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import httpx
import pytest
from tinker import types
from tinker.lib import internal_client_holder
from tinker.lib.public_interfaces import training_client

import tinker_routefix
from tests import programs
from tests.common import collect
from tests.schedules.clock import faster
from tinker_routefix import _routes, _settings, _threads
from tinker_routefix.lab import Exchange, Lab

try:
    import pyqwest
except ImportError:  # tinker before 0.22.0
    pyqwest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.schedules.model import Actor, Client, Op, Schedule
    from tinker_routefix._route import Route

RATE: Final = 10.0
"""How much faster time passes."""

SETTINGS: Final = {
    "retry_budget": 20.0,
    "warmup_timeout": 20.0,
    "control_plane_timeout": 20.0,
}
"""Budgets that are shorter than the defaults; long enough for what `judge` calls survivable."""

IMPATIENT: Final = 2.0
"""The control plane's timeout where it hangs."""

PATIENCE: Final = 60.0
"""Real seconds after which what has not ended is taken to hang."""

STUCK: Final = 0.4
"""Real seconds without any sign of life; only counted where tinker itself may be stuck."""

PART: Final = 2
"""Examples in a submission: tinker splits batches into parts of so many."""

State = Literal["done", "failed", "cancelled", "stuck", "hung"]

_examples = itertools.count()
_played = itertools.count()


@dataclass
class Result:
    """What came of one call of the program."""

    op: str
    """The op's kind, or ``connect``."""
    client: int
    tag: int = 0
    """Marks the op's requests: 1, 2, 3, … in the order of the schedule."""
    parts: int = 1
    state: State = "done"
    may_cancel: bool = False
    """Whether the program cancels it."""
    error: BaseException | None = None
    began: float = 0.0
    """When it was made, by the lab's clock."""
    ended: float = math.nan
    """When it was known to the program, by the lab's clock."""

    def __str__(self) -> str:
        error = "" if self.error is None else f" {self.error!r:.300}"
        name = f"#{self.tag} {self.op}" if self.tag else self.op
        return f"client {self.client} {name}: {self.state}{error}"


@dataclass
class Played:
    """All that is known after a schedule has been played."""

    schedule: Schedule
    shim: bool
    results: list[Result]
    exchanges: list[Exchange]
    lab: Lab
    jobs: tuple[str, str]
    left: list[str]
    """What was left behind, in words."""
    dropped: list[float]
    """When all connections were dropped, by the lab's clock."""
    control_plane_replies: dict[Exchange, str]
    """What the control plane replied where it was not a mere RUNNING."""
    lag: float
    """For how many real seconds, all in all, this process did not get to run."""
    status: tuple[Any, ...] = ()
    """The shim's account of each job."""

    def lines(self) -> str:
        """Everything, for a reader."""
        exchanges = (f"{one}  #{one.connection} {one.job}" for one in self.exchanges)
        return "\n".join((*map(str, self.results), "", *exchanges, "", *map(str, self.status)))


def play(schedule: Schedule, *, shim: bool = True, observer: Any = None) -> Played:
    """Play a schedule; the shim is installed or not, as the caller wants it."""
    # What the one before has left, before a thread with a loop does: see `collect`.
    collect()
    if next(_played) == 1:
        # What the first one has imported is nobody's garbage, and need not be looked at.
        gc.freeze()
    with faster(RATE), _settings_for(schedule), _short_parts(), _cheap_clients():
        return _Stage(schedule, shim, observer).play()


@contextlib.contextmanager
def _settings_for(schedule: Schedule) -> Iterator[None]:
    before = _settings.current()
    changed = dict(SETTINGS)
    if any(one.reply == "hang" for one in schedule.control_plane_replies):
        changed["control_plane_timeout"] = IMPATIENT
    _settings.set_current(before.replace(**changed))
    try:
        yield
    finally:
        _settings.set_current(before)


@contextlib.contextmanager
def _cheap_clients() -> Iterator[None]:
    """Read no certificates: 20 ms for each client, ten times that by the faster clock.

    Nothing here speaks TLS.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx._transports.default, "create_ssl_context", _no_certificates)
        if pyqwest is not None:
            transport = pyqwest.HTTPTransport

            def without_certificates(**how: Any) -> Any:
                how.pop("tls_include_system_certs", None)
                return transport(**how)

            patch.setattr(pyqwest, "HTTPTransport", without_certificates)
        yield


@functools.cache
def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _no_certificates(**_: Any) -> ssl.SSLContext:
    return _context()


@contextlib.contextmanager
def _short_parts() -> Iterator[None]:
    # A constant until the server's configuration took its place.
    before = getattr(training_client, "MAX_CHUNK_LEN", None)
    if before is not None:
        training_client.MAX_CHUNK_LEN = PART  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is not None:
            training_client.MAX_CHUNK_LEN = before  # type: ignore[attr-defined]


class _Lag(threading.Thread):
    """Adds up the time for which the process does not get to run when it could."""

    def __init__(self) -> None:
        super().__init__(name="schedule-lag", daemon=True)
        self.seconds = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        before = time.perf_counter()
        while not self.over.wait(0.01):
            now = time.perf_counter()
            self.seconds += max(0.0, now - before - 0.015)
            before = now


class _Stage:
    def __init__(self, schedule: Schedule, shim: bool, observer: Any) -> None:
        self.schedule = schedule
        self.shim = shim
        number = next(_examples)
        # What the shim knows of a job stays: every schedule has jobs of its own.
        self.jobs = (f"job-{number}-a", f"job-{number}-b")
        self.lab = Lab(
            job=self.jobs[0],
            replicas=schedule.replicas,
            work_seconds=schedule.work_seconds,
            seed=schedule.seed,
            config={
                "fwdbwd_max_chunk_len": PART,
                "sample_use_retrieve_futures": schedule.futures_together,
                "use_pyqwest_transport": schedule.pyqwest,
            },
            observer=observer,
        )
        self.results: list[Result] = []
        self.clients: dict[int, Any] = {}
        self.services: dict[tuple[int, int], Any] = {}
        self.wounded: set[int] = set()
        """Clients of which a call failed or was cancelled."""
        self.dropped: list[float] = []
        self.replies: dict[Exchange, str] = {}
        self.attempts = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    # -- the acts ------------------------------------------------------------------------

    def play(self) -> Played:
        loop = internal_client_holder._internal_client_holder_thread_singleton.get_loop()
        tasks = _tasks(loop)
        threads = set(threading.enumerate())
        lag = _Lag()
        lag.start()
        with self.lab as lab:
            for job in self.jobs:
                lab.ledger_of(job)
            self._arm("connect")
            with _telemetry(self.schedule.telemetry):
                self._connect()
            self._arm("work")
            self._work()
            left = self._clear_up(loop, tasks)
            exchanges = lab.exchanges
        lag.over.set()
        lag.join()
        status = tuple(job for job in tinker_routefix.status().jobs if job.name in self.jobs)
        left += _eventually(
            lambda: [
                f"thread {thread.name}"
                for thread in set(threading.enumerate()) - threads
                # The loops' pools for what would block: asyncio bounds and keeps them.
                if not thread.name.startswith("asyncio_")
            ]
        )
        return Played(
            schedule=self.schedule,
            shim=self.shim,
            results=self.results,
            exchanges=exchanges,
            lab=self.lab,
            jobs=self.jobs,
            left=left,
            dropped=self.dropped,
            control_plane_replies=self.replies,
            lag=lag.seconds,
            status=status,
        )

    def _arm(self, phase: str) -> None:
        for drawn in self.schedule.faults:
            if drawn.phase == phase:
                self.lab.fault(drawn.fault(self.jobs))
        for one in self.schedule.control_plane_replies:
            if one.phase == phase:
                fault = one.fault(self.jobs)
                fault.when = functools.partial(self._replied, one.reply)
                self.lab.fault(fault)

    def _replied(self, reply: str, exchange: Exchange) -> bool:
        # The first fault that is more than a delay wins.
        if self.replies.get(exchange, "slow") == "slow":
            self.replies[exchange] = reply
        return True

    def _connect(self) -> None:
        connecting = [
            threading.Thread(target=self._connect_one, args=(number, client), daemon=True)
            for number, client in enumerate(self.schedule.clients)
        ]
        if self.schedule.together:
            self._all(connecting)
        else:
            for one in connecting:
                self._all([one])

    def _connect_one(self, number: int, client: Client) -> None:
        result = Result("connect", number)
        try:
            service = self._service(client)
            made = service.create_lora_training_client(base_model="lab/base", rank=8)
            self.clients[number] = made.result(PATIENCE) if hasattr(made, "result") else made
        except BaseException as error:
            self._failed(result, error)
            # A service that could not connect does so anew when it is used again.
            self.attempts += 1
        self._note(result)

    def _service(self, client: Client) -> Any:
        key = (client.job, client.service)
        # One at a time: two clients that share it must not make it twice.
        with self.lock:
            if key not in self.services:
                self.attempts += 1
                self.services[key] = programs.service(self.lab.job_url(self.jobs[client.job]))
            return self.services[key]

    def _work(self) -> None:
        tags = itertools.count(1)
        actors: list[threading.Thread] = []
        for number, actor in enumerate(self.schedule.actors):
            tagged = [(next(tags), op) for op in actor.ops]
            if actor.client in self.clients:
                part = _Part(self, actor, tagged)
                actors.append(
                    threading.Thread(target=part.run, name=f"schedule-actor-{number}", daemon=True)
                )
        chaos = threading.Thread(target=self._happen, name="schedule-chaos", daemon=True)
        chaos.start()
        self._all(actors)
        self.over.set()
        chaos.join()

    def _happen(self) -> None:
        began = time.monotonic()
        for happening in sorted(self.schedule.happenings, key=lambda one: one.at):
            if self.over.wait(max(0.0, began + happening.at - time.monotonic()) / RATE):
                return
            if happening.what == "connections dropped":
                self.lab.drop_connections()
                self.dropped.append(self.lab._gateway.clock())
            else:
                self.lab.drop_session(self.jobs[happening.job])

    def _all(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        deadline = time.perf_counter() + 2 * PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
            if thread.is_alive():
                self._note(Result(thread.name, -1, state="hung"))

    # -- what came of it -----------------------------------------------------------------

    def _note(self, result: Result) -> None:
        if math.isnan(result.ended):
            result.ended = self.lab._gateway.clock()
        with self.lock:
            self.results.append(result)

    def _failed(self, result: Result, error: BaseException) -> None:
        found = (state for kinds, state in _STATES if isinstance(error, kinds))
        result.state, result.error = next(found, "failed"), error
        self.wounded.add(result.client)

    def stuck(self, client: int) -> bool:
        """Whether tinker alone may be waiting, for a turn that nobody takes any more."""
        if client not in self.wounded:
            return False
        job = self.jobs[self.schedule.clients[client].job]
        waits = any(route.waiters.count for route in _routes_of(job))
        return not waits and not any(
            math.isnan(one.seconds) for one in self.lab.exchanges if one.job == job
        )

    # -- afterwards ----------------------------------------------------------------------

    def _clear_up(self, loop: asyncio.AbstractEventLoop, before: set[Any]) -> list[str]:
        """Close everything, and say what is left."""
        self.lab.clear()
        left = [] if not self.shim else self._left_of_the_shim()
        holders = [service.holder for service in self.services.values()]
        left += self._left_in_pools(holders)
        for holder in holders:
            holder.close()
        del holders
        self.clients.clear()
        self.services.clear()
        left += _eventually(lambda: [f"task {_describe(task)}" for task in _tasks(loop) - before])
        return left

    def _left_of_the_shim(self) -> list[str]:
        def left() -> list[str]:
            said = []
            for job in self.jobs:
                for route in _routes_of(job):
                    prober = route._prober
                    asked = [one.question for one in route.control_plane._flights.values()]
                    said += [
                        f"{what} of {job}"
                        for what, there in (
                            (f"{route.waiters.count} waiters", route.waiters.count),
                            (f"{route._open_incidents} incidents", route._open_incidents),
                            ("a prober", prober is not None and not prober.done()),
                            ("a question", any(one is not None for one in asked)),
                        )
                        if there
                    ]
            if _threads._tasks:
                said.append("clients being closed or opened")
            return said

        return _eventually(left)

    def _left_in_pools(self, holders: list[Any]) -> list[str]:
        """Loans that were not given back, and connections that no pool knows of."""

        def left() -> list[str]:
            pools = [pool for holder in holders for pool in holder._client_pools.values()]
            lent = sum(sum(pool._client_active_refcount) for pool in pools)
            held = sum(_connections_of(client) for pool in pools for client in pool._clients)
            there = _call(self.lab, self._open_connections)
            said = [f"{lent} loans"] if lent else []
            # tinker itself does not close the client that fetches its configuration, nor one
            # that it replaces for a bare 400, nor those of a service that was refused.
            own = 2 * self.attempts + sum(one.status == 400 for one in self.lab.exchanges)
            if there > held + own and not self.schedule.pyqwest:
                said.append(f"{there} connections, {held} of them in pools")
            return said

        return _eventually(left)

    def _open_connections(self) -> int:
        return sum(not one.is_closing() for one in self.lab._gateway._connections)


class StuckError(Exception):
    """tinker waits for a turn that nobody takes any more: a call before it failed."""


class HungError(Exception):
    """It did not end, and nothing explains why."""


class _Watch:
    """Looks whether a wait still has an end in sight."""

    def __init__(self, stage: _Stage, client: int) -> None:
        self.stage = stage
        self.client = client
        self.began = self.quiet_since = time.perf_counter()

    def look(self) -> None:
        now = time.perf_counter()
        if not self.stage.stuck(self.client):
            self.quiet_since = now
        if now - self.quiet_since > STUCK:
            raise StuckError
        if now - self.began > PATIENCE:
            raise HungError


_STATES: Final[tuple[tuple[Any, State], ...]] = (
    ((CancelledError, asyncio.CancelledError), "cancelled"),
    (StuckError, "stuck"),
    (HungError, "hung"),
)


class _Part:
    """One actor of the program."""

    def __init__(self, stage: _Stage, actor: Actor, ops: list[tuple[int, Op]]) -> None:
        self.stage = stage
        self.client = stage.clients[actor.client]
        about = stage.schedule.clients[actor.client]
        self.service = stage.services[about.job, about.service]
        self.actor = actor
        self.ops = ops
        self.pending: list[tuple[Result, Any]] = []

    def run(self) -> None:
        run = self._in_thread if self.actor.style == "thread" else self._on_loop
        try:
            run()
        except BaseException as error:
            # Of the test itself: must not get lost in a thread.
            self.stage._note(Result("actor", self.actor.client, state="hung", error=error))

    def _result(self, tag: int, op: Op) -> Result:
        # Waiting with a timeout in a coroutine is a cancellation, in a thread it is not.
        cancels = op.how == "cancel" or (op.how == "timeout" and self.actor.style == "async")
        began = self.stage.lab._gateway.clock()
        return Result(op.kind, self.actor.client, tag, op.parts, may_cancel=cancels, began=began)

    def _in_thread(self) -> None:
        for tag, op in self.ops:
            result = self._result(tag, op)
            try:
                future = self._submit(tag, op, result)
                self._go_on(op, result, future)
            except BaseException as error:
                self.stage._failed(result, error)
                self.stage._note(result)
            if result.state in ("failed", "stuck", "hung"):
                break
        for result, future in self.pending:
            self._settle(result, future)

    def _go_on(self, op: Op, result: Result, future: Any) -> None:
        if future is None:
            self.stage._note(result)
        elif op.how == "later":
            self.pending.append((result, future))
        elif op.how == "timeout":
            try:
                future.result(op.seconds / RATE)
            except TimeoutError:
                if _concurrent(future).done():
                    raise
                self.pending.append((result, future))
            else:
                self.stage._note(result)
        elif op.how == "cancel":
            time.sleep(op.seconds / RATE)
            _concurrent(future).cancel()
            self._settle(result, future)
        else:
            self._settle(result, future)

    def _settle(self, result: Result, future: Any) -> None:
        """Wait for a result; never for ever."""
        try:
            self._wait(future)
        except BaseException as error:
            self.stage._failed(result, error)
        self.stage._note(result)

    def _wait(self, future: Any) -> Any:
        watch = _Watch(self.stage, self.actor.client)
        while True:
            try:
                return future.result(0.05)
            except TimeoutError:
                if _concurrent(future).done():
                    raise
                try:
                    watch.look()
                except Exception:
                    _concurrent(future).cancel()
                    raise

    def _on_loop(self) -> None:
        asyncio.run(self._coroutine())

    async def _coroutine(self) -> None:
        for tag, op in self.ops:
            result = self._result(tag, op)
            future = self._submit(tag, op, result)
            if op.how == "later":
                self.pending.append((result, future))
                continue
            waiting = asyncio.ensure_future(self._awaited(result, future))
            if op.how in ("timeout", "cancel"):
                await asyncio.wait((waiting,), timeout=op.seconds)
                if not waiting.done():
                    waiting.cancel()
            await asyncio.wait((waiting,))
            if result.state in ("failed", "stuck", "hung"):
                break
        await asyncio.gather(*(self._awaited(*pending) for pending in self.pending))

    async def _awaited(self, result: Result, future: Any) -> None:
        watch = _Watch(self.stage, self.actor.client)
        waiting = asyncio.ensure_future(_await(future))
        try:
            while not (await asyncio.wait((waiting,), timeout=0.05 * RATE))[0]:
                watch.look()
            waiting.result()
        except BaseException as error:
            # How `wait_for` ends what it has waited for long enough.
            waiting.cancel()
            await asyncio.wait((waiting,))
            self.stage._failed(result, error)
        self.stage._note(result)

    # -- calls ---------------------------------------------------------------------------

    def _submit(self, tag: int, op: Op, result: Result) -> Any:
        """Make a call; None where it has waited itself."""
        future = self._call(tag, op)

        def ended(future: Any) -> None:
            result.ended = self.stage.lab._gateway.clock()
            if future.cancelled() or future.exception() is not None:
                # Perhaps long before the program looks at it.
                self.stage.wounded.add(result.client)

        if future is not None:
            _concurrent(future).add_done_callback(ended)
        return future

    def _call(self, tag: int, op: Op) -> Any:
        client = self.client
        if op.kind in ("forward_backward", "forward"):
            call = client.forward_backward if op.kind == "forward_backward" else client.forward
            data = [programs.datum(tag) for _ in range(PART * (op.parts - 1) + 1)]
            return call(data, "cross_entropy")
        if op.kind == "optim_step":
            return client.optim_step(types.AdamParams(learning_rate=float(tag)))
        if op.kind == "save":
            return client.save_state(f"tag-{tag}")
        if op.kind == "load":
            path = self._wait(client.save_state(f"tag-{tag}")).path
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return client.load_state(path)
        if op.kind == "sample":
            # In two steps: older releases do both in one that waits itself, for ever if stuck.
            path = self._wait(client.save_weights_for_sampler(f"tag-{tag}")).path
            sampler = programs.settled(self.service.create_sampling_client(model_path=path))
            return sampler.sample(
                prompt=types.ModelInput.from_ints([1, 2, 3]),
                num_samples=1,
                sampling_params=types.SamplingParams(max_tokens=tag),
            )
        assert op.kind == "info"
        client.get_info()
        return None


def _concurrent(future: Any) -> Any:
    """The future of ``concurrent.futures`` that it is, or holds."""
    return future.future() if hasattr(future, "future") else future


async def _await(future: Any) -> Any:
    return await future


@contextlib.contextmanager
def _telemetry(on: bool) -> Iterator[None]:
    before = os.environ.get("TINKER_TELEMETRY")
    os.environ["TINKER_TELEMETRY"] = str(int(on))
    try:
        yield
    finally:
        if before is None:
            del os.environ["TINKER_TELEMETRY"]
        else:
            os.environ["TINKER_TELEMETRY"] = before


def _call(lab: Lab, function: Callable[[], int]) -> int:
    """Run something on the lab's loop."""
    answers: list[int] = []
    lab._call(lambda: answers.append(function()))
    return answers[0]


def _routes_of(job: str) -> list[Route]:
    return [route for route in _routes.all_routes() if route.job.name == job]


def _tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    async def all_tasks() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return asyncio.run_coroutine_threadsafe(all_tasks(), loop).result(PATIENCE)


def _describe(task: asyncio.Task[Any]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", task))


def _connections_of(client: Any) -> int:
    transport = client._client._transport
    pool = getattr(transport, "_pool", None)
    return 0 if pool is None else len(pool.connections)


def _eventually(left: Callable[[], list[str]], seconds: float = 15.0) -> list[str]:
    """What is still left after a while; nothing as soon as nothing is."""
    end = time.perf_counter() + seconds
    while said := left():
        if time.perf_counter() > end:
            return said
        collect()
        time.sleep(0.02)
    return []
