"""The verdict of ``tinker-routefix check``: what was seen, what it means, and what to do next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import httpx

from tinker_routefix._job_state import JobState
from tinker_routefix._verdict import Fix

from .diagnosis import Fault
from .probes import Probe, Seen
from .report import Exit, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .diagnosis import Proxy

HEALTHY_STREAK = 20
"""Answers in a row that make a route healthy."""
LOOKUP_RETRIED = "lookup retried"
"""The fix that no single answer shows: no probe is refused from the first moment on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What it all means, and what to do next."""

    code: Exit
    verdict: str
    message: str
    advice: str


def key_is_wrong(report: Report) -> bool:
    """Whether the gateway or the control plane has refused the key."""
    message = report.control_plane
    return bool(report.denied) or "HTTP 401" in message or "HTTP 403" in message


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """All that a verdict is made of."""

    report: Report
    window: Sequence[Probe]
    """The latest probes."""
    streak: int
    """Answers in a row, up to now."""
    streak_running: int
    """Those of them while the control plane answered RUNNING."""
    state: JobState
    """What the control plane's last response means."""
    proxy: Proxy | None
    root: str
    """Where the control plane is asked."""
    key_variable: str

    @property
    def _runs(self) -> bool:
        return self.state is JobState.RUNNING

    def outcome(self) -> Outcome:
        """What it all means."""
        report = self.report
        if not self.window:
            return Outcome(
                Exit.UNCLEAR, "unclear", "nothing was probed", "Let it run until it ends by itself."
            )
        last = self.window[-1]
        if key_is_wrong(self.report):
            return self._wrong_key()
        if self.state is JobState.ENDED:
            return self._gone(last)
        if report.raced:
            return self._racing()
        if report.failed == report.probes:
            return Outcome(Exit.UNREACHABLE, "unreachable", last.message, self._fault_advice(last))
        well = self.streak >= HEALTHY_STREAK or self.streak == report.probes
        if well and self._runs:
            return Outcome(
                Exit.HEALTHY,
                "healthy",
                f"{self._count()}, each over a fresh connection, and the job is RUNNING",
                "Start the training run: the job and its route are ready now.",
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
        status = self.window[-1].message if self.report.denied else self.report.control_plane
        also = (
            ", although the gateway does" if self.report.answered and not self.report.denied else ""
        )
        message = f"the {who} does not accept this key for this job{also}: {status}"
        advice = (
            f"Check the key in {self.key_variable}, and whether the account in the URL is its own"
        )
        if who == "control plane":
            advice += (
                f"; if the control plane is not at {self.root}, set "
                "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
            )
        return Outcome(Exit.WRONG_KEY, "wrong key", message, f"{advice}.")

    def _gone(self, last: Probe) -> Outcome:
        report = self.report
        message = f"the control plane's response: {report.control_plane}"
        if last.seen is Seen.ANSWERED:
            message += ", although the route still answers"
        known = report.control_plane.startswith("JOB_STATE_")
        advice = (
            "See what ended or suspended the job; resume from its last checkpoint on one that runs."
            if known
            else "Check the account and the job in the URL; a job that was deleted does not return."
        )
        return Outcome(Exit.GONE, "gone", message, advice)

    def _racing(self) -> Outcome:
        report = self.report
        refused = (
            f"{report.raced} of {report.probes} probes were refused while the job was RUNNING, "
            f"over {report.race_seconds:.1f} s"
        )
        if self.streak:
            last = "the last one was" if self.streak == 1 else f"the last {self.streak} were"
            return Outcome(
                Exit.RACING,
                "racing",
                f"{refused}; {last} answered",
                "Keep tinker_routefix in the training run: without it, one such refusal ends it.",
            )
        return Outcome(
            Exit.RACING,
            "racing",
            f"{refused}, and the route is not back yet",
            "Check again in a minute; if it stays like this, tell whoever runs the gateway: "
            "tinker_routefix waits for a route, but only for two minutes.",
        )

    def _unclear(self, last: Probe, *, well: bool) -> Outcome:
        report = self.report
        routed = last.seen in (Seen.ANSWERED, Seen.REFUSED, Seen.NOT_READY)
        if routed and self.state is JobState.STARTING:
            message = f"the job has not started: {report.control_plane}"
            if last.seen is Seen.ANSWERED:
                message += ", although its route answers"
            advice = "Wait until it is RUNNING; with --watch this command shows how it starts."
        elif well or last.seen in (Seen.REFUSED, Seen.NOT_READY):
            message = (
                f"{self._count()}, but there is no usable response of the control plane: "
                f"{report.control_plane}"
            )
            advice = self._control_plane_advice()
        elif last.message == report.route and report.other == report.probes:
            message = (
                f"the answer was {last.message}, {report.probes} times in {report.seconds:.1f} s"
            )
            advice = self._fault_advice(last)
        else:
            message = f"{self._count()}; the last ones: {report.route}"
            advice = self._fault_advice(last)
        return Outcome(Exit.UNCLEAR, "unclear", message, advice)

    def _control_plane_advice(self) -> str:
        message = self.report.control_plane
        variable = "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
        if message.startswith("not asked"):
            return f"Set {variable} to the https URL of the control plane."
        if message.startswith(("no answer", "HTTP 5", "HTTP 408", "HTTP 429")):
            direct = self.proxy and self.root.startswith("http:")
            directly = " It is asked directly, not through the proxy." if direct else ""
            return (
                f"Check again in a minute; if the control plane is not at {self.root}, set "
                f"{variable}.{directly}"
            )
        return f"Set {variable}: there seems to be no control plane at {self.root}."

    def _fault_advice(self, last: Probe) -> str:
        """What to do about an answer, or the lack of one, that is not the pod's."""
        status = last.status or 0
        if last.fault is Fault.PROXY:
            return (
                f"Correct the proxy in {self.proxy.variable}, or name the host in NO_PROXY."
                if self.proxy
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

    def name_fix(self) -> None:
        """Name the fix that the gateway showed, if it did, in the report."""
        report = self.report
        if report.not_ready:
            report.gateway_fix = Fix.ROUTE_NOT_READY.value
            report.gateway_fix_message = (
                "the gateway answers 503 route_not_ready for a stale route, which the SDK repeats "
                "by itself: this gateway does not need the shim"
            )
        elif report.start_seen and not report.raced and self.streak_running >= HEALTHY_STREAK:
            report.gateway_fix = LOOKUP_RETRIED
            report.gateway_fix_message = (
                "no probe was refused once the job was seen RUNNING: as if the gateway retried "
                "the lookup itself; if all new jobs start like this, it does not need the shim"
            )
