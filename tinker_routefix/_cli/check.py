"""``tinker-routefix check``: what a job's gateway and its control plane say right now.

Its report is a public interface: ``docs/check.schema.json`` describes it, and tests hold it to
that.

A health check proves nothing about a route: it can be answered while the paths that training
uses are still refused. So a path that does go through the route table is probed, over a fresh
connection each time, because connections stay with one replica of the gateway and only some of
those may know the route.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx

from tinker_routefix import _settings, _verdict
from tinker_routefix._control_plane import GOOD_FOR, NOT_ASKED, ControlPlane, JobState
from tinker_routefix._job import Job
from tinker_routefix._switch import SettingError
from tinker_routefix._verdict import Cure, Verdict
from tinker_routefix._version import __version__

from .diagnosis import Fault, explain, proxy_for
from .output import Json, Mark, Row, Screen, screen

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

PATH = "/api/v1/get_server_capabilities"
"""What is probed: light, and through the route table."""
SECONDS = 15.0
HEALTHY_STREAK = 20
"""Answers in a row that make a route healthy."""
UNREACHABLE_AFTER = 3
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
    TERMINATED = 143


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
    status: int | None = None
    """None where there was no HTTP answer."""
    fault: Fault | None = None
    """What kept it from being answered."""


def read_probe(status: int, body: bytes) -> Probe:
    """What an answer to a probe means; never raises."""
    if _verdict.is_route_not_ready(status, body):
        cure = Cure.ROUTE_NOT_READY
        return Probe(Seen.NOT_READY, cure.value, cure, status)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Probe(Seen.DENIED, f"HTTP {status}", status=status)
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        if _verdict.of_body(body) is Verdict.POD:
            return Probe(Seen.ANSWERED, "answers", status=status)
        return Probe(Seen.REFUSED, f"the gateway's {status}", status=status)
    if status < httpx.codes.MULTIPLE_CHOICES:
        return Probe(Seen.ANSWERED, "answers", status=status)
    fault = Fault.PROXY if status == httpx.codes.PROXY_AUTHENTICATION_REQUIRED else None
    return Probe(Seen.OTHER, f"HTTP {status}", status=status, fault=fault)


@dataclasses.dataclass(slots=True)
class Change:
    """From when on the route or the control plane said something else."""

    at: float
    """A Unix timestamp, as all moments here."""
    route: str
    control_plane: str


@dataclasses.dataclass(slots=True)
class Report:
    """All that was seen, as ``--json`` prints it; the page of the command line explains it."""

    account: str
    job: str
    gateway: str
    started: float
    verdict: str = "unclear"
    said: str = ""
    advice: str = ""
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
    slowest: float | None = None
    """Of the answers; None: there were none."""
    proxy: str | None = None
    fault: str | None = None
    control_plane: str = "not asked"
    """Its last response."""
    control_plane_state: str = JobState.UNKNOWN.value
    questions: int = 0
    route: str = "not probed"
    """What the latest probes got."""
    start_seen: bool = False
    """Whether the job was seen before it was RUNNING, and then RUNNING."""
    cure: str | None = None
    cure_says: str | None = None
    changes: list[Change] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What it all means, and what to do next."""

    code: Exit
    verdict: str
    said: str
    advice: str


