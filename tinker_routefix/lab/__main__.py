"""``python -m tinker_routefix.lab``: a lab to point a training program at, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinker_routefix.lab._faults import Exchange, Fault
from tinker_routefix.lab._server import Lab

if TYPE_CHECKING:
    from types import FrameType

_STYLES = {2: "green", 3: "yellow", 4: "red", 5: "bold red"}
_ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SECONDS = click.FloatRange(min=0)


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


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="a free one",
    help="Port to listen on.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Replicas of the gateway.",
)
@click.option(
    "--stale",
    type=_SECONDS,
    default=0.0,
    metavar="SECONDS",
    help="Refuse a job for so long, from its first create_session on.",
)
@click.option("--stale-from-start", is_flag=True, help="Let --stale begin with the lab.")
@click.option(
    "--flap",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="CHANCE",
    help="Refuse requests by chance (0 to 1).",
)
@click.option(
    "--work", type=_SECONDS, default=0.0, metavar="SECONDS", help="What an operation takes."
)
@click.option(
    "--state",
    default="JOB_STATE_RUNNING",
    show_default=True,
    help="What the control plane says about the jobs.",
)
def main(
    port: int,
    replicas: int,
    stale: float,
    stale_from_start: bool,
    flap: float,
    work: float,
    state: str,
) -> None:
    """Serve a control plane, a gateway that loses routes, and a trainer, until Ctrl-C."""
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
        raise click.ClickException(f"cannot listen on port {port}: {error.strerror}") from error
    try:
        if stale and stale_from_start:
            lab.stale(stale)
        elif stale:
            lab.fault(Fault(kinds={"create_session"}, when=first_session))
        console.print(f"base URL: {lab.base_url}", style="bold")
        console.print(f"direct:   {lab.direct_url}")
        while not ended_by:
            time.sleep(0.1)
    finally:
        lab.stop()
    console.print(_summary(lab))
    sys.stderr.write(f"{_ENDS[signal.Signals(ended_by[0])]}\n")
    # As a shell sees a program that such a signal has ended.
    sys.exit(128 + ended_by[0])


if __name__ == "__main__":
    main()
