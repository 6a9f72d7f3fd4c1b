"""What must hold after any schedule, whatever was drawn.

The lab's ledger says what was carried out, the lab's exchanges what was sent, the results
what the program was told. `complaints` compares the three, and with what plain tinker may
make of the same troubles.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import tinker
from tinker.lib.retryable_exception import RetryableException

from tests import programs
from tests.schedules.model import LOST, OVER, Schedule, Trouble
from tests.schedules.runner import IMPATIENT, RATE, SETTINGS, Played, Result
from tinker_routefix import RouteTimeoutError, _verdict
from tinker_routefix.lab._ledger import CHUNKS, ORDERED, Execution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinker_routefix.lab import Exchange

SLACK: Final = 6.0
"""Seconds of the faster clock that work may take on top of a wait, besides the process's lag: a
thread that shares its core with others was seen to take 0.3 real seconds for what takes 0.03."""

SLOW: Final = {"slow": 1.0, "hang": IMPATIENT}
"""Seconds that the control plane may take, by what it says."""

PACE: Final = 1.0
"""Seconds between two early releases of a request."""

SHORT: Final = 4.0
"""Seconds of 404s, all in all, that the shim has to survive."""

FEW: Final = 2
"""As many 404s, where it is a number of them and not a time, that it has to survive."""

RESENT: Final = {None, 408, 409, 429, *range(500, 600)}
"""How a request may have ended that tinker sends again: without an answer, or with these."""

POLLED_AGAIN: Final = RESENT | {200, 400, 429}
"""The same for polls: a result may not be there yet, or only be announced."""

WORK: Final = {"forward", "forward_backward", "optim_step", "save", "save_sampler", "sample"}
"""Requests that end connecting: from then on only RUNNING will do."""

PASSES: Final = ("forward_backward", "forward")

ONE_SUBMISSION: Final = (*PASSES, "optim_step", "save")
"""Calls that make one submission for each of their parts, marked with the call's tag."""

KINDS_OF: Final = {
    "connect": ("config", "dynamic_config", "create_session", "create_model", "get_info"),
    "forward_backward": ("forward_backward",),
    "forward": ("forward",),
    "optim_step": ("optim_step",),
    "save": ("save",),
    "load": ("save", "load"),
    "sample": ("save_sampler", "sampling_session", "sample", "polls"),
    "info": ("get_info",),
}
"""The requests that a call is made of, apart from its polls."""

SUBMISSION_ERRORS: Final[dict[int, tuple[type[BaseException], ...]]] = {
    400: (tinker.BadRequestError,),
    403: (tinker.PermissionDeniedError,),
    404: (tinker.NotFoundError,),
    410: (tinker.APIStatusError,),
}
POLL_ERRORS: Final[dict[int, tuple[type[BaseException], ...]]] = {
    400: (ValueError,),
    403: (ValueError,),
    404: (ValueError,),
    410: (RetryableException,),
    # Before polling was split up, in 0.21.
    429: (ValueError,),
}
"""What plain tinker raises; whatever is not here it sends again until it gets through."""


def damage(played: Played) -> list[str]:
    """What must not be even once, however busy the machine is."""
    return [
        *_hung(played),
        *_executed_twice(played),
        *_out_of_order(played),
        *_lost(played),
        *_executed_though_refused(played),
        *(f"left behind: {what}" for what in played.left),
    ]


def complaints(played: Played) -> list[str]:
    """Everything that must not be; empty when all is well."""
    return [
        *damage(played),
        *_sent_again(played),
        *_sent_though_cancelled(played),
        *_outcomes(played),
        *(_of_the_shim(played) if played.shim else ()),
    ]


# --- Ending ------------------------------------------------------------------------------


def _hung(played: Played) -> Iterator[str]:
    for result in played.results:
        if result.state == "hung":
            yield f"it did not end: {result}"


# --- What was carried out ----------------------------------------------------------------


def _executions(played: Played) -> list[Execution]:
    return [one for job in played.jobs for one in played.lab.ledger_of(job).executions]


def _executed_twice(played: Played) -> Iterator[str]:
    """Only tinker itself may do that, where it never heard of the first time."""
    if any(trouble.shape in LOST for trouble in played.schedule.troubles):
        return
    if played.dropped:
        return
    for job in played.jobs:
        for execution in played.lab.ledger_of(job).duplicates():
            yield f"executed twice: {execution}"