class Checker:
    """Probes a route until the outcome is clear, or for ever."""

    def __init__(
        self, job: Job, key: str, to: Screen, *, key_variable: str, rate: float, watch: bool
    ) -> None:
        self.report = Report(job.account, job.name, job.gateway, started=time.time())
        self._job = job
        self._url = f"{job.url}{PATH}"
        self._headers = {"x-api-key": key, "authorization": f"Bearer {key}"}
        self._key_variable = key_variable
        self._to = to
        self._rate = rate
        self._watch = watch
        self._proxy = proxy_for(self._url)
        self.report.proxy = None if self._proxy is None else str(self._proxy)
        self._control_plane = ControlPlane(job)
        self._root = _settings.current().control_plane_url or job.gateway
        self._client = self._connected_anew()
        self._answer = NOT_ASKED
        self._window: collections.deque[Probe] = collections.deque(maxlen=WINDOW)
        self._streak = 0
        self._streak_running = 0
        """Answers in a row, all while the control plane said RUNNING."""
        self._race_began = math.nan
        self._cures: dict[Cure, str] = {}
        self._was_starting = False
        self._began = time.monotonic()

    async def run(self, seconds: float) -> None:
        """Probe for so long, unless it is clear before."""
        await self._ask()
        if self._watch and self._runs():
            self._to.line(
                "The job was RUNNING before this watch began: too late to see its start. Whether "
                "its gateway still needs the shim shows on a job that is still being created.",
                "warn",
            )
        self._began = time.monotonic()
        async with self._client:
            while True:
                started = time.monotonic()
                probe, took = await self._probe()
                await self._take(probe, took)
                if self._is_clear():
                    return
                left = self._began + seconds - time.monotonic()
                if left <= 0:
                    return
                streak = self._streak_running if self._runs() else self._streak
                quiet = self._watch and streak >= HEALTHY_STREAK
                gap = 1 / (min(QUIET_RATE, self._rate) if quiet else self._rate)
                await asyncio.sleep(min(max(started + gap - time.monotonic(), 0.0), left))

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
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                self._client.stream("GET", self._url) as response,
            ):
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _verdict.MAX_BODY:
                        break
            probe = read_probe(response.status_code, bytes(body))
        except TimeoutError:
            said = f"no answer within {PROBE_SECONDS:g} s"
            probe = Probe(Seen.FAILED, said, fault=Fault.NETWORK)
        except Exception as error:  # noqa: BLE001 - its text could hold a header
            fault, said = explain(error, self._url, self._proxy)
            probe = Probe(Seen.FAILED, said, fault=fault)
        return probe, time.monotonic() - began

    async def _ask(self) -> None:
        self._answer = await self._control_plane.ask(self._headers)
        report = self.report
        report.questions = self._control_plane.questions
        report.control_plane = self._answer.said
        report.control_plane_state = self._answer.state.value
        if self._answer.state is JobState.ON_ITS_WAY:
            self._was_starting = True
        report.start_seen = report.start_seen or (self._was_starting and self._runs())

    def _runs(self) -> bool:
        return self._answer.state is JobState.RUNNING

    # -- taking stock --------------------------------------------------------------------------

    async def _take(self, probe: Probe, took: float) -> None:
        report = self.report
        at = time.monotonic() - took
        ran = self._runs()
        report.probes += 1
        name = probe.seen.name.lower()
        setattr(report, name, getattr(report, name) + 1)
        if probe.status is not None:
            report.slowest = max(report.slowest or 0.0, took)
        self._window.append(probe)
        self._streak = self._streak + 1 if probe.seen is Seen.ANSWERED else 0
        if probe.cure is not None:
            self._cures[probe.cure] = probe.said
        if time.monotonic() - self._answer.at > self._max_age(probe):
            await self._ask()
        runs = ran and self._runs()
        answered = probe.seen is Seen.ANSWERED
        self._streak_running = self._streak_running + 1 if runs and answered else 0
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

    def _max_age(self, probe: Probe) -> float:
        """How old the control plane's response may be."""
        well = probe.seen is Seen.ANSWERED and self._runs()
        # Otherwise as old as the control plane's answers may get; and where it has none, it can
        # be slow, and the probes shall not have to wait for it each time.
        return ASK_AGAIN if well or self._answer.state is JobState.UNKNOWN else GOOD_FOR

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
        if report.failed == report.probes >= UNREACHABLE_AFTER:
            return not self._watch
        if self._watch:
            return False
        refused = self._window[-1].seen is Seen.REFUSED
        return self._streak >= HEALTHY_STREAK or (
            refused and (self._is_over() or self._key_is_wrong())
        )

    def _is_over(self) -> bool:
        return self._answer.state is JobState.OVER

    def _key_is_wrong(self) -> bool:
        said = self.report.control_plane
        return bool(self.report.denied) or "HTTP 401" in said or "HTTP 403" in said

    def conclude(self) -> Report:
        """Say what it all means."""
        report = self.report
        report.seconds = time.monotonic() - self._began if report.probes else 0.0
        outcome = self._outcome()
        report.exit_code, report.verdict = int(outcome.code), outcome.verdict
        report.said, report.advice = outcome.said, outcome.advice
        faults = [probe.fault for probe in self._window if probe.fault is not None]
        report.fault = faults[-1].value if faults else None
        self._name_cure()
        return report

    def _outcome(self) -> Outcome:
        report = self.report
        if not self._window:
            return Outcome(
                Exit.UNCLEAR, "unclear", "nothing was probed", "Let it run until it ends by itself."
            )
        last = self._window[-1]
        if self._key_is_wrong():
            return self._wrong_key()
        if self._is_over():
            return self._gone(last)
        if report.raced:
            return self._racing()
        if report.failed == report.probes:
            return Outcome(Exit.UNREACHABLE, "unreachable", last.said, self._fault_advice(last))
        well = self._streak >= HEALTHY_STREAK or self._streak == report.probes
        if well and self._runs():
            return Outcome(
                Exit.HEALTHY,
                "healthy",
                f"{self._count()}, each over a fresh connection, and the job is RUNNING",
                "Start the training run; nothing else is needed.",
            )
        return self._unclear(last, well=well)

    def _count(self) -> str:
        report = self.report
        if report.answered == report.probes > 1:
            return f"all {report.probes} probes were answered by the pod in {report.seconds:.1f} s"
        by_pod = f"{report.answered} of {report.probes} probes were answered by the pod"
        return f"{by_pod} in {report.seconds:.1f} s"

    def _wrong_key(self) -> Outcome:
        who = "gateway" if self.report.denied else "control plane"
        status = self._window[-1].said if self.report.denied else self.report.control_plane
        also = (
            ", although the gateway does" if self.report.answered and not self.report.denied else ""
        )
        said = f"the {who} does not accept this key for this job{also}: {status}"
        advice = (
            f"Check the key in {self._key_variable}, and whether the account in the URL is its own"
        )
        if who == "control plane":
            advice += (
                f"; if the control plane is not at {self._root}, set "
                "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
            )
        return Outcome(Exit.WRONG_KEY, "wrong key", said, f"{advice}.")

    def _gone(self, last: Probe) -> Outcome:
        report = self.report
        said = f"the control plane says: {report.control_plane}"
        if last.seen is Seen.ANSWERED:
            said += ", although the route still answers"
        known = report.control_plane.startswith("JOB_STATE_")
        advice = (
            "See why the job ended or sleeps, and resume from its last checkpoint on one that runs."
            if known
            else "Check the account and the job in the URL; a job that was deleted does not return."
        )
        return Outcome(Exit.GONE, "gone", said, advice)

    def _racing(self) -> Outcome:
        report = self.report
        refused = (
            f"{report.raced} of {report.probes} probes were refused while the job was RUNNING, "
            f"over {report.race_seconds:.1f} s"
        )
        if self._streak:
            last = "the last one was" if self._streak == 1 else f"the last {self._streak} were"
            return Outcome(
                Exit.RACING,
                "racing",
                f"{refused}; {last} answered",
                "Keep tinker_routefix in the training run: without it, one such refusal ends it.",
            )
        return Outcome(
            Exit.RACING,
            "racing",
            f"{refused}, and at the end still",
            "Check again in a minute; if it stays like this, tell whoever runs the gateway: "
            "tinker_routefix waits for a route, but only for two minutes.",
        )

    def _unclear(self, last: Probe, *, well: bool) -> Outcome:
        report = self.report
        routed = last.seen in (Seen.ANSWERED, Seen.REFUSED, Seen.NOT_READY)
        if routed and self._answer.state is JobState.ON_ITS_WAY:
            said = f"the job has not started: {report.control_plane}"
            if last.seen is Seen.ANSWERED:
                said += ", although its route answers"
            advice = "Wait until it is RUNNING; with --watch this command shows how it starts."
        elif well or last.seen in (Seen.REFUSED, Seen.NOT_READY):
            said = (
                f"{self._count()}, but whether the job runs could not be learnt from the control "
                f"plane: {report.control_plane}"
            )
            advice = self._control_plane_advice()
        elif last.said == report.route and report.other == report.probes:
            said = f"the answer was {last.said}, {report.probes} times in {report.seconds:.1f} s"
            advice = self._fault_advice(last)
        else:
            said = f"{self._count()}; the last ones: {report.route}"
            advice = self._fault_advice(last)
        return Outcome(Exit.UNCLEAR, "unclear", said, advice)

    def _control_plane_advice(self) -> str:
        said = self.report.control_plane
        variable = "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
        if said.startswith("not asked"):
            return f"Set {variable} to the https URL of the control plane."
        if said.startswith(("no answer", "HTTP 5", "HTTP 408", "HTTP 429")):
            directly = " It is asked directly, not through the proxy." if self._proxy else ""
            return (
                f"Check again in a minute; if the control plane is not at {self._root}, set "
                f"{variable}.{directly}"
            )
        return f"Set {variable}: there seems to be no control plane at {self._root}."

    def _fault_advice(self, last: Probe) -> str:
        """What to do about an answer, or the lack of one, that is not the pod's."""
        status = last.status or 0
        if last.fault is Fault.PROXY:
            return (
                f"Correct the proxy in {self._proxy.variable}, or name the host in NO_PROXY."
                if self._proxy
                else "Something between here and the gateway wants a login: ask who runs it."
            )
        if last.fault is Fault.CERTIFICATE:
            return (
                "If your network has a certificate authority of its own, name its file in "
                "SSL_CERT_FILE; otherwise check the host's name and this machine's clock."
            )
        if last.fault is Fault.SCHEME:
            return "Check the host and the port: what listens there expects http, not https."
        if last.fault is Fault.NAME:
            return "Check the host in the URL, and whether this machine can resolve names."
        if last.fault is Fault.NETWORK:
            return (
                "Check the host and the port in the URL, and whether this network may reach them."
            )
        if 300 <= status < 400:
            return (
                "Give the URL that the redirect leads to: it is not followed, because the key "
                "would go along."
            )
        if status == httpx.codes.TOO_MANY_REQUESTS:
            return "Try again later, with a lower --rate."
        if status >= 500:
            return (
                "Check again in a minute, and tell whoever runs the gateway if it stays: tinker "
                "repeats such a request by itself."
            )
        if last.seen is Seen.ANSWERED:
            return "Check again, with more --seconds."
        return "Check that the URL is that of a trainer job."

    def _name_cure(self) -> None:
        report = self.report
        if Cure.ROUTE_NOT_READY in self._cures:
            report.cure = Cure.ROUTE_NOT_READY.value
            report.cure_says = (
                "the gateway answers 503 route_not_ready for a stale route, which the SDK repeats "
                "by itself: this gateway does not need the shim"
            )
        elif report.start_seen and not report.raced and self._streak_running >= HEALTHY_STREAK:
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
        checker = Checker(job, key, to, key_variable=key_variable, rate=rate, watch=watch)
    except (_UsageError, SettingError) as error:
        sys.stderr.write(f"tinker-routefix check: {error}\n")
        return Exit.USAGE
    limit = seconds or (math.inf if watch else SECONDS)
    if not isinstance(to, Json):
        how_long = "until Ctrl-C" if math.isinf(limit) else f"for {limit:g} s at most"
        to.line(f"Probing job {job} behind {job.gateway}, {rate:g} times a second, {how_long}")
    ended_by: Exit | None = None
    try:
        asyncio.run(_until_terminated(checker.run(limit)))
    except KeyboardInterrupt:
        ended_by = Exit.INTERRUPTED
    except asyncio.CancelledError:
        ended_by = Exit.TERMINATED
    finally:
        to.close()
    report = checker.conclude()
    if ended_by is not None:
        report.interrupted, report.exit_code = True, ended_by
        sys.stderr.write(f"{ended_by.name.lower()}\n")
    to.record(dataclasses.asdict(report))
    _say(report, to)
    return report.exit_code


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Let SIGTERM end the work like Ctrl-C does, where there are signals and this may take them."""
    task = asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


_VERDICT_MARKS: dict[str, Mark] = {"healthy": "good", "racing": "warn", "unclear": "warn"}
_COUNTS = {
    "answered": "by the pod",
    "refused": "404 of the gateway",
    "not_ready": "503 route_not_ready",
    "denied": "401 or 403",
    "other": "other answers",
    "failed": "no answer",
}
"""What the counted probes got."""


def _say(report: Report, to: Screen) -> None:
    mark = _VERDICT_MARKS.get(report.verdict, "bad")
    rows = [
        Row(("control plane", report.control_plane)),
        Row(("route", report.route)),
        Row(("probes", str(report.probes))),
        *(
            Row((f"  {name}", str(count)))
            for field, name in _COUNTS.items()
            if (count := getattr(report, field))
        ),
    ]
    if report.slowest is not None:
        rows.append(Row(("slowest answer", f"{report.slowest:.2f} s")))
    if report.proxy is not None:
        rows.append(Row(("proxy", report.proxy)))
    to.table("What was seen", rows)
    to.line("")
    to.line(f"{report.verdict}: {report.said}", mark)
    to.line(f"Next: {report.advice}")
    if report.cure_says is not None:
        to.line(f"The gateway has changed: {report.cure_says}", "good")
