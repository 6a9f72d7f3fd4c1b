"""What a client may wait for while it connects.

A service client (config, token, session) has a budget, and so has each training client (the
checkpoint's weights_info, model, warm-up). A budget belongs to its requests: it travels in their
context, and no other client makes it longer or shorter.
"""

from __future__ import annotations

import contextvars
import time
from typing import TYPE_CHECKING, Any

from . import _endpoints, _errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._clients import Pool

SAME_CLIENT_WITHIN = 5.0
"""Seconds between a checkpoint's ``weights_info`` and the model that is created from it."""


class ConnectBudget:
    """How long one client may wait for the route while it connects; runs from the first 404."""

    def __init__(self) -> None:
        self._began: float | None = None
        self.ended = False
        """Connecting has ended; what was started meanwhile and goes on is something else."""
        self.ahead: Any = None
        """What the SDK's side has opened for the warm-up meanwhile."""

    def start(self) -> None:
        """Note that a 404 was received."""
        if self._began is None:
            self._began = time.monotonic()

    def left(self, budget: float) -> float:
        """Seconds that are left of a budget."""
        return budget if self._began is None else budget - (time.monotonic() - self._began)

    @property
    def used(self) -> bool:
        """Whether a 404 was received."""
        return self._began is not None


_current: contextvars.ContextVar[ConnectBudget | None] = contextvars.ContextVar(
    "tinker_routefix_connecting", default=None
)


def connect_service(
    wrapped: Callable[..., None], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """``InternalClientHolder.__init__``: its config, token and session share a budget.

    What it runs on tinker's loop runs in a copy of this thread's context.
    """
    budget = ConnectBudget()
    token = _current.set(budget)
    try:
        wrapped(*args, **kwargs)
    except Exception as error:
        _errors.trim(error)
        raise
    finally:
        # It has started heartbeats, which go on in such a copy.
        budget.ended = True
        _current.reset(token)


def of_request(pool: Pool, path: str, options: Any) -> ConnectBudget | None:
    """What a request may wait for as a part of connecting; None where it is not a part of it."""
    budget = _running()
    if budget is not None or not _endpoints.creates_client(path, options):
        return budget
    before, pool.weights_info = pool.weights_info, None
    if before is not None and time.monotonic() - before[1] < SAME_CLIENT_WITHIN:
        budget = before[0]
    else:
        budget = ConnectBudget()
    # Left there: what creates the client goes on in this task with polls, and then ends.
    _current.set(budget)
    return budget


def of_new_model(request_type: str) -> ConnectBudget | None:
    """What the rest of creating a training client may wait for; None for all other futures."""
    budget = _running()
    if request_type == _endpoints.LOADS_WEIGHTS:
        # Sent as what creates a model, or it would not be here.
        return budget
    if request_type not in _endpoints.CREATES_MODEL:
        return None
    if budget is None:
        budget = ConnectBudget()
        _current.set(budget)
    return budget


def keep_for_model(pool: Pool, budget: ConnectBudget) -> None:
    """Note what is left of a client's budget, whose model is created next."""
    pool.weights_info = (budget, time.monotonic())


def _running() -> ConnectBudget | None:
    budget = _current.get()
    return None if budget is None or budget.ended else budget