def _out_of_order(played: Played) -> Iterator[str]:
    """Nothing may overtake; sequence numbers that were refused for good are left out."""
    models: dict[str | None, list[Execution]] = defaultdict(list)
    for execution in _executions(played):
        if execution.kind in ORDERED and execution.seq_id is not None:
            models[execution.model_id].append(execution)
    for executions in models.values():
        highest = barrier = 0
        seen: set[int] = set()
        for execution in executions:
            seq = execution.seq_id or 0
            if seq in seen:
                continue
            seen.add(seq)
            # Parts of one batch are sent in parallel, the first one last.
            if seq < (barrier if execution.kind in CHUNKS else highest):
                yield f"executed too late: {execution}"
            highest = max(highest, seq)
            if execution.kind not in CHUNKS:
                barrier = max(barrier, seq)


def _tag(exchange: Exchange) -> int | None:
    """The op that a submission belongs to."""
    said: dict[str, Any] = exchange.said or {}
    if exchange.kind in PASSES:
        given = said.get("forward_backward_input") or said.get("forward_input") or {}
        for datum in given.get("data", ()):
            target = datum["loss_fn_inputs"]["target_tokens"]
            return int((target.get("shape") or [len(target.get("data", ()))])[0])
    if exchange.kind == "optim_step":
        return int(said["adam_params"]["learning_rate"])
    if exchange.kind == "save":
        return int(said["path"].removeprefix("tag-"))
    if exchange.kind == "sample":
        return int(said["sampling_params"]["max_tokens"])
    return None


def _lost(played: Played) -> Iterator[str]:
    """What the program was told to be done was carried out, with all its parts."""
    executed = {
        (one.model_id, one.kind, one.seq_id) for one in _executions(played) if one.kind != "sample"
    }
    samples = sum(one.kind == "sample" for one in _executions(played))
    parts: dict[int | None, set[int | None]] = defaultdict(set)
    for exchange in played.exchanges:
        tag = _tag(exchange) if exchange.reached and exchange.said else None
        if tag is None:
            continue
        if exchange.kind == "sample":
            if samples:
                parts[tag].add(exchange.seq_id)
        elif (exchange.model_id, exchange.kind, exchange.seq_id) in executed:
            parts[tag].add(exchange.seq_id)
    for result in played.results:
        if result.state == "done" and result.op not in ("connect", "info"):
            there = len(parts[result.tag])
            if there != result.parts:
                yield f"reported done, {there} of {result.parts} parts executed: {result}"


def _executed_though_refused(played: Played) -> Iterator[str]:
    """What the gateway was said to have refused did not reach the trainer."""
    if not _nothing_unheard(played):
        return
    reached = {_tag(one) for one in played.exchanges if one.reached}
    for result in played.results:
        refused = isinstance(result.error, tinker.NotFoundError) and result.parts == 1
        if refused and result.op in ONE_SUBMISSION and result.tag in reached:
            yield f"reported refused, and executed: {result}"


def _nothing_unheard(played: Played) -> bool:
    """Whether no answer of the trainer was lost on its way."""
    return not played.dropped and not any(
        one.reached and (one.status is None or one.status >= 400) for one in played.exchanges
    )


# --- What was sent -----------------------------------------------------------------------


def _requests(played: Played) -> Iterator[tuple[tuple[Any, ...], list[Exchange]]]:
    """The exchanges of each submission and of each poll, in order."""
    found: dict[tuple[Any, ...], list[Exchange]] = defaultdict(list)
    for one in played.exchanges:
        if one.replica is None:
            continue
        said = one.said or {}
        if one.kind == "poll":
            found[one.job, "poll", said.get("request_id")].append(one)
        elif one.kind == "create_model":
            found[one.job, one.kind, said.get("session_id"), said.get("model_seq_id")].append(one)
        elif one.seq_id is not None and one.kind in (*ORDERED, "sample"):
            where = one.model_id or said.get("sampling_session_id")
            found[one.job, one.kind, where, one.seq_id].append(one)
    yield from found.items()


def _sent_again(played: Played) -> Iterator[str]:
    """What was answered is not sent again, but for the gateway's 404 of a job that runs."""
    words = _words(played)
    for name, sent in _requests(played):
        for before, after in itertools.pairwise(sent):
            if name[1] == "poll" and before.status in POLLED_AGAIN:
                continue
            if before.status in RESENT or any(before.at < at < after.at for at in played.dropped):
                # Also an answer may have been on its way when its connection was dropped.
                continue
            if before.status == 400:
                # A bare one is an edge fault to newer releases: they send again themselves.
                continue
            if name[1] == "sample" and _drawn(played, 410):
                # tinker samples again where a result has expired.
                continue
            if not before.refused:
                yield f"sent again after {before.status}: {after}"
                continue
            if not played.shim:
                yield f"plain tinker sent again after a 404: {after}"
                continue
            if after.body != before.body:
                yield f"sent again with another body: {after}"
            key = "x-idempotency-key"
            if after.headers.get(key) != before.headers.get(key):
                yield f"sent again with another idempotency key: {after}"
            yield from _may_send_again(played, words[name[0]], before, after)


