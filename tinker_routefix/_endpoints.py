"""What a request asks for, read off its path and its body; and what may be sent again.

Found by what is there, never by a release's number.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from typing import Any, cast

import httpx

API = "/api/v1/"
TELEMETRY = API + "telemetry"
POLL = API + "retrieve_future"
HEARTBEAT = API + "session_heartbeat"
DYNAMIC_CONFIG = API + "client/dynamic_config"
WEIGHTS_INFO = API + "weights_info"
LOAD_WEIGHTS = API + "load_weights"
PASS_THROUGH = frozenset({HEARTBEAT, API + "cancel_future"})
"""Background calls that nobody waits for and that tinker repeats, or does without."""
FINISH = re.compile(rf"{API}sessions/[^/]+/finish")
CREATES = frozenset({LOAD_WEIGHTS, API + "create_model"})
"""Requests that a warm-up follows on."""
_CONNECTS = CREATES | {WEIGHTS_INFO, API + "create_sampling_session"}
"""Requests that create a client, so that there is nothing to lose by waiting (of
``load_weights`` only the one that creates a model)."""

CREATES_MODEL = frozenset({"CreateModel", "CreateBaseModel"})
"""Types of a future. The second is the Fireworks SDK's, for reference models."""
LOADS_WEIGHTS = "LoadWeights"
"""How 0.38 creates a training client from a checkpoint: without a ``CreateModel``."""

REPEATABLE = frozenset(
    {
        # Reads, and what only asks for something that goes on by itself.
        "client/config",
        "client/dynamic_config",
        "get_info",
        "get_server_capabilities",
        "healthz",
        "retrieve_future",
        "retrieve_futures",
        "sessions/search",
        "weights_info",
        "session_heartbeat",
        "telemetry",
        "cancel_future",
        # A second token, session, model or sampler is idle, but harmless.
        "auth/token",
        "create_session",
        "create_model",
        "create_base_model",
        "create_sampling_session",
        "join_sampling_session",
        # They change nothing in a model.
        "forward",
        "asample",
    }
)
"""Endpoints below ``/api/v1/`` that may be sent again where an earlier try may have been carried
out; every GET is one too. What is not listed changes something, or is not known here."""


def may_be_repeated(options: Any, client: Any) -> bool:
    """Whether a request may be sent again though an earlier try may have been carried out."""
    if str(options.method).lower() == "get":
        return True
    endpoint = str(options.url).removeprefix(API)
    if endpoint == "load_weights":
        return _creates_model(options)
    if endpoint == "forward_backward":
        message = _message(options, client)
        return message is not None and bool(message.forward_only)
    return endpoint in REPEATABLE


def creates_client(path: str, options: Any) -> bool:
    """Whether a request is what a client is created with."""
    return path in _CONNECTS and (path != LOAD_WEIGHTS or _creates_model(options))


def _creates_model(options: Any) -> bool:
    """Whether a ``load_weights`` makes a model of a checkpoint (0.24.1 and later)."""
    body = options.json_data
    return isinstance(body, dict) and body.get("model_seq_id") is not None


def step_of(options: Any, client: Any) -> bytes | None:
    """What a submission asks for, but for its place in the order; None: it cannot be told."""
    body = options.json_data
    if isinstance(body, dict):
        kept = {name: value for name, value in body.items() if not name.endswith("seq_id")}
        return json.dumps(kept, sort_keys=True, default=str).encode()
    message = _message(options, client)
    if message is None:
        return None
    message.ClearField("seq_id")
    return cast("bytes", message.SerializeToString(deterministic=True))


def _message(options: Any, client: Any) -> Any:
    """The message in a protobuf body, read by the SDK's own class; None for any other body."""
    body = options.json_data
    proto = sys.modules.get(f"{type(client).__module__.rpartition('.')[0]}.proto.tinker_public_pb2")
    if not isinstance(body, bytes) or proto is None:
        return None
    try:
        headers = httpx.Headers(options.headers or {})
        if headers.get("content-encoding") == "zstd":
            body = import_module("zstandard").ZstdDecompressor().decompressobj().decompress(body)
        message = proto.ForwardBackwardRequest()
        message.ParseFromString(body)
    except Exception:  # noqa: BLE001 - what cannot be read is nothing that may be repeated
        return None
    return message
