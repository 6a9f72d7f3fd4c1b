"""Work that would block the event loop, in a thread of its own; and tasks that nobody waits for.

Not in the loop's default executor: the program shares that, and where it is busy a wait of a
second was measured to take 45. Nor in a pool of the shim's: its threads would stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_T = TypeVar("_T")


async def run(work: Callable[[], _T]) -> _T:
    """What a function returns or raises that is called in a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled meanwhile
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def call() -> None:
        result: _T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001 - it is raised where the result is awaited
            error = raised
        except BaseException as raised:  # noqa: BLE001 - raised in the loop, it would end that
            # A panic of pyqwest's, say.
            error = RuntimeError(type(raised).__name__)
            error.__cause__ = raised
        # A loop that was closed meanwhile has nobody who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=call, name="tinker-routefix", daemon=True).start()
    except RuntimeError as error:
        if "interpreter shutdown" not in str(error):
            raise
    else:
        return await future
    # From Python 3.12 on no thread is started once the main one has ended; others may train on.
    return work()


_tasks: set[asyncio.Task[Any]] = set()


def in_background(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Have the running loop do something that nobody waits for; it must not raise.

    In a context of its own: a task keeps its context, and that what it holds. Nowhere where a
    coroutine is collected that was thrown away unfinished: that may be on no loop.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    task = loop.create_task(work(), context=contextvars.Context())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
