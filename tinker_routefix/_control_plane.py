"""Ask the control plane whether a job runs.

A gateway 404 alone cannot tell a stale route from a job that is gone. The control plane
can, so nothing is sent again before it has said RUNNING. One question serves every
request of the job that asks within the same moment, its answer stays good for about a
second, and whatever goes wrong with it is an answer too: "could not tell".

The question carries a key. So it goes over https, or within this machine where the gateway is
http on loopback as well; anywhere else it is not asked, and that is said when the first client
connects. A gateway that is plain http on a network gets its key from tinker anyway, but the
shim does not add to that: an https control plane has to be configured for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import json
import re
import time
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from . import _log, _settings, events
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

MAX_BODY = 64 * 1024
"""Bytes of an answer that are read; a job's description has a few thousand."""

TURNS = 20
"""Parts of the timeout; however long the loop stands still, that uses up one of them."""

AGAIN_AFTER = 2.0
"""Seconds after which a question that has no answer is put once more, over another connection.
Twice what an answer stays good, so that there never are two questions within a second."""

CREDENTIALS = ("authorization", "x-api-key", "cf-access-client-id", "cf-access-client-secret")
"""The request headers that tinker and the SDKs on top of it carry their keys in."""


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where a control plane is, as an SDK in this process knows it."""

    root: str
    """Its URL up to, not including, ``/v1``."""
    headers: Mapping[str, str] | None = dataclasses.field(repr=False)
    """What it is asked with; None: the refused request's own credentials."""
    verify: bool


_known: dict[str, Callable[[], Address]] = {}
"""By gateway."""


def learn(gateway: str, address: Callable[[], Address]) -> None:
    """Note where a gateway's control plane is; the latest word counts."""
    _known[base_of(gateway) or gateway] = address


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


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the control plane said, in words that may be shown, and when."""

    state: JobState
    said: str
    at: float
    """``time.monotonic()`` at the end of the question."""


NOT_ASKED = Answer(JobState.UNKNOWN, "not asked", float("-inf"))


def state_of(word: str) -> JobState:
    """The meaning of a job state's name, with or without its prefix; new ones are unknown."""
    name = word.removeprefix(_PREFIX)
    if name in _RUNNING:
        return JobState.RUNNING
    if name in _ON_ITS_WAY:
        return JobState.ON_ITS_WAY
    return JobState.OVER if name in _OVER else JobState.UNKNOWN


def read_answer(status: int, body: bytes) -> tuple[JobState, str]:
    """The meaning of an answer of the control plane; never raises."""
    if status == httpx.codes.FORBIDDEN:
        return JobState.OVER, "the job is not visible with this key (HTTP 403)"
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    readable = isinstance(document, dict)
    # Any web server answers 404 in HTML; only an API that knows jobs does so in JSON.
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE) and readable:
        return JobState.OVER, f"there is no such job (HTTP {status})"
    if status != httpx.codes.OK:
        return JobState.UNKNOWN, f"HTTP {status}"
    word = document.get("state") if readable else None
    if not isinstance(word, str):
        return JobState.UNKNOWN, "an answer without a job state"
    state = state_of(word)
    # A word comes from outside and could even be our key: show it only where it cannot.
    known = state is not JobState.UNKNOWN or _LOOKS_LIKE_A_STATE.fullmatch(word)
    return state, word if known else "a strange state"


_tls: ssl.SSLContext | None = None


async def tls_context() -> ssl.SSLContext:
    """One TLS context for all questions, built off the loop: it costs about 25 ms.

    The certificates that the environment names count, as they do for tinker.
    """
    global _tls
    if _tls is None:
        _tls = await asyncio.to_thread(httpx.create_ssl_context, trust_env=True)
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


class ControlPlane:
    """The control plane's view of one job.

    Raises:
        SettingError: The settings are strict, and what is configured cannot be asked about
            this job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._answer = NOT_ASKED
        self._question: asyncio.Task[Answer] | None = None
        self._warned = False
        self.questions = 0
        settings = _settings.current()
        configured = settings.control_plane_url
        # A job manager's is looked at when it is asked: the program may still make one.
        if configured is not None or job.gateway not in _known:
            asked = self._may_ask(configured or job.gateway)
            if settings.strict and not asked:
                raise SettingError(
                    "TINKER_ROUTEFIX_CONTROL_PLANE_URL",
                    configured,
                    f"an https URL for jobs behind {job.gateway}",
                )

    async def ask(self, headers: Mapping[str, str]) -> Answer:
        """Whether the job runs, as of at most :data:`GOOD_FOR` seconds ago; never raises.

        Args:
            headers: Those of the refused request; only its credentials are sent on.
        """
        if time.monotonic() - self._answer.at < GOOD_FOR:
            return self._answer
        if self._question is None or self._question.done():
            credentials = {name: headers[name] for name in CREDENTIALS if name in headers}
            self._question = asyncio.ensure_future(self._put_question(credentials))
        # Shielded: one cancelled request must not take the answer from the others.
        return await asyncio.shield(self._question)

    async def _put_question(self, credentials: Mapping[str, str]) -> Answer:
        settings = _settings.current()
        timeout = settings.control_plane_timeout
        began = time.monotonic()
        try:
            address = self._address(settings.control_plane_url)
            if self._may_ask(address.root):
                fetch = functools.partial(self._fetch, address, credentials)
                state, said = read_answer(*await _within(timeout, fetch))
            else:
                state, said = JobState.UNKNOWN, "not asked, because its URL is not https"
        except TimeoutError:
            state, said = JobState.UNKNOWN, f"no answer within {timeout:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not say RUNNING
            state, said = JobState.UNKNOWN, f"no answer ({type(error).__name__})"
        self._answer = Answer(state, said, time.monotonic())
        events.publish(
            events.QuestionAnswered(
                job=str(self._job),
                state=state.value,
                said=said,
                seconds=round(self._answer.at - began, 3),
            )
        )
        return self._answer

    def _address(self, configured: str | None) -> Address:
        """What was configured, else what a job manager of this process knows, else the gateway."""
        known = _known.get(self._job.gateway)
        if configured is None and known is not None:
            address = known()
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
                "a stale route ends the run as without tinker_routefix; "
                "TINKER_ROUTEFIX_CONTROL_PLANE_URL can name an https one",
                job=str(self._job),
            )
        return False

    async def _fetch(self, address: Address, credentials: Mapping[str, str]) -> tuple[int, bytes]:
        self.questions += 1
        url = self._job.control_plane_url(address.root)
        secure = address.verify and url.startswith("https:")
        client = httpx.AsyncClient(
            verify=await tls_context() if secure else False,
            # Neither a redirect nor a proxy from the environment gets to see the keys.
            follow_redirects=False,
            trust_env=False,
            timeout=None,  # noqa: S113 - the caller bounds the whole question
        )
        keys = credentials if address.headers is None else address.headers
        headers = {**keys, "accept": "application/json", "accept-encoding": "identity"}
        async with client, client.stream("GET", url, headers=headers) as response:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BODY:
                    return response.status_code, b""
            return response.status_code, bytes(body)
