"""One call of the SDK's ``request``: its arguments, and what they are a part of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _answers, _connecting, _endpoints, _futures, _patching, _submissions
from ._answers import Kind
from ._verdict import Fix

if TYPE_CHECKING:
    from ._connecting import ConnectBudget
    from ._connections import PooledClient


class Call:
    """One call of ``request``."""

    __slots__ = ("args", "budget", "kwargs", "options", "path", "polling", "pooled", "route")

    def __init__(self, pooled: PooledClient, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.pooled = pooled
        self.route = pooled.pool.route
        self.args = args
        self.kwargs = kwargs
        self.options: Any = kwargs.get("options", args[1] if len(args) > 1 else None)
        self.path = str(getattr(self.options, "url", ""))
        self.polling = _futures.polling()
        if self.polling is not None and self.path == _endpoints.POLL:
            self.polling.pooled = pooled
        self.budget: ConnectBudget | None = _connecting.of_request(
            pooled.pool, self.path, self.options
        )

    @property
    def name(self) -> str:
        """What it is called in events."""
        name = self.path.removeprefix(_endpoints.API)
        return name if self.polling is None else f"{name} ({self.polling.request_type})"

    async def send_with(self, client: Any) -> Any:
        """Send it, as it is."""
        return await client.request(*self.args, **self.kwargs)

    def uncertain(self) -> str | None:
        """How an earlier try ended that may have been carried out, if that matters here."""
        submission = _submissions.current()
        doubt = None if submission is None else submission.uncertain(self.path)
        if doubt is None and not _patching.follows_tries():
            doubt = "cannot be followed any more, since a wrapper of the shim was taken away"
        if doubt is None or _endpoints.may_be_repeated(self.options, self.pooled.client):
            return None
        return doubt

    def record(self, error: BaseException) -> Kind:
        """Note what a try of it was answered, where that is no 404 of the gateway."""
        kind = _answers.kind_of(error, self.route.job)
        submission = _submissions.current()
        if submission is not None and not kind.is_refusal:
            submission.record_try(self.path, error, self.route.job)
        if kind is Kind.NOT_READY:
            self.route.record_fix(Fix.ROUTE_NOT_READY)
        elif kind is Kind.ANSWER:
            # The route is there.
            self.route.mark_reachable(proof=False)
        return kind
