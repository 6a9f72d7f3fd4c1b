"""``tinker-routefix check``: what a job's gateway and its control plane say right now.

A health check proves nothing about a route: it can be answered while the paths that training
uses are still refused. So a path that does go through the route table is probed, over a fresh
connection each time, because connections stay with one replica of the gateway and only some of
those may know the route.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import json
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING

import httpx

from tinker_routefix import _settings, _verdict
from tinker_routefix._control_plane import GOOD_FOR, Answer, ControlPlane, JobState
from tinker_routefix._job import Job
from tinker_routefix._switch import SettingError
from tinker_routefix._verdict import Cure, Verdict
from tinker_routefix._version import __version__

from .output import Json, Mark, Row, Screen, screen

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "/api/v1/get_server_capabilities"
"""What is probed: light, and through the route table."""
SECONDS = 15.0
ENOUGH = 20
"""Answers in a row that make a route healthy."""
NOBODY = 3
"""Attempts without any answer after which nobody is there."""
WINDOW = 8
"""Probes by which the route is described: fewer would call every second replica a change."""
LOOKUP_RETRIED = "lookup retried"
"""The cure that no single answer shows: no probe is refused from the first moment on."""
QUIET_RATE = 1.0
ASK_AGAIN = 5.0
"""Seconds after which the control plane is asked about a job that is well."""
PROBE_SECONDS = 10.0
_TIMEOUT = httpx.Timeout(PROBE_SECONDS, connect=5.0)


class Exit(enum.IntEnum):
    """Exit codes of the command."""

    HEALTHY = 0
    USAGE = 2
    RACING = 3
    GONE = 4
    WRONG_KEY = 5
    UNREACHABLE = 6
    UNCLEAR = 7
    INTERRUPTED = 130


class Seen(enum.Enum):
    """What came of one probe."""

    ANSWERED = "answered"
    """By the pod, whatever it said."""
    REFUSED = "refused"
    """The gateway's 404, or one of unknown origin."""
    NOT_READY = "not ready"
    """503 with ``queue_state: route_not_ready``."""
    DENIED = "denied"
    """401 or 403."""
    FAILED = "failed"
    """No HTTP answer."""
    OTHER = "other"


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One answer of the gateway, or the lack of one."""

    seen: Seen
    said: str
    cure: Cure | None = None


def read_probe(status: int, body: bytes) -> Probe:
    """What an answer to a probe means; never raises."""
    cure = _verdict.cure_in(status, body)
    if cure is Cure.ROUTE_NOT_READY:
        return Probe(Seen.NOT_READY, cure.value, cure)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Probe(Seen.DENIED, f"HTTP {status}")
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        if _verdict.of_body(body) is Verdict.POD:
            return Probe(Seen.ANSWERED, "answers")
        if cure is not None:
            return Probe(Seen.REFUSED, f"{status} with the code {_code(body)}", cure)
        return Probe(Seen.REFUSED, f"the gateway's {status}")
    if status < httpx.codes.MULTIPLE_CHOICES:
        return Probe(Seen.ANSWERED, "answers")
    return Probe(Seen.OTHER, f"HTTP {status}")


def _code(body: bytes) -> str:
    """The code in a body that has one; it comes from outside, and is shown if it looks like one."""
    code: str = json.loads(body)["error"]["code"]
    return code if re.fullmatch("[A-Za-z_]{1,40}", code) else "(strange)"


@dataclasses.dataclass(slots=True)
class Change:
    """From when on the route or the control plane said something else."""

    at: float
    """Seconds since the epoch, as all moments here."""
    route: str
    control_plane: str


@dataclasses.dataclass(slots=True)
class Report:
    """All that was seen, as ``--json`` prints it."""

    account: str
    job: str
    gateway: str
    started: float
    verdict: str = "unclear"
    said: str = ""
    exit_code: int = Exit.UNCLEAR
    interrupted: bool = False
    seconds: float = 0.0
    probes: int = 0
    answered: int = 0
    refused: int = 0
    not_ready: int = 0
    denied: int = 0
    failed: int = 0
    other: int = 0
    raced: int = 0
    """Probes that were not let through while the control plane said RUNNING."""
    race_seconds: float = 0.0
    """From the first to the last of them."""
    slowest: float = 0.0
    control_plane: str = "not asked"
    """Its last word."""
    control_plane_state: str = JobState.UNKNOWN.value
    questions: int = 0
    route: str = "not probed"
    """What the latest probes met."""
    cure: str | None = None
    cure_says: str | None = None
    changes: list[Change] = dataclasses.field(default_factory=list)


class Checker:
    """Probes a route until the outcome is clear, or for ever."""

    def __init__(self, job: Job, key: str, to: Screen, *, rate: float, watch: bool) -> None:
        self.report = Report(job.account, job.name, job.gateway, started=time.time())
        self._job = job
        self._headers = {"x-api-key": key, "authorization": f"Bearer {key}"}
        self._to = to
        self._rate = rate
        self._watch = watch
        self._control_plane = ControlPlane(job)
        self._client = self._connected_anew()
        self._word = Answer(JobState.UNKNOWN, "not asked", -math.inf)
        self._window: collections.deque[Probe] = collections.deque(maxlen=WINDOW)
        self._streak = 0
        self._race_began = math.nan
        self._cures: dict[Cure, str] = {}
        self._was_on_its_way = False
        self._began = time.monotonic()

    async def run(self, seconds: float) -> None:
        """Probe for so long, unless it is clear before."""
        await self._ask()
        self._began = time.monotonic()
        async with self._client:
            while True:
                turn = time.monotonic()
                probe, took = await self._probe()
                await self._take(probe, took)
                if self._is_clear():
                    return
                left = self._began + seconds - time.monotonic()
                if left <= 0:
                    return
                quiet = self._watch and self._streak >= ENOUGH
                gap = 1 / (min(QUIET_RATE, self._rate) if quiet else self._rate)
                await asyncio.sleep(min(max(turn + gap - time.monotonic(), 0.0), left))

    # -- asking --------------------------------------------------------------------------------

    def _connected_anew(self) -> httpx.AsyncClient:
        """A client that keeps no connection; proxies and certificates as tinker's own has them."""
        try:
            return httpx.AsyncClient(
                headers={
                    **self._headers,
                    "user-agent": f"tinker-routefix/{__version__}",
                    "accept": "application/json",
                    "accept-encoding": "identity",
                },
                limits=httpx.Limits(max_keepalive_connections=0),
                follow_redirects=False,
                timeout=_TIMEOUT,
            )
        except Exception as error:
            # Its text may hold a proxy's password.
            raise _UsageError(
                "the environment names a proxy or certificates that cannot be used "
                f"({type(error).__name__}): look at HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and "
                "SSL_CERT_DIR"
            ) from error

    async def _probe(self) -> tuple[Probe, float]:
        url = f"{self._job.url}{PATH}"
        began = time.monotonic()
        try:
            async with asyncio.timeout(PROBE_SECONDS), self._client.stream("GET", url) as response:
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _verdict.MAX_BODY:
                        break
            probe = read_probe(response.status_code, bytes(body))
        except TimeoutError:
            probe = Probe(Seen.FAILED, f"no answer within {PROBE_SECONDS:g} s")
        except httpx.ConnectError as error:
            probe = Probe(Seen.FAILED, f"no connection ({error})")
        except Exception as error:  # noqa: BLE001 - its text could hold a header
            probe = Probe(Seen.FAILED, f"no answer ({type(error).__name__})")
        return probe, time.monotonic() - began

    async def _ask(self) -> None:
        self._word = await self._control_plane.ask(self._headers)
        report = self.report
        report.questions = self._control_plane.questions
        report.control_plane, report.control_plane_state = self._word.said, self._word.state.value
        if self._word.state is JobState.ON_ITS_WAY:
            self._was_on_its_way = True

    # -- taking stock --------------------------------------------------------------------------

    async def _take(self, probe: Probe, took: float) -> None:
        report = self.report
        at = time.monotonic() - took
        ran = self._word.state is JobState.RUNNING
        report.probes += 1
        name = probe.seen.name.lower()
        setattr(report, name, getattr(report, name) + 1)
        report.slowest = max(report.slowest, took)
        self._window.append(probe)
        self._streak = self._streak + 1 if probe.seen is Seen.ANSWERED else 0
        if probe.cure is not None:
            self._cures[probe.cure] = probe.said
        if time.monotonic() - self._word.at > self._patience(probe):
            await self._ask()
        runs = ran and self._word.state is JobState.RUNNING
        if runs and probe.seen in (Seen.REFUSED, Seen.NOT_READY):
            if not report.raced:
                self._race_began = at
            report.raced += 1
            report.race_seconds = time.monotonic() - self._race_began
        report.seconds = time.monotonic() - self._began
        self._note_change()
        self._to.progress(
            f"{report.probes} probes in {report.seconds:.0f} s: {report.answered} answered, "
            f"{report.refused + report.not_ready} refused; {report.control_plane}"
        )

    def _patience(self, probe: Probe) -> float:
        """How old the control plane's word may be."""
        well = probe.seen is Seen.ANSWERED and self._word.state is JobState.RUNNING
        # Otherwise as old as the control plane's answers may get; and where it has none, it can
        # be slow, and the probes shall not have to wait for it each time.
        return ASK_AGAIN if well or self._word.state is JobState.UNKNOWN else GOOD_FOR

    def _note_change(self) -> None:
        report = self.report
        words = sorted({probe.said for probe in self._window})
        report.route = words[0] if len(words) == 1 else f"mixed: {', '.join(words)}"
        change = Change(time.time(), report.route, report.control_plane)
        last = report.changes[-1] if report.changes else None
        if last is None or (last.route, last.control_plane) != (change.route, change.control_plane):
            report.changes.append(change)
            if self._watch:
                self._to.record({"change": dataclasses.asdict(change)})
                clock = time.strftime("%H:%M:%S", time.localtime(change.at))
                self._to.line(
                    f"{clock}  route: {change.route}; job: {change.control_plane}",
                    _mark(self._window[-1]),
                )

    def _is_clear(self) -> bool:
        report = self.report
        if report.denied:
            return True
        if report.failed == report.probes >= NOBODY:
            return not self._watch
        if self._watch:
            return False
        refused = self._window[-1].seen is Seen.REFUSED
        return self._streak >= ENOUGH or (refused and (self._is_over() or self._key_is_wrong()))

    def _is_over(self) -> bool:
        return self._word.state is JobState.OVER

    def _key_is_wrong(self) -> bool:
        word = self.report.control_plane
        return bool(self.report.denied) or (
            not self.report.answered and ("HTTP 401" in word or "HTTP 403" in word)
        )

    def conclude(self) -> Report:
        """Say what it all means."""
        report = self.report
        report.seconds = time.monotonic() - self._began
        code, verdict, said = self._outcome()
        report.exit_code, report.verdict, report.said = int(code), verdict, said
        self._name_cure()
        return report

    def _outcome(self) -> tuple[Exit, str, str]:
        report = self.report
        last = self._window[-1].seen if self._window else None
        count = (
            f"{report.answered} of {report.probes} probes were answered in {report.seconds:.1f} s"
        )
        if last is None:
            return Exit.UNCLEAR, "unclear", "nothing was probed"
        if self._key_is_wrong():
            who = "gateway" if report.denied else "control plane"
            return Exit.WRONG_KEY, "wrong key", f"the {who} does not accept this key for this job"
        if last is Seen.REFUSED and self._is_over():
            return Exit.GONE, "gone", f"the control plane says: {report.control_plane}"
        if report.raced:
            refused = (
                f"{report.raced} of {report.probes} probes were refused while the job was RUNNING, "
                f"over {report.race_seconds:.1f} s"
            )
            if self._streak:
                return Exit.RACING, "racing", f"{refused}; the last {self._streak} were answered"
            return Exit.RACING, "racing", f"{refused}, and at the end still"
        if report.failed == report.probes:
            return Exit.UNREACHABLE, "unreachable", self._window[-1].said
        if self._streak >= ENOUGH or self._streak == report.probes:
            return Exit.HEALTHY, "healthy", f"{count}, each over a fresh connection"
        if last is Seen.REFUSED:
            if self._word.state is JobState.ON_ITS_WAY:
                return Exit.UNCLEAR, "unclear", f"the job has not started: {report.control_plane}"
            said = f"{count}; the control plane cannot tell whether the job runs"
            return Exit.UNCLEAR, "unclear", f"{said}: {report.control_plane}"
        return Exit.UNCLEAR, "unclear", f"{count}; at the end: {report.route}"

    def _name_cure(self) -> None:
        report = self.report
        if Cure.ROUTE_NOT_READY in self._cures:
            report.cure = Cure.ROUTE_NOT_READY.value
            report.cure_says = (
                "the gateway answers 503 route_not_ready for a stale route, which the SDK repeats "
                "by itself: this gateway does not need the shim"
            )
        elif Cure.DISTINCT_CODE in self._cures:
            report.cure = Cure.DISTINCT_CODE.value
            report.cure_says = (
                "the gateway tells a stale route from a job that is gone "
                f"({self._cures[Cure.DISTINCT_CODE]}): an SDK that knows the code does not need "
                "the shim"
            )
        elif self._was_on_its_way and not report.raced and self._streak >= ENOUGH:
            report.cure = LOOKUP_RETRIED
            report.cure_says = (
                "no probe was refused once the job was seen RUNNING: as if the gateway retried "
                "the lookup itself; if all new jobs start like this, it does not need the shim"
            )


