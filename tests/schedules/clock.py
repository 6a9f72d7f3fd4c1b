"""A clock that runs faster, so that whole outages fit into fractions of a second.

tinker, the shim and the lab all wait on asyncio and read ``time.monotonic``. Here both pass
``rate`` times as fast, for all of them alike: every constant keeps its proportion to every
other one, and none of them has to be replaced for a test. Only work takes as long as ever,
so it seems ``rate`` times slower.
"""

from __future__ import annotations

import selectors
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Clock:
    def __init__(self) -> None:
        self.rate = 1.0
        self._real = time.monotonic
        self._since = self._shown = self._real()
        self._select = selectors.DefaultSelector.select

    def monotonic(self) -> float:
        return self._shown + (self._real() - self._since) * self.rate

    def select(self, selector: Any, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            timeout /= self.rate
        return self._select(selector, timeout)

    def turn(self, rate: float) -> None:
        self._shown, self._since = self.monotonic(), self._real()
        self.rate = rate


_clock: _Clock | None = None


@contextmanager
def faster(rate: float) -> Iterator[None]:
    """Let time pass faster. Afterwards it passes as usual, from where it has come to.

    It is never put back: a clock must not run backwards, and tinker's loop outlives a test.
    """
    global _clock
    if _clock is None:
        clock = _clock = _Clock()
        time.monotonic = clock.monotonic
        selectors.DefaultSelector.select = lambda self, timeout=None: clock.select(self, timeout)  # type: ignore[method-assign]
    before = _clock.rate
    _clock.turn(rate)
    try:
        yield
    finally:
        _clock.turn(before)
