"""Labs in a process of their own, and the wire on which contenders reach them.

What the gateway, the control plane and the trainer cost must not be counted as the client's,
and their event loop must not take turns with tinker's for one interpreter lock. A contender
opens its lab from its own process, and reads what happened when its run is over.

Moments are ``time.monotonic()``, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

ADDRESS = "BENCHMARKS_LABS"
"""Where the process with the labs listens: host, port and key."""

PYQWEST = "pyqwest"
WIRES: Mapping[str, Mapping[str, Any]] = {
    PYQWEST: {"config": {"use_pyqwest_transport": True}},
    "httpx": {"config": {"use_pyqwest_transport": False}},
    "pyqwest-far": {"config": {"use_pyqwest_transport": True}},
    "httpx-far": {"config": {"use_pyqwest_transport": False}},
}
"""The ways to a lab, by what has to be set for the lab; programs and reports take any.

The first is the default of tinker 0.22 and later. Those that are far lead over TLS and HTTP/2
through an nginx, so many seconds of round trip away as :data:`FAR` says.
"""
FAR = 0.05

SUBMISSIONS = frozenset({"forward", "forward_backward", "optim_step", "save", "load"})
POLLS = frozenset({"poll", "polls"})
PROBES = frozenset({"get_info", "capabilities"})
"""What the shim's own requests through the route ask for; the programs here ask neither."""


class Seen(NamedTuple):
    """A request that reached the gateway or the control plane."""

    at: float
    done: float
    kind: str
    refused: bool
    connection: int


class Account(NamedTuple):
    """What the trainer carried out."""

    gradients: int
    updates: int
    twice: int
    """Executions of a request that had been executed before."""
    out_of_order: int
    missing: int


class Lab:
    """A lab, held in the other process; its methods take and return plain data."""

    def __init__(self, wire: str, **settings: Any) -> None:
        from tinker_routefix import lab

        self._module = lab
        self._holding = False
        self._began = time.monotonic()
        self._started = contextlib.ExitStack()
        self._lab = lab.Lab(**WIRES[wire], **settings).start()
        self._started.callback(self._lab.stop)
        self._nginx: Any = None
        self._url = self._lab.base_url
        if wire.endswith("-far"):
            self._move_away()

    def _move_away(self) -> None:
        from tests.wire.delay import delayed
        from tests.wire.servers import Replica
        from tinker_routefix.lab import _tls

        start = self._started.enter_context
        folder = Path(start(tempfile.TemporaryDirectory()))
        certificate = folder / "server.pem"
        certificate.write_bytes(_tls.issue().private_key_and_cert_chain_pem.bytes())
        about: dict[str, Any] = {"lab": self._lab.origin, "certificate": certificate}
        self._nginx = start(Replica(folder / "nginx", gateway_404="{}", **about))
        self._port = start(delayed(self._nginx.port, FAR))
        origin = f"https://127.0.0.1:{self._port}"
        self._url = self._url.replace(self._lab.origin, origin)

    def close(self) -> None:
        """Stop the server."""
        self._started.close()

    def url(self) -> str:
        """The base URL of the job."""
        return self._url

    def ca_file(self) -> str | None:
        """What a client has to trust, if anything."""
        from tinker_routefix.lab import _tls

        return None if self._nginx is None else str(_tls.ca_file())

    def opened(self) -> int:
        """How many connections have been used so far."""
        seen = self._lab.exchanges if self._nginx is None else self._nginx.answered()
        return len({one.connection for one in seen})

    def open(self) -> int:
        """How many connections are open to a lab that is far."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        port = f":{self._port:04X}"
        return sum(remote.endswith(port) and state == "01" for _, _, remote, state, *_ in rows)

    def lose(self, seconds: float, kinds: Collection[str] | None = None) -> float:
        """Let the gateway lose the route from now on; returns the moment when it has healed."""
        self._lab.fault(self._module.Fault(kinds=kinds, seconds=seconds))
        return time.monotonic() + seconds

    def far_away(self, seconds: float) -> None:
        """Let every request take so much longer, as a distant gateway does."""
        self._lab.fault(self._module.Fault(answer=None, delay=seconds))

    def hold(self, seconds: float) -> None:
        """Let every poll wait so long in vain, until :meth:`hand_out`."""
        self._holding = True
        again = {"type": "try_again", "request_id": "held", "queue_state": "active"}
        self._lab.fault(
            self._module.Fault(
                kinds=POLLS,
                at="pod",
                delay=seconds,
                answer=self._module.Answer(408, again),
                when=lambda _: self._holding,
            )
        )

    def hand_out(self) -> None:
        """Let polls have their results from now on."""
        self._holding = False

    def accepted(self, kind: str) -> int:
        """How many operations of a kind the trainer has taken."""
        return self._lab.ledger.count(kind)

    def count(self) -> int:
        """How many requests have come, of whatever kind."""
        return len(self._lab.exchanges)

    def seen(self) -> list[Seen]:
        """Every request."""
        return [
            Seen(
                self._began + one.at,
                self._began + one.at + one.seconds,
                one.kind,
                one.refused,
                one.connection,
            )
            for one in self._lab.exchanges
        ]

    def account(self) -> Account:
        """What the trainer carried out."""
        ledger = self._lab.ledger
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
def opened(wire: str, **settings: Any) -> Iterator[Lab]:
    """A lab of one's own in the process that :func:`serving` started."""
    host, port, key = os.environ[ADDRESS].split()
    manager = _Manager((host, int(port)), authkey=bytes.fromhex(key))
    manager.connect()
    lab: Lab = cast("Any", manager).Lab(wire, **settings)
    trusted = lab.ca_file()
    if trusted is not None:
        os.environ["SSL_CERT_FILE"] = trusted
    try:
        yield lab
    finally:
        lab.close()