def _mark(probe: Probe) -> Mark:
    if probe.seen is Seen.ANSWERED:
        return "good"
    return "warn" if probe.seen in (Seen.REFUSED, Seen.NOT_READY) else "bad"


# -- the command -------------------------------------------------------------------------------


class _UsageError(Exception):
    pass


def _job_of(url: str) -> Job:
    job = Job.from_url(url)
    if job is None:
        # What was given is not repeated: it may hold a password.
        raise _UsageError(
            "this is no trainer job's URL; it looks like "
            "https://HOST/training/v1/rlorTrainerJobs/ACCOUNT/JOB"
        )
    if not (job.gateway.startswith("https:") or _settings.http_on_loopback(job.gateway)):
        raise _UsageError("the key is not sent over plain http: give the https URL")
    return job


def _key_in(variable: str, environment: Mapping[str, str]) -> str:
    if not variable.isidentifier():
        # What was given is not repeated: it may be the key.
        raise _UsageError("--key-env takes the name of a variable, not the key")
    key = environment.get(variable, "").strip()
    if not key:
        raise _UsageError(f"no key: set {variable}, or name another variable with --key-env")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise _UsageError(f"what {variable} holds is no key: it has blanks or strange characters")
    return key


def check(
    url: str,
    *,
    key_variable: str,
    seconds: float | None,
    rate: float,
    watch: bool,
    as_json: bool,
    to: Screen | None = None,
) -> int:
    """Ask and probe, and say what was seen.

    Returns:
        The exit code, one of :class:`Exit`.
    """
    to = to or screen(as_json=as_json, one_a_line=watch)
    try:
        job = _job_of(url)
        key = _key_in(key_variable, os.environ)
        checker = Checker(job, key, to, rate=rate, watch=watch)
    except (_UsageError, SettingError) as error:
        sys.stderr.write(f"tinker-routefix check: {error}\n")
        return Exit.USAGE
    limit = seconds or (math.inf if watch else SECONDS)
    if not isinstance(to, Json):
        how_long = "until Ctrl-C" if math.isinf(limit) else f"for {limit:g} s at most"
        to.line(f"Probing job {job} behind {job.gateway}, {rate:g} times a second, {how_long}")
    interrupted = False
    try:
        asyncio.run(checker.run(limit))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        to.close()
    report = checker.conclude()
    report.interrupted = interrupted
    if interrupted:
        report.exit_code = Exit.INTERRUPTED
        sys.stderr.write("interrupted\n")
    to.record(dataclasses.asdict(report))
    _say(report, to)
    return report.exit_code


_VERDICT_MARKS: dict[str, Mark] = {"healthy": "good", "racing": "warn", "unclear": "warn"}


def _say(report: Report, to: Screen) -> None:
    mark = _VERDICT_MARKS.get(report.verdict, "bad")
    to.table(
        "What was seen",
        [
            Row(("control plane", report.control_plane)),
            Row(("route", report.route)),
            *(
                Row((name.replace("_", " "), str(count)))
                for name in (
                    "probes",
                    "answered",
                    "refused",
                    "not_ready",
                    "denied",
                    "failed",
                    "other",
                )
                if (count := getattr(report, name)) or name == "probes"
            ),
            Row(("slowest answer", f"{report.slowest:.2f} s")),
        ],
    )
    to.line(f"\n{report.verdict}: {report.said}", mark)
    if report.cure_says is not None:
        to.line(f"cure seen: {report.cure_says}", "good")
