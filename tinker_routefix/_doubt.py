"""A request whose 404 does not tell whose it is: sent over a connection that answers probes."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from . import _log, _probes, _settings, _verdict, events
from ._answers import Kind

if TYPE_CHECKING:
    from ._call import Call
    from ._replay import Replay


class Doubt:
    """What has been found out of the 404 of a request.

    Args:
        call: The request.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.refused_at = time.monotonic()
        self.is_the_pods = False
        """The 404 has turned out to be an answer of the pod's."""
        self._cannot_probe = False

    @property
    def can_be_settled(self) -> bool:
        """Whether there is something to find out: not where probes are refused as well."""
        return not self._cannot_probe and self.call.route.probe_refused_at <= self.refused_at

    async def send(self, replay: Replay) -> Any:
        """Send it over a connection that answers probes, three times at most.

        Args:
            replay: Counts each time it is sent.

        Raises:
            Exception: The request's 404: the pod's, or the gateway's where it refused the probe.
        """
        pooled = self.call.pooled
        async with contextlib.AsyncExitStack() as stack:
            try:
                send = await stack.enter_async_context(_probes.one_connection(pooled))
            except Exception as failure:  # noqa: BLE001 - then the program's 404 is waited with
                strict = _settings.current().strict
                _log.own_failure("opening a connection", failure, strict=strict)
                self._cannot_probe = True
                raise replay.error from None
            trial = _Trial(self, send, replay)
            believed = await _verdict.is_the_pods(
                trial.is_probe_answered, trial.is_refused, self.call.route.waiters.sleep
            )
        if trial.answered:
            # Exception -> traceback -> frame -> trial: a cycle, with the batch.
            trial.last.__traceback__ = None
            return trial.answer
        # The program's own client may have sent each over another connection.
        self.is_the_pods = believed and not pooled.pool.has_own_http
        raise trial.last


class _Trial:
    """What came back over one such connection."""

    def __init__(self, doubt: Doubt, send: _probes.Send, replay: Replay) -> None:
        self.answered = False
        self.answer: Any = None
        self.last = replay.error
        self._doubt = doubt
        self._call = doubt.call
        self._send = send
        self._replay = replay

    async def is_probe_answered(self) -> bool:
        """Send a probe."""
        route = self._call.route
        if not await _probes.is_answered(route, self._send):
            route.probe_refused_at = time.monotonic()
            return False
        route.publish(events.ProbesSent, number=1)
        return True

    async def is_refused(self) -> bool:
        """Send the request; whether its 404 is again one that does not tell."""
        self._replay.count()
        try:
            self.answer = await self._send(self._call.send_with)
        except BaseException as error:
            kind = self._call.record(error)
            if not (isinstance(error, Exception) and kind.is_refusal):
                raise
            self.last = error
        else:
            self.answered = True
            return False
        self._replay.wait.waits = True
        self._doubt.refused_at = time.monotonic()
        return kind is Kind.UNKNOWN_404 and self._call.uncertain() is None
