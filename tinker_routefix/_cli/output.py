"""How a command says what it found: rich on a terminal, plain text elsewhere, or JSON.

What is said is the same text in all of them; only ASCII, so that it fits any encoding. rich is
not a dependency of the shim: it is used where somebody installed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from rich.status import Status

Mark = Literal["good", "warn", "bad", "dim", "title", ""]

_STYLES: dict[Mark, str] = {
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "dim": "dim",
    "title": "bold",
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


def _wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """Lines that fit a terminal; a word that does not fit is not cut: it has to be copied."""
    if width is None or len(indent) + len(text) <= width:
        return [indent + text]
    return textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _laid_out(rows: Sequence[Row], width: int | None) -> Iterator[tuple[str, Mark]]:
    """The lines of a table: in columns, and what is too long for that below its name."""
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]
    for row in rows:
        cells = (cell.ljust(size) for cell, size in zip(row.cells, widths, strict=True))
        line = f"  {'  '.join(cells)}".rstrip()
        if width is None or len(line) <= width:
            yield line, row.mark
            continue
        name, *more = row.cells
        yield f"  {name}", row.mark
        for line in _wrapped("  ".join(filter(None, more)), width, "      "):
            yield line, row.mark


class Plain:
    """Text for files, pipes and terminals without rich."""

    def __init__(self) -> None:
        self._shown = 0

    def line(self, text: str, mark: Mark = "") -> None:
        """Write a text, wrapped where a terminal shows it."""
        self.close()
        for line in _wrapped(text, self._width()):
            self._write(line, mark)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Write a title, and the rows below it."""
        self.close()
        self._write("", "")
        self._write(title, "title")
        for line, mark in _laid_out(rows, self._width()):
            self._write(line, mark)

    def _width(self) -> int | None:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def _write(self, line: str, mark: Mark) -> None:
        del mark
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def progress(self, text: str) -> None:
        """Rewrite one line of the terminal; a file gets none of it."""
        if sys.stderr.isatty():
            # Longer than a line it could not be rewritten.
            text = text[: shutil.get_terminal_size().columns - 1]
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


class Rich(Plain):
    """The same in colour, where rich is installed."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        # Not at the top: the base install has no rich.
        if console is None:
            console = importlib.import_module("rich.console").Console(highlight=False)
        self._console = console
        self._status: Status | None = None

    def _width(self) -> int | None:
        return self._console.width if self._console.file.isatty() else None

    def _write(self, line: str, mark: Mark) -> None:
        self._console.print(line, style=_STYLES[mark] or None, markup=False, soft_wrap=True)

    def progress(self, text: str) -> None:
        """Show a spinner with a text, where there is a terminal to draw it on."""
        if not self._console.file.isatty():
            return
        text = importlib.import_module("rich.markup").escape(text)
        if self._status is None:
            # Drawn with ASCII: what stands here has to fit any encoding.
            self._status = self._console.status(text, spinner="line")
            self._status.start()
        else:
            self._status.update(text)

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
    # A CI that shows colours has no terminal, and says so by this variable.
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        with contextlib.suppress(ImportError):
            return Rich()
    return Plain()
