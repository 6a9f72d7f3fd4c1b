"""Every published release of tinker, and what each has where the shim takes hold.

`python -m tools.releases` writes `releases.toml` and `atlas.toml`; `matrix.toml`, what the
sessions of nox run, is written by hand.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.releases import look

if TYPE_CHECKING:
    from tests.releases.look import Shape

FOLDER = Path(__file__).parent
RELEASES = FOLDER / "releases.toml"
ATLAS = FOLDER / "atlas.toml"
MATRIX = FOLDER / "matrix.toml"

Atlas: TypeAlias = dict[str, dict[str, "Shape"]]
"""By release, and there by place."""


def releases() -> dict[str, dict[str, Any]]:
    """What is known of each release, oldest first."""
    return tomllib.loads(RELEASES.read_text("utf-8"))


def matrix() -> dict[str, Any]:
    """What the sessions of nox run on."""
    return tomllib.loads(MATRIX.read_text("utf-8"))


def table() -> str:
    """What `docs/compatibility.md` says of the supported releases: cog puts it there."""
    known, run = releases(), matrix()
    first, *_, last = known
    torch = [release for release, facts in known.items() if facts["needs_torch"]]
    full = [release for release in known if release in {*run["boundaries"], *run["tinkers"]}]
    sdks = ", ".join(
        f"{pin.partition('==')[2]} ({_below(row)})" for row, (pin, *_) in run["fireworks"].items()
    )
    rows = [
        ("SDK", "releases", "what is run, on plain tinker and with the shim"),
        ("---", "---", "---"),
        ("tinker", f"all {len(known)}, {first} to {last}", "the core tests"),
        ("", ", ".join(full), "all tests of `nox -s compat`"),
        ("fireworks-ai", sdks, "its own tests"),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(
        ["", *lines, "", f"tinker {torch[0]} to {torch[-1]} cannot be imported without torch.", ""]
    )


def _below(row: str) -> str:
    kind, _, release = row.partition("-")
    return f"with tinker {release}" if kind == "tinker" else "with its own copy of tinker"


def atlas() -> Atlas:
    """The file names only the releases where a place changes; this has all of them."""
    tables = tomllib.loads(ATLAS.read_text("utf-8"))
    full: Atlas = {}
    standing: dict[str, Shape] = {}
    for release in tables.pop("releases"):
        for where, changes in tables.items():
            if release in changes:
                standing[where] = _shape(changes[release])
        full[release] = dict(standing)
    return full


def _shape(fields: dict[str, Any]) -> Shape:
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return look.Shape(**known)


def incompatible(shapes: dict[str, Shape]) -> list[str]:
    """Why the shim does not fit a release: by the same rules as when it is installed.

    One rule is stricter. Source shows what a decorator is called but not what it returns, so
    only those that are known to keep the kind of a function are accepted.
    """
    found = []
    for where, seam in look.SEAMS.items():
        shape = shapes.get(where, look.ABSENT)
        kind = "async function" if seam.coroutine else "function"
        if shape.kind != kind:
            found.append(f"{where} is not of the kind {kind!r}: {shape.kind}")
            continue
        known = set() if seam.coroutine else {"contextmanager", "without_sdk_method_telemetry"}
        found += [
            f"{where} is decorated with @{name}" for name in shape.decorators if name not in known
        ]
        found += [
            f"{where} has no parameter {name!r}"
            for name in seam.parameters
            if name not in shape.parameters
        ]
    for where, names in look.ATTRIBUTES.items():
        assigns = shapes.get(where, look.ABSENT).assigns
        found += [f"{where} does not assign {name!r}" for name in names if name not in assigns]
    return found
