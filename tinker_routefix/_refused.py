"""A request of the program that the gateway has refused, or may have: what is sent again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from . import (
    _answers,
    _connecting,
    _endpoints,
    _probes,
    _raised,
    _settings,
)
from ._answers import Kind
from ._doubt import Doubt
from ._prober import light_prober
from ._replay import Replay

if TYPE_CHECKING:
    from ._call import Call


class ReplayableRequest:
    """A refused request: the same body, the same ``seq_id``, the same idempotency key.

    Args:
        call: The request.
        error: Its 404.
        kind: Whose 404 it is.
    """

    def __init__(self, call: Call, error: Exception, kind: Kind) -> None:
        self.name = call.name
        self.headers = _answers.headers_of(error)
        self._call = call
        self._doubt = Doubt(call) if kind is Kind.UNKNOWN_404 else None
        self._keep_idempotency_key()

    def replay(self, error: Exception) -> Replay:
        """Its way through; not kept here, so that refcounting frees both."""
        call = self._call
        probe = light_prober(call.route, functools.partial(_probes.open_prober, call.pooled))
        return Replay(call.route, self, error, budget=call.budget, probe=probe)

    async def settle(self, replay: Replay) -> Any:
        """The request's answer in the end."""
        call = self._call
        try:
            answer = await self._answer(replay)
        except Exception as error:
            if self.is_refusal(error):
                _raised.remember(call.route, call.options, call.pooled.client)
            raise
        if call.path == _endpoints.WEIGHTS_INFO and call.budget is not None:
            _connecting.keep_for_model(call.pooled.pool, call.budget)
        return answer

    async def _answer(self, replay: Replay) -> Any:
        may_replay = self._call.budget is not None or _settings.current().max_replays > 0
        if self._doubt is not None and may_replay and self.uncertain() is None:
            # Whose it is: sent where probes are answered.
            await self._call.route.waiters.stagger()
            if self._doubt.can_be_settled:
                try:
                    answer = await self._doubt.send(replay)
                except Exception as error:
                    if not self.is_refusal(error):
                        raise
                    replay.error = error
                else:
                    replay.answered()
                    return answer
        return await replay.run()

    async def send_again(self, replay: Replay) -> Any:
        """Send it over a connection that has not refused."""
        if self._doubt is not None and self._doubt.can_be_settled:
            return await self._doubt.send(replay)
        pooled = await self._call.pooled.fresh()
        replay.count()
        try:
            return await pooled.send(self._call.send_with)
        except BaseException as error:
            kind = self._call.record(error)
            pooled.stale |= kind.is_refusal
            # The route has worked since the last one: it may be the pod's.
            if kind is Kind.UNKNOWN_404 and self._call.route.answered_at >= replay.wait.refused_at:
                self._doubt = Doubt(self._call)
            raise

    def is_refusal(self, error: BaseException) -> bool:
        """Whether an error is again a 404 that may be the gateway's."""
        if self._doubt is not None and self._doubt.is_the_pods:
            return False
        return _answers.kind_of(error, self._call.route.job).is_refusal

    def uncertain(self) -> str | None:
        """As :meth:`Call.uncertain`."""
        return self._call.uncertain()

    def _keep_idempotency_key(self) -> None:
        # tinker makes one up in every call of `request`; the first one's has to stay.
        name = getattr(self._call.pooled.client, "_idempotency_header", None)
        key = self.headers.get(name) if name else None
        options = self._call.options
        if key is not None and options.idempotency_key is None:
            options.idempotency_key = key