def _words(played: Played) -> dict[str, list[Exchange]]:
    words: dict[str, list[Exchange]] = {job: [] for job in played.jobs}
    for one in played.exchanges:
        if one.kind == "control_plane" and one.job in words:
            words[one.job].append(one)
    return words


def _may_send_again(
    played: Played, words: list[Exchange], before: Exchange, after: Exchange
) -> Iterator[str]:
    """The control plane had been asked, and what it said last was RUNNING.

    While connecting, that it did not say that the job is over is enough.
    """
    work = _is_work(before)
    slack = _slack(played) + (0.0 if work else 8.0)
    answered = [one for one in words if one.at + one.seconds <= after.at]
    good = [one for one in answered if _may_run(played, one, surely=work)]
    if not good:
        yield f"sent again though the control plane did not say RUNNING: {after}"
        return
    age = after.at - good[-1].at - good[-1].seconds
    if work and age > 1.0 + slack:
        yield f"sent again, and it was {age:.1f} s ago that the control plane was asked: {after}"
    for one in answered[answered.index(good[-1]) + 1 :]:
        if one.at + one.seconds < after.at - slack:
            said = played.words[one]
            yield f"sent again though the control plane has said {said!r} since: {after}"


def _may_run(played: Played, exchange: Exchange, *, surely: bool) -> bool:
    word = played.words.get(exchange, "slow")
    return word == "slow" if surely else word not in OVER


def _is_work(exchange: Exchange) -> bool:
    return exchange.kind in WORK or exchange.subject in WORK


def _slack(played: Played) -> float:
    """What a busy machine may add to any wait, in seconds of the faster clock."""
    delays = sum(trouble.delay for trouble in played.schedule.troubles)
    # The control plane is asked before a wait and after it.
    delays += 2 * sum(SLOW.get(word.says, 0.0) for word in played.schedule.words)
    return SLACK + delays + RATE * played.lag


def _drawn(played: Played, status: int) -> bool:
    return any(
        trouble.answer is not None and trouble.answer.status == status
        for trouble in played.schedule.troubles
    )


def _sent_though_cancelled(played: Played) -> Iterator[str]:
    """Nothing is sent any more for a call that the program has cancelled."""
    cancelled = {one.tag: one for one in played.results if one.state == "cancelled"}
    for exchange in played.exchanges:
        tag = _tag(exchange) if exchange.said else None
        if tag in cancelled:
            late = exchange.at - cancelled[tag].ended
            if late > _slack(played):
                yield f"sent {late:.1f} s after it was cancelled: {exchange}"


# --- What the program was told -----------------------------------------------------------


def survivable(schedule: Schedule, *, connecting: bool) -> bool:
    """Whether the shim has to bring every call through."""
    if any(word.says in OVER for word in schedule.words):
        return False
    if not connecting and any(word.says != "slow" for word in schedule.words):
        return False
    seconds = count = 0.0
    for trouble in schedule.troubles:
        if not trouble.of_gateway:
            continue
        if trouble.seconds < float("inf"):
            seconds += trouble.seconds
        elif trouble.count is not None:
            count += trouble.count
        else:
            return False
    # Both at once could be too much for one request.
    return count <= FEW if not seconds else seconds <= SHORT and not count


def _outcomes(played: Played) -> Iterator[str]:
    for result in played.results:
        if result.state not in ("failed", "cancelled") or result.error is None:
            continue
        if result.state == "cancelled" and result.may_cancel:
            continue
        fine = [*_allowed(played, result)]
        if not any(isinstance(result.error, kind) for kind in fine):
            names = sorted({kind.__name__ for kind in fine}) or "nothing"
            yield f"plain tinker would raise {names}: {result}"
        elif played.shim:
            yield from _noted(result)


def _allowed(played: Played, result: Result) -> Iterator[type[BaseException]]:
    schedule = played.schedule
    connecting = result.op == "connect"
    hopeless = not played.shim or not survivable(schedule, connecting=connecting)
    # Nobody can keep to a budget who does not get to run.
    hopeless |= RATE * played.lag > SETTINGS["retry_budget"] / 2
    for trouble in schedule.troubles:
        if trouble.answer is None or (trouble.of_gateway and not hopeless):
            continue
        status = trouble.answer.status
        if _meets(trouble, result, polls=False):
            yield from SUBMISSION_ERRORS.get(status, ())
            if connecting and status == 400:
                # 0.38 takes a bare one for an edge fault, and closes the client that it is on.
                yield tinker.APIConnectionError
            if played.shim and connecting and trouble.of_gateway:
                yield RouteTimeoutError
        if _meets(trouble, result, polls=True):
            yield from POLL_ERRORS.get(status, ())
            if result.op == "sample" and status == 404:
                # From 0.27.1 on, where samples are polled for together.
                yield tinker.TinkerError
    if any(one.what == "trainer restarted" for one in schedule.happenings) and not connecting:
        yield from (tinker.NotFoundError, ValueError)


