"""``tinker-routefix check``: what a job's gateway and its control plane say right now."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from tinker_routefix import _settings
from tinker_routefix._job import Job
from tinker_routefix._switch import SettingError

from .checker import Checker
from .output import Json, Mark, Row, Screen, screen
from .probes import UsageError
from .report import Exit, Report

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

SECONDS = 15.0
"""How long it probes at most, unless it is told otherwise."""


def _job_of(url: str) -> Job:
    job = Job.from_url(url)
    if job is None:
        # What was given is not repeated: it may hold a password.
        raise UsageError(
            "this is no trainer job's URL; it looks like "
            "https://HOST/training/v1/rlorTrainerJobs/ACCOUNT/JOB"
        )
    if not (job.gateway.startswith("https:") or _settings.http_on_loopback(job.gateway)):
        raise UsageError("the key is not sent over plain http: give the https URL")
    return job


def _key_in(variable: str, environment: Mapping[str, str]) -> str:
    if not variable.isidentifier():
        # What was given is not repeated: it may be the key.
        raise UsageError("--key-env takes the name of a variable, not the key")
    key = environment.get(variable, "").strip()
    if not key:
        raise UsageError(f"no key: set {variable}, or name another variable with --key-env")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(f"what {variable} holds is no key: it has blanks or strange characters")
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
    except (UsageError, SettingError) as error:
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
    to.line(f"{report.verdict}: {report.message}", mark)
    to.line(f"Next: {report.advice}")
    if report.gateway_fix_message is not None:
        to.line(f"The gateway has changed: {report.gateway_fix_message}", "good")
