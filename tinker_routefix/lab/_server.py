"""The lab as its users hold it: a server in a thread of its own."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Self

from aiohttp import web

from tinker_routefix.lab import _tls
from tinker_routefix.lab._faults import Exchange, Fault
from tinker_routefix.lab._gateway import ControlPlane, Gateway, Mode, Pinning
from tinker_routefix.lab._trainer import KINDS, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path
    from types import TracebackType

    from tinker_routefix.lab._ledger import Ledger

_HOST: Final = "127.0.0.1"
_START_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 10.0
_HANDLER_SECONDS: Final = 1.0
_MAX_BODY: Final = 2**30
_BACKLOG: Final = 2048


class Lab:
    """A control plane, a gateway and trainers on loopback, with scripted faults and a ledger.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. All of it can be used
    from any thread while the server runs.

    Args:
        account: The account of all jobs.
        job: The job that :attr:`base_url` leads to.
        replicas: Gateway replicas; every TCP connection stays with one for its life.
        work_seconds: How long an operation of the trainer takes; those of one model queue up.
        seed: Repeats everything that is random.
        port: The port to listen on; 0 picks a free one.
        config: Fields of the trainer's answers to client/config and client/dynamic_config.
        without: Kinds of requests that the trainer is too old to know (``{"detail": "Not
            Found"}``).
        pinning: How connections are spread over the replicas.
        poll_seconds: How long a poll waits for a result before it is told to try again.
        observer: Called with every finished exchange, in the thread of the server.
        tls: Serve https. Clients trust it that read :attr:`ca_file`: set ``SSL_CERT_FILE`` to it
            before the first of them is made.

    """

    def __init__(
        self,
        account: str = "lab",
        job: str = "job-1",
        *,
        replicas: int = 1,
        work_seconds: float = 0.0,
        seed: int = 0,
        port: int = 0,
        config: Mapping[str, Any] | None = None,
        without: Collection[str] = (),
        pinning: Pinning = "round-robin",
        poll_seconds: float = 2.0,
        observer: Callable[[Exchange], None] | None = None,
        tls: bool = False,
    ) -> None:
        if replicas < 1:
            raise ValueError("a gateway has at least one replica")
        if unknown := set(without) - KINDS:
            raise ValueError(f"not kinds of requests: {sorted(unknown)}")
        self.account = account
        self.job = job
        self._port = port
        self._tls = tls
        self._settings = Settings(
            work_seconds, poll_seconds, dict(config or {}), frozenset(without)
        )
        self._gateway = Gateway(
            account=account,
            job=job,
            replicas=replicas,
            pinning=pinning,
            settings=self._settings,
            seed=seed,
            observer=observer,
        )
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the server, and wait until it listens."""
        listening: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="tinker-routefix-lab", daemon=True
        )
        self._thread.start()
        self._port = listening.result(_START_SECONDS)
        return self

    def stop(self) -> None:
        """Stop the server; requests in flight lose their connections. Takes seconds at most."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            raise RuntimeError("the lab's server did not stop")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self, listening: Future[int]) -> None:
        try:
            asyncio.run(self._serve(listening))
        except BaseException as error:
            if listening.done():
                raise
            listening.set_exception(error)

    async def _serve(self, listening: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._gateway.handle)
        runner = web.AppRunner(
            app,
            access_log=None,
            # Bodies are written down as they were sent.
            auto_decompress=False,
            # A hanging handler ends with its connection.
            handler_cancellation=True,
            shutdown_timeout=_HANDLER_SECONDS,
        )
        await runner.setup()
        try:
            tls = _tls.server_context() if self._tls else None
            site = web.TCPSite(runner, _HOST, self._port, backlog=_BACKLOG, ssl_context=tls)
            await site.start()
            listening.set_result(runner.addresses[0][1])
            await self._stop.wait()
            # First the door: clients come back at once when their connections are closed.
            await site.stop()
            self._gateway.close_connections()
        finally:
            await runner.cleanup()

    # -- addresses -----------------------------------------------------------------------------

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self._tls else 'http'}://{_HOST}:{self._port}"

    @property
    def ca_file(self) -> Path | None:
        """The certificate authority of a lab with ``tls``, the same for all of a process."""
        return _tls.ca_file() if self._tls else None

    @property
    def base_url(self) -> str:
        """The base URL of the default job, through the gateway."""
        return self._job_url(self.job)

    @property
    def direct_url(self) -> str:
        """The base URL of the default job's trainer, past the gateway."""
        return f"{self.origin}/direct"

    def job_url(self, job: str) -> str:
        """Return the base URL of a job; its trainer is started when there is none."""
        self._gateway.add_trainer(job)
        return self._job_url(job)

    def _job_url(self, job: str) -> str:
        return f"{self.origin}/training/v1/rlorTrainerJobs/{self.account}/{job}"

    # -- what goes wrong -----------------------------------------------------------------------

    @property
    def control_plane(self) -> ControlPlane:
        """What the control plane says; set its attributes."""
        return self._gateway.control_plane

    def fault(self, fault: Fault) -> Fault:
        """Arm a fault: its clock and its counters start now. The first one that applies wins."""
        link: Fault | None = fault
        while link is not None:
            for name in {*(link.kinds or ()), *link.excluding}:
                if name.partition(":")[0] not in KINDS:
                    # It would never strike, and the test that armed it would prove nothing.
                    raise ValueError(f"not a kind of requests: {name!r}")
            link = link.then
        return self._gateway.faults.arm(fault)

    def stale(
        self, seconds: float = math.inf, replica: int | None = None, *, job: str | None = None
    ) -> Fault:
        """Let a replica (default: all) not know a job (default: any) for some seconds from now."""
        return self.fault(Fault(seconds=seconds, replica=replica, job=job))

    def flap(self, chance: float) -> Fault:
        """Let the gateway answer 404 by chance, to any request but healthz."""
        return self.fault(Fault(chance=chance))

    def end_job(
        self,
        state: str = "JOB_STATE_DELETED",
        mode: Mode = "ok",
        *,
        job: str | None = None,
    ) -> Fault:
        """End a job (default: the default one) for good, in the control plane and the gateway."""
        job = job or self.job
        self.control_plane.states[job] = state
        self.control_plane.modes[job] = mode
        return self.fault(Fault(kinds=KINDS, job=job))

    @property
    def work_seconds(self) -> float:
        """How long an operation takes that is submitted from now on."""
        return self._settings.work_seconds

    @work_seconds.setter
    def work_seconds(self, seconds: float) -> None:
        self._settings.work_seconds = seconds

    def clear(self) -> None:
        """Disarm all faults. Requests that hang already go on hanging."""
        self._gateway.faults.clear()

    def drop_session(self, job: str | None = None) -> None:
        """Let a trainer forget its sessions, models and futures, as a restarted pod does."""
        self._call(self._gateway.add_trainer(job or self.job).forget)

    def drop_connections(self) -> None:
        """Close every open connection."""
        self._call(self._gateway.close_connections)

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is None:
            raise RuntimeError("the lab has not been started")
        done: Future[None] = Future()

        def call() -> None:
            function()
            done.set_result(None)

        self._loop.call_soon_threadsafe(call)
        done.result(_STOP_SECONDS)

    # -- what happened -------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """What reached the trainer of the default job."""
        return self.ledger_of(self.job)

    def ledger_of(self, job: str) -> Ledger:
        """Return what reached the trainer of a job."""
        return self._gateway.add_trainer(job).ledger

    @property
    def exchanges(self) -> list[Exchange]:
        """Every request that reached the server, in order of arrival: a snapshot of the list."""
        return list(self._gateway.exchanges)

    def count(
        self, kind: str | None = None, status: int | None = None, refused: bool | None = None
    ) -> int:
        """Count the exchanges of a kind, with a status, refused or not."""
        return sum(
            (kind is None or kind in exchange.names)
            and (status is None or exchange.status == status)
            and (refused is None or exchange.refused == refused)
            for exchange in self.exchanges
        )
