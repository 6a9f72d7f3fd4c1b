"""What the shim says: one logger, one line an event, never a key.

Events have fixed names and carry their fields in ``extra`` (``routefix_event``,
``routefix_job``, …), so that a log processor needs no parsing. A stampede of refused
requests must not become a stampede of lines, so an event can be limited in rate; what
was left out is counted in the next line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType
    from typing import TextIO

_OURS = {__package__, "_tinker_routefix_autoload"}
_NOT_THE_PROGRAM = _OURS | {"wrapt", "importlib", "tinker", "fireworks"}
"""Packages that lead from the program's line to a warning, where it imports or connects."""

logger = logging.getLogger("tinker_routefix")
logger.addHandler(logging.NullHandler())


class RoutefixWarning(RuntimeWarning):
    """The shim cannot do what it was installed for, and has stepped aside."""

    __module__ = __package__


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
    """Log one event: its name, a sentence, and its fields in ``extra``.

    Where the program has not configured logging, it may be printed instead.
    """
    _emit(level, name, text, limit, fields, printed=_is_printed(level, name))


def is_wanted(level: int, name: str) -> bool:
    """Whether anyone gets to see a line: what it says may be costly to make."""
    return logger.isEnabledFor(level) or _is_printed(level, name)


def _emit(
    level: int,
    name: str,
    text: str,
    limit: RateLimit | None,
    fields: dict[str, Any],
    *,
    printed: bool = False,
) -> None:
    if not (printed or logger.isEnabledFor(level)):
        return
    if limit is not None:
        skipped = limit.skipped(name)
        if skipped is None:
            return
        if skipped:
            fields["skipped"] = skipped
            lines = "line" if skipped == 1 else "lines"
            text = f"{text} ({skipped} similar {lines} suppressed)"
    if printed:
        _print(text)
        return
    extra = {f"routefix_{key}": value for key, value in fields.items()}
    # A handler or filter of the program's that raises must not end a request of its run.
    with contextlib.suppress(Exception):
        logger.log(level, "%s: %s", name, text, extra={"routefix_event": name, **extra})


# --- Where the program has not configured logging ----------------------------------------

SPOKEN = frozenset(
    {"route.waiting", "route.wait_over", "process.waiting", "program.step_repeated", "shim.failed"}
)
"""What is printed unless ``TINKER_ROUTEFIX_LOG`` says otherwise: what no exception tells."""


def _is_printed(level: int, name: str) -> bool:
    """Whether a line goes to stderr, because nobody else would show it."""
    from . import _settings  # which imports this module

    word = _settings.current().log
    if word is None:
        wanted = name in SPOKEN
    else:
        wanted = word != "off" and level >= logging.getLevelNamesMapping()[word.upper()]
    # A logger that was disabled, or raised above WARNING, has been configured for silence.
    return wanted and logger.isEnabledFor(max(level, logging.WARNING)) and not _has_handler()


def _has_handler() -> bool:
    """Whether a handler of the program's gets what the logger is given."""
    up: logging.Logger | None = logger
    while up is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in up.handlers):
            return True
        up = up.parent if up.propagate else None
    return False


def _print(text: str) -> None:
    """Write a line to stderr, in one piece; never raises."""
    stderr = sys.stderr
    # There may be none, it may be closed, or nobody reads what it leads to.
    with contextlib.suppress(Exception):
        line = text.encode("ascii", "backslashreplace").decode()
        stderr.write(f"{_new_line(stderr)}tinker_routefix: {line}\n")
        stderr.flush()


def _new_line(stderr: TextIO) -> str:
    """What begins a new line on a terminal where a progress bar may have left an unfinished one.

    So many blanks as a line has: from its beginning they fill it and the cursor stays on it; from
    anywhere else they lead to the next one. The bar stays, and there is no empty line.
    """
    if not stderr.isatty():
        return ""
    try:
        return " " * os.get_terminal_size(stderr.fileno()).columns + "\r"
    except (OSError, ValueError):  # as in a notebook: it has no file
        return ""


def warn(name: str, message: str, **fields: Any) -> None:
    """One log line and one :class:`RoutefixWarning`, without ever raising."""
    # Where logging is not configured, Python prints the warning.
    _emit(logging.WARNING, name, message, None, fields)
    # `-W error`: the log line has been written, and neither an import nor tinker's loop is a
    # place to raise.
    with contextlib.suppress(Exception):
        warn_the_program(message)


def warn_the_program(message: str) -> None:
    """Raise a :class:`RoutefixWarning` at the program's own line, if one leads here.

    Raises:
        RoutefixWarning: Warnings are errors.
    """
    frame: FrameType | None = sys._getframe(1)
    outermost = frame
    while frame is not None:  # pragma: no branch - ends in threads that coverage does not see
        outermost = frame
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_PROGRAM:
            break
        frame = frame.f_back
    assert outermost is not None
    registry = outermost.f_globals.setdefault("__warningregistry__", {})
    where = outermost.f_code.co_filename, outermost.f_lineno
    warnings.warn_explicit(message, RoutefixWarning, *where, registry=registry)


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
