"""The future's seam: it names polls, and warms a new model's route up."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import TYPE_CHECKING, Any

from . import _connecting, _errors, _patching, _probes
from ._warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ._connecting import ConnectBudget
    from ._connections import PooledClient


class PollContext:
    """A future whose result is being polled for."""

    def __init__(self, request_type: str) -> None:
        self.request_type = request_type
        self.pooled: PooledClient | None = None
        """Over which it was polled last."""


# A context variable and not the task: some SDKs poll under `wait_for`, which is a task of its
# own before Python 3.12.
_polling: contextvars.ContextVar[PollContext | None] = contextvars.ContextVar(
    "tinker_routefix_polling", default=None
)


def polling() -> PollContext | None:
    """The future that the running code polls for."""
    return _polling.get()


async def await_result(
    wrapped: Callable[..., Coroutine[Any, Any, Any]],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``_APIFuture._result_async``: name its polls, and warm up before a model is returned."""
    context = PollContext(str(getattr(instance, "request_type", "")))
    token = _polling.set(context)
    budget = _connecting.of_new_model(context.request_type)
    try:
        try:
            result = await wrapped(*args, **kwargs)
        except Exception as error:
            _errors.carry_note(error)
            _errors.trim(error)
            raise
        finally:
            # None where nothing was polled on a trainer job's route. Not to be held any longer:
            # copies of this context stay in the loop with timers that were cancelled.
            pooled, context.pooled = context.pooled, None
            # A collected coroutine runs this in another context, where `reset` raises.
            with contextlib.suppress(ValueError):
                _polling.reset(token)
        if budget is not None and pooled is not None:
            await _warm_up(pooled, instance, result, budget)
        return result
    finally:
        # Also where the warm-up does not come.
        if budget is not None and budget.ahead is not None:
            budget.ahead.release()


async def _warm_up(pooled: PooledClient, instance: Any, result: Any, budget: ConnectBudget) -> None:
    route = pooled.pool.route
    future = getattr(instance, "untyped_future", None)
    model_id = getattr(result, "model_id", None) or getattr(future, "model_id", None)
    if isinstance(model_id, str):
        route.model_id = model_id
    _patching.verify()
    try:
        await warm_up(route, functools.partial(_probes.open_prober, pooled, budget.ahead), budget)
    except Exception as error:
        _errors.trim(error)
        raise
    finally:
        budget.ended = True
