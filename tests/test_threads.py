"""Work in a thread of its own: whatever the program does with its loop and its executor."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tinker_routefix import _threads

if TYPE_CHECKING:
    from pytest_mock import MockerFixture


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tinker-routefix"]


def until_done() -> None:
    for thread in ours():
        thread.join(10)
    assert not ours()


def test_result_and_exception_come_back() -> None:
    def fail() -> None:
        raise OSError("too many open files")

    def end() -> None:
        raise SystemExit

    async def program() -> int:
        with pytest.raises(OSError, match="too many"):
            await _threads.run(fail)
        # Raised in the loop, it would end that.
        with pytest.raises(RuntimeError, match="SystemExit"):
            await _threads.run(end)
        return await _threads.run(threading.get_ident)

    assert asyncio.run(program()) != threading.get_ident()
    until_done()


def test_system_that_starts_no_more_threads_is_an_error_like_any_other(
    mocker: MockerFixture,
) -> None:
    mocker.patch.object(
        threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
    )
    with pytest.raises(RuntimeError, match="can't start new thread"):
        asyncio.run(_threads.run(threading.get_ident))


def test_call_in_a_thread_is_not_held_up_by_a_busy_default_executor() -> None:
    """A program may have a hundred tokenizers in it: a wait of a second took 45."""
    free = threading.Event()

    async def program() -> None:
        loop = asyncio.get_running_loop()
        busy = [loop.run_in_executor(None, free.wait, 60) for _ in range(100)]
        try:
            await asyncio.wait_for(_threads.run(lambda: None), 20)
            assert not any(one.done() for one in busy)
        finally:
            free.set()
            await asyncio.gather(*busy)

    asyncio.run(program())


def test_call_in_a_thread_lets_the_loop_go_on() -> None:
    ticked = threading.Event()

    async def program() -> bool:
        working = asyncio.ensure_future(_threads.run(lambda: ticked.wait(10)))
        for _ in range(5):
            await asyncio.sleep(0.01)
        ticked.set()
        return await working

    assert asyncio.run(program()), "it waited for the loop, which waited for it"


def test_cancelled_waiter_is_not_told_the_outcome() -> None:
    goes_on, failed = threading.Event(), []

    def fail() -> None:
        goes_on.wait(10)
        raise OSError("nobody waits for this")

    async def program() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: failed.append(about))
        waiting = asyncio.ensure_future(_threads.run(fail))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        goes_on.set()
        while ours():  # noqa: ASYNC110 - a thread tells nobody
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(program())
    assert not failed


def test_loop_closed_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    goes_on = threading.Event()

    async def program() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_threads.run(lambda: goes_on.wait(10)), 0.01)

    asyncio.run(program())
    goes_on.set()
    until_done()
    assert not failed


def test_work_in_the_background_is_left_undone_where_no_loop_runs() -> None:
    """As where a coroutine is collected that was thrown away unfinished."""
    begun: list[None] = []

    async def work() -> None:
        begun.append(None)

    _threads.in_background(work)
    assert not begun
    assert not _threads._tasks
