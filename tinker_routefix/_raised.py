"""Notice that the program submits once more what has just ended in a 404: a retry of its own.

Other parts of that step may have been carried out, and then they are now a second time.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from . import _endpoints, _log, _settings, events

if TYPE_CHECKING:
    from ._route import Route


class RaisedSteps:
    """Submissions whose 404 was raised to the program, to notice that it submits one again.

    Digests, so that no batch is kept alive; a few, and only for a while.
    """

    KEPT = 32
    FOR = 120.0
    """Seconds; retries around the SDK were seen to wait 30 s at most."""

    def __init__(self) -> None:
        self._raised: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._raised)

    def add(self, path: str, step: bytes | None) -> None:
        """Note a submission, by what it asks for but for its place in the order."""
        if step is not None:
            self._raised[path, _digest(step)] = time.monotonic()
            while len(self._raised) > self.KEPT:
                self._raised.popitem(last=False)

    def recently(self, path: str) -> bool:
        """Whether a submission to this path is among them, so that a closer look is worth it."""
        oldest = time.monotonic() - self.FOR
        for key in [key for key, at in self._raised.items() if at < oldest]:
            del self._raised[key]
        return any(raised == path for raised, _ in self._raised)

    def seconds_since(self, path: str, step: bytes | None) -> float | None:
        """How long ago this very submission was raised, each once; None: it was not."""
        at = None if step is None else self._raised.pop((path, _digest(step)), None)
        return None if at is None else time.monotonic() - at


def remember(route: Route, options: Any, client: Any) -> None:
    """Remember a submission whose 404 is raised to the program."""
    try:
        if not _endpoints.may_be_repeated(options, client):
            route.raised.add(str(options.url), _endpoints.step_of(options, client))
    except Exception as failure:  # noqa: BLE001 - the program gets its 404
        _log.own_failure("noting a 404", failure, strict=_settings.current().strict)


def warn_if_repeated(route: Route, options: Any, client: Any) -> None:
    """Say it where a submission is one that was raised."""
    path = str(options.url)
    if not route.raised.recently(path):
        return
    try:
        seconds = route.raised.seconds_since(path, _endpoints.step_of(options, client))
    except Exception as failure:  # noqa: BLE001 - a warning is not worth an error
        _log.own_failure("comparing a submission", failure, strict=_settings.current().strict)
        return
    if seconds is not None:
        request = path.removeprefix(_endpoints.API)
        events.publish(
            events.StepRepeated(
                job=str(route.job),
                gateway=route.job.gateway,
                request=request,
                seconds=round(seconds, 3),
            )
        )


def _digest(step: bytes) -> bytes:
    return hashlib.blake2b(step, digest_size=16).digest()
