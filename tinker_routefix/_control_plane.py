"""Ask the control plane whether a job runs.

A gateway 404 alone cannot tell a stale route from a job that is gone. The control plane can. One
question serves every request of the job, with the same key, that asks within the same moment; its
answer stays good for about a second. What it says about the job ends a wait, but one strange
answer never does: a proxy's error page, a key that is being rotated, a replica that does not know
a new job yet. So an answer carries for how long the control plane has been saying the same, and
whoever waits decides how long that has to be.

The question carries a key. So it goes over https, or within this machine where the gateway is
http on loopback as well; anywhere else it is not asked, and that is said when the first client
connects. A gateway that is plain http on a network gets its key from tinker anyway, but the
shim does not add to that: an https control plane has to be configured for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import email.utils
import enum
import functools
import hashlib
import json
import re
import time
from collections import OrderedDict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import _log, _settings, _threads, events
from ._counters import Counters
from ._job import base_of
from ._switch import SettingError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Mapping

    from ._job import Job

_T = TypeVar("_T")

GOOD_FOR = 1.0
"""Seconds that an answer stays good. A single flight that ends with its answer was measured
at 15 questions a second under load."""

LONGEST_BACKOFF = 4.0
"""Seconds between two questions to a control plane that cannot tell for now; 1, 2, 4, 4, …"""

LONGEST_RETRY_AFTER = 60.0
"""Seconds of a ``Retry-After`` that are honoured: one strange answer must not silence it."""

SAME_WITHIN = 15.0
"""Seconds. An answer that confirms another one has to come within so many of it."""

FLIGHTS = 8
"""Keys of one job that are remembered: tokens rotate, and must not pile up."""

MAX_BODY = 64 * 1024
"""Bytes of an answer that are read; a job's description has a few thousand."""

TURNS = 20
"""Parts of the timeout; however long the loop stands still, that uses up one of them."""

AGAIN_AFTER = 2.0
"""Seconds after which a question that has no answer is put once more, over another connection.
Twice what an answer stays good, so that there never are two questions within a second."""

CREDENTIALS = ("authorization", "x-api-key", "cf-access-client-id", "cf-access-client-secret")
"""The request headers that tinker and the SDKs on top of it carry their keys in."""


# --- Where it is, and who asks --------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where a control plane is, as an SDK in this process knows it."""

    root: str
    """Its URL up to, not including, ``/v1``."""
    headers: Mapping[str, str] | None = dataclasses.field(repr=False)
    """What it is asked with; None: the refused request's own credentials."""
    verify: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Manager:
    """A job manager of the program: it knows where the control plane of a gateway is."""

    address: Callable[[], Address]
    """Without headers once the program has let go of the manager."""
    account: Callable[[], str | None] = lambda: None
    """None where the manager has not found out yet."""


_managers: dict[str, list[Manager]] = {}
"""By gateway. Of those that the program has let go of, one is kept: for its address."""


def register(gateway: str, manager: Manager) -> None:
    """Note a job manager."""
    gateway = base_of(gateway) or gateway
    kept = [known for known in _managers.get(gateway, ()) if known.address().headers is not None]
    _managers[gateway] = [*kept, manager]


def _asker(job: Job, credentials: Mapping[str, str]) -> Address | None:
    """Who asks about a job: where, and with whose key.

    The manager with this account and key; else the only one of this gateway and account; else
    the refused request itself, where a manager's control plane is.
    """
    known = [(manager.account(), manager.address()) for manager in _managers.get(job.gateway, ())]
    if not known:
        return None
    of_account = [
        address
        for account, address in known
        if address.headers is not None and account in (None, job.account)
    ]
    keys = _keys(credentials)
    for address in reversed(of_account):
        if keys & _keys(address.headers or {}):
            return address
    if len({frozenset(_keys(address.headers or {})) for address in of_account}) == 1:
        return of_account[-1]
    _, last = known[-1]
    return Address(last.root, None, last.verify)


def _keys(headers: Mapping[str, str]) -> set[str]:
    return {
        headers[name].removeprefix("Bearer ")
        for name in ("authorization", "x-api-key")
        if name in headers
    }


# --- What it says ---------------------------------------------------------------------------

