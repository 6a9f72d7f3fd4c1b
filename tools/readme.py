"""What the README says of the supported releases: from the data, between two markers."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from tests import releases as files

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

BEGIN = "<!-- written by `python -m tools.releases` -->"
END = "<!-- end of what is written -->"


def constant(name: str) -> Any:
    """A constant of the noxfile, which only nox can import."""
    for statement in ast.parse((ROOT / "noxfile.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise LookupError(f"noxfile.py has no {name}")


def block() -> str:
    """The markers, and what belongs between them."""
    known = files.releases()
    first, *_, last = known
    torch = [release for release, facts in known.items() if facts["needs_torch"]]
    full = [release for release, facts in known.items() if facts["boundary"]]
    full = [release for release in known if release in {*full, *constant("TINKERS")}]
    sdks = ", ".join(
        f"{_sdk(requirements)} ({_below(row)})"
        for row, requirements in constant("FIREWORKS").items()
    )
    rows = [
        ("tinker", f"all {len(known)}, {first} to {last}", "the core tests"),
        ("", ", ".join(full), "all tests"),
        ("fireworks-ai", sdks, "its own tests"),
    ]
    lines = [
        BEGIN,
        "",
        "| SDK | releases | what is run, on plain tinker and with the shim |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"tinker {torch[0]} to {torch[-1]} cannot be imported without torch.",
        "",
        END,
    ]
    return "\n".join(lines)


def text() -> str:
    """The README as it should be; it has the markers."""
    present = README.read_text("utf-8")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    new, count = re.subn(pattern, lambda _: block(), present, flags=re.DOTALL)
    if count != 1:
        raise LookupError(f"{README.name} does not have `{BEGIN}` and `{END}` once")
    return new


def _sdk(requirements: list[str]) -> str:
    (pin,) = (item for item in requirements if item.startswith("fireworks-ai"))
    return pin.partition("==")[2]


def _below(row: str) -> str:
    kind, _, release = row.partition("-")
    return f"with tinker {release}" if kind == "tinker" else "with its own copy of tinker"
