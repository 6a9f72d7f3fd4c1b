"""Labs in a process of their own.

What the gateway, the control plane and the trainer cost must not be counted as the client's,
and their event loop must not take turns with tinker's for one interpreter lock. A contender
opens its labs from its own process, and reads what happened when its run is over.

Moments are ``time.monotonic()``, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import os
import time
from multiprocessing.managers import BaseManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

ADDRESS = "BENCHMARKS_LABS"
"""Where the process with the labs listens: host, port and key."""

SUBMISSIONS = frozenset({"forward", "forward_backward", "optim_step", "save", "load"})
POLLS = frozenset({"poll", "polls"})
CONNECTING = frozenset(
    {
        "config",
        "dynamic_config",
        "create_session",
        "create_model",
        "poll:create_model",
        "heartbeat",
        "telemetry",
        "healthz",
    }
)
PROBES = frozenset({"get_info", "capabilities"})
"""What the shim's own requests through the route ask for; the programs here ask neither."""


class Seen(NamedTuple):
    """A request that reached the gateway or the control plane."""

    at: float
    done: float
    kind: str
    subject: str | None
    status: int | None
    refused: bool
    replica: int | None
    connection: int


class Account(NamedTuple):
    """What the trainer of a job carried out."""

    gradients: int
    updates: int
    twice: int
    """Executions of a request that had been executed before."""
    out_of_order: int
    missing: int


class Lab:
    """A lab, held in the other process; its methods take and return plain data."""

    def __init__(self, **settings: Any) -> None:
        from tinker_routefix import lab

        self._faults = lab.Fault
        self._answer = lab.Answer
        self._holding = False
        self._healed: dict[str, float] = {}
        self._began = time.monotonic()
        self._lab = lab.Lab(**settings).start()

    def close(self) -> None:
        """Stop the server."""
        self._lab.stop()

    def url(self, job: str | None = None) -> str:
        """The base URL of a job, whose trainer is started when there is none."""
        return self._lab.base_url if job is None else self._lab.job_url(job)

    def lose(
        self,
        seconds: float,
        *,
        kinds: Collection[str] | None = None,
        excluding: Collection[str] = (),
        replica: int | None = None,
        job: str | None = None,
    ) -> float:
        """Let the gateway lose the route from now on; returns the moment when it has healed."""
        self._lab.fault(
            self._faults(
                kinds=kinds, excluding=excluding, replica=replica, job=job, seconds=seconds
            )
        )
        return time.monotonic() + seconds

    def lose_replicas(
        self, seconds: float, replicas: Collection[int], job: str, *, after_model: bool
    ) -> None:
        """Let some replicas lose the route to a job, for all but what connecting sends.

        Args:
            seconds: For how long.
            replicas: Which.
            job: Whose route.
            after_model: From the job's first create_model on, instead of from now on.
        """

        def lose(_: object = None) -> bool:
            if job not in self._healed:
                for replica in replicas:
                    self._healed[job] = self.lose(
                        seconds, excluding=CONNECTING, replica=replica, job=job
                    )
            return False

        if after_model:
            self._lab.fault(self._faults(kinds={"create_model"}, job=job, when=lose))
        else:
            lose()

    def healed(self, job: str) -> float:
        """When the replicas had all found the route again."""
        return self._healed[job]

    def far_away(self, seconds: float) -> None:
        """Let every request take so much longer, as a distant gateway does."""
        self._lab.fault(self._faults(answer=None, delay=seconds))

    def work(self, seconds: float) -> None:
        """How long an operation takes that is submitted from now on."""
        self._lab.work_seconds = seconds

    def hold(self, seconds: float) -> None:
        """Let every poll wait so long in vain, until :meth:`hand_out`."""
        self._holding = True
        again = {"type": "try_again", "request_id": "held", "queue_state": "active"}
        self._lab.fault(
            self._faults(
                kinds=POLLS,
                at="pod",
                delay=seconds,
                answer=self._answer(408, again),
                when=lambda _: self._holding,
            )
        )

    def hand_out(self) -> None:
        """Let polls have their results from now on."""
        self._holding = False

    def accepted(self, kind: str, job: str | None = None) -> int:
        """How many operations of a kind the trainer has taken."""
        return self._lab.ledger_of(job or self._lab.job).count(kind)

    def count(self) -> int:
        """How many requests have come, of whatever kind."""
        return len(self._lab.exchanges)

    def seen(self, job: str | None = None) -> list[Seen]:
        """Every request, of one job or of all."""
        return [
            Seen(
                self._began + one.at,
                self._began + one.at + one.seconds,
                one.kind,
                one.subject,
                one.status,
                one.refused,
                one.replica,
                one.connection,
            )
            for one in self._lab.exchanges
            if job in (None, one.job)
        ]

    def account(self, job: str | None = None) -> Account:
        """What a trainer carried out."""
        ledger = self._lab.ledger_of(job or self._lab.job)
        return Account(
            ledger.gradients,
            ledger.optim_steps,
            len(ledger.duplicates()),
            len(ledger.out_of_order()),
            len(ledger.missing()),
        )


class _Manager(BaseManager):
    pass


_Manager.register("Lab", Lab)


@contextlib.contextmanager
def serving() -> Iterator[dict[str, str]]:
    """A process for labs; yields what a contender has to have in its environment."""
    key = os.urandom(16)
    manager = _Manager(("127.0.0.1", 0), authkey=key)
    # The labs must not patch anything, and what the process imports is not measured.
    manager.start(initializer=_prepare)
    try:
        host, port = cast("tuple[str, int]", manager.address)
        yield {ADDRESS: f"{host} {port} {key.hex()}"}
    finally:
        manager.shutdown()


def _prepare() -> None:
    os.environ["TINKER_ROUTEFIX"] = "0"


@contextlib.contextmanager
def opened(**settings: Any) -> Iterator[Lab]:
    """A lab of one's own in the process that :func:`serving` started."""
    host, port, key = os.environ[ADDRESS].split()
    manager = _Manager((host, int(port)), authkey=bytes.fromhex(key))
    manager.connect()
    lab: Lab = cast("Any", manager).Lab(**settings)
    try:
        yield lab
    finally:
        lab.close()
