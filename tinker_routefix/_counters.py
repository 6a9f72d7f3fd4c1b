"""What has happened on the route to one job, in numbers: made of its events alone."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING

from . import events

if TYPE_CHECKING:
    from ._job import Job


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Counters:
    """The numbers of one job, as :class:`~tinker_routefix.JobStatus` shows and explains them."""

    refused: int = 0
    questions: int = 0
    probes: int = 0
    replays: int = 0
    recovered: int = 0
    given_up: int = 0
    uncertain: int = 0
    failed_fast: int = 0
    cancelled: int = 0
    telemetry_dropped: int = 0
    longest_wait: float = 0.0
    warmups: int = 0
    warmup_seconds: float = 0.0
    last_intervention: float | None = None
    gateway_fix: str | None = None

    def add(self, event: events.Event) -> None:
        """Count one event of the job's."""
        match event:
            case events.Refused():
                self.refused += 1
                self.last_intervention = event.at
            case events.ProbesSent():
                self.probes += event.number
            case events.Replayed():
                self.replays += 1
            case events.QuestionAsked():
                self.questions += 1
            case events.Recovered():
                self.recovered += 1
                self._wait_ended(event.seconds)
            case events.FailedFast():  # a GivenUp as well
                self.failed_fast += 1
                self._wait_ended(event.seconds)
            case events.GivenUp():
                self.given_up += 1
                self._wait_ended(event.seconds)
            case events.Uncertain():
                self.uncertain += 1
                self._wait_ended(event.seconds)
            case events.Cancelled():
                self.cancelled += 1
            case events.TelemetryDropped():
                self.telemetry_dropped += 1
            case events.WarmupStarted():
                self.warmups += 1
            case events.WarmupEnded():
                self.warmup_seconds += event.seconds
                if event.refused:
                    self._refused_warmup_ended(event)
            case events.FixSeen():
                self.gateway_fix = event.fix

    def _refused_warmup_ended(self, event: events.WarmupEnded) -> None:
        self.recovered += event.outcome == "warm"
        self.given_up += event.outcome == "timeout"
        self.failed_fast += event.outcome == "job ended"
        self.cancelled += event.outcome == "cancelled"
        if event.outcome != "cancelled":
            self._wait_ended(event.seconds)

    def _wait_ended(self, seconds: float) -> None:
        self.longest_wait = max(self.longest_wait, seconds)


_fed: weakref.WeakValueDictionary[tuple[str, str], Counters] = weakref.WeakValueDictionary()
"""By gateway and job, as events name them. Who shows them keeps them alive."""


def feed(job: Job, counters: Counters | None = None) -> Counters:
    """Have the events of a job counted, by new counters or by these."""
    counters = counters or Counters()
    _fed[job.gateway, str(job)] = counters
    return counters


def of(job: Job) -> Counters:
    """The counters of a job, wherever they are; new ones if there are none."""
    return _fed.get((job.gateway, str(job))) or feed(job)


def count(event: events.Event) -> None:
    """Count an event, wherever its job's counters are."""
    counters = _fed.get((event.gateway, event.job))
    if counters is not None:
        counters.add(event)


# Every fact is counted by way of its event.
events.listen(count)
