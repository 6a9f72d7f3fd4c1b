"""What the race looks like: live, as tables with timelines, or as JSON.

Everything fits into 80 columns, and into ASCII where the terminal's encoding asks for it.
"""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final, Protocol

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinker_routefix import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinker_routefix.demo.race import Act, Result, Run

LINE_CELLS: Final = 60
"""Cells of a timeline."""
LOOK_SECONDS: Final = 0.1
"""How often the runs are looked at."""

Played = list[tuple["Act", list["Result"]]]


class Report(Protocol):
    """Where the demo reports to."""

    def follow(self, act: Act, runs: Sequence[Run]) -> None:
        """Show the runs until all are over."""

    def act(self, act: Act, results: Sequence[Result]) -> None:
        """Show what came of an act."""

    def end(self, played: Played, flaws: Sequence[str], *, steps: int, seed: int) -> None:
        """Show what came of it all."""


def _wait(runs: Sequence[Run]) -> bool:
    """Wait a moment; False when all runs are over."""
    if not any(run.alive for run in runs):
        return False
    time.sleep(LOOK_SECONDS)
    return True


class Json:
    """Says nothing until the end."""

    def follow(self, act: Act, runs: Sequence[Run]) -> None:
        """Only wait."""
        del act
        while _wait(runs):
            pass

    def act(self, act: Act, results: Sequence[Result]) -> None:
        """Say nothing yet."""

    def end(self, played: Played, flaws: Sequence[str], *, steps: int, seed: int) -> None:
        """Print all of it."""
        said = {
            "tinker": metadata.version("tinker"),
            "tinker_routefix": __version__,
            "steps": steps,
            "seed": seed,
            "exact": not flaws,
            "flaws": list(flaws),
            "acts": [
                {
                    "name": act.name,
                    "title": act.title,
                    "contenders": {one.contender: asdict(one) for one in results},
                }
                for act, results in played
            ],
        }
        sys.stdout.write(json.dumps(said, indent=2) + "\n")


@dataclass(frozen=True)
class Glyphs:
    """The characters of a timeline."""

    waiting: str = "·"
    connected: str = "○"
    step: str = "█"
    refused: str = "x"
    again: str = "2"
    died: str = "✗"
    finished: str = "✓"


ASCII: Final = Glyphs(waiting=".", connected="o", step="#", died="X", finished="+")

STYLES: Final = {
    "waiting": "dim",
    "connected": "cyan",
    "step": "green",
    "refused": "yellow",
    "again": "bold red",
    "died": "bold red",
    "finished": "bold green",
}
MEANINGS: Final = {
    "connected": "connected",
    "step": "step",
    "refused": "404",
    "again": "trained again",
    "finished": "done",
    "died": "died",
}


