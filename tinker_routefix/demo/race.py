"""The race: who runs, what goes wrong on the way, and what came of it.

Every contender is a process of its own with a lab of its own, so that they can run at the
same time and none of them sees what another one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

from tinker_routefix.lab import Exchange, Fault, Lab, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COLD_SECONDS: Final = 4.0
"""How long a job is not known to the gateway at first."""
LOST_SECONDS: Final = 3.0
"""How long the gateway loses it later on."""
WORK_SECONDS: Final = 0.3
"""What an operation of the trainer takes."""
POLL_SECONDS: Final = 0.1
"""How long a poll waits for a result: less than the work takes, so that a client polls more
than once, and the loss of the route comes at the same point of the run every time."""
CHILD_SECONDS: Final = 120.0
"""After so many seconds a contender is killed and called hung."""

SUBMISSIONS: Final = frozenset({"forward", "forward_backward", "optim_step", "save", "load"})

_SCRIPT: Final = Path(__file__).with_name("train.py")

Outcome = Literal["running", "survived", "died", "hung"]


# -- who, and through what ---------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A way to run the training script."""

    name: str
    arguments: tuple[str, ...] = ()
    shim: bool = False


CONTENDERS: Final = (
    Contender("plain"),
    Contender("strategy A", ("--strategy", "a")),
    Contender("strategy B", ("--strategy", "b")),
    Contender("tinker_routefix", ("--shim",), shim=True),
)


@dataclass(frozen=True)
class Act:
    """What goes wrong."""

    name: str
    title: str
    faults: Callable[[Lab], list[Fault]]


def _within(seconds: float, moment: Callable[[Exchange], float | None]) -> Callable[..., bool]:
    """Whether a request arrived so many seconds after a moment, None being not yet."""

    def when(exchange: Exchange) -> bool:
        began = moment(exchange)
        return began is not None and 0 <= exchange.at - began < seconds

    return when


def _cold(_: Lab) -> list[Fault]:
    arrivals: list[float] = []

    def first_request(exchange: Exchange) -> float:
        arrivals.append(exchange.at)
        return arrivals[0]

    return [Fault(when=_within(COLD_SECONDS, first_request))]


def _mid_training(lab: Lab) -> list[Fault]:
    def second_update(_: Exchange) -> float | None:
        updates = lab.ledger.of("optim_step")
        return updates[1].at if len(updates) > 1 else None

    def gradient_of_step_4(_: Exchange) -> float | None:
        # Told by its datums: a strategy that trains twice has its fourth gradient earlier.
        gradients = [one for one in lab.ledger.of("forward_backward") if one.datums == 4]
        return gradients[0].at if gradients else None

    return [
        Fault(kinds={"poll", "polls"}, when=_within(LOST_SECONDS, second_update)),
        Fault(kinds=SUBMISSIONS, when=_within(LOST_SECONDS, gradient_of_step_4)),
    ]


ACTS: Final = (
    Act(
        "cold",
        f"Cold race: every request is answered 404 for the first {COLD_SECONDS:.0f} s",
        _cold,
    ),
    Act(
        "mid-training",
        f"Mid-training: polls are lost for {LOST_SECONDS:.0f} s in step 2, "
        f"submissions for {LOST_SECONDS:.0f} s in step 4",
        _mid_training,
    ),
)


# -- what came of it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a contender fares, or fared, in an act. Moments are seconds since it started."""

    contender: str
    shim: bool
    outcome: Outcome
    error: str | None
    """The type of the exception that it died of."""
    message: str | None
    seconds: float
    """From its start (tinker imported) to its last event."""
    steps: int
    """How many were done."""
    steps_asked: int
    gradients: int
    """How many the trainer executed, and below, how many the script asked for by then."""
    gradients_asked: int
    updates: int
    updates_asked: int
    saves: int
    refused: int
    """How many 404s of the gateway were received."""
    duplicates: int
    """The same request executed again, as told by its sequence number."""
    out_of_order: int
    missing: int
    connected_at: float | None
    steps_at: list[float] = field(repr=False)
    refused_at: list[float] = field(repr=False)
    again_at: list[float] = field(repr=False)
    """When a gradient or an optimizer step of a step was executed that had been before."""

    def flaws(self) -> list[str]:
        """What is not as it should be, in words; nothing when the run was exact."""
        if self.outcome != "survived":
            how = f"{self.outcome} ({self.error}: {self.message})" if self.error else self.outcome
            return [f"it {how} after {self.steps} of {self.steps_asked} steps"]
        asked = self.steps_asked
        wrong = {
            f"{self.steps} of {asked} steps are done": self.steps != asked,
            f"{self.gradients} gradients were executed, not {asked}": self.gradients != asked,
            f"{self.updates} optimizer steps were executed, not {asked}": self.updates != asked,
            f"{self.saves} checkpoints were saved, not 1": self.saves != 1,
            f"{self.duplicates} requests were executed twice": self.duplicates,
            f"{self.out_of_order} requests were executed out of order": self.out_of_order,
            f"{self.missing} requests are missing": self.missing,
            f"{len(self.again_at)} operations were trained again": self.again_at,
        }
        return [text for text, is_so in wrong.items() if is_so]


