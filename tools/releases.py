"""Look at every published release of tinker, and write down what the shim relies on.

A new release of tinker can move a seam. This reads the wheel of each release, without
importing it, and writes `tests/releases/releases.toml` and `tests/releases/atlas.toml`, so
that such a change is one line of a diff.

    python -m tools.releases            # write
    python -m tools.releases --check    # whether what is written is still true

A release that is only on the index is news and no error: the check says so, and passes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
from packaging.version import Version

from tests import releases as files
from tests.releases import look

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.releases.look import Shape

INDEX = "https://pypi.org/pypi/tinker/json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinker_routefix"

UNREACHABLE = 75
"""The exit code where the package index cannot be asked: nothing was found out."""

RELEASES_HEADER = """\
# Every release of tinker on the package index. Written by `python -m tools.releases`.
"""
ATLAS_HEADER = """\
# The seam atlas: what each release of tinker has where the shim takes hold. Written by
# `python -m tools.releases`. A line holds from its release on, until the next line.
"""


def published(cache: Path, *, offline: bool) -> dict[str, str]:
    """The releases that have a wheel, oldest first, and the day each was uploaded."""
    index = cache / "index.json"
    if not offline:
        answer = httpx.get(INDEX, timeout=60).raise_for_status()
        cache.mkdir(parents=True, exist_ok=True)
        index.write_bytes(answer.content)
    elif not index.is_file():
        raise click.ClickException(f"--offline, and {cache} does not hold the index")
    days = {
        release: min(
            (file["upload_time"] for file in uploaded if file["packagetype"] == "bdist_wheel"),
            default="",
        )[:10]
        for release, uploaded in json.loads(index.read_bytes())["releases"].items()
    }
    return {release: days[release] for release in sorted(days, key=Version) if days[release]}


def unpacked(cache: Path, release: str, *, offline: bool) -> Path:
    """The folder of a release: to look at, and to put on `PYTHONPATH`."""
    folder = cache / "src" / release
    if folder.is_dir():
        return folder
    wheel = _wheel(cache, release, offline=offline)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Moved into place when complete: an interrupted run leaves no half release behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / release
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(whole)
        whole.rename(folder)
    return folder


def _wheel(cache: Path, release: str, *, offline: bool) -> Path:
    wheels = cache / "wheels"
    pattern = f"tinker-{release}-*.whl"
    if not offline and not any(wheels.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", f"--dest={wheels}", f"tinker=={release}"]
        ended = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            raise click.ClickException(f"no wheel of tinker {release}: {ended.stderr.strip()}")
    for wheel in wheels.glob(pattern):
        return wheel
    raise click.ClickException(f"{wheels} does not hold tinker {release}")


def releases_text(uploads: Mapping[str, str], trees: Mapping[str, Path]) -> str:
    """`releases.toml`."""
    tables = []
    for release, uploaded in uploads.items():
        lines = [
            f"[{_toml(release)}]",
            f"uploaded = {uploaded}",
            *(
                f"needs_{package} = {_toml(look.needs(trees[release], package))}"
                for package in look.NOT_ALWAYS
            ),
            f"wire = {_toml(look.wire(trees[release]))}",
        ]
        tables.append("\n".join(lines) + "\n")
    return "\n".join([RELEASES_HEADER, *tables])


def atlas_text(trees: Mapping[str, Path]) -> str:
    """`atlas.toml`: for each place, the releases in which it changes."""
    shapes = {release: look.look(tree) for release, tree in trees.items()}
    names = "".join(f"    {_toml(release)},\n" for release in shapes)
    tables = [f"releases = [\n{names}]\n"]
    for where in (*look.SEAMS, *look.ATTRIBUTES):
        lines = [f"[{_toml(where)}]"]
        last = None
        for release, places in shapes.items():
            if places[where] != last:
                last = places[where]
                lines.append(f"{_toml(release)} = {_inline(last)}")
        tables.append("\n".join(lines) + "\n")
    return "\n".join([ATLAS_HEADER, *tables])


def _inline(shape: Shape) -> str:
    fields = {name: value for name, value in dataclasses.asdict(shape).items() if value}
    return "{ " + ", ".join(f"{name} = {_toml(value)}" for name, value in fields.items()) + " }"


def _toml(value: Any) -> str:
    """Strings, booleans and lists of them are written alike in JSON and in TOML."""
    return json.dumps(value, ensure_ascii=False)


def _put(path: Path, text: str, *, check: bool) -> bool:
    """Write a file, or only show how it would change; whether it would."""
    present = path.read_text("utf-8") if path.is_file() else ""
    new = f"{path.name}, regenerated"
    changes = list(
        difflib.unified_diff(present.splitlines(), text.splitlines(), path.name, new, lineterm="")
    )
    click.echo("\n".join(changes) if changes else f"{path.name}: nothing changes")
    if changes and not check:
        path.write_text(text, "utf-8", newline="\n")
    return bool(changes)


def _news(release: str, tree: Path) -> str:
    """What the shim will meet in a release that nobody has looked at."""
    incompatible = files.incompatible(look.look(tree))
    return f"NEW: tinker {release}: " + ("; ".join(incompatible) or "the shim fits its seams")


@click.command(help="Write releases.toml and atlas.toml anew.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=CACHE,
    show_default=True,
    help="Where wheels are kept.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if what is written is wrong.")
@click.option("--offline", is_flag=True, help="Use only what the cache holds.")
def main(cache: Path, check: bool, offline: bool) -> None:
    """Regenerate both, or compare."""
    try:
        uploads = published(cache, offline=offline)
    except httpx.HTTPError as error:
        click.echo(f"{INDEX} cannot be reached: {error}", err=True)
        sys.exit(UNREACHABLE)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = pool.map(lambda release: unpacked(cache, release, offline=offline), uploads)
        trees = dict(zip(uploads, folders, strict=True))
    news = [_news(release, trees[release]) for release in trees if release not in files.releases()]
    if check:
        # The rest has to be as it is written.
        uploads = {release: day for release, day in uploads.items() if release in files.releases()}
        trees = {release: trees[release] for release in uploads}
    changed = _put(files.RELEASES, releases_text(uploads, trees), check=check)
    changed |= _put(files.ATLAS, atlas_text(trees), check=check)
    click.echo(f"{len(trees)} releases, {next(iter(trees))} to {list(trees)[-1]}")
    for line in news:
        click.echo(line)
    if check and news:
        click.echo("Run `python -m tools.releases`, and read the diff.")
    if check and changed:
        click.echo("What is written is not so: run `python -m tools.releases`.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
