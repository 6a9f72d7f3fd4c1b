"""The shim can be read in the order that docs/architecture.md gives, and stays small to read."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import tinker_routefix

PACKAGE = Path(tinker_routefix.__file__ or "").parent
PAGE = Path(__file__).parent.parent / "docs/architecture.md"
if not PAGE.is_file():
    pytest.skip("only a checkout has the page", allow_module_level=True)

MODULES = {path.stem: path.read_text("utf-8") for path in sorted(PACKAGE.glob("*.py"))}
SURFACE = {"events", "_status"}
"""Longer than the others: every field of theirs has a docstring."""


@cache
def page() -> str:
    return PAGE.read_text("utf-8")


def named(text: str) -> list[str]:
    """The modules that a text names, in its order."""
    return [
        name
        for name in re.findall(r"`(\w+)(?:\.\w+)*`", text)
        if name in MODULES or (PACKAGE / name).is_dir()
    ]


def path_of_a_refused_request() -> list[str]:
    (table,) = re.findall(
        r"## The path of a refused request\n(?:.*\n)*?\| file .*\n\| ---.*\n((?:\|.*\n)+)", page()
    )
    return [row.split("|")[1].strip(" `") for row in table.splitlines()]


def test_page_names_every_module_of_the_package() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*MODULES, *folders} == set(named(page()))


def test_path_of_a_refused_request_is_short() -> None:
    path = path_of_a_refused_request()
    assert path[0] == "_seams"
    assert path[-2:] == ["_replay", "_waiting"]
    assert sum(len(MODULES[name].split()) for name in path) <= 3500


def imported(module: str) -> set[str]:
    """The modules that one imports, wherever in it, but for types only."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found.update([node.module] if node.module else [name.name for name in node.names])
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(MODULES[module]))
    return found & set(MODULES)


def test_no_module_imports_another_in_a_circle() -> None:
    uses = {module: imported(module) for module in MODULES}
    # The log asks a setting, and a wrong setting is logged: at their import only one of them.
    uses["_log"].discard("_settings")
    while leaves := [module for module, used in uses.items() if not used]:
        for leaf in leaves:
            del uses[leaf]
        for used in uses.values():
            used.difference_update(leaves)
    assert not uses


def test_policies_know_nothing_of_the_sdk() -> None:
    """What is imported by what decides when to replay knows neither its clients nor its wire."""
    seams = {"_clients", "_requests", "_futures", "_connecting", "_manager"}
    made_of = {"_call", "_refused", "_doubt", "_submissions", "_connections", "_probes", "_answers"}
    reached, todo = set(), ["_replay", "_warmup", "_prober", "_waiting", "_control_plane"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += imported(module)
    assert not reached & (seams | made_of)


@pytest.mark.parametrize("module", sorted(set(MODULES) - SURFACE))
def test_module_is_at_most_300_lines(module: str) -> None:
    assert len(MODULES[module].splitlines()) <= 300


@pytest.mark.parametrize("module", MODULES)
def test_function_is_at_most_30_statements(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(one, ast.stmt) for one in ast.walk(node)) - 1
            assert statements <= 30, node.name
