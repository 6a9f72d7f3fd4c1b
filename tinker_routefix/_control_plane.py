"""Ask the control plane whether a job runs.

A gateway 404 alone cannot tell a stale route from a job that is gone. The control plane can. One
question serves every request of the job, with the same key, that asks within the same moment; its
response stays good for about a second. It carries for how long the control plane has been saying
the same, and whoever waits decides how long that has to be.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from . import _addresses, _counters, _log, _question, _settings, events
from ._addresses import CREDENTIALS, Address
from ._job_state import NOT_ASKED, Answer, Told, read_answer, retry_after
from ._switch import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._counters import Counters
    from ._job import Job

GOOD_FOR = 1.0
"""Seconds that a response stays good. A single flight that ends with its response was measured
at 15 questions a second under load."""

LONGEST_BACKOFF = 4.0
"""Seconds between two questions to a control plane that cannot tell for now; 1, 2, 4, 4, …"""

SAME_WITHIN = 15.0
"""Seconds. A response that confirms another one has to come within so many of it."""

FLIGHTS = 8
"""Keys of one job that are remembered: tokens rotate, and must not pile up."""


class _Flight:
    """The questions about one job that are put with one key."""

    def __init__(self) -> None:
        self.answer = NOT_ASKED
        self.question: asyncio.Task[Answer] | None = None
        self._told_nothing = 0

    def note(self, told: Told, said: str, pause: float) -> Answer:
        """The answer, with how long it has been the same and when to ask again."""
        now, before = time.monotonic(), self.answer
        same = before.told is told and now - before.answered_at < SAME_WITHIN
        self._told_nothing = self._told_nothing + 1 if told is Told.NOTHING else 0
        backoff = min(2.0 ** (min(self._told_nothing, 10) - 1), LONGEST_BACKOFF)
        wait = max(GOOD_FOR, backoff if self._told_nothing else 0.0, pause)
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
        self._counters = counters or _counters.of(job)
        self._flights: OrderedDict[bytes, _Flight] = OrderedDict()
        self._warned = False
        self.connections = _question.Connections(job)
        settings = _settings.current()
        configured = settings.control_plane_url
        # A job manager's is looked at when it is asked: the program may still make one.
        if configured is not None or not _addresses.is_known(job.gateway):
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
    def root(self) -> str:
        """Where it is asked, as far as is known now."""
        return _addresses.address_of(self._job, {}).root

    @property
    def last_answer(self) -> Answer:
        """What was said last, to any key."""
        answers = [flight.answer for flight in self._flights.values()]
        return max(answers, key=lambda answer: answer.answered_at, default=NOT_ASKED)

    async def ask(self, headers: Mapping[str, str]) -> Answer:
        """Whether the job runs, as of at most :data:`GOOD_FOR` seconds ago; never raises.

        Where the control plane could not tell, or has asked for a pause, longer ago.

        Args:
            headers: Those of the refused request; only its credentials are sent on.
        """
        credentials = {name: headers[name] for name in CREDENTIALS if name in headers}
        try:
            address = _addresses.address_of(self._job, credentials)
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
        began = time.monotonic()
        try:
            told, said, pause = await self._response(address, credentials)
        finally:
            flight.question = None
        answer = flight.note(told, said, pause)
        events.publish(
            events.QuestionAnswered(
                job=str(self._job),
                gateway=self._job.gateway,
                state=answer.state.value,
                control_plane_said=said,
                seconds=round(answer.answered_at - began, 3),
            )
        )
        return answer

    async def _response(
        self, address: Address, credentials: Mapping[str, str]
    ) -> tuple[Told, str, float]:
        """What it says or why it says nothing, and the pause that it asks for."""
        timeout = _settings.current().control_plane_timeout

        async def fetch() -> _question.Response:
            return await self.connections.fetch(address, credentials)

        try:
            if not self._may_ask(address.root):
                return Told.NOTHING, "not asked, because its URL is not https", 0.0
            status, body, header = await _question.hedged_with_timeout(timeout, fetch)
            told, said = read_answer(status, body)
        except TimeoutError:
            return Told.NOTHING, f"no answer within {timeout:g} s", 0.0
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not say RUNNING
            return Told.NOTHING, f"no answer ({type(error).__name__})", 0.0
        return told, said, retry_after(header) if told is Told.NOTHING else 0.0

    def _may_ask(self, root: str) -> bool:
        """Whether a key may be sent to a control plane; says so once where it may not."""
        if _addresses.may_carry_key(root, self._job):
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
