"""The trainer pod: speaks what every release of the SDK needs, and computes nothing.

It carries out whatever reaches it, in order of arrival and without deduplicating, and writes it
down: a request that a client sends twice is trained twice, and the ledger shows it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tinker_routefix.lab import _wire
from tinker_routefix.lab._faults import Answer, Exchange
from tinker_routefix.lab._ledger import Execution, Ledger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping

API: Final = "/api/v1/"
_FAR_AWAY: Final = 10**9  # seconds until a token expires


def _not_found(what: str) -> Answer:
    return Answer(404, {"detail": what})


class _Refusal(Exception):  # noqa: N818 - it carries an answer, it is not a failure of the lab
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass
class Settings:
    """What all trainers of a lab have in common."""

    work_seconds: float = 0.0
    """How long an operation takes."""
    poll_seconds: float = 2.0
    """How long a poll waits for a result before it is told to try again."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the answers to client/config and client/dynamic_config."""
    without: Collection[str] = ()
    """Kinds of requests that the server is too old to know."""


@dataclass(frozen=True)
class _Call:
    said: dict[str, Any]
    parameters: tuple[str, ...]
    protobuf: bool
    """Whether protobuf was asked for."""


@dataclass
class _Model:
    model_id: str
    session_id: str | None
    base_model: str
    rank: int


@dataclass(frozen=True)
class _Checkpoint:
    path: str
    kind: str
    model: _Model
    made: str


@dataclass(frozen=True)
class _Sampler:
    sampler_id: str
    base_model: str
    model_path: str | None


@dataclass
class _Future:
    request_id: str
    kind: str
    result: Callable[[], dict[str, Any]]
    as_protobuf: Callable[[], bytes] | None
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Completions:
    """What of a sampling session has finished, for ``retrieve_futures``."""

    request_ids: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, request_id: str) -> None:
        self.request_ids.append(request_id)
        self.news.set()
        self.news = asyncio.Event()


