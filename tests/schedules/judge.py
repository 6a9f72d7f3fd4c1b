"""What must hold after any schedule, whatever was drawn.

The lab's ledger says what was carried out, the lab's exchanges what was sent, the results
what the program was told. `violations` compares the three, and with what plain tinker may
make of the same faults.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

import tinker
from tinker.lib.retryable_exception import RetryableException

from tests import programs
from tests.common import (
    RETRIED,
    answer_may_be_lost,
    chains,
    is_bare_400,
    may_be_repeated,
    sent_in_vain,
    uncertain_404,
    unexplained,
)
from tests.schedules.model import ENDED, DrawnFault, Schedule
from tests.schedules.runner import IMPATIENT, RATE, SETTINGS, Played, Result
from tinker_routefix import RouteTimeoutError, _verdict
from tinker_routefix.lab._ledger import CHUNKS, ORDERED, Execution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinker_routefix.lab import Exchange

SLACK: Final = 6.0
"""Seconds of the faster clock that work may take on top of a wait, besides the process's lag: a
thread that shares its core with others was seen to take 0.3 real seconds for what takes 0.03."""

TERMINAL: Final = ("DELETED", "PAUSED")
"""Replies that end a request of a client that has connected, once they are given."""
PASSING: Final = {"slow", "error", "drop", "hang", "SINGING"}
"""Replies that tell nothing for now: the pod's own success is proof enough."""
SLOW: Final = {"slow": 1.0, "hang": IMPATIENT}
"""Seconds that the control plane may take, by what it says."""

PACE: Final = 1.0
"""Seconds between two early releases of a request."""

SHORT: Final = 4.0
"""Seconds of 404s, all in all, that the shim has to survive."""

FEW: Final = 2
"""As many 404s, where it is a number of them and not a time, that it has to survive."""

POLLED_AGAIN: Final = RETRIED | {200, 400}
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


UNCERTAIN_NOTE: Final = "may have been carried out"
"""What a note says where an earlier try of the same submission counts."""


def safety_violations(played: Played) -> list[str]:
    """What must not be even once, however busy the machine is."""
    return [
        *_hung(played),
        *_repeated_by_the_shim(played),
        *_executed_twice(played),
        *_out_of_order(played),
        *_lost(played),
        *_executed_though_refused(played),
        *_done_though_uncertain(played),
        *(f"left behind: {what}" for what in played.left),
    ]