class Screen:
    """Prints to the terminal; plain lines while it runs where there is none."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # An exception's message may have characters that this terminal does not.
            sys.stdout.reconfigure(errors="replace")
        self.console = Console(highlight=False)
        self.glyphs = ASCII if self.console.options.ascii_only else Glyphs()
        self._began = time.monotonic()

    def follow(self, act: Act, runs: Sequence[Run]) -> None:
        """Show the timelines grow, or a line per event."""
        self.console.print(f"\n{act.title}", style="bold")
        if not self.console.is_terminal:
            self._lines(runs)
            return
        with Live(console=self.console, transient=True, auto_refresh=False) as live:
            while _wait(runs):
                live.update(self._timelines([run.result() for run in runs]), refresh=True)

    def _lines(self, runs: Sequence[Run]) -> None:
        shown = dict.fromkeys(runs, 0)
        going_on = True
        while going_on:
            going_on = _wait(runs)
            for run in runs:
                for event in run.events[shown[run] :]:
                    shown[run] += 1
                    said = " ".join(str(word) for word in event.said.values())
                    if event.said.get("event") != "submitted":
                        line = f"{event.at:6.1f} s  {run.contender.name:<15}  {said}"
                        self.console.print(line, markup=False, overflow="crop", no_wrap=True)

    def act(self, act: Act, results: Sequence[Result]) -> None:
        """Print the table and the timelines."""
        del act
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("contender")
        table.add_column("outcome", overflow="fold")
        for column in ("steps", "gradients", "updates", "404s", "seconds"):
            table.add_column(column, justify="right")
        for one in results:
            table.add_row(
                one.contender,
                self._outcome(one),
                f"{one.steps}/{one.steps_asked}",
                _counted(one.gradients, one.gradients_asked),
                _counted(one.updates, one.updates_asked),
                str(one.refused),
                f"{one.seconds:.1f}",
            )
        self.console.print()
        self.console.print(table)
        self.console.print()
        self.console.print(self._timelines(results))

    def end(self, played: Played, flaws: Sequence[str], *, steps: int, seed: int) -> None:
        """Print the legend and the verdict."""
        del steps, seed
        self.console.print(
            "\ngradients, updates (optimizer steps): executed by the trainer / asked for by\n"
            "the script until it ended.",
            style="dim",
        )
        for contender, count in _trained_again(played).items():
            self.console.print(f"{contender} trained {count} operations again.", style="red")
        for flaw in flaws:
            self.console.print(f"Not exact: {flaw}", style="bold red", markup=False)
        if not flaws:
            self.console.print(
                "tinker_routefix survived both acts, with everything trained exactly once.",
                style="bold green",
            )
        self.console.print(
            f"tinker {metadata.version('tinker')}, tinker_routefix {__version__}, "
            f"{time.monotonic() - self._began:.0f} s",
            style="dim",
        )

    def _outcome(self, one: Result) -> Text:
        if one.outcome == "survived":
            return Text(f"{self.glyphs.finished} survived", STYLES["finished"])
        how = one.error if one.outcome == "died" else one.outcome
        return Text(f"{self.glyphs.died} {how}", STYLES["died"])

    def _timelines(self, results: Sequence[Result]) -> Group:
        # A little more than the longest one, so that its end has a cell of its own.
        cell_seconds = max(*(one.seconds for one in results), 1.0) / (LINE_CELLS - 0.5)
        table = Table.grid(padding=(0, 2))
        table.add_column(width=15, no_wrap=True)
        table.add_column(width=LINE_CELLS, no_wrap=True)
        for one in results:
            table.add_row(one.contender, self._timeline(one, cell_seconds))
        return Group(table, self._legend(cell_seconds))

    def _timeline(self, one: Result, cell_seconds: float) -> Text:
        """One cell per fraction of a second; in each the last of these that applies."""

        def cell(at: float) -> int:
            return min(max(int(at / cell_seconds), 0), LINE_CELLS - 1)

        end = cell(one.seconds)
        cells = ["waiting"] * (end + 1)
        happened = [
            ("refused", one.refused_at),
            ("connected", [one.connected_at] if one.connected_at is not None else []),
            ("step", one.steps_at),
            ("again", one.again_at),
            ("finished", [one.seconds] if one.outcome == "survived" else []),
            ("died", [one.seconds] if one.outcome in ("died", "hung") else []),
        ]
        for what, moments in happened:
            for at in moments:
                cells[min(cell(at), end)] = what
        return Text.assemble(*((getattr(self.glyphs, what), STYLES[what]) for what in cells))

    def _legend(self, cell_seconds: float) -> Text:
        legend = Text()
        for what, meaning in MEANINGS.items():
            legend.append(getattr(self.glyphs, what), STYLES[what])
            legend.append(f" {meaning}  ", "dim")
        legend.append(self.glyphs.waiting, STYLES["waiting"])
        legend.append(f" waiting {cell_seconds:.2f} s", "dim")
        return legend


def _counted(executed: int, asked: int) -> Text:
    return Text(f"{executed}/{asked}", "bold red" if executed != asked else "")


def _trained_again(played: Played) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, results in played:
        for one in results:
            if one.again_at:
                counts[one.contender] = counts.get(one.contender, 0) + len(one.again_at)
    return counts
