"""Training programs as users of the Fireworks SDK write them, for every release of it.

The SDK brings its own tinker: up to 1.2.24 the package, pinned, from 1.2.25 on a renamed copy.
So nothing here imports tinker, and nothing knows of the shim.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

from tests.common import CANARY, collect

PATIENCE = 60.0
"""Seconds after which a result that does not come is taken for one that never will."""

API_KEY = f"fw_{CANARY}"
"""Of Fireworks' kind: the SDK sends it in headers of its own. tinker's begin with ``tml-``."""

BASE_MODEL = "accounts/lab/models/base"


def sdk() -> Any:
    return importlib.import_module("fireworks.training.sdk")


def types() -> Any:
    """Of tinker, or of the SDK's own copy."""
    vendored = importlib.util.find_spec("fireworks.training.sdk._core") is not None
    return importlib.import_module("fireworks.training.sdk.types" if vendored else "tinker.types")


def connect(url: str, lora_rank: int = 0) -> Any:
    """A training client; rank 0 trains all parameters."""
    service = sdk().FiretitanServiceClient(base_url=url, api_key=API_KEY)
    client = service.create_training_client(base_model=BASE_MODEL, lora_rank=lora_rank)
    collect()
    return client


def data(count: int = 2) -> list[Any]:
    known = types()
    datum = known.Datum(
        model_input=known.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={
            "target_tokens": known.TensorData(data=[1, 2, 3], dtype="int64", shape=[3]),
            "weights": known.TensorData(data=[1.0] * 3, dtype="float32", shape=[3]),
        },
    )
    return [datum] * count


def forward_backward(client: Any, count: int = 2) -> Any:
    return client.forward_backward(data(count), "cross_entropy")


def optim_step(client: Any) -> Any:
    return client.optim_step(types().AdamParams(learning_rate=1e-4))


def train(client: Any, steps: int = 1) -> None:
    for _ in range(steps):
        forward_backward(client).result(PATIENCE)
        optim_step(client).result(PATIENCE)


def save(client: Any) -> None:
    client.save_state("step-1").result(PATIENCE)


# --- The control plane's client ----------------------------------------------------------


def manager(control_plane: str, **more: Any) -> Any:
    return sdk().TrainerJobManager(api_key=API_KEY, base_url=control_plane, **more)


def has_split_gateway() -> bool:
    """Whether the release knows of gateways with an address of their own (1.2.25)."""
    return "trainer_gateway_url" in inspect.signature(sdk().TrainerJobManager).parameters


# --- What to expect ----------------------------------------------------------------------


def gateway_404(error: BaseException) -> BaseException:
    """The gateway's 404 in an error's chain."""
    link: BaseException | None = error
    while link is not None:
        if b"Trainer job not found" in getattr(getattr(link, "response", None), "content", b""):
            return link
        link = link.__cause__
    raise AssertionError(f"no 404 in the chain of {error!r}")