def _trained_again(ledger: Ledger) -> list[float]:
    """Moments at which a step's gradient or update was executed that had been before."""
    seen: set[tuple[str, int]] = set()
    again = []
    step = 0
    for execution in ledger.of("forward_backward", "optim_step"):
        # A batch has as many datums as its step's number; an update has none, and belongs to
        # the gradient before it.
        step = execution.datums or step
        if (execution.kind, step) in seen:
            again.append(execution.at)
        seen.add((execution.kind, step))
    return again


# -- running it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """What a contender said, and when: seconds since its lab began."""

    at: float
    said: dict[str, Any]


class Run:
    """One contender in one act."""

    def __init__(self, contender: Contender, act: Act, *, steps: int, seed: int, tls: bool) -> None:
        self.contender = contender
        self.steps = steps
        self.seed = seed
        self.events: list[Event] = []
        self._began = time.monotonic()
        self._lab = Lab(work_seconds=WORK_SECONDS, poll_seconds=POLL_SECONDS, seed=seed, tls=tls)
        self._faults = act.faults(self._lab)
        self._hung = False

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """The contender's process, while it is needed."""
        with self._lab, tempfile.TemporaryFile() as errors:
            for fault in self._faults:
                self._lab.fault(fault)
            with self._process(errors) as process:
                bound = threading.Timer(CHILD_SECONDS, self._kill, [process])
                bound.daemon = True
                reader = threading.Thread(target=self._read, args=(process, errors), daemon=True)
                self._reader = reader
                try:
                    bound.start()
                    reader.start()
                    yield
                finally:
                    process.kill()
                    bound.cancel()
                    reader.join()

    def _process(self, errors: IO[bytes]) -> subprocess.Popen[str]:
        arguments = [*self.contender.arguments, f"--steps={self.steps}", f"--seed={self.seed}"]
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-P", str(_SCRIPT), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        # Whatever is set for tinker or the shim out there must not decide the race.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TINKER_")
        }
        environment |= {
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # It finds what this process finds, also in a checkout that is not installed.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONIOENCODING": "utf-8",
            "TINKER_API_KEY": "tml-demo",
            "TINKER_BASE_URL": self._lab.base_url,
            # Its requests would get the same 404s, and be counted.
            "TINKER_TELEMETRY": "0",
        }
        if self._lab.ca_file is not None:
            environment["SSL_CERT_FILE"] = str(self._lab.ca_file)
        if not self.contender.shim:
            # Importing the strategies must not install the shim.
            environment["TINKER_ROUTEFIX"] = "0"
        return environment

    def _kill(self, process: subprocess.Popen[str]) -> None:
        # It may be waiting for the others.
        if not self.over:
            self._hung = True
            process.kill()

    def _read(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # not ours
                self._note(json.loads(line))
                if self.over:
                    # What else the SDK's threads have to say to the lab is not waited for.
                    process.kill()
        process.wait()
        if not self.over:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            kind = "hung" if self._hung else f"exit {process.returncode}"
            self._note({"event": "error", "type": kind, "message": last})

    def _note(self, said: dict[str, Any]) -> None:
        self.events.append(Event(time.monotonic() - self._began, said))

    @property
    def over(self) -> bool:
        """Whether it has finished or died."""
        return bool(self.events) and self.events[-1].said.get("event") in ("saved", "error")

    @property
    def alive(self) -> bool:
        """Whether there is more to come."""
        return self._reader.is_alive()

    def result(self) -> Result:
        """How it fares; final when it is no longer alive."""
        events = list(self.events)
        ledger = self._lab.ledger

        def moments(name: str) -> list[float]:
            return [event.at for event in events if event.said.get("event") == name]

        now = time.monotonic() - self._began
        start = next(iter(moments("started")), now)
        error = next((e.said for e in events if e.said.get("event") == "error"), {})
        outcome: Outcome = "running"
        if self._hung:
            outcome = "hung"
        elif error:
            outcome = "died"
        elif moments("saved"):
            outcome = "survived"
        asked = len(moments("submitted"))
        return Result(
            contender=self.contender.name,
            shim=self.contender.shim,
            outcome=outcome,
            error=error.get("type"),
            message=error.get("message"),
            seconds=max(0.0, (now if outcome == "running" else events[-1].at) - start),
            steps=len(moments("step")),
            steps_asked=self.steps,
            gradients=ledger.gradients,
            gradients_asked=asked,
            updates=ledger.optim_steps,
            updates_asked=asked,
            saves=ledger.count("save"),
            refused=self._lab.count(refused=True),
            duplicates=len(ledger.duplicates()),
            out_of_order=len(ledger.out_of_order()),
            missing=len(ledger.missing()),
            connected_at=next((at - start for at in moments("connected")), None),
            steps_at=[at - start for at in moments("step")],
            refused_at=[one.at - start for one in self._lab.exchanges if one.refused],
            again_at=[at - start for at in _trained_again(ledger)],
        )


@contextlib.contextmanager
def start(act: Act, *, steps: int, seed: int, tls: bool = False) -> Iterator[list[Run]]:
    """All contenders of an act, running; on the way out all of them are ended."""
    with contextlib.ExitStack() as stack:
        runs = [Run(contender, act, steps=steps, seed=seed, tls=tls) for contender in CONTENDERS]
        for run in runs:
            stack.enter_context(run.started())
        yield runs
