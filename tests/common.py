"""What the tests of every SDK share; imports none of them."""

from __future__ import annotations

import asyncio
import base64
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tinker_routefix.lab import Lab

CANARY = "tml-canary-5f2c9e7d41"
"""The key that every test uses; it must not turn up anywhere."""

CANARIES = {
    "the key": CANARY,
    "a key in a default header": "canary-9c1be0a774-header",
    "a user name in a URL": "canary-2d60f3c85e-user",
    "a password in a URL": "canary-71aa4e09bd-password",
    "a token in a query": "canary-e83b50d216-query",
}
"""All that is secret in a test, by what it is."""


def _coded(secret: str) -> Iterator[str]:
    """What there is of it in something that was put into base64: basic authentication is."""
    for before in range(3):
        coded = base64.b64encode(b" " * before + secret.encode()).decode()
        # What its neighbours have a part in is left out.
        kept = coded[-(-before * 8 // 6) : len(coded) - 4]
        yield from {kept, kept.replace("+", "-").replace("/", "_")}


_CODED = {name: (secret.lower(), *_coded(secret)) for name, secret in CANARIES.items()}


def leaks(text: str | bytes) -> list[str]:
    """Which of the secrets stand in a text, by what they are; as they are or in base64."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    lower = text.lower()
    return [
        name
        for name, (secret, *coded) in _CODED.items()
        if secret in lower or any(part in text for part in coded)
    ]


def collect() -> None:
    """Collect clients that nobody holds any more, here and not on a thread that has a loop.

    In 0.3.0 to 0.5.0 a client that is collected waits for tinker's loop: on it, for ever. In
    all others one that was never closed (connecting leaves one behind) has the loop of that
    thread, perhaps a lab's, close sockets that are gone: a new connection that has got the number
    of one hears nothing more.
    """
    gc.collect()


Speak = Callable[[asyncio.StreamWriter], Awaitable[None]]

RUNNING = b'{"state": "JOB_STATE_RUNNING"}'


def http(
    body: bytes = RUNNING, status: str = "200 OK", headers: bytes = b"", length: int | None = None
) -> bytes:
    """An answer as it goes over the wire."""
    length = len(body) if length is None else length
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    ).encode() + (headers + b"Connection: close\r\n\r\n" + body)


class Listener:
    """A server on loopback that says what it is told to, and writes down what it hears.

    By default it says that every job is RUNNING, so that who asks it by mistake goes wrong.

    Args:
        says: The bytes to send once a request's headers have come, or what sends them.
        asked_first: Whether to wait for a request's headers at all.
    """

    def __init__(self, says: bytes | Speak = http(), *, asked_first: bool = True) -> None:  # noqa: B008
        self.says = says
        self.heard: list[bytes] = []
        """What came over each connection, up to the end of the headers."""
        self.url = ""
        self._asked_first = asked_first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        listening: Future[str] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listening),))
        self._thread.start()
        self.url = listening.result(10)
        return self

    def stop(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, listening: Future[str]) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        listening.set_result(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await self._stop.wait()
        # What still speaks is cancelled by `asyncio.run`; from 3.12 on `wait_closed` waits for it.
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._asked_first:
                self.heard.append(b"")
                number = len(self.heard) - 1
                while b"\r\n\r\n" not in self.heard[number]:
                    more = await reader.read(65536)
                    if not more:
                        return
                    self.heard[number] += more
            if isinstance(self.says, bytes):
                writer.write(self.says)
                await writer.drain()
            else:
                await self.says(writer)
        except ConnectionError:
            pass
        finally:
            writer.close()


def exact(lab: Lab, *, gradients: int, optim_steps: int) -> None:
    """The trainer has carried out what was asked for: once, in order, and nothing else."""
    ledger = lab.ledger
    done = (ledger.gradients, ledger.optim_steps)
    assert done == (gradients, optim_steps), ledger.summary()
    assert not ledger.duplicates(), ledger.summary()
    assert not ledger.out_of_order(), ledger.summary()
    assert not ledger.missing(), ledger.summary()