def _meets(trouble: Trouble, result: Result, *, polls: bool) -> bool:
    if trouble.kinds is None:
        return True
    if polls:
        return any(kind.startswith("poll") for kind in trouble.kinds)
    return not set(trouble.kinds).isdisjoint(KINDS_OF[result.op])


def _noted(result: Result) -> Iterator[str]:
    """A 404 that may be the gateway's is handed on with a note that says what was seen."""
    assert result.error is not None
    for link in programs.chain(result.error):
        response = getattr(link, "response", None)
        if response is None or response.status_code != 404:
            continue
        verdict = _verdict.of_body(response.content)
        note = f"{programs.notes(result.error)} {result.error}"
        if (verdict is not _verdict.Verdict.POD) != ("tinker_routefix:" in note):
            yield f"with the note {note!r}, from a 404 of verdict {verdict.value}: {result}"


# --- For how long, and how often ---------------------------------------------------------


def _of_the_shim(played: Played) -> Iterator[str]:
    yield from _budgets(played)
    yield from _slept_on(played)
    yield from _failed_late(played)
    yield from _not_warm(played)
    yield from _questions(played)


def _budgets(played: Played) -> Iterator[str]:
    """No request is sent again when its time is over."""
    for _, sent in _requests(played):
        began: Exchange | None = None
        for one in sent:
            if began is not None:
                budget = SETTINGS["retry_budget" if _is_work(one) else "warmup_timeout"]
                if one.at - began.at > budget + _slack(played):
                    yield f"sent again for {one.at - began.at:.1f} s: {one}"
            if not one.refused:
                began = None
            elif began is None:
                began = one


def _slept_on(played: Played) -> Iterator[str]:
    """Who waits for the route is released when it answers, to whomever."""
    if played.words:
        # Before it waits, and before it is sent again, the control plane is asked.
        return
    answers = {
        job: sorted(
            one.at + one.seconds
            for one in played.exchanges
            if one.job == job
            and one.replica is not None
            # Nobody looks at what these are answered.
            and one.kind not in ("heartbeat", "telemetry")
            and one.status is not None
            and not one.refused
        )
        for job in played.jobs
    }
    for (job, *_), sent in _requests(played):
        for before, after in itertools.pairwise(sent):
            if not before.refused:
                continue
            heard = before.at + before.seconds + _slack(played)
            first = next((at for at in answers[job] if heard < at < after.at), after.at)
            if after.at - first > PACE + _slack(played):
                yield f"slept on for {after.at - first:.1f} s after an answer: {after}"


def _failed_late(played: Played) -> Iterator[str]:
    """What is handed on is handed on at once."""
    if played.words:
        # Before it waits, and before it is sent again, the control plane is asked.
        return
    last: dict[int, float] = {}
    for exchange in played.exchanges:
        tag = _tag(exchange) if exchange.said and exchange.refused else None
        if tag is not None:
            last[tag] = exchange.at + exchange.seconds
    for result in played.results:
        if result.state == "failed" and isinstance(result.error, tinker.NotFoundError):
            seconds = result.ended - last.get(result.tag, result.ended)
            if result.op in ONE_SUBMISSION and seconds > _slack(played):
                yield f"told {seconds:.1f} s after its last 404: {result}"


def _not_warm(played: Played) -> Iterator[str]:
    """Connecting has ended with so many answers over fresh connections."""
    probes = ("get_info",)
    if any(
        not trouble.of_gateway and (trouble.kinds is None or "get_info" in trouble.kinds)
        for trouble in played.schedule.troubles
    ):
        return
    for result in played.results:
        if result.op != "connect" or result.state != "done" or played.dropped:
            continue
        job = played.jobs[played.schedule.clients[result.client].job]
        warm = {
            one.connection
            for one in played.exchanges
            if one.job == job and one.kind in probes and one.status == 200 and one.at < result.ended
        }
        if len(warm) < 3:
            yield f"connected after {len(warm)} answers: {result}"


def _questions(played: Played) -> Iterator[str]:
    """At most one a job and second, whatever is in flight."""
    for job, asked in _words(played).items():
        for before, after in itertools.pairwise(asked):
            if after.at - before.at < 1.0:
                yield f"asked again about {job} after {after.at - before.at:.3f} s"
