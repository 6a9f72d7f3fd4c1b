"""All the published releases of tinker have what the shim relies on, and the books agree.

Nothing is downloaded or imported: `python -m tools.releases` has looked at every wheel, and
these tests judge what it wrote down.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
from importlib import metadata
from pathlib import Path

import pytest

from tests import releases as files
from tests.releases import look

RELEASES = files.releases()
ATLAS = files.atlas()
NEWEST = list(RELEASES)[-1]


def test_both_files_tell_of_the_same_releases_in_the_same_order() -> None:
    assert list(RELEASES) == list(ATLAS)
    assert list(RELEASES) == sorted(RELEASES, key=lambda name: [*map(int, name.split("."))])
    assert len(RELEASES) >= 75


def test_every_boundary_has_a_reason() -> None:
    boundaries = [name for name, facts in RELEASES.items() if facts["boundary"]]
    assert boundaries == [name for name, facts in RELEASES.items() if facts.get("reason")]
    # A new release is a boundary until someone has looked at it and moved the mark.
    assert boundaries[0] == next(iter(RELEASES))
    assert boundaries[-1] == NEWEST


def test_where_the_shape_changes_is_a_boundary() -> None:
    for before, after in itertools.pairwise(ATLAS):
        if ATLAS[before] != ATLAS[after]:
            assert RELEASES[after]["boundary"], after


def test_the_matrix_tests_releases_that_exist() -> None:
    noxfile = Path(__file__).parent.parent / "noxfile.py"
    if not noxfile.is_file():
        pytest.skip("there is no noxfile beside these tests")
    (tinkers,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(noxfile.read_text("utf-8")).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "TINKERS"
    )
    assert set(tinkers) - {"newest"} <= set(RELEASES)


@pytest.mark.parametrize("release", ATLAS)
def test_the_shim_fits(release: str) -> None:
    assert files.misfits(ATLAS[release]) == []


def test_the_installed_tinker_is_as_the_atlas_says() -> None:
    try:
        release = metadata.version("tinker")
    except metadata.PackageNotFoundError:
        pytest.skip("tinker is not installed")
    if release not in ATLAS:
        pytest.skip(f"the atlas does not know tinker {release} yet: python -m tools.releases")
    spec = importlib.util.find_spec("tinker")
    assert spec
    assert spec.origin
    tree = Path(spec.origin).parent.parent
    assert look.look(tree) == ATLAS[release]
    for package in look.NOT_ALWAYS:
        assert look.needs(tree, package) == RELEASES[release][f"needs_{package}"]
    assert look.wire(tree) == RELEASES[release]["wire"]


# --- The tests above can fail ------------------------------------------------------------

REQUEST = "tinker._client:AsyncTinker.request"
ACLIENT = "tinker.lib.internal_client_holder:ClientConnectionPool.aclient"
POOL = "tinker.lib.internal_client_holder:ClientConnectionPool.__init__"


@pytest.mark.parametrize(
    ("where", "doctored", "said"),
    [
        (REQUEST, {"kind": "function"}, "not of the kind 'async function': function"),
        (REQUEST, {"kind": "absent"}, "not of the kind 'async function': absent"),
        (REQUEST, {"parameters": ("self", "cast_to")}, "no parameter 'options'"),
        (REQUEST, {"decorators": ("sync",)}, "decorated with @sync"),
        (ACLIENT, {"kind": "async function"}, "not of the kind 'function': async function"),
        (ACLIENT, {"decorators": ("asynccontextmanager",)}, "decorated with @asynccontextmanager"),
        (POOL, {"assigns": ("_clients",)}, "does not assign '_constructor_kwargs'"),
    ],
)
def test_a_misfit_is_found(where: str, doctored: dict[str, object], said: str) -> None:
    shapes = ATLAS[NEWEST]
    doctored_shape = dataclasses.replace(shapes[where], **doctored)  # type: ignore[arg-type]
    (misfit,) = files.misfits(shapes | {where: doctored_shape})
    assert misfit.startswith(where)
    assert said in misfit


def test_a_place_that_is_not_there_is_a_misfit() -> None:
    assert len(files.misfits({})) >= len(look.SEAMS) + len(look.ATTRIBUTES)


SOURCES = {
    "tinker/__init__.py": "",
    "tinker/_base_client.py": """
class AsyncAPIClient(Generic[T]):
    @overload
    async def request(self, wrong): ...
    async def request(self, cast_to, options, *, stream=False, **more): ...
""",
    "tinker/_client.py": """
from ._base_client import AsyncAPIClient as Base
class AsyncTinker(Base[int]):
    def __init__(self):
        self._idempotency_header: str | None = None
""",
    "tinker/lib/__init__.py": "from .. import elsewhere",
    "tinker/lib/api_future_impl.py": "class _APIFuture: ...",
    "tinker/types/datum.py": """
try:
    import torch
except ImportError: ...
def later():
    import torch
""",
}


def test_looking_follows_bases_and_sees_what_is_missing(tmp_path: Path) -> None:
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, "utf-8")
    shapes = look.look(tmp_path)
    assert shapes[REQUEST] == look.Shape(
        "async function",
        ("self", "cast_to", "options", "*", "stream", "**more"),
        defined="tinker._base_client:AsyncAPIClient.request",
    )
    assert shapes["tinker._client:AsyncTinker.__init__"].assigns == ("_idempotency_header",)
    # A method, a module and a constructor that are not there.
    assert shapes["tinker.lib.api_future_impl:_APIFuture._result_async"] == look.ABSENT
    assert shapes[ACLIENT] == look.ABSENT
    assert shapes[POOL] == look.ABSENT


@pytest.mark.parametrize("source", ["import torch", "import os, torch.fx", "from torch import nn"])
def test_what_is_always_imported(tmp_path: Path, source: str) -> None:
    module = tmp_path / "tinker" / "lib" / "deep" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"try:\n    {source}\nexcept ImportError: ...\n")
    assert not look.needs(tmp_path, "torch")
    module.write_text(source)
    assert look.needs(tmp_path, "torch")
