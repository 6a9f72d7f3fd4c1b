"""The clock of the tests in which nothing is sent: time passes only where it is put forward.

Real servers cannot be put forward; where they take part, ``schedules.clock`` runs faster.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pytest_mock import MockerFixture


class FakeClock:
    """Time that stands still, random waits at their longest, and a loop that lives by it."""

    def __init__(self, mocker: MockerFixture) -> None:
        self.now = self.began = 1000.0
        mocker.patch("time.monotonic", self.monotonic)
        mocker.patch("random.uniform", lambda _, high: high)

    def monotonic(self) -> float:
        return self.now

    @property
    def passed(self) -> float:
        """Seconds since the test began."""
        return round(self.now - self.began, 3)

    def run(self, program: Coroutine[Any, Any, Any]) -> Any:
        """Run a program on a loop that puts the clock forward where it would sleep."""

        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(_Selector(self))

        failed: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: failed.append(context))
            outcome = runner.run(program)
        # In a callback, or in a task that nobody waits for.
        assert not failed
        return outcome


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        self.turns += 1
        assert self.turns < 100_000, "this goes on for ever"
        if not ready:
            assert timeout is not None, "nothing will ever happen again"
            self.clock.now += timeout
        # No two turns of a loop are ever at the same moment.
        self.clock.now += 1e-7
        return ready