class Trainer:
    """One trainer job. Lives on the event loop of the server."""

    def __init__(self, job: str, settings: Settings, clock: Callable[[], float]) -> None:
        self.job = job
        self.ledger = Ledger()
        self._settings = settings
        self._clock = clock
        self._sessions: dict[str, dict[str, Any]] = {}
        self._models: dict[str, _Model] = {}
        self._samplers: dict[str, _Sampler] = {}
        self._joined: dict[str, int] = {}
        self._checkpoints: dict[str, _Checkpoint] = {}
        self._futures: dict[str, _Future] = {}
        self._completions: dict[tuple[str, int], _Completions] = {}
        self._busy_until: dict[Hashable, float] = {}
        self._numbers: dict[str, int] = {}

    def forget(self) -> None:
        """Lose all but the checkpoints, as a restarted pod does."""
        for memory in (self._sessions, self._models, self._samplers, self._futures):
            memory.clear()

    def kind_of(self, request_id: object) -> str | None:
        """Return the kind of the operation that a future belongs to."""
        future = self._futures.get(str(request_id))
        return future.kind if future else None

    async def handle(self, exchange: Exchange, path: str, accept: str) -> Answer:
        """Carry out a request; ``path`` is the one that the pod sees."""
        route, parameters = find_route(exchange.method, path)
        if route is None or exchange.kind in self._settings.without:
            return _not_found("Not Found")
        if route.method != exchange.method:
            return Answer(405, {"detail": "Method Not Allowed"})
        unreadable = Answer(422, {"detail": [{"type": "missing", "loc": ["body"]}]})
        if exchange.said is None:
            return unreadable
        call = _Call(exchange.said, parameters, _wire.PROTOBUF in accept)
        try:
            return await route.handler(self, call)
        except _Refusal as refusal:
            return refusal.answer
        except (AttributeError, KeyError, TypeError, ValueError):
            # The body is JSON, but not the request that the endpoint takes.
            return unreadable

    # -- bookkeeping ---------------------------------------------------------------------------

    def _number(self, what: str) -> int:
        self._numbers[what] = self._numbers.get(what, -1) + 1
        return self._numbers[what]

    def _record(self, kind: str, **about: Any) -> None:
        self.ledger.record(Execution(at=self._clock(), kind=kind, job=self.job, **about))

    def _submit(
        self,
        kind: str,
        call: _Call,
        result: Callable[[], dict[str, Any]],
        *,
        model_id: str | None,
        as_protobuf: Callable[[], bytes] | None = None,
        queue: Hashable = None,
        datums: int = 0,
        once: Hashable = None,
    ) -> _Future:
        request_id = f"{self.job}-future-{self._number('future')}"
        future = _Future(request_id, kind, result, as_protobuf)
        self._futures[request_id] = future
        self._record(
            kind,
            model_id=model_id,
            seq_id=call.said.get("seq_id"),
            request_id=request_id,
            datums=datums,
            once=once,
        )
        self._work(future, queue)
        return future

    def _work(self, future: _Future, queue: Hashable) -> None:
        loop = asyncio.get_running_loop()
        if not self._settings.work_seconds:
            future.done.set()
            return
        begin = loop.time()
        if queue is not None:
            begin = max(begin, self._busy_until.get(queue, 0.0))
        end = begin + self._settings.work_seconds
        if queue is not None:
            self._busy_until[queue] = end
        loop.call_at(end, future.done.set)

    def _model(self, model_id: str) -> _Model:
        if model_id not in self._models:
            raise _Refusal(_not_found("Model not found"))
        return self._models[model_id]

    def _session(self, session_id: str) -> dict[str, Any]:
        if session_id not in self._sessions:
            raise _Refusal(_not_found("Session not found"))
        return self._sessions[session_id]

    def _checkpoint(self, path: str) -> _Checkpoint:
        if path not in self._checkpoints:
            raise _Refusal(_not_found("Checkpoint not found"))
        return self._checkpoints[path]

    # -- service -------------------------------------------------------------------------------

    async def healthz(self, _call: _Call) -> Answer:
        return Answer(200, {"status": "ok"})

    async def config(self, _call: _Call) -> Answer:
        return Answer(200, {"pjwt_auth_enabled": False, **self._settings.config})

    async def dynamic_config(self, _call: _Call) -> Answer:
        return Answer(200, {"refresh_interval_sec": 300, **self._settings.config})

    async def auth_token(self, _call: _Call) -> Answer:
        now = int(time.time())
        claims = {"sub": "lab", "iat": now, "exp": now + _FAR_AWAY}
        parts = [{"alg": "none", "typ": "JWT"}, claims, {"lab": True}]
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in parts]
        return Answer(200, {"jwt": b".".join(part.rstrip(b"=") for part in encoded).decode()})

    async def capabilities(self, _call: _Call) -> Answer:
        model = {"model_name": "lab/base", "max_context_length": 32768}
        return Answer(200, {"supported_models": [model]})

    async def telemetry(self, _call: _Call) -> Answer:
        return Answer(200, {"status": "accepted"})

    async def create_session(self, call: _Call) -> Answer:
        session_id = f"{self.job}-session-{self._number('session')}"
        self._sessions[session_id] = call.said
        self._record("create_session")
        return Answer(200, {"type": "create_session", "session_id": session_id})

    async def heartbeat(self, call: _Call) -> Answer:
        self._session(call.said["session_id"])
        return Answer(200, {"type": "session_heartbeat"})

    async def accept(self, _call: _Call) -> Answer:
        return Answer(200, {})

    # -- training ------------------------------------------------------------------------------

    async def create_model(self, call: _Call) -> Answer:
        lora = call.said.get("lora_config") or {}
        model = self._new_model(call.said, call.said["base_model"], lora.get("rank", 32))
        return self._training(
            "create_model",
            call,
            model,
            {"type": "create_model", "model_id": model.model_id},
            once=("create_model", model.model_id),
        )

    def _new_model(self, said: dict[str, Any], base_model: str, rank: int) -> _Model:
        session_id = said.get("session_id")
        if session_id is not None:
            self._session(session_id)
        seq = said.get("model_seq_id")
        # Clients derive the same name, so that a model can be addressed before it is there.
        model_id = f"{session_id}:train:{self._number('model') if seq is None else seq}"
        model = _Model(model_id, session_id, base_model, rank)
        self._models[model_id] = model
        return model

    def _training(
        self,
        kind: str,
        call: _Call,
        model: _Model,
        result: dict[str, Any],
        once: Hashable = None,
    ) -> Answer:
        future = self._submit(
            kind,
            call,
            lambda: result,
            model_id=model.model_id,
            queue=model.model_id,
            once=once,
        )
        return Answer(200, {"request_id": future.request_id, "model_id": model.model_id})

    async def forward(self, call: _Call) -> Answer:
        return self._pass("forward", call)

    async def forward_backward(self, call: _Call) -> Answer:
        return self._pass("forward" if call.said.get("forward_only") else "forward_backward", call)

    def _pass(self, kind: str, call: _Call) -> Answer:
        model = self._model(call.said["model_id"])
        shapes = _wire.datum_shapes(call.said)
        future = self._submit(
            kind,
            call,
            partial(_wire.forward_backward_json, shapes),
            as_protobuf=partial(_wire.forward_backward_proto, shapes),
            model_id=model.model_id,
            queue=model.model_id,
            datums=len(shapes),
        )
        return Answer(200, {"request_id": future.request_id, "model_id": model.model_id})

    async def optim_step(self, call: _Call) -> Answer:
        model = self._model(call.said["model_id"])
        return self._training("optim_step", call, model, {"type": "optim_step"})

    async def get_info(self, call: _Call) -> Answer:
        model = self._model(call.said["model_id"])
        return Answer(
            200,
            {
                "type": "get_info",
                "model_data": {"arch": "lab", "model_name": model.base_model},
                "model_id": model.model_id,
                "model_name": model.base_model,
                "is_lora": True,
                "lora_rank": model.rank,
            },
        )

    async def unload(self, call: _Call) -> Answer:
        model = self._model(call.said["model_id"])
        result = {"type": "unload_model", "model_id": model.model_id}
        return self._training("unload_model", call, model, result)

    # -- checkpoints ---------------------------------------------------------------------------

    def _save(self, call: _Call, folder: str, kind: str) -> tuple[_Model, str]:
        model = self._model(call.said["model_id"])
        name = call.said.get("path") or f"{folder}-{call.said.get('seq_id')}"
        path = f"tinker://{model.model_id}/{folder}/{name}"
        made = datetime.now(UTC).isoformat()
        self._checkpoints[path] = _Checkpoint(path, kind, model, made)
        return model, path

    async def save(self, call: _Call) -> Answer:
        model, path = self._save(call, "weights", "training")
        return self._training("save", call, model, {"type": "save_weights", "path": path})

    async def save_external(self, call: _Call) -> Answer:
        model, path = self._save(call, "external_weights", "external")
        result = {"type": "save_weights_external", "path": path}
        return self._training("save_external", call, model, result)

    async def save_sampler(self, call: _Call) -> Answer:
        model, path = self._save(call, "sampler_weights", "sampler")
        result = {"type": "save_weights_for_sampler"}
        if call.said.get("path") is None:
            sampler_id = self._sampler(
                model.session_id, call.said.get("sampling_session_seq_id"), model.base_model, path
            )
            result["sampling_session_id"] = sampler_id
        else:
            result["path"] = path
        return self._training("save_sampler", call, model, result)

    async def load(self, call: _Call) -> Answer:
        saved = self._checkpoint(call.said["path"]).model
        once = None
        if call.said.get("model_id") is None:
            base_model = call.said.get("base_model") or saved.base_model
            model = self._new_model(call.said, base_model, saved.rank)
            once = ("load", model.model_id)
        else:
            model = self._model(call.said["model_id"])
        result = {"type": "load_weights", "path": call.said["path"]}
        return self._training("load", call, model, result, once=once)

    async def weights_info(self, call: _Call) -> Answer:
        model = self._checkpoint(call.said["tinker_path"]).model
        about = {"base_model": model.base_model, "is_lora": True, "lora_rank": model.rank}
        return Answer(200, about)

    # -- futures -------------------------------------------------------------------------------

    async def poll(self, call: _Call) -> Answer:
        future = self._futures.get(call.said["request_id"])
        if future is None:
            return _not_found("Future not found")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.poll_seconds):
                await future.done.wait()
        if not future.done.is_set():
            return Answer(
                408,
                {
                    "type": "try_again",
                    "request_id": future.request_id,
                    "queue_state": "active",
                },
            )
        self.ledger.record_retrieval(future.request_id)
        if call.protobuf and future.as_protobuf is not None:
            return Answer(200, future.as_protobuf(), _wire.PROTOBUF)
        return Answer(200, future.result())

    async def polls(self, call: _Call) -> Answer:
        target = call.said["target"]
        key = target["sampling_session_id"], target.get("cloned_sampler_id", 0)
        seen = call.said.get("prev_cursor", 0)
        completions = self._completions.setdefault(key, _Completions())
        asked = call.said.get("timeout")
        longest = self._settings.poll_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest if asked is None else min(asked, longest)):
                while len(completions.request_ids) <= seen:
                    await completions.news.wait()
        finished = completions.request_ids[seen:]
        return Answer(
            200,
            {
                "completions": [{"state": "finished", "request_id": one} for one in finished],
                "cursor": len(completions.request_ids),
            },
        )

    # -- sampling ------------------------------------------------------------------------------

    def _sampler(
        self, session_id: str | None, seq: int | None, base_model: str, path: str | None
    ) -> str:
        number = self._number("sampler") if seq is None else seq
        sampler_id = f"{session_id}:sample:{number}"
        self._samplers[sampler_id] = _Sampler(sampler_id, base_model, path)
        return sampler_id

    async def sampling_session(self, call: _Call) -> Answer:
        session_id = call.said["session_id"]
        self._session(session_id)
        path = call.said.get("model_path")
        base_model = call.said.get("base_model")
        if path is not None:
            base_model = self._checkpoint(path).model.base_model
        sampler_id = self._sampler(
            session_id, call.said.get("sampling_session_seq_id"), base_model or "lab/base", path
        )
        self._record("sampling_session", model_id=sampler_id, once=("sampling_session", sampler_id))
        return Answer(200, {"type": "create_sampling_session", "sampling_session_id": sampler_id})

    async def join_sampling_session(self, call: _Call) -> Answer:
        sampler_id = call.said["sampling_session_id"]
        self._joined[sampler_id] = self._joined.get(sampler_id, 0) + 1
        return Answer(
            200, {"type": "join_sampling_session", "client_counter": self._joined[sampler_id]}
        )

    async def sampler(self, call: _Call) -> Answer:
        sampler = self._samplers.get(call.parameters[0])
        if sampler is None:
            return _not_found("Sampler not found")
        return Answer(
            200,
            {
                "sampler_id": sampler.sampler_id,
                "base_model": sampler.base_model,
                "model_path": sampler.model_path,
            },
        )

    async def sample(self, call: _Call) -> Answer:
        sampler_id = call.said.get("sampling_session_id")
        if sampler_id is not None and sampler_id not in self._samplers:
            return _not_found("Sampling session not found")
        wanted = call.said.get("num_samples", 1)
        length = call.said["sampling_params"].get("max_tokens") or 8
        sequences = [list(range(1, length + 1)) for _ in range(wanted)]
        prompt = _wire.prompt_length(call.said["prompt"]) if call.said.get("prompt_logprobs") else 0
        future = self._submit(
            "sample",
            call,
            partial(_wire.sample_json, sequences, prompt or None),
            as_protobuf=partial(_wire.sample_proto, sequences, prompt or None),
            model_id=sampler_id,
            datums=wanted,
        )
        if sampler_id is not None:
            self._announce(future, sampler_id, call.said.get("seq_id") or 0)
        return Answer(
            200,
            {
                "request_id": future.request_id,
                "sample_sequence_ids": [f"{future.request_id}-{one}" for one in range(wanted)],
            },
        )

    def _announce(self, future: _Future, sampler_id: str, seq_id: int) -> None:
        # Clones of a sampling client number their requests in blocks of 10**9.
        completions = self._completions.setdefault((sampler_id, seq_id // 10**9), _Completions())
        if future.done.is_set():
            completions.add(future.request_id)
        else:
            delay = self._settings.work_seconds
            asyncio.get_running_loop().call_later(delay, completions.add, future.request_id)

    # -- listings ------------------------------------------------------------------------------

    def _as_run(self, model: _Model) -> dict[str, Any]:
        return {
            "training_run_id": model.model_id,
            "base_model": model.base_model,
            "model_owner": "lab",
            "is_lora": True,
            "lora_rank": model.rank,
            "last_request_time": datetime.now(UTC).isoformat(),
        }

    def _listing(self, name: str, items: list[Any]) -> Answer:
        cursor = {"offset": 0, "limit": len(items), "total_count": len(items)}
        return Answer(200, {name: items, "cursor": cursor})

    async def training_runs(self, _call: _Call) -> Answer:
        return self._listing("training_runs", [self._as_run(m) for m in self._models.values()])

    async def training_run(self, call: _Call) -> Answer:
        return Answer(200, self._as_run(self._model(call.parameters[0])))

    async def checkpoints(self, call: _Call) -> Answer:
        if call.parameters:
            self._model(call.parameters[0])
        found = [
            {
                "checkpoint_id": saved.path.removeprefix(f"tinker://{saved.model.model_id}/"),
                "checkpoint_type": saved.kind,
                "time": saved.made,
                "tinker_path": saved.path,
                "size_bytes": 1,
            }
            for saved in self._checkpoints.values()
            if not call.parameters or saved.model.model_id == call.parameters[0]
        ]
        return self._listing("checkpoints", found)

    async def checkpoint_names(self, _call: _Call) -> Answer:
        # Of the Fireworks SDK's own; plain tinker does not ask for it.
        saved = [one.path for one in self._checkpoints.values() if one.kind == "training"]
        return Answer(200, {"checkpoints": sorted(path.rpartition("/")[2] for path in saved)})

    async def delete_checkpoint(self, call: _Call) -> Answer:
        path = "tinker://{}/{}".format(*call.parameters)
        self._checkpoint(path)
        del self._checkpoints[path]
        return Answer(200, {})

    async def sessions(self, _call: _Call) -> Answer:
        return self._listing("sessions", list(self._sessions))

    async def session(self, call: _Call) -> Answer:
        session_id = call.parameters[0]
        self._session(session_id)
        prefix = f"{session_id}:"
        return Answer(
            200,
            {
                "training_run_ids": [one for one in self._models if one.startswith(prefix)],
                "sampler_ids": [one for one in self._samplers if one.startswith(prefix)],
            },
        )


@dataclass(frozen=True)
class Route:
    """An endpoint of the trainer."""

    method: str
    pattern: re.Pattern[str]
    kind: str
    handler: Callable[[Trainer, _Call], Awaitable[Answer]]


def _route(
    method: str, path: str, kind: str, handler: Callable[[Trainer, _Call], Awaitable[Answer]]
) -> Route:
    # {} stands for one segment of a path, {*} for any number of them.
    pattern = re.escape(path).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^/]+)")
    return Route(method, re.compile(pattern), kind, handler)


