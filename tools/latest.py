"""Whether the seams of the tinker that is installed here, known or not, fit the shim.

A release that fits passes even if nobody has looked at it yet.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tests import releases as files
from tests.releases import look

if TYPE_CHECKING:
    from tests.releases.look import Shape


def compared(now: dict[str, Shape], then: dict[str, Shape]) -> dict[str, str]:
    """For each place that the shim relies on: absent, changed, or present as it was."""
    return {
        where: "absent" if shape == look.ABSENT
        else "present" if shape == then.get(where)
        else f"changed: {shape}, was {then.get(where)}"
        for where, shape in now.items()
    }  # fmt: skip


def report(release: str, shapes: dict[str, Shape]) -> tuple[list[str], list[str]]:
    """What there is to say of a release, and why the shim does not fit it."""
    atlas = files.atlas()
    newest = list(atlas)[-1]
    known = f"the atlas ends with {newest}: run `nox -s update-releases`"
    lines = [f"tinker {release}, {'known' if release in atlas else f'a NEW release: {known}'}"]
    for where, what in compared(shapes, atlas.get(release, atlas[newest])).items():
        lines.append(f"  {where}: {what}")
    return lines, files.incompatible(shapes)


if __name__ == "__main__":
    spec = importlib.util.find_spec("tinker")
    if spec is None or spec.origin is None:
        sys.exit("tinker is not installed")
    lines, incompatible = report(
        metadata.version("tinker"), look.look(Path(spec.origin).parent.parent)
    )
    sys.stdout.write("\n".join([*lines, ""]))
    sys.exit("\n".join(["The shim does not fit:", *incompatible]) if incompatible else 0)
