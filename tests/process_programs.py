"""What the recipes in ``docs/processes.md`` call ``work``: a program's own code, using tinker.

It is copied beside each recipe, so it imports nothing of the tests and does not know the shim.
The gateway's address and the key are in the environment.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import tinker
from tinker import types

logging.basicConfig(level=os.environ.get("LEVEL", "WARNING"))

MODEL = "lab/base"
PATIENCE = 60.0
"""Seconds; for a result that never comes."""


def batch() -> list[types.Datum]:
    """The smallest one there is."""
    tokens = types.TensorData(data=[1, 2, 3], dtype="int64", shape=[3])
    weights = types.TensorData(data=[1.0, 1.0, 1.0], dtype="float32", shape=[3])
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": tokens, "weights": weights},
        )
    ]


def train() -> None:
    """One step on a model of its own."""
    service: Any = tinker.ServiceClient()
    client = service.create_lora_training_client(base_model=MODEL, rank=8)
    client.forward_backward(batch(), "cross_entropy").result(PATIENCE)
    client.optim_step(types.AdamParams(learning_rate=1e-4)).result(PATIENCE)


async def train_async() -> None:
    """The same on the caller's event loop."""
    service: Any = tinker.ServiceClient()
    client = await service.create_lora_training_client_async(base_model=MODEL, rank=8)
    gradient = await client.forward_backward_async(batch(), "cross_entropy")
    await gradient.result_async(PATIENCE)
    step = await client.optim_step_async(types.AdamParams(learning_rate=1e-4))
    await step.result_async(PATIENCE)


def make_sampler() -> Any:
    """A sampling client of a base model."""
    service: Any = tinker.ServiceClient()
    return service.create_sampling_client(base_model=MODEL)


def sample(sampler: Any) -> int:
    """How many sequences came back."""
    params = types.SamplingParams(max_tokens=4)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    answer = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)
    return len(answer.result(PATIENCE).sequences)
