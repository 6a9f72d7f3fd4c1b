"""How a command says what it found: rich on a terminal, plain text elsewhere, or JSON.

What is said is the same text in all of them; only ASCII, so that it fits any encoding. rich is
not a dependency of the shim: it is used where somebody installed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.status import Status

Mark = Literal["good", "warn", "bad", "dim", ""]

_STYLES: dict[Mark, str] = {
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "dim": "dim",
    "": "",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A line of a table, and whether it is good news."""

    cells: tuple[str, ...]
    mark: Mark = ""


class Screen(Protocol):
    """Where a command reports to."""

    def line(self, text: str, mark: Mark = "") -> None:
        """Say one thing."""

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Say several things of a kind; the first cell of a row is its name."""

    def progress(self, text: str) -> None:
        """Show what is going on, in the place of what was shown before."""

    def record(self, document: dict[str, Any]) -> None:
        """Say the same for programs."""

    def close(self) -> None:
        """End what is going on."""


class Plain:
    """Text for files, pipes and terminals without rich."""

    def __init__(self) -> None:
        self._shown = 0

    def line(self, text: str, mark: Mark = "") -> None:
        """Write a line."""
        del mark
        self.close()
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Write a title, and the rows in columns below it."""
        widths = [
            max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)
        ]
        self.line(f"\n{title}")
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True))
            self.line(f"  {'  '.join(cells)}".rstrip())

    def progress(self, text: str) -> None:
        """Rewrite one line of the terminal; a file gets none of it."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text.ljust(self._shown)}")
            sys.stderr.flush()
            self._shown = len(text)

    def record(self, document: dict[str, Any]) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Wipe the line of the progress."""
        if self._shown:
            sys.stderr.write(f"\r{' ' * self._shown}\r")
            sys.stderr.flush()
            self._shown = 0


class Rich:
    """A terminal, where rich is installed."""

    def __init__(self, console: Console | None = None) -> None:
        # Not at the top: the base install has no rich.
        if console is None:
            console = importlib.import_module("rich.console").Console(highlight=False)
        self._console = console
        self._status: Status | None = None

    def line(self, text: str, mark: Mark = "") -> None:
        """Print a line."""
        self._console.print(text, style=_STYLES[mark] or None, markup=False, soft_wrap=True)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Print a table."""
        table = importlib.import_module("rich.table").Table(
            title=title, title_justify="left", title_style="bold", show_header=False
        )
        text = importlib.import_module("rich.text").Text
        for row in rows:
            table.add_row(*map(text, row.cells), style=_STYLES[row.mark] or None)
        self._console.print(table)

    def progress(self, text: str) -> None:
        """Show a spinner with a text."""
        text = importlib.import_module("rich.markup").escape(text)
        if self._status is None:
            # Drawn with ASCII: what stands here has to fit any encoding.
            self._status = self._console.status(text, spinner="line")
            self._status.start()
        else:
            self._status.update(text)

    def record(self, document: dict[str, Any]) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Stop the spinner."""
        if self._status is not None:
            self._status.stop()
            self._status = None


class Json:
    """Documents for programs."""

    def __init__(self, *, one_a_line: bool = False) -> None:
        self._indent = None if one_a_line else 2

    def line(self, text: str, mark: Mark = "") -> None:
        """Say nothing."""

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Say nothing."""

    def progress(self, text: str) -> None:
        """Say nothing."""

    def record(self, document: dict[str, Any]) -> None:
        """Write a document."""
        sys.stdout.write(json.dumps(document, indent=self._indent) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing goes on."""


def screen(*, as_json: bool, one_a_line: bool = False) -> Screen:
    """What fits where the output goes to."""
    if as_json:
        return Json(one_a_line=one_a_line)
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return Rich()
    return Plain()
