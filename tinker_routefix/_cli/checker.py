"""The work of ``tinker-routefix check``: ask, probe and take stock until the outcome is clear."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import time
from typing import TYPE_CHECKING

from tinker_routefix import _settings
from tinker_routefix._control_plane import GOOD_FOR, ControlPlane
from tinker_routefix._job_state import NOT_ASKED, JobState

from .probes import Probe, Prober, Seen
from .report import Change, Report
from .verdict import HEALTHY_STREAK, Evidence, key_is_wrong

if TYPE_CHECKING:
    from tinker_routefix._job import Job

    from .output import Mark, Screen

UNREACHABLE_AFTER = 3
"""Attempts without any answer after which nobody is there."""
WINDOW = 8
"""Probes by which the route is described: fewer would call every second replica a change."""
QUIET_RATE = 1.0
ASK_AGAIN = 5.0
"""Seconds after which the control plane is asked about a job that is well."""


class Checker:
    """Probes a route until the outcome is clear, or for ever."""

    def __init__(
        self, job: Job, key: str, to: Screen, *, key_variable: str, rate: float, watch: bool
    ) -> None:
        self.report = Report(job.account, job.name, job.gateway, started=time.time())
        self._headers = {"x-api-key": key, "authorization": f"Bearer {key}"}
        self._key_variable = key_variable
        self._to = to
        self._rate = rate
        self._watch = watch
        self._prober = Prober(job.url, self._headers)
        self.report.proxy = None if self._prober.proxy is None else str(self._prober.proxy)
        self._control_plane = ControlPlane(job)
        self._root = _settings.current().control_plane_url or job.gateway
        self._answer = NOT_ASKED
        self._window: collections.deque[Probe] = collections.deque(maxlen=WINDOW)
        self._streak = 0
        self._streak_running = 0
        """Answers in a row, all while the control plane answered RUNNING."""
        self._race_began = math.nan
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
        async with self._prober.client:
            while True:
                started = time.monotonic()
                probe, took = await self._prober.probe()
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

    async def _ask(self) -> None:
        self._answer = await self._control_plane.ask(self._headers)
        report = self.report
        report.questions = self._control_plane.questions
        report.control_plane = self._answer.message
        report.control_plane_state = self._answer.state.value
        if self._answer.state is JobState.STARTING:
            self._was_starting = True
        report.start_seen = report.start_seen or (self._was_starting and self._runs())

    def _runs(self) -> bool:
        return self._answer.state is JobState.RUNNING

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
        if time.monotonic() - self._answer.answered_at > self._max_age(probe):
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
        # Otherwise as old as the control plane's responses may get; and where it has none, it can
        # be slow, and the probes shall not have to wait for it each time.
        return ASK_AGAIN if well or self._answer.state is JobState.UNKNOWN else GOOD_FOR

    def _note_change(self) -> None:
        report = self.report
        words = sorted({probe.message for probe in self._window})
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
                    mark_of(self._window[-1]),
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
        ended = self._answer.state is JobState.ENDED
        return self._streak >= HEALTHY_STREAK or (refused and (ended or key_is_wrong(report)))

    def conclude(self) -> Report:
        """Say what it all means."""
        report = self.report
        report.seconds = time.monotonic() - self._began if report.probes else 0.0
        evidence = Evidence(
            report,
            window=self._window,
            streak=self._streak,
            streak_running=self._streak_running,
            state=self._answer.state,
            proxy=self._prober.proxy,
            root=self._root,
            key_variable=self._key_variable,
        )
        outcome = evidence.outcome()
        report.exit_code, report.verdict = int(outcome.code), outcome.verdict
        report.message, report.advice = outcome.message, outcome.advice
        faults = [probe.fault for probe in self._window if probe.fault is not None]
        report.fault = faults[-1].value if faults else None
        evidence.name_fix()
        return report


def mark_of(probe: Probe) -> Mark:
    """How what came of a probe is shown."""
    if probe.seen is Seen.ANSWERED:
        return "good"
    return "warn" if probe.seen in (Seen.REFUSED, Seen.NOT_READY) else "bad"