def violations(played: Played) -> list[str]:
    """Everything that must not be; empty when all is well."""
    return [
        *safety_violations(played),
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


def _repeated_by_the_shim(played: Played) -> Iterator[str]:
    """Nothing follows an answer, nor a 404 once an earlier try may have been carried out."""
    for name, tries in _requests(played):
        if name[1] not in ("poll", "sample"):
            yield from unexplained(tries, played.dropped)


def _executed_twice(played: Played) -> Iterator[str]:
    """Only tinker itself may do that, where it never heard of the first time."""
    unheard: set[tuple[Any, ...]] = set()
    for (job, *_), tries in _requests(played):
        dropped = answer_may_be_lost(tries[0], tries[-1], played.dropped)
        if dropped or any(one.reached and one.status in RETRIED for one in tries):
            first = tries[0]
            # A new model has no number, and another key for each of tinker's outer tries.
            owner = first.model_id or (first.said or {}).get("sampling_session_id")
            unheard |= {(job, first.kind), (job, first.kind, owner, first.seq_id)}
    # tinker samples again where a result has expired.
    expired = {"sample"} if _drawn(played, 410) else set()
    for job in played.jobs:
        for one in played.lab.ledger_of(job).duplicates():
            numbered = () if one.once is not None else (one.model_id, one.seq_id)
            if (job, one.kind, *numbered) not in unheard and one.kind not in expired:
                yield f"executed twice: {one}"


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
            # A sample whose answer was lost is another one when older releases repeat it.
            if there < result.parts or (there > result.parts and result.op != "sample"):
                yield f"reported done, {there} of {result.parts} parts executed: {result}"


def _executed_though_refused(played: Played) -> Iterator[str]:
    """What the gateway was said to have refused did not reach the trainer.

    Unless an answer was lost, and then the note says so: see `_noted`.
    """
    submissions = _submissions(played)
    for result in played.results:
        if not isinstance(result.error, tinker.NotFoundError) or result.op not in ONE_SUBMISSION:
            continue
        for tries in submissions[result.tag] if result.parts == 1 else ():
            if any(one.reached and _heard(played, one) for one in tries):
                yield f"reported refused, and executed: {result}"


def _heard(played: Played, exchange: Exchange) -> bool:
    """Whether the client surely had the trainer's answer."""
    ended = exchange.at + exchange.seconds
    return exchange.status == 200 and not any(
        exchange.at <= at <= ended + SLACK for at in played.dropped
    )


def _done_though_uncertain(played: Played) -> Iterator[str]:
    """A 404 after a try that may have been carried out ends the call."""
    submissions = _submissions(played)
    for result in played.results:
        if result.state == "done":
            for tries in submissions[result.tag]:
                final = sent_in_vain(tries, played.dropped)
                if final is not None:
                    yield f"reported done in spite of {final}: {result}"


# --- What was sent -----------------------------------------------------------------------


def _requests(played: Played) -> Iterator[tuple[tuple[Any, ...], list[Exchange]]]:
    """The exchanges of each submission and of each poll, in order."""
    for name, tries in chains(played.exchanges).items():
        assert isinstance(name, tuple)
        yield name, tries


def _submissions(played: Played) -> dict[int, list[list[Exchange]]]:
    """The chains that may not be repeated, by the tag of the call that they are made for."""
    found: dict[int, list[list[Exchange]]] = defaultdict(list)
    for _, tries in _requests(played):
        tag = _call(tries[0])
        if tag is not None and not may_be_repeated(tries[0]):
            found[tag].append(tries)
    return found


def _final(tries: list[Exchange]) -> Exchange | None:
    """The gateway's 404 that a submission ends with, as a try before it counts."""
    found = sent_in_vain(tries)
    return found if found is not None and found.refused else None


def _made_for(played: Played, result: Result) -> Iterator[list[Exchange]]:
    """All chains that are made for a call."""
    for _, tries in _requests(played):
        if _call(tries[0]) == result.tag:
            yield tries


def _call(exchange: Exchange) -> int | None:
    """The tag of the call that a request is made for, where it carries one."""
    if exchange.kind in ("save", "save_sampler", "load"):
        tag = re.search(r"tag-(\d+)$", str((exchange.said or {}).get("path")))
        return None if tag is None else int(tag[1])
    return _tag(exchange) if exchange.said else None


def _sent_again(played: Played) -> Iterator[str]:
    """What was answered is not sent again, but for the gateway's 404 of a job that runs."""
    questions = _questions_about(played)
    for name, sent in _requests(played):
        for before, after in itertools.pairwise(sent):
            if name[1] == "poll" and before.status in POLLED_AGAIN:
                continue
            if before.status in RETRIED or answer_may_be_lost(before, after, played.dropped):
                # Also an answer may have been on its way when its connection was dropped.
                continue
            if is_bare_400(before):
                # An edge fault to newer releases: they send again themselves.
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
            yield from _may_send_again(played, questions[name[0]], before, after)


def _questions_about(played: Played) -> dict[str, list[Exchange]]:
    """What the control plane was asked, by the job."""
    questions: dict[str, list[Exchange]] = {job: [] for job in played.jobs}
    for one in played.exchanges:
        if one.kind == "control_plane" and one.job in questions:
            questions[one.job].append(one)
    return questions


def _may_send_again(
    played: Played, questions: list[Exchange], before: Exchange, after: Exchange
) -> Iterator[str]:
    """There is proof, younger than the refusal, that the job runs; and no word that it has ended.

    Proof is RUNNING of the control plane, or a success of the pod through the route. Connecting
    needs none.
    """
    answered = [one for one in questions if one.at + one.seconds <= after.at]
    proofs = [one for one in answered if _reply(played, one) == "slow"]
    proofs += [one for one in played.exchanges if one.job == before.job and _is_success(one)]
    ends = [one.at + one.seconds for one in proofs]
    if _is_work(before) and not any(before.at <= end <= after.at for end in ends):
        yield f"sent again without proof that the job runs: {after}"
    since = max((end for end in ends if end <= after.at), default=0.0)
    told = [one for one in answered if since < one.at + one.seconds < after.at - _slack(played)]
    terminal = [one for one in told if _reply(played, one) in TERMINAL]
    if _is_work(before) and terminal:
        yield f"sent again though the control plane has replied {_reply(played, terminal[0])!r}"
    # Twice, 2 s apart at the most; the third is one too many by any account.
    if len(told) > 2 and all(_reply(played, one) in ENDED for one in told):
        yield f"sent again though the control plane has replied so {len(told)} times: {after}"


def _reply(played: Played, exchange: Exchange) -> str:
    return played.control_plane_replies.get(exchange, "slow")


def _is_success(exchange: Exchange) -> bool:
    background = exchange.kind in ("control_plane", "telemetry", "healthz")
    return not background and exchange.status is not None and exchange.status < 300


def _is_work(exchange: Exchange) -> bool:
    return exchange.kind in WORK or exchange.subject in WORK


def _slack(played: Played) -> float:
    """What a busy machine may add to any wait, in seconds of the faster clock."""
    delays = sum(fault.delay for fault in played.schedule.all_faults())
    # The control plane is asked before a wait and after it.
    replies = played.schedule.control_plane_replies
    delays += 2 * sum(SLOW.get(one.reply, 0.0) for one in replies)
    return SLACK + delays + RATE * played.lag


def _drawn(played: Played, status: int) -> bool:
    return any(
        fault.answer is not None and fault.answer.status == status
        for fault in played.schedule.all_faults()
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
    replies = {one.reply for one in schedule.control_plane_replies}
    if not replies.isdisjoint(ENDED) or (not connecting and replies - PASSING):
        return False
    seconds = count = 0.0
    for fault in schedule.all_faults():
        if not fault.of_gateway:
            continue
        if fault.seconds < float("inf"):
            seconds += fault.seconds
        elif fault.count is not None:
            count += fault.count
        else:
            return False
    # Both at once could be too much for one request.
    return count <= FEW if not seconds else seconds <= SHORT and not count


def _outcomes(played: Played) -> Iterator[str]:
    submissions = _submissions(played)
    for result in played.results:
        if result.state not in ("failed", "cancelled") or result.error is None:
            continue
        if result.state == "cancelled" and result.may_cancel:
            continue
        made = submissions[result.tag]
        fine = [*_allowed(played, result, made)]
        if not any(isinstance(result.error, kind) for kind in fine):
            names = sorted({kind.__name__ for kind in fine}) or "nothing"
            yield f"plain tinker would raise {names}: {result}"
        elif played.shim:
            yield from _noted(played, result, made)


def _allowed(
    played: Played, result: Result, made: list[list[Exchange]]
) -> Iterator[type[BaseException]]:
    schedule = played.schedule
    connecting = result.op == "connect"
    hopeless = not played.shim or not survivable(schedule, connecting=connecting)
    # Nobody can keep to a budget who does not get to run.
    hopeless |= RATE * played.lag > SETTINGS["retry_budget"] / 2
    if any(sent_in_vain(tries) or _cut_off(played, result, tries) for tries in made):
        yield tinker.NotFoundError
    if result.op == "forward":
        for tries in _made_for(played, result):
            if _seems_to_change_the_model(tries) and (
                uncertain_404(tries) or _cut_off(played, result, tries)
            ):
                yield tinker.NotFoundError
    for fault in schedule.all_faults():
        if fault.answer is None or (fault.of_gateway and not hopeless and not _in_doubt(fault)):
            continue
        status = fault.answer.status
        if _meets(fault, result, polls=False):
            yield from SUBMISSION_ERRORS.get(status, ())
            if connecting and status == 400:
                # 0.38 takes a bare one for an edge fault, and closes the client that it is on.
                yield tinker.APIConnectionError
            if played.shim and connecting and fault.of_gateway:
                yield RouteTimeoutError
        if _meets(fault, result, polls=True):
            yield from POLL_ERRORS.get(status, ())
            if result.op == "sample" and status in POLL_ERRORS and _of_common_poll(result.error):
                yield tinker.TinkerError
    if any(one.what == "trainer restarted" for one in schedule.happenings) and not connecting:
        yield from (tinker.NotFoundError, ValueError)


def _in_doubt(fault: DrawnFault) -> bool:
    """Whether a 404 may be taken for the pod's own: of unknown shape, beside answered probes."""
    answer = fault.answer
    return (
        answer is not None
        and answer.status == 404
        and _verdict.of_body(answer.content) is _verdict.Verdict.UNKNOWN
    )


def _seems_to_change_the_model(tries: list[Exchange]) -> bool:
    """Whether a forward pass has the path of a forward_backward: so from 0.25 on."""
    return tries[0].path.endswith("/forward_backward")


def _cut_off(played: Played, result: Result, tries: list[Exchange]) -> bool:
    """Whether a try that the lab has not seen may have been cut off before the last 404."""
    return tries[-1].refused and any(
        result.began <= at <= tries[-1].at + tries[-1].seconds for at in played.dropped
    )


def _of_common_poll(error: BaseException | None) -> bool:
    """Whether samples failed that are polled for together, from 0.26.2 on."""
    return type(error) is tinker.TinkerError and "retrieve_futures polling failed" in str(error)


def _meets(fault: DrawnFault, result: Result, *, polls: bool) -> bool:
    if fault.kinds is None:
        return True
    if polls:
        return any(kind.startswith("poll") for kind in fault.kinds)
    return not set(fault.kinds).isdisjoint(KINDS_OF[result.op])


def _noted(played: Played, result: Result, made: list[list[Exchange]]) -> Iterator[str]:
    """A 404 that may be the gateway's is raised with a note that says what was seen."""
    assert result.error is not None
    for link in programs.chain(result.error):
        response = getattr(link, "response", None)
        if response is None or response.status_code != 404:
            continue
        verdict = _verdict.of_body(response.content)
        note = f"{programs.notes(result.error)} {result.error}"
        if verdict is _verdict.Verdict.UNKNOWN:
            # The pod's after all, where it went on beside probes that were answered.
            continue
        if (verdict is not _verdict.Verdict.POD) != ("tinker_routefix:" in note):
            yield f"with the note {note!r}, from a 404 of verdict {verdict.value}: {result}"
    if len(made) != 1 or any(result.began <= at <= result.ended for at in played.dropped):
        return
    said = UNCERTAIN_NOTE in programs.notes(result.error)
    final = _final(made[0])
    if said != (final is not None and isinstance(result.error, tinker.NotFoundError)):
        yield f"with the note {programs.notes(result.error)!r}, after {final}: {result}"


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
    if played.control_plane_replies:
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
    """What is raised to the program is raised at once."""
    submissions = _submissions(played)
    last: dict[int, float] = {}
    for exchange in played.exchanges:
        # The pod's own as well: tinker may have repeated a request in between.
        tag = _tag(exchange) if exchange.said and exchange.status == 404 else None
        if tag is not None:
            last[tag] = exchange.at + exchange.seconds
    for result in played.results:
        # Before it waits, and before it is sent again, the control plane is asked; not about what
        # may not be sent again whatever it replies.
        final = any(map(_final, submissions[result.tag]))
        if played.control_plane_replies and not final:
            continue
        if result.state == "failed" and isinstance(result.error, tinker.NotFoundError):
            if _verdict.of_body(result.error.response.content) is _verdict.Verdict.UNKNOWN:
                # Sent again only beside probes that are answered.
                continue
            seconds = result.ended - last.get(result.tag, result.ended)
            if result.op in ONE_SUBMISSION and seconds > _slack(played):
                yield f"told {seconds:.1f} s after its last 404: {result}"


def _not_warm(played: Played) -> Iterator[str]:
    """Connecting has ended with so many answers over fresh connections."""
    probes = ("get_info",)
    if any(
        not fault.of_gateway and (fault.kinds is None or "get_info" in fault.kinds)
        for fault in played.schedule.all_faults()
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
        if len(warm) < 3 and not _pods_own(played, job, result.ended):
            yield f"connected after {len(warm)} answers: {result}"


def _pods_own(played: Played, job: str, until: float) -> bool:
    """Whether one connection answered probes and refused `get_info` thrice, in no known shape.

    A 404 like that is the pod's own: it does not have `get_info`, and the warm-up ends.
    """
    refusals = Counter(
        one.connection
        for one in played.exchanges
        if one.job == job
        and one.kind == "get_info"
        and one.status == 404
        and one.at < until
        and one.error is not None
        and _verdict.of_body(one.error.content) is _verdict.Verdict.UNKNOWN
    )
    return max(refusals.values(), default=0) >= 3


def _questions(played: Played) -> Iterator[str]:
    """At most one a job and second, whatever is in flight.

    But for one that was not answered over a connection that was kept, which may have been closed.
    """
    for job, asked in _questions_about(played).items():
        used: set[int] = set()
        for before, after in itertools.pairwise(asked):
            kept = before.connection in used
            used.add(before.connection)
            lost = kept and before.status is None and after.connection not in used
            if after.at - before.at < 1.0 and not lost:
                yield f"asked again about {job} after {after.at - before.at:.3f} s"
