"""What a program can ask about an exception that it got."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNCERTAIN = "_tinker_routefix_may_have_been_carried_out"


def mark_uncertain(error: BaseException) -> None:
    """Note on a 404 that an earlier try of its request may have been carried out."""
    setattr(error, _UNCERTAIN, True)


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


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
