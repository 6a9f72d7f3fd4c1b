"""How the plots look: small SVGs that come out the same for the same figures."""

from __future__ import annotations

import io
import re
import statistics
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Not drawn by lot: the same figures make the same file.
    "svg.hashsalt": "benchmarks",
}


def axes(rows: int, columns: int, *, height: float = 3.4, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes."""
    mpl.rcParams.update(cast("Any", STYLE))
    return pyplot.subplots(rows, columns, figsize=(9, height), **options)


def strips(on: Axes, values: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> None:
    """Every value as a dot, and the median as a line."""
    for place, (name, dots) in enumerate(values.items()):
        if not dots:
            continue
        shifts = [(number % 7 - 3) * 0.04 for number in range(len(dots))]
        on.scatter([place + shift for shift in shifts], dots, s=14, color=colours[name], alpha=0.6)
        on.hlines(statistics.median(dots), place - 0.3, place + 0.3, color=colours[name])
    on.set_xticks(range(len(values)), [name.replace("tinker_", "tinker_\n") for name in values])
    on.grid(visible=False, axis="x")


def save(figure: Figure, path: Path) -> None:
    """Write an SVG without the date and what made it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # Without blanks at the ends of lines.
    path.write_text(re.sub(r"[ \t]+\n", "\n", text.getvalue()), encoding="utf-8")