_PREFIX = "JOB_STATE_"
_LOOKS_LIKE_A_STATE = re.compile(r"JOB_STATE_[A-Z_]{1,60}")
_RUNNING = frozenset({"RUNNING"})
_ON_ITS_WAY = frozenset(
    {"PENDING", "CREATING", "CREATING_INPUT_DATASET", "VALIDATING", "RE_QUEUEING"}
)
_OVER = frozenset(
    {
        "ARCHIVED",
        "CANCELLED",
        "CANCELLING",
        "COMPLETED",
        "DELETED",
        "DELETING",
        "DELETING_CLEANING_UP",
        "EARLY_STOPPED",
        "EXPIRED",
        "FAILED",
        "IDLE",
        "PAUSED",
        "WRITING_RESULTS",
    }
)


class JobState(enum.Enum):
    """What the control plane's answer means for a request that was refused."""

    RUNNING = "running"
    ON_ITS_WAY = "on its way"
    OVER = "over"
    """Ended, ending, asleep, gone or not visible with this key."""
    UNKNOWN = "unknown"
    """The control plane could not be reached or understood."""


class Told(enum.Enum):
    """What kind of answer a question got."""

    RUNNING = enum.auto()
    STARTING = enum.auto()
    ENDED = enum.auto()
    """A terminal state."""
    GONE = enum.auto()
    """There is no such job, or it is not visible: in the API's own shape."""
    QUESTION_REFUSED = enum.auto()
    """The question itself was turned down, by whoever it was, or the answer cannot be read."""
    NOTHING = enum.auto()
    """Nothing for now: no connection, no answer, overload, a failure, a state that is new."""

    @property
    def state(self) -> JobState:
        """What it means for the job."""
        return _STATES.get(self, JobState.UNKNOWN)


