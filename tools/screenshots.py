"""Screenshots of the command line, as SVG files for the documentation.

`python -m tools.screenshots` runs `status`, `check` and `demo` against the lab and rewrites
`docs/images`; names behind it choose some of them. What they say is what was measured, so each
run is a little different; nothing else in them changes, and nothing tells of this machine.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

import tinker_routefix
from tinker_routefix import _settings
from tinker_routefix._cli import check, status
from tinker_routefix._cli.output import Rich, Row
from tinker_routefix.lab import Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tinker_routefix.demo.race import Act, Run

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH = 104
PORT = 8404
"""Of the lab, as it stands in the pictures."""
_FONTS = re.compile(r"\s*@font-face {.*?}", re.DOTALL)
"""What would be fetched from a server."""


class Shot(Rich):
    """The screen of a command."""

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Show a table without the paths of this machine."""
        tidy = [
            Row(tuple(cell.replace(sys.prefix, ".venv") for cell in row.cells), row.mark)
            for row in rows
        ]
        super().table(title, tidy)

    def _width(self) -> int:
        """The picture's, as if it were a terminal's."""
        return WIDTH


def prompt(console: Console, command: str) -> None:
    """Write a command as it is typed."""
    console.print(f"[bold]$[/] tinker-routefix {command}")


def shoot_status(console: Console) -> None:
    """What a healthy installation says."""
    prompt(console, "status")
    status.show(as_json=False, to=Shot(console))


def shoot_check(console: Console) -> None:
    """The route of a new job, and the same one a little later."""
    with Lab(port=PORT) as lab, mock.patch.dict(os.environ, FIREWORKS_API_KEY="lab"):
        lab.fault(Fault(kinds={"capabilities"}, count=7))
        for again in (False, True):
            if again:
                console.print()
            prompt(console, f"check {lab.base_url}")
            check.check(
                lab.base_url,
                key_variable="FIREWORKS_API_KEY",
                seconds=None,
                rate=4.0,
                watch=False,
                as_json=False,
                to=Shot(console),
            )


def shoot_demo(console: Console) -> None:
    """The whole demo, without what it shows on the way."""
    from tinker_routefix import demo
    from tinker_routefix.demo import report

    class Screen(report.Screen):
        def __init__(self) -> None:
            super().__init__()
            self.console, self.glyphs = console, report.Glyphs()

        def follow(self, act: Act, runs: Sequence[Run]) -> None:
            self.console.print(f"\n{act.title}", style="bold")
            report.Json().follow(act, runs)

    prompt(console, "demo")
    with mock.patch.object(report, "Screen", Screen):
        if demo.run(steps=6, seed=0, as_json=False) != 0:
            raise SystemExit("the demo has failed: there is nothing to show")


SHOTS: dict[str, Callable[[Console], None]] = {
    "status": shoot_status,
    "check": shoot_check,
    "demo": shoot_demo,
}


def main(names: Sequence[str]) -> int:
    """Make the pictures."""
    unknown = set(names) - set(SHOTS)
    if unknown:
        sys.stderr.write(f"there is no {', '.join(unknown)}; there are {', '.join(SHOTS)}\n")
        return 2
    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        del os.environ[name]
    _settings.set_current(_settings.Settings.from_environment())
    tinker_routefix.install()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in names or SHOTS:
        console = Console(
            record=True,
            width=WIDTH,
            file=io.StringIO(),
            highlight=False,
            force_terminal=False,
            _environ={},
        )
        SHOTS[name](console)
        svg = console.export_svg(
            title=f"tinker-routefix {name}", theme=DIMMED_MONOKAI, unique_id=name
        )
        lines = (line.rstrip() for line in _FONTS.sub("", svg).splitlines())
        (IMAGES / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sys.stdout.write(f"docs/images/{name}.svg\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
