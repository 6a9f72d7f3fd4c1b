"""Training programs as people write them, for every release of tinker, and what to expect.

The programs do not know of the shim: the same ones run with it and without.
"""

from __future__ import annotations

import inspect
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tinker
from tinker import types
from tinker.lib.public_interfaces import training_client

import tinker_routefix
from tests.common import CANARY as CANARY
from tests.common import collect
from tests.common import exact as exact
from tests.common import notes as notes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tinker_routefix._route import Route
    from tinker_routefix.lab import Lab

PATIENCE = 120.0
"""Seconds after which a result that does not come is taken for one that never will."""


def settled(value: Any) -> Any:
    """The value itself, or what a future of it holds: 0.38 returns futures of its clients."""
    result = getattr(value, "result", None)
    return value if result is None else result(PATIENCE)


def datum(length: int = 3) -> types.Datum:
    tokens = list(range(1, length + 1))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens, dtype="int64", shape=[length]),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
        },
    )


def service(url: str) -> Any:
    return tinker.ServiceClient(base_url=url)


def connect(url: str) -> Any:
    """A training client."""
    client = settled(service(url).create_lora_training_client(base_model="lab/base", rank=8))
    collect()
    return client


def forward_backward(client: Any, data: list[types.Datum] | None = None) -> Any:
    return client.forward_backward(data or [datum(), datum()], "cross_entropy")


def optim_step(client: Any) -> Any:
    return client.optim_step(types.AdamParams(learning_rate=1e-4))


def train(client: Any, steps: int = 1) -> None:
    """One step after the other, each forward_backward waited for before its optim_step."""
    for _ in range(steps):
        forward_backward(client).result(PATIENCE)
        optim_step(client).result(PATIENCE)


def train_pipelined(client: Any, steps: int = 1) -> None:
    """Every step is submitted before the first result is waited for."""
    futures = []
    for _ in range(steps):
        futures += [forward_backward(client), optim_step(client)]
    for future in futures:
        future.result(PATIENCE)


def many_parts() -> list[types.Datum]:
    """A batch that every release splits into three submissions."""
    # Before 0.7.0 a submission holds 128 examples; from 0.25.0 on the server says how many.
    longest = getattr(training_client, "MAX_CHUNK_LEN", 1024)
    return [datum(1) for _ in range(2 * longest + 2)]


def save(client: Any, name: str) -> Any:
    return client.save_state(name).result(PATIENCE)


def load(client: Any, path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return client.load_state(path).result(PATIENCE)


def sampler(client: Any) -> Any:
    save = client.save_weights_and_get_sampling_client
    # Before 0.3.0 the weights have to have a name; later one has no effect, then a warning.
    named = inspect.signature(save).parameters["name"].default is inspect.Parameter.empty
    return settled(save("sampler") if named else save())


def base_sampler(url: str) -> Any:
    """A sampling client of a base model: without a model of its own."""
    return settled(service(url).create_sampling_client(base_model="lab/base"))


def sample(client: Any) -> Any:
    prompt = types.ModelInput.from_ints([1, 2, 3])
    return client.sample(
        prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=4)
    ).result(PATIENCE)


def on_loop(client: Any, call: Callable[[Any], Any], pool: str = "TRAIN") -> Any:
    """Run one raw request of a client's on tinker's loop: `call(tinker's HTTP client)`."""
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    async def request() -> Any:
        with client.holder.aclient(ClientConnectionPoolType[pool]) as http:
            return await call(http)

    return client.holder.run_coroutine_threadsafe(request()).result(PATIENCE)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def gateway_404(error: BaseException) -> tinker.NotFoundError:
    """The gateway's 404 in an error's chain."""
    for link in chain(error):
        if isinstance(link, tinker.NotFoundError):
            assert b"Trainer job not found" in link.response.content
            return link
    raise AssertionError(f"no 404 in the chain of {error!r}")


def job_of(lab: Lab) -> tinker_routefix.JobStatus:
    """The shim's account of a lab's job."""
    (status,) = (job for job in tinker_routefix.status().jobs if lab.origin == job.gateway)
    return status


def route_of(lab: Lab) -> Route:
    """The shim's route to a lab's job: clients of earlier tests may still have theirs."""
    from tinker_routefix import _routes

    (route,) = (one for one in _routes.all_routes() if lab.origin == one.job.gateway)
    return route


@contextmanager
def took(least: float, most: float) -> Iterator[None]:
    """Bounds in seconds; generous ones, for a hang or a wait that never took place."""
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    assert least <= seconds <= most, f"took {seconds:.1f} s, expected {least} to {most}"