_STATES = {
    Told.RUNNING: JobState.RUNNING,
    Told.STARTING: JobState.ON_ITS_WAY,
    Told.ENDED: JobState.OVER,
    Told.GONE: JobState.OVER,
}
_TOLD = {
    JobState.RUNNING: Told.RUNNING,
    JobState.ON_ITS_WAY: Told.STARTING,
    JobState.OVER: Told.ENDED,
    JobState.UNKNOWN: Told.NOTHING,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the control plane said, in words that may be shown, and when."""

    told: Told
    said: str
    at: float
    """``time.monotonic()`` at the end of the question."""
    since: float = float("-inf")
    """When it began to say the same, question after question."""
    ask_again_at: float = float("-inf")
    """Before this moment it is not asked again."""

    @property
    def state(self) -> JobState:
        """What it means for the job."""
        return self.told.state

    def heard_for(self, seconds: float) -> bool:
        """Whether it has been said twice, so far apart."""
        # Two questions that are a second apart are not answered exactly so.
        return self.at - self.since >= 0.9 * seconds


NOT_ASKED = Answer(Told.NOTHING, "not asked", float("-inf"))


def state_of(word: str) -> JobState:
    """The meaning of a job state's name, with or without its prefix; new ones are unknown."""
    name = word.removeprefix(_PREFIX)
    if name in _RUNNING:
        return JobState.RUNNING
    if name in _ON_ITS_WAY:
        return JobState.ON_ITS_WAY
    return JobState.OVER if name in _OVER else JobState.UNKNOWN


_NOT_FOUND = frozenset({5, "NOT_FOUND"})
_NOT_VISIBLE = frozenset({7, "PERMISSION_DENIED"})
"""A code of ``google.rpc.Status``, by number or by name."""


def read_answer(status: int, body: bytes) -> tuple[Told, str]:
    """The meaning of an answer of the control plane; never raises."""
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
        # Any proxy, framework or firewall answers these; about a job only the API does.
        codes = _codes(document)
        if codes & _NOT_FOUND:
            return Told.GONE, f"there is no such job (HTTP {status})"
        if codes & _NOT_VISIBLE:
            return Told.GONE, f"the job is not visible with this key (HTTP {status})"
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        return Told.NOTHING, f"HTTP {status}"
    if status == HTTPStatus.UNAUTHORIZED:
        return Told.QUESTION_REFUSED, "the key was refused (HTTP 401)"
    if status != HTTPStatus.OK:
        return Told.QUESTION_REFUSED, f"HTTP {status}"
    word = document.get("state") if isinstance(document, dict) else None
    if not isinstance(word, str):
        return Told.QUESTION_REFUSED, "an answer without a job state"
    state = state_of(word)
    # A word comes from outside and could even be our key: show it only where it cannot.
    known = state is not JobState.UNKNOWN or _LOOKS_LIKE_A_STATE.fullmatch(word)
    return _TOLD[state], word if known else "a strange state"


def _codes(document: Any) -> set[Any]:
    """The codes in a ``google.rpc.Status``, which stands at the top or in ``error``."""
    places = (document, document.get("error")) if isinstance(document, dict) else ()
    return {
        place[name]
        for place in places
        if isinstance(place, dict)
        for name in ("code", "status")
        if isinstance(place.get(name), str | int)
    }


def _retry_after(header: str | None) -> float:
    """Seconds that a ``Retry-After`` asks for; 0 for none, or one that cannot be read."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER)


# --- The question ---------------------------------------------------------------------------

_tls: ssl.SSLContext | None = None


async def tls_context() -> ssl.SSLContext:
    """One TLS context for all questions, built off the loop: it costs about 25 ms.

    The certificates that the environment names count, as they do for tinker.
    """
    global _tls
    if _tls is None:
        _tls = await _threads.run(functools.partial(httpx.create_ssl_context, trust_env=True))
    return _tls


async def _within(seconds: float, fetch: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """What is fetched within so many seconds for which the loop turns.

    tinker makes the body of a large batch on the loop, which stands still meanwhile, for seconds
    on a busy machine. ``asyncio.timeout`` would then throw away an answer that is there already.

    And one connection that hangs is not the control plane: it can even be this process that does
    not hear it any more. When a client of tinker's is garbage collected by a thread that has a
    loop, its close takes away the reader of whatever connection has its socket's number by then.

    Raises:
        TimeoutError: It has not come.
    """
    part = seconds / TURNS
    coming = [asyncio.ensure_future(fetch())]
    try:
        for turn in range(TURNS):
            if len(coming) == 1 and turn * part >= AGAIN_AFTER:
                coming.append(asyncio.ensure_future(fetch()))
            done, _ = await asyncio.wait(coming, timeout=part, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return done.pop().result()
        raise TimeoutError
    finally:
        for one in coming:
            one.cancel()
            # Whatever the other one ends with, nobody asks for it.
            one.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Flight:
    """The questions about one job that are put with one key."""

    def __init__(self) -> None:
        self.answer = NOT_ASKED
        self.question: asyncio.Task[Answer] | None = None
        self._told_nothing = 0

    def note(self, told: Told, said: str, retry_after: float) -> Answer:
        """The answer, with how long it has been the same and when to ask again."""
        now, before = time.monotonic(), self.answer
        same = before.told is told and now - before.at < SAME_WITHIN
        self._told_nothing = self._told_nothing + 1 if told is Told.NOTHING else 0
        backoff = min(2.0 ** (min(self._told_nothing, 10) - 1), LONGEST_BACKOFF)
        wait = max(GOOD_FOR, backoff if self._told_nothing else 0.0, retry_after)
        since = before.since if same else now
        self.answer = Answer(told, said, now, since, now + wait)
        return self.answer


class ControlPlane:
    """The control plane's view of one job.

    Raises:
        SettingError: The settings are strict, and what is configured cannot be asked about
            this job.
    """

    def __init__(self, job: Job, counters: Counters | None = None) -> None:
        self._job = job
        self._counters = counters or Counters()
        self._flights: OrderedDict[bytes, _Flight] = OrderedDict()
        self._warned = False
        settings = _settings.current()
        configured = settings.control_plane_url
        # A job manager's is looked at when it is asked: the program may still make one.
        if configured is not None or job.gateway not in _managers:
            asked = self._may_ask(configured or job.gateway)
            if settings.strict and not asked:
                raise SettingError(
                    "TINKER_ROUTEFIX_CONTROL_PLANE_URL",
                    configured,
                    f"an https URL for jobs behind {job.gateway}",
                )

    @property
    def questions(self) -> int:
        """How many were put."""
        return self._counters.questions

    @property
    def last_answer(self) -> Answer:
        """What was said last, to any key."""
        answers = [flight.answer for flight in self._flights.values()]
        return max(answers, key=lambda answer: answer.at, default=NOT_ASKED)

    async def ask(self, headers: Mapping[str, str]) -> Answer:
        """Whether the job runs, as of at most :data:`GOOD_FOR` seconds ago; never raises.

        Where the control plane could not tell, or has asked for a pause, longer ago.

        Args:
            headers: Those of the refused request; only its credentials are sent on.
        """
        credentials = {name: headers[name] for name in CREDENTIALS if name in headers}
        try:
            address = self._address(credentials)
        except Exception as error:  # noqa: BLE001 - a manager of the program's
            _log.own_failure("asking a job manager", error, strict=_settings.current().strict)
            address = Address(self._job.gateway, None, verify=True)
        flight = self._flight(address, credentials)
        if time.monotonic() < flight.answer.ask_again_at:
            return flight.answer
        if flight.question is None:
            # In a context of its own: a task keeps its context, and that what it holds.
            flight.question = asyncio.get_running_loop().create_task(
                self._put_question(flight, address, credentials), context=contextvars.Context()
            )
        # Shielded: one cancelled request must not take the answer from the others.
        return await asyncio.shield(flight.question)

    def _flight(self, address: Address, credentials: Mapping[str, str]) -> _Flight:
        keys = credentials if address.headers is None else address.headers
        asked = repr((address.root, address.verify, sorted(keys.items()))).encode()
        key = hashlib.blake2b(asked, digest_size=16).digest()
        flight = self._flights.setdefault(key, _Flight())
        self._flights.move_to_end(key)
        while len(self._flights) > FLIGHTS:
            self._flights.popitem(last=False)
        return flight

    async def _put_question(
        self, flight: _Flight, address: Address, credentials: Mapping[str, str]
    ) -> Answer:
        timeout = _settings.current().control_plane_timeout
        began = time.monotonic()
        retry_after = 0.0
        try:
            if self._may_ask(address.root):
                fetch = functools.partial(self._fetch, address, credentials)
                status, body, header = await _within(timeout, fetch)
                told, said = read_answer(status, body)
                if told is Told.NOTHING:
                    retry_after = _retry_after(header)
            else:
                told, said = Told.NOTHING, "not asked, because its URL is not https"
        except TimeoutError:
            told, said = Told.NOTHING, f"no answer within {timeout:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not say RUNNING
            told, said = Told.NOTHING, f"no answer ({type(error).__name__})"
        finally:
            flight.question = None
        answer = flight.note(told, said, retry_after)
        events.publish(
            events.QuestionAnswered(
                job=str(self._job),
                state=answer.state.value,
                said=said,
                seconds=round(answer.at - began, 3),
            )
        )
        return answer

    def _address(self, credentials: Mapping[str, str]) -> Address:
        """What was configured, else what a job manager of this process knows, else the gateway."""
        configured = _settings.current().control_plane_url
        if configured is None:
            address = _asker(self._job, credentials)
            if address is not None:
                # As the program wrote it, perhaps with a password in it.
                return dataclasses.replace(address, root=base_of(address.root) or "")
        return Address(configured or self._job.gateway, None, verify=True)

    def _may_ask(self, root: str) -> bool:
        """Whether a key may be sent to a control plane; says so once where it may not."""
        on_loopback = _settings.http_on_loopback
        if root.startswith("https:") or (on_loopback(root) and on_loopback(self._job.gateway)):
            return True
        if not self._warned:
            self._warned = True
            _log.warn(
                "control_plane.not_asked",
                f"the control plane of job {self._job} is not asked: {root or 'its URL'} is not "
                f"https, and not http on loopback for a gateway that is so too. Once connected, "
                "a 404 is replayed only after the job has answered another request; "
                "TINKER_ROUTEFIX_CONTROL_PLANE_URL can name an https one",
                job=str(self._job),
            )
        return False

    async def _fetch(
        self, address: Address, credentials: Mapping[str, str]
    ) -> tuple[int, bytes, str | None]:
        self._counters.questions += 1
        url = self._job.control_plane_url(address.root)
        secure = address.verify and url.startswith("https:")
        client = httpx.AsyncClient(
            verify=await tls_context() if secure else False,
            # A redirect must not get to see the keys. A proxy from the environment does not: it
            # is a tunnel to an https control plane, and http is asked on loopback only.
            follow_redirects=False,
            trust_env=secure,
            timeout=None,  # noqa: S113 - the caller bounds the whole question
        )
        keys = credentials if address.headers is None else address.headers
        headers = {**keys, "accept": "application/json", "accept-encoding": "identity"}
        async with client, client.stream("GET", url, headers=headers) as response:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BODY:
                    body.clear()
                    break
            return response.status_code, bytes(body), response.headers.get("retry-after")
