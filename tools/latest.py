"""Whether the shim works with the tinker that is installed here, known or not.

For the newest release of today: a look at its seams, against the newest that the atlas knows,
and the core tests. A release that fits passes even if nobody has looked at it yet.

    python -m tools.latest
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests import releases as files
from tests.releases import look

if TYPE_CHECKING:
    from tests.releases.look import Shape

ROOT = Path(__file__).parent.parent


def compared(now: dict[str, Shape], then: dict[str, Shape]) -> dict[str, str]:
    """For each place that the shim relies on: absent, changed, or present as it was."""
    return {
        where: "absent" if shape == look.ABSENT
        else "present" if shape == then.get(where)
        else f"changed: {shape}, was {then.get(where)}"
        for where, shape in now.items()
    }  # fmt: skip


@click.command(help="Look at the installed tinker's seams, and run the core tests with it.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(options: tuple[str, ...]) -> None:
    """Exit 1 if a seam does not fit, else as pytest does."""
    release = metadata.version("tinker")
    atlas = files.atlas()
    newest = list(atlas)[-1]
    spec = importlib.util.find_spec("tinker")
    if spec is None or spec.origin is None:
        raise click.ClickException("tinker is not installed")
    shapes = look.look(Path(spec.origin).parent.parent)
    known = release if release in atlas else newest
    said = f"tinker {release}, " + (
        "known" if release in atlas else f"a NEW release: the atlas ends with {newest}"
    )
    click.echo(said)
    for where, what in compared(shapes, atlas[known]).items():
        click.echo(f"  {where}: {what}")
    if misfits := files.misfits(shapes):
        click.echo("\n".join([f"The shim does not fit tinker {release}:", *misfits]), err=True)
        sys.exit(1)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "core", *options, "tests"]
    code = subprocess.run(pytest, cwd=ROOT, check=False).returncode  # noqa: S603
    click.echo(f"{said}; the seams fit; the core tests " + ("FAILED" if code else "passed"))
    if release not in atlas:
        click.echo(f"NEW: {release} is not in the atlas: run `python -m tools.releases`.")
    sys.exit(code)


if __name__ == "__main__":
    main()
