"""The exceptions that a program gets: what is noted on them, what it can ask, how they read."""

from __future__ import annotations

import contextlib
import re
import textwrap
import time
from itertools import pairwise
from typing import TYPE_CHECKING

from ._job_state import JobState, Told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from ._waiting import RouteWait


class RouteTimeoutError(TimeoutError):
    """The route was still not there at the end of the warm-up's budget.

    A class of its own because asyncio makes a new exception, without cause and notes, of
    a plain :class:`TimeoutError` on its way from the loop's thread to the caller's.
    """

    __module__ = __package__


# --- What a program can ask --------------------------------------------------------------

_UNCERTAIN = "_tinker_routefix_may_have_been_carried_out"


def may_have_been_carried_out(error: BaseException) -> bool:
    """Whether the request that ended in an exception may have been carried out all the same.

    True for the gateway's 404 to a request that changes something (``forward_backward``,
    ``optim_step``, a save, a load, …), where an earlier try of the same request got no answer,
    or one that does not tell. The 404 says nothing about that earlier try: resume from a
    checkpoint, and do not repeat the step.

    False for every other exception, which is not the same as "it was not": only what
    tinker_routefix itself has seen is known here.

    Args:
        error: What a call of the SDK raised; what it was raised from is looked at too.
    """
    return any(getattr(link, _UNCERTAIN, False) for link in _chain(error))


# --- What is noted on them, and what to do -------------------------------------------------


def note_given_up(error: BaseException, seen: object, wait: RouteWait) -> None:
    """Note on a 404 why it was not replayed, or not any more."""
    add_note(error, f"tinker_routefix: {seen}.", f"What to do: {_advice(wait)}.")


def note_uncertain(error: BaseException, seen: object) -> None:
    """Note on a 404 that an earlier try of its request may have been carried out."""
    setattr(error, _UNCERTAIN, True)
    add_note(
        error,
        f"tinker_routefix: {seen}.",
        "What to do: resume from a checkpoint, do not repeat the step: other parts of the "
        "same batch may be in flight.",
    )


def note_warm_up(error: BaseException, wait: RouteWait, rounds: int) -> None:
    """Note on the 404 of a warm-up why it ended."""
    add_note(error, *_of_warm_up(wait, rounds))


def route_timeout(cause: Exception, wait: RouteWait, rounds: int) -> RouteTimeoutError:
    """What a warm-up ends with whose budget is exhausted."""
    seen, advice = _of_warm_up(wait, rounds)
    # Python prints its name in front.
    name = f"{RouteTimeoutError.__module__}.{RouteTimeoutError.__name__}: "
    error = RouteTimeoutError(wrapped(f"{name}{seen}", advice).removeprefix(name))
    error.__cause__ = cause
    return error


def _of_warm_up(wait: RouteWait, rounds: int) -> tuple[str, str]:
    ago = time.monotonic() - wait.answer.answered_at
    seen = (
        f"tinker_routefix: job {wait.route.job}: the gateway still answered 404 after "
        f"{wait.elapsed:.1f} s and {rounds} rounds; the control plane's response on the "
        f"job, {ago:.1f} s before: {wait.answer.message}."
    )
    return seen, f"What to do: {_advice(wait)}."


def _advice(wait: RouteWait) -> str:
    """What to do once the 404 is raised to the program; for people."""
    answer = wait.answer
    check = f"`tinker-routefix check {wait.route.job.url}`"
    if answer.state is JobState.ENDED:
        return (
            "see what ended the job, and resume from its last checkpoint on one that runs: it "
            "has ended, is suspended or is not visible with this key"
        )
    if answer.state is JobState.RUNNING:
        again, limits = "start again", "TINKER_ROUTEFIX_WARMUP_TIMEOUT sets"
        if not wait.connecting:
            again = "resume from the last checkpoint"
            limits = "TINKER_ROUTEFIX_MAX_REPLAYS and TINKER_ROUTEFIX_RETRY_BUDGET set"
        return (
            f"{again} when {check} calls the route healthy: the job runs, but its route did "
            f"not come back in time; {limits} how long the shim waits"
        )
    if answer.state is JobState.STARTING:
        return f"start again when {check} calls the route healthy: the job does not run yet"
    if answer.told is Told.QUESTION_REFUSED:
        return (
            f"check the key, and with {check} where the control plane is: it was asked whether "
            "the job runs, and refused the question"
        )
    return (
        f"see with {check} whether the control plane can be reached from here: without a "
        "usable response of it a request is replayed only after the job has answered another one, "
        "as it may have ended"
    )


_NOTE = "_tinker_routefix_note"


def add_note(error: BaseException, *paragraphs: str) -> None:
    """Note on an exception what was seen, in lines as a terminal has them."""
    note = wrapped(*paragraphs)
    setattr(error, _NOTE, note)
    error.add_note(note)


def wrapped(*paragraphs: str) -> str:
    """Text in lines of a terminal's width; a command is to be copied, and stays whole."""
    fill = textwrap.TextWrapper(79, break_long_words=False, break_on_hyphens=False).fill
    whole = (re.sub("`.*?`", lambda at: at[0].replace(" ", "\0"), one) for one in paragraphs)
    return "\n".join(map(fill, whole)).replace("\0", " ")


def note_on(error: BaseException) -> str | None:
    """Our note on an exception, also where it has been carried on to another one."""
    return getattr(error, _NOTE, None)


def carry_note(error: BaseException) -> None:
    """Move our note to what the caller gets: tinker raises its own error from the 404."""
    for link in _chain(error, contexts=False):
        note = note_on(link)
        if note is not None:
            if link is not error:
                # Two errors can have the same cause.
                with contextlib.suppress(ValueError):
                    link.__notes__.remove(note)
                setattr(error, _NOTE, note)
                error.add_note(note)
            return


# --- How they read -------------------------------------------------------------------------

_PACKAGE = __name__.partition(".")[0]


def trim(error: BaseException) -> None:
    """Take the frames of the shim, and of tenacity below it, out of an exception's tracebacks.

    What is left is what tinker alone would show. Not where the shim itself has raised it.
    """
    # An exception of the program's may refuse to be changed.
    with contextlib.suppress(Exception):
        for link in _chain(error):
            _trim(link)


def _trim(link: BaseException) -> None:
    kept: list[TracebackType] = []
    entry, ours, dropped = link.__traceback__, False, False
    while entry is not None:
        module = str(entry.tb_frame.f_globals.get("__name__"))
        # A program may use tenacity itself. It keeps outcomes in such futures.
        within = ours and module.startswith(("tenacity", "concurrent.futures._base"))
        ours = within or module.partition(".")[0] == _PACKAGE
        dropped = dropped or ours
        if not ours:
            kept.append(entry)
        entry = entry.tb_next
    if dropped and kept and not ours:
        for above, below in pairwise(kept):
            above.tb_next = below
        link.__traceback__ = kept[0]


def _chain(error: BaseException, *, contexts: bool = True) -> Iterator[BaseException]:
    """An exception and what it was raised from, each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (link.__context__ if contexts else None)