# The first pattern that fits names the request; among the routes with that pattern the method
# decides.
ROUTES: Final = (
    _route("GET", "healthz", "healthz", Trainer.healthz),
    _route("POST", "client/config", "config", Trainer.config),
    _route("POST", "client/dynamic_config", "dynamic_config", Trainer.dynamic_config),
    _route("POST", "auth/token", "auth_token", Trainer.auth_token),
    _route("GET", "get_server_capabilities", "capabilities", Trainer.capabilities),
    _route("POST", "telemetry", "telemetry", Trainer.telemetry),
    _route("POST", "create_session", "create_session", Trainer.create_session),
    _route("POST", "session_heartbeat", "heartbeat", Trainer.heartbeat),
    _route("POST", "create_model", "create_model", Trainer.create_model),
    _route("POST", "get_info", "get_info", Trainer.get_info),
    _route("POST", "forward", "forward", Trainer.forward),
    _route("POST", "forward_backward", "forward_backward", Trainer.forward_backward),
    _route("POST", "optim_step", "optim_step", Trainer.optim_step),
    _route("POST", "save_weights", "save", Trainer.save),
    _route("POST", "save_weights_for_sampler", "save_sampler", Trainer.save_sampler),
    _route("POST", "save_weights_external", "save_external", Trainer.save_external),
    _route("POST", "load_weights", "load", Trainer.load),
    _route("POST", "create_sampling_session", "sampling_session", Trainer.sampling_session),
    _route("POST", "join_sampling_session", "join_sampling_session", Trainer.join_sampling_session),
    _route("POST", "asample", "sample", Trainer.sample),
    _route("POST", "retrieve_future", "poll", Trainer.poll),
    _route("POST", "retrieve_futures", "polls", Trainer.polls),
    _route("POST", "cancel_future", "cancel", Trainer.accept),
    _route("GET", "training_runs/{}/checkpoints", "checkpoints", Trainer.checkpoints),
    _route("POST", "training_runs/{}/checkpoints/{*}/publish", "checkpoints", Trainer.accept),
    _route("DELETE", "training_runs/{}/checkpoints/{*}/publish", "checkpoints", Trainer.accept),
    _route("PUT", "training_runs/{}/checkpoints/{*}/ttl", "checkpoints", Trainer.accept),
    _route("DELETE", "training_runs/{}/checkpoints/{*}", "checkpoints", Trainer.delete_checkpoint),
    _route("GET", "list_checkpoints", "checkpoints", Trainer.checkpoint_names),
    _route("GET", "training_runs", "other", Trainer.training_runs),
    _route("GET", "training_runs/{}", "other", Trainer.training_run),
    _route("GET", "checkpoints", "other", Trainer.checkpoints),
    _route("GET", "sessions", "other", Trainer.sessions),
    _route("GET", "sessions/{}", "other", Trainer.session),
    _route("POST", "sessions/{}/finish", "other", Trainer.accept),
    _route("PUT", "sessions/{}/project", "other", Trainer.accept),
    _route("GET", "samplers/{}", "other", Trainer.sampler),
    _route("POST", "weights_info", "other", Trainer.weights_info),
    _route("POST", "unload_model", "other", Trainer.unload),
)

KINDS: Final = frozenset(route.kind for route in ROUTES) | {"control_plane", "other"}
"""Every name that a request can have, with healthz."""


def find_route(method: str, path: str) -> tuple[Route | None, tuple[str, ...]]:
    """Find the endpoint at a path of the pod, and what the path names.

    Where no method fits, the route is one with another method.
    """
    if not path.startswith(API):
        return None, ()
    rest = path.removeprefix(API)
    found: tuple[Route | None, tuple[str, ...]] = None, ()
    for route in ROUTES:
        if match := route.pattern.fullmatch(rest):
            if route.method == method:
                return route, match.groups()
            found = route, match.groups()
    return found


def kind_of_request(method: str, path: str, said: Mapping[str, Any] | None) -> str:
    """Name a request; ``path`` is the one that the pod sees."""
    route, _ = find_route(method, path)
    kind = route.kind if route else "other"
    # In newer releases a forward pass is a forward_backward that says so in its body.
    if kind == "forward_backward" and said and said.get("forward_only"):
        return "forward"
    return kind
