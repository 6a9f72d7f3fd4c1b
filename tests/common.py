"""What the tests of every SDK share; imports none of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import itertools
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from tinker_routefix.lab import Exchange, Fault, Lab

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


def not_excused(found: object) -> None:
    """On CI a failed test is run once more. That it passes then excuses no such finding."""
    if found:
        tell_nox("unexcused.txt", f"{os.environ.get('PYTEST_CURRENT_TEST')}: {found}\n")


def tell_nox(file: str, what: str) -> None:
    """Leave something that the run of nox, if there is one, has to know."""
    run = Path(os.environ.get("NOX_RUN") or "nowhere")
    if run.is_dir():
        with (run / file).open("a", encoding="utf-8") as told:
            told.write(what)


def until(done: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.02)


def stale_from_the_first(lab: Lab, seconds: float, **which: Any) -> Fault:
    """A stale route for so long, from the first such request on: however late that comes."""
    # Importing the package loads the shim, which reads its settings then.
    from tinker_routefix.lab import Fault

    first: list[float] = []

    def stale(exchange: Exchange) -> bool:
        first.append(exchange.at)
        return exchange.at - first[0] < seconds

    return lab.fault(Fault(when=stale, **which))


def shown_on(terminal: int) -> bytes:
    """All that programs write to a terminal, until the last of them has closed its end."""
    shown = b""
    # Linux has an error where others have an empty end.
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    return shown


def notes(error: BaseException) -> str:
    """What is noted on an exception, however it is wrapped."""
    return " ".join(" ".join(getattr(error, "__notes__", ())).split())


def exact(lab: Lab, *, gradients: int, optim_steps: int) -> None:
    """The trainer has carried out what was asked for: once, in order, and nothing else."""
    ledger = lab.ledger
    done = (ledger.gradients, ledger.optim_steps)
    not_excused(done[0] > gradients or done[1] > optim_steps or ledger.duplicates())
    assert done == (gradients, optim_steps), ledger.summary()
    assert not ledger.duplicates(), ledger.summary()
    assert not ledger.out_of_order(), ledger.summary()
    assert not ledger.missing(), ledger.summary()


# --- The chain of one submission ---------------------------------------------------------

REPEATABLE: Final = frozenset(
    {
        *("config", "dynamic_config", "auth_token", "capabilities", "create_session"),
        *("create_model", "sampling_session", "join_sampling_session", "heartbeat", "telemetry"),
        *("get_info", "forward", "sample", "poll", "polls", "cancel"),
    }
)
"""Kinds of requests that may be sent again although they may have been carried out."""

RETRIED: Final = frozenset({None, 408, 409, 429, *range(500, 600)})
"""How a try may have ended after which tinker itself makes another: without an answer (None), or
with one of these."""


def may_be_repeated(request: Exchange) -> bool:
    """Whether a request is one of those that do no harm when they are carried out twice."""
    return (
        request.method == "GET"
        or request.kind in REPEATABLE
        # Creates a model instead of changing one.
        or (request.kind == "load" and request.model_id is None)
        or request.path.endswith("/weights_info")
    )


def identity(request: Exchange) -> Hashable:
    """What all tries of one submission have in common, and no other one; None: not a submission.

    Of a model it is the sequence number: the idempotency key is another for each of tinker's
    outer tries, and the body is for those of ``save_weights_for_sampler``.
    """
    said = request.said or {}
    if request.replica is None:
        return None
    if request.kind == "poll":
        return request.job, "poll", said.get("request_id")
    if request.kind == "create_model" and said.get("model_seq_id") is not None:
        return request.job, request.kind, said.get("session_id"), said["model_seq_id"]
    owner = request.model_id or said.get("sampling_session_id")
    if owner is not None and request.seq_id is not None:
        return request.job, request.kind, owner, request.seq_id
    key = request.headers.get("x-idempotency-key")
    return None if key is None else (request.job, request.kind, key)


def chains(requests: Iterable[Exchange]) -> dict[Hashable, list[Exchange]]:
    """All tries of each submission, tinker's own and the shim's replays, in order of arrival."""
    found: dict[Hashable, list[Exchange]] = {}
    for request in requests:
        name = identity(request)
        if name is not None:
            found.setdefault(name, []).append(request)
    return found


def is_bare_400(request: Exchange) -> bool:
    """A 400 without a body, which tinker from 0.22.7 on takes for a fault of the edge."""
    return request.status == 400 and request.error is not None and not request.error.content


def may_have_been_carried_out(request: Exchange) -> bool:
    """Whether the client cannot know that a try was not carried out, once another follows it."""
    not_ready = request.error is not None and b"route_not_ready" in request.error.content
    return not (
        request.status in (404, 429)
        or (request.status == 503 and not_ready)
        or is_bare_400(request)
    )


def is_replay(before: Exchange, after: Exchange) -> bool:
    """Whether a try is the shim's, and not tinker's repeat of the one before.

    tinker's inner tries are counted, and its outer ones have an idempotency key of their own (but
    in 0.1 and 0.2, where a submission has nothing else).
    """
    key = after.headers.get("x-idempotency-key")
    return (
        key is not None
        and key == before.headers.get("x-idempotency-key")
        and after.seq_id is not None
        and after.headers.get("x-stainless-retry-count") == "0"
    )


def is_inner_try(request: Exchange) -> bool:
    """Whether tinker itself counts a request as a repeat: it did not wait for the answer, say."""
    return request.headers.get("x-stainless-retry-count", "0") != "0"


MOMENT: Final = 0.3
"""Seconds, of whichever clock, that a request may be on its way to a connection just closed."""


def answer_may_be_lost(before: Exchange, after: Exchange, closed_at: Collection[float]) -> bool:
    """Whether all connections were closed from just before one request to the next."""
    return any(before.at - MOMENT < at < after.at for at in closed_at)


def sent_in_vain(tries: list[Exchange], closed_at: Collection[float] = ()) -> Exchange | None:
    """The first 404 of a chain after which nothing may be sent any more, if there is one."""
    return None if may_be_repeated(tries[0]) else uncertain_404(tries, closed_at)


def uncertain_404(tries: list[Exchange], closed_at: Collection[float] = ()) -> Exchange | None:
    """The first 404 of a chain that has a try before it which may have been carried out.

    One that was lost on its way, as tinker's own repeat of it shows, is no word to anybody.
    """
    counts = False
    for request, after in itertools.zip_longest(tries, tries[1:]):
        if request.status == 404 and counts:
            lost = after is not None and answer_may_be_lost(request, after, closed_at)
            if not lost or is_replay(request, after):
                return request
        counts = counts or may_have_been_carried_out(request)
    return None


def unexplained(tries: list[Exchange], closed_at: Collection[float] = ()) -> Iterator[str]:
    """The tries of a submission that neither tinker's retries explain nor a replay may be.

    Args:
        tries: The chain of one submission.
        closed_at: When all connections were closed: an answer may have been lost that the lab
            takes for sent.

    """
    final = sent_in_vain(tries, closed_at)
    final_seen = False
    for before, after in itertools.pairwise(tries):
        final_seen = final_seen or before is final
        if final_seen:
            yield f"sent again after {before.status}, and may have been carried out before: {after}"
        elif before.status == 404:
            continue
        elif is_replay(before, after):
            yield f"replayed after {before.status}: {after}"
        elif not (
            before.status in RETRIED
            or is_bare_400(before)
            or (may_be_repeated(after) and is_inner_try(after))
            or answer_may_be_lost(before, after, closed_at)
        ):
            yield f"sent again after {before.status}: {after}"


def unexplained_executions(lab: Lab) -> list[str]:
    """Whatever the trainers may have carried out more often than plain tinker had them do.

    What tinker itself sends again, because an answer was lost, is tinker's own doing.
    """
    requests = lab.exchanges
    closed_at = lab._gateway.closed_at
    found = [
        line
        for tries in chains(requests).values()
        # A result may be asked for any number of times.
        if tries[0].kind != "poll"
        for line in unexplained(tries, closed_at)
    ]
    if not closed_at and not any(one.reached and one.status in RETRIED for one in requests):
        # No answer was lost: nothing explains a second execution, whoever made it.
        for trainer in lab._gateway.trainers.values():
            found += [f"executed twice: {one}" for one in trainer.ledger.duplicates()]
    return found
