"""What the trainer did: the one account that decides whether a run was trained exactly once.

A client's view of a retried run says little (it got an answer in the end); only the receiving
side knows whether an operation ran twice, too early, or never.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable

CHUNKS: Final = frozenset({"forward", "forward_backward"})
"""Operations whose chunks may arrive in any order among themselves."""

ORDERED: Final = CHUNKS | {"optim_step", "save", "save_sampler", "save_external", "load"}
"""Operations that a model executes in the order of their sequence numbers."""


@dataclass(frozen=True)
class Execution:
    """One operation that the trainer carried out."""

    at: float
    """Seconds since the lab started."""
    kind: str
    job: str
    model_id: str | None = None
    """The model, or the sampling session of a sample."""
    seq_id: int | None = None
    request_id: str | None = None
    """The future that was returned, None for operations that answer at once."""
    datums: int = 0
    """How many datums or samples it was about."""
    once: Hashable = None
    """What may be executed once only, when it is not (model, kind, sequence number)."""

    @property
    def identity(self) -> Hashable:
        """What makes another execution the same one again; None when nothing does."""
        if self.once is not None:
            return self.once
        if self.seq_id is None:
            return None
        return self.model_id, self.kind, self.seq_id

    def __str__(self) -> str:
        return f"{self.at:8.3f}s {self.kind:<16} {self.model_id or '-'} seq={self.seq_id}"


class Ledger:
    """Everything that one job's trainer executed, in the order in which it did. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executions: list[Execution] = []
        self._retrieved: Counter[str] = Counter()

    def record(self, execution: Execution) -> None:
        """Append an execution."""
        with self._lock:
            self._executions.append(execution)

    def record_retrieval(self, request_id: str) -> None:
        """Count one delivery of a result."""
        with self._lock:
            self._retrieved[request_id] += 1

    @property
    def executions(self) -> list[Execution]:
        """A snapshot, in order of execution."""
        with self._lock:
            return list(self._executions)

    def of(self, *kinds: str) -> list[Execution]:
        """Select the executions of some kinds (default: all)."""
        return [one for one in self.executions if not kinds or one.kind in kinds]

    def count(self, *kinds: str) -> int:
        """Count the executions of some kinds (default: all)."""
        return len(self.of(*kinds))

    @property
    def gradients(self) -> int:
        """How many times gradients were accumulated."""
        return self.count("forward_backward")

    @property
    def optim_steps(self) -> int:
        """How many times weights were updated."""
        return self.count("optim_step")

    def retrieved(self, request_id: str) -> int:
        """Count the deliveries of a result."""
        with self._lock:
            return self._retrieved[request_id]

    def duplicates(self) -> list[Execution]:
        """List the executions of something that had been executed before."""
        seen: set[Hashable] = set()
        again = []
        for execution in self.executions:
            identity = execution.identity
            if identity is None:
                continue
            if identity in seen:
                again.append(execution)
            seen.add(identity)
        return again

    def out_of_order(self) -> list[Execution]:
        """List the executions that ran after a later one of their model, or before an earlier one.

        Chunks of one batch (forward, forward_backward) may overtake each other: releases since
        0.22 submit them in parallel, the first one last.
        """
        return [
            wrong for executions in self._by_model().values() for wrong in _out_of_order(executions)
        ]

    def missing(self, model_id: str | None = None) -> list[int]:
        """List the sequence numbers that were skipped, of one model (default: of all)."""
        gaps: list[int] = []
        for model, executions in self._by_model().items():
            if model_id in (None, model):
                there = {seq for seq, _ in executions}
                gaps += [seq for seq in range(1, max(there)) if seq not in there]
        return gaps

    def _by_model(self) -> dict[str | None, list[tuple[int, Execution]]]:
        models: dict[str | None, list[tuple[int, Execution]]] = {}
        for execution in self.of(*ORDERED):
            if execution.seq_id is not None:
                models.setdefault(execution.model_id, []).append((execution.seq_id, execution))
        return models

    def summary(self) -> str:
        """Say it in a few lines, for an assertion message."""
        counts = Counter(execution.kind for execution in self.executions)
        lines = [", ".join(f"{kind} {count}" for kind, count in counts.items()) or "nothing"]
        for name, wrong in (
            ("duplicate", self.duplicates()),
            ("out of order", self.out_of_order()),
        ):
            lines += [f"{name}: {execution}" for execution in wrong]
        if gaps := self.missing():
            lines.append(f"missing: {gaps}")
        return "\n".join(lines)


def _out_of_order(executions: list[tuple[int, Execution]]) -> list[Execution]:
    wrong = []
    done: set[int] = set()
    complete = 0  # every sequence number up to this one has been executed
    highest = highest_barrier = 0
    for seq, execution in executions:
        if execution.kind in CHUNKS:
            late = seq < highest_barrier
        else:
            late = seq < highest or complete < seq - 1
            highest_barrier = max(highest_barrier, seq)
        if late:
            wrong.append(execution)
        done.add(seq)
        highest = max(highest, seq)
        while complete + 1 in done:
            complete += 1
    return wrong
