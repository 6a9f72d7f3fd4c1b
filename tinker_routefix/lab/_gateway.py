"""The HTTP side: the control plane, the gateway's replicas, and the way to the trainers.

One handler takes every request, because the faults decide per request and per connection what a
client gets to see.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Never
from weakref import WeakKeyDictionary

from aiohttp import web

from tinker_routefix.lab import _wire
from tinker_routefix.lab._faults import GATEWAY_404, Answer, Exchange, Fault, Faults
from tinker_routefix.lab._trainer import API, Settings, Trainer, kind_of_request

if TYPE_CHECKING:
    from collections.abc import Callable

Mode = Literal[
    "ok",
    "missing",
    "forbidden",
    "unauthorized",
    "error",
    "rubbish",
    "hang",
    "drop",
    "redirect",
    "slow_drip",
]
Pinning = Literal["round-robin", "random"]

_JOB: Final = re.compile(r"/training/v1/rlorTrainerJobs/([^/]+)/([^/]+)(/.*)?")
# A job, or the list of the accounts that a key belongs to: how managers find out theirs.
_CONTROL_PLANE: Final = re.compile(r"/v1/accounts(?:/([^/]+)/rlorTrainerJobs/([^/]+))?")
_DIRECT: Final = "/direct"
_ELSEWHERE: Final = "/elsewhere"
_DRIP_SECONDS: Final = 0.2
_FIRST_ERROR: Final = 400


def _error(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": {"code": code, "message": message}})


_REFUSALS: Final = {
    "missing": _error(404, "NOT_FOUND", "rlorTrainerJob not found"),
    "forbidden": _error(403, "PERMISSION_DENIED", "permission denied"),
    "unauthorized": _error(401, "UNAUTHENTICATED", "invalid API key"),
    "error": _error(500, "INTERNAL", "internal error"),
    "rubbish": Answer(200, "<html>all is well</html>", "text/html"),
    "redirect": Answer(302, headers={"Location": _ELSEWHERE}),
}


@dataclass
class ControlPlane:
    """What the control plane says about the jobs. Set it from any thread, at any time."""

    state: str = "JOB_STATE_RUNNING"
    """The state of every job that has none of its own."""
    mode: Mode = "ok"
    """How it answers: ``slow_drip`` sends the headers and then a byte now and then, for ever."""
    delay: float = 0.0
    """Seconds to wait before answering."""
    states: dict[str, str] = field(default_factory=dict)
    """The states of single jobs."""
    modes: dict[str, Mode] = field(default_factory=dict)
    """The modes of single jobs."""
    questions: int = 0
    """How many times it was asked."""


@dataclass
class _Connection:
    number: int
    replica: int | None = None


class Gateway:
    """Takes all requests of a lab. Lives on the event loop of the server."""

    def __init__(
        self,
        *,
        account: str,
        job: str,
        replicas: int,
        pinning: Pinning,
        settings: Settings,
        seed: int,
        observer: Callable[[Exchange], None] | None,
    ) -> None:
        self.account = account
        self.faults = Faults(seed)
        self.control_plane = ControlPlane()
        self.exchanges: list[Exchange] = []
        self.trainers: dict[str, Trainer] = {}
        self.closed_at: list[float] = []
        """When all connections were closed: answers that were in flight are lost."""
        self._settings = settings
        self._replicas = replicas
        self._pinning = pinning
        self._random = random.Random(seed)  # noqa: S311 - it has to be repeatable
        self._observer = observer
        self._began = time.monotonic()
        self._connections: WeakKeyDictionary[asyncio.BaseTransport, _Connection] = (
            WeakKeyDictionary()
        )
        self._numbers = itertools.count()
        self._pinned = itertools.count()
        self.add_trainer(job)

    def clock(self) -> float:
        """Seconds since the lab started."""
        return time.monotonic() - self._began

    def add_trainer(self, job: str) -> Trainer:
        """Return the trainer of a job, started when there is none. Safe in any thread."""
        return self.trainers.setdefault(job, Trainer(job, self._settings, self.clock))

    def close_connections(self) -> None:
        """Close every open connection at once."""
        self.closed_at.append(self.clock())
        for transport in list(self._connections):
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()

    # -- one request ---------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request, and write it down."""
        at = self.clock()
        exchange = self._exchange(request, await request.read(), at)
        self.exchanges.append(exchange)
        try:
            answer = await self._answer(request, exchange)
            if isinstance(answer, Answer) and answer.status >= _FIRST_ERROR:
                exchange.error = answer
            response = _as_response(answer) if isinstance(answer, Answer) else answer
            exchange.status = response.status
            return response
        finally:
            exchange.seconds = self.clock() - at
            if self._observer is not None:
                self._observer(exchange)

    def _exchange(self, request: web.Request, body: bytes, at: float) -> Exchange:
        headers = {name.lower(): value for name, value in request.headers.items()}
        connection = self._connection(request)
        exchange = Exchange(
            at=at,
            kind="other",
            method=request.method,
            path=request.path,
            connection=connection.number,
            headers=headers,
            body=body,
            said=_wire.read_body(
                body, headers.get("content-type", ""), headers.get("content-encoding", "")
            ),
        )
        if asked := _CONTROL_PLANE.fullmatch(request.path):
            exchange.kind = "control_plane"
            exchange.job = asked[2]
            return exchange
        exchange.job, path = self._destination(request.path)
        exchange.kind = kind_of_request(request.method, path, exchange.said)
        trainer = self.trainers.get(exchange.job or "")
        if trainer is not None and exchange.kind == "poll":
            exchange.subject = trainer.kind_of((exchange.said or {}).get("request_id"))
        if _JOB.fullmatch(request.path):
            exchange.replica = self._replica(connection)
        return exchange

    def _destination(self, path: str) -> tuple[str | None, str]:
        """Find the job that a path leads to, and the path that its trainer sees."""
        if path.startswith(_DIRECT + API):
            return next(iter(self.trainers)), path.removeprefix(_DIRECT)
        match = _JOB.fullmatch(path)
        if match is None:
            return None, path
        account, job, rest = match.groups()
        return job if account == self.account else None, rest or "/"

    def _connection(self, request: web.Request) -> _Connection:
        transport = request.transport
        if transport is None:  # the client is gone already
            return _Connection(-1, 0)
        if transport not in self._connections:
            self._connections[transport] = _Connection(next(self._numbers))
        return self._connections[transport]

    def _replica(self, connection: _Connection) -> int:
        if connection.replica is None:
            turn = next(self._pinned)
            if self._pinning == "random":
                turn = self._random.randrange(self._replicas)
            connection.replica = turn % self._replicas
        return connection.replica

    async def _answer(
        self, request: web.Request, exchange: Exchange
    ) -> Answer | web.StreamResponse:
        if exchange.kind == "control_plane":
            return await self._ask(request, exchange)
        if request.path == _ELSEWHERE:
            return Answer(200, "<html>moved here</html>", "text/html")
        _, path = self._destination(request.path)
        trainer = self.trainers.get(exchange.job or "")
        if exchange.replica is None:
            if trainer is None:
                return Answer(404, {"detail": "Not Found"})
            return await self._forward(request, exchange, trainer, path)
        if trainer is None:
            exchange.refused = True
            return GATEWAY_404
        fault = await self._fault(exchange, "gateway")
        answer = None
        if fault is None or fault.lost_answer:
            answer = await self._forward(request, exchange, trainer, path)
        if fault is not None:
            answer = await self._go_wrong(request, fault)
            exchange.refused = answer.status == GATEWAY_404.status
        assert answer is not None
        return answer

    async def _forward(
        self, request: web.Request, exchange: Exchange, trainer: Trainer, path: str
    ) -> Answer:
        fault = await self._fault(exchange, "pod")
        if fault is None or fault.lost_answer:
            exchange.reached = True
            answer = await trainer.handle(exchange, path, request.headers.get("Accept", ""))
            if fault is None:
                return answer
        return await self._go_wrong(request, fault)

    async def _fault(
        self, exchange: Exchange, stage: Literal["gateway", "pod", "control_plane"]
    ) -> Fault | None:
        delay, fault = self.faults.strike(exchange, stage)
        if delay:
            await asyncio.sleep(delay)
        return fault

    async def _go_wrong(self, request: web.Request, fault: Fault) -> Answer:
        if fault.hang:
            await _for_ever()
        if fault.drop or fault.answer is None:
            await _drop(request)
        assert fault.answer is not None
        return fault.answer

    # -- the control plane ---------------------------------------------------------------------

    async def _ask(self, request: web.Request, exchange: Exchange) -> Answer | web.StreamResponse:
        plane = self.control_plane
        plane.questions += 1
        fault = await self._fault(exchange, "control_plane")
        if plane.delay:
            await asyncio.sleep(plane.delay)
        if fault is not None:
            return await self._go_wrong(request, fault)
        job = exchange.job or ""
        mode = plane.modes.get(job, plane.mode)
        if mode in _REFUSALS:
            return _REFUSALS[mode]
        if mode == "hang":
            await _for_ever()
        if mode == "drop":
            await _drop(request)
        if mode == "slow_drip":
            return await self._drip(request, exchange)
        if exchange.method != "GET":
            return _error(405, "METHOD_NOT_ALLOWED", "method not allowed")
        if not job:
            return Answer(200, {"accounts": [{"name": f"accounts/{self.account}"}]})
        known = job in self.trainers or job in plane.states
        if not known or f"/accounts/{self.account}/" not in request.path:
            return _REFUSALS["missing"]
        name = f"accounts/{self.account}/rlorTrainerJobs/{job}"
        return Answer(200, {"name": name, "state": plane.states.get(job, plane.state)})

    async def _drip(self, request: web.Request, exchange: Exchange) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        exchange.status = response.status
        await response.prepare(request)
        try:
            while True:
                await response.write(b" ")
                await asyncio.sleep(_DRIP_SECONDS)
        except ConnectionError:
            return response


def _as_response(answer: Answer) -> web.Response:
    headers: dict[str, Any] = {"Content-Type": answer.content_type, **answer.headers}
    return web.Response(status=answer.status, body=answer.content, headers=headers)


async def _for_ever() -> Never:
    # The server cancels a handler whose connection is gone, and closes all of them to stop.
    await asyncio.Event().wait()
    raise AssertionError


async def _drop(request: web.Request) -> Never:
    if request.transport is not None:
        request.transport.close()
    await _for_ever()
