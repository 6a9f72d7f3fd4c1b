"""What a release of tinker has where the shim takes hold, read without importing it.

Reading the source tree lets one Python look at every release that was ever published,
whatever that release would need in order to be imported.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import TYPE_CHECKING, TypeAlias

from tinker_routefix import _seams

if TYPE_CHECKING:
    from pathlib import Path

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

SEAMS = {f"{seam.module}:{seam.attribute}": seam for seam in _seams.TINKER}

ATTRIBUTES = {
    "tinker.lib.internal_client_holder:ClientConnectionPool.__init__": (
        "_clients",
        "_constructor_kwargs",
    ),
    "tinker.lib.api_future_impl:_APIFuture.__init__": ("request_type", "untyped_future"),
    "tinker._client:AsyncTinker.__init__": ("_idempotency_header",),
}
"""What instances have and the shim reads, by the method that assigns it."""


NOT_ALWAYS = ("torch", "grpc")
"""Packages without which some releases cannot be imported, and the newest can."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What stands at one place in one release."""

    kind: str
    """"function", "async function", "attributes" or "absent"."""
    parameters: tuple[str, ...] = ()
    """In order, with the markers `/` and `*`."""
    decorators: tuple[str, ...] = ()
    assigns: tuple[str, ...] = ()
    defined: str = ""
    """Where it is inherited from, if it is."""


ABSENT = Shape("absent")


def look(tree: Path) -> dict[str, Shape]:
    """What the package below a folder has at every place that the shim relies on."""
    shapes = {where: _function(tree, where) for where in SEAMS}
    return shapes | {where: _attributes(tree, where, names) for where, names in ATTRIBUTES.items()}


def needs(tree: Path, package: str) -> bool:
    """Whether a module of the library imports a package come what may, so that tinker does."""
    return any(
        _imports(statement, package)
        for folder in ("lib", "types")
        for path in sorted((tree / "tinker" / folder).rglob("*.py"))
        if package.encode() in (source := path.read_bytes())
        for statement in ast.parse(source).body
    )


def wire(tree: Path) -> str:
    """How submissions can be encoded."""
    protobuf = (tree / "tinker" / "proto" / "request_conv.py").is_file()
    return "protobuf" if protobuf else "json"


def _imports(statement: ast.stmt, package: str) -> bool:
    """Only the statement itself counts: below a `try` or an `if`, an import may not happen."""
    match statement:
        case ast.Import(names=names):
            modules = [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            modules = [module]
        case _:
            return False
    return any(module.partition(".")[0] == package for module in modules)


def _function(tree: Path, where: str) -> Shape:
    node, defined = _find(tree, where)
    if node is None:
        return ABSENT
    return Shape(
        "async function" if isinstance(node, ast.AsyncFunctionDef) else "function",
        _parameters(node.args),
        tuple(ast.unparse(decorator) for decorator in node.decorator_list),
        defined=defined if defined != where else "",
    )


def _attributes(tree: Path, where: str, names: tuple[str, ...]) -> Shape:
    node, _ = _find(tree, where)
    if node is None:
        return ABSENT
    assigned = {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and ast.unparse(target.value) == "self"
    }
    return Shape("attributes", assigns=tuple(name for name in names if name in assigned))


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in arguments.posonlyargs]
    if names:
        names.append("/")
    names += [argument.arg for argument in arguments.args]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def _find(tree: Path, where: str) -> tuple[Function | None, str]:
    """A method and where it is defined: in its class, or the first base that has it."""
    module, _, attribute = where.partition(":")
    class_name, _, name = attribute.rpartition(".")
    node, module = _find_class(tree, module, class_name)
    if node is None:
        return None, ""
    # The last definition wins, as in Python: the ones before it are overloads.
    for statement in reversed(node.body):
        if isinstance(statement, Function) and statement.name == name:
            return statement, f"{module}:{node.name}.{name}"
    for base in node.bases:
        base_name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        found = _find(tree, f"{module}:{base_name}.{name}")
        if found[0] is not None:
            return found
    return None, ""


def _find_class(tree: Path, module: str, name: str) -> tuple[ast.ClassDef | None, str]:
    """A class and the module that defines it, through imports of its name."""
    for statement in reversed(_statements(tree, module)):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement, module
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(tree, _absolute(tree, module, statement), alias.name)
    return None, module


def _absolute(tree: Path, module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    is_package = tree.joinpath(*parts).is_dir()
    parts = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parts, statement.module] if statement.module else parts)


@functools.lru_cache(maxsize=16)
def _statements(tree: Path, module: str) -> list[ast.stmt]:
    path = tree.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_bytes()).body
    return []
