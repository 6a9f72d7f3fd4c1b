"""What the shim says: one logger, one line an event, never a key.

Events have fixed names and carry their fields in ``extra`` (``routefix_event``,
``routefix_job``, …), so that a log processor needs no parsing. A stampede of refused
requests must not become a stampede of lines, so an event can be limited in rate; what
was left out is counted in the next line.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
import warnings
from typing import Any

logger = logging.getLogger("tinker_routefix")
logger.addHandler(logging.NullHandler())


class RoutefixWarning(RuntimeWarning):
    """The shim cannot do what it was installed for, and has stepped aside."""


class RateLimit:
    """Lets an event of a given name through at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: dict[str, float] = {}
        self._skipped: dict[str, int] = {}

    def skipped(self, name: str) -> int | None:
        """How many events were left out before this one, or None to leave this one out too."""
        now = time.monotonic()
        if now - self._last.get(name, float("-inf")) < self._seconds:
            self._skipped[name] = self._skipped.get(name, 0) + 1
            return None
        self._last[name] = now
        return self._skipped.pop(name, 0)


def event(
    level: int, name: str, text: str, *, limit: RateLimit | None = None, **fields: Any
) -> None:
    """Log one event: its name, a sentence, and its fields in ``extra``."""
    if not logger.isEnabledFor(level):
        return
    if limit is not None:
        skipped = limit.skipped(name)
        if skipped is None:
            return
        if skipped:
            fields["skipped"] = skipped
            text = f"{text} ({skipped} more like this were not logged)"
    extra = {f"routefix_{key}": value for key, value in fields.items()}
    # A handler or filter of the program's that raises must not end a request of its run.
    with contextlib.suppress(Exception):
        logger.log(level, "%s: %s", name, text, extra={"routefix_event": name, **extra})


def warn(name: str, message: str, **fields: Any) -> None:
    """One log line and one :class:`RoutefixWarning`, without ever raising."""
    event(logging.WARNING, name, message, **fields)
    # `-W error`: the log line has been written, and neither an import nor tinker's loop is a
    # place to raise.
    with contextlib.suppress(RoutefixWarning):
        warnings.warn(message, RoutefixWarning, stacklevel=2)


_own_failures = RateLimit(seconds=60.0)


def own_failure(doing: str, error: BaseException, *, strict: bool) -> None:
    """Report a failure of the shim itself; the caller then steps aside.

    Raises:
        BaseException: The failure itself, where the settings are strict.
    """
    if strict:
        raise error
    # The error's text could hold a URL or a header; its type and its place cannot.
    event(
        logging.WARNING,
        "shim.failed",
        f"{doing} failed with {type(error).__name__}; tinker goes on without the shim's help",
        limit=_own_failures,
        error=type(error).__name__,
    )
    with contextlib.suppress(Exception):
        logger.debug("shim.failed: %s", "".join(traceback.format_tb(error.__traceback__)))
