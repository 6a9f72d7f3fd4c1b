"""``tinker-routefix lab``: a lab to point a training program at, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinker_routefix.lab._faults import Exchange, Fault
from tinker_routefix.lab._server import Lab

if TYPE_CHECKING:
    from types import FrameType

_STYLES = {2: "green", 3: "yellow", 4: "red", 5: "bold red"}
_ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def _line(exchange: Exchange) -> Text:
    kind = f"{exchange.kind}:{exchange.subject}" if exchange.subject else exchange.kind
    status = "closed" if exchange.status is None else str(exchange.status)
    who = "direct" if exchange.replica is None else f"replica {exchange.replica}"
    if exchange.kind == "control_plane":
        who = "control plane"
    return Text.assemble(
        f"{exchange.at:9.3f}s  ",
        (f"{status:<6}", _STYLES.get((exchange.status or 0) // 100, "magenta")),
        f"  {kind:<28} seq {exchange.seq_id if exchange.seq_id is not None else '-':<5}",
        f" {exchange.seconds * 1000:7.0f} ms  {who}, connection {exchange.connection}",
        "  (stale route)" if exchange.refused else "",
    )


def _summary(lab: Lab) -> Table:
    table = Table("executed", "times", title="What the trainer did")
    executions = lab.ledger.executions
    for kind in dict.fromkeys(execution.kind for execution in executions):
        table.add_row(kind, str(lab.ledger.count(kind)))
    table.add_section()
    table.add_row("twice", str(len(lab.ledger.duplicates())))
    table.add_row("out of order", str(len(lab.ledger.out_of_order())))
    table.add_row("missing", str(len(lab.ledger.missing())))
    table.add_row("refused by the gateway", str(lab.count(refused=True)))
    return table


def serve(
    *,
    port: int,
    replicas: int,
    stale: float,
    stale_from_start: bool,
    flap: float,
    work: float,
    state: str,
    tls: bool,
) -> int:
    """Serve until a signal ends it.

    Returns:
        The exit code: as a shell sees a program that such a signal has ended.
    """
    console = Console(soft_wrap=True, highlight=False)
    ended_by: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        # Nothing that takes a lock: it runs in the midst of whatever the main thread does.
        ended_by.append(number)

    for number in _ENDS:
        signal.signal(number, end)

    lab = Lab(
        replicas=replicas,
        work_seconds=work,
        port=port,
        observer=lambda exchange: console.print(_line(exchange)),
        tls=tls,
    )
    lab.control_plane.state = state
    if flap:
        lab.flap(flap)
    begun: list[Fault] = []

    def first_session(_exchange: Exchange) -> bool:
        # It is armed in time to refuse this request already.
        if not begun:
            begun.append(lab.stale(stale))
        return False

    try:
        lab.start()
    except OSError as error:
        sys.stderr.write(f"tinker-routefix lab: cannot listen on port {port}: {error.strerror}\n")
        return 1
    try:
        if stale and stale_from_start:
            lab.stale(stale)
        elif stale:
            lab.fault(Fault(kinds={"create_session"}, when=first_session))
        console.print(f"base URL: {lab.base_url}", style="bold")
        console.print(f"direct:   {lab.direct_url}")
        if lab.ca_file is not None:
            console.print(f"trust it: export SSL_CERT_FILE={lab.ca_file}")
        while not ended_by:
            time.sleep(0.1)
    finally:
        lab.stop()
    console.print(_summary(lab))
    sys.stderr.write(f"{_ENDS[signal.Signals(ended_by[0])]}\n")
    return 128 + ended_by[0]
