"""All the published releases of tinker have what the shim relies on, and the books agree.

Nothing is downloaded or imported: `python -m tools.releases` has looked at every wheel, and
these tests judge what it wrote down. And the tools that look and compare can fail.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from tests import releases as files
from tests import survey
from tests.releases import look
from tools import latest
from tools import releases as index

ROOT = Path(__file__).parent.parent
RELEASES = files.releases()
ATLAS = files.atlas()
MATRIX = files.matrix()
BOUNDARIES = MATRIX["boundaries"]
NEWEST = list(RELEASES)[-1]


def test_releases_and_atlas_list_the_same_releases_in_order() -> None:
    assert list(RELEASES) == list(ATLAS)
    assert list(RELEASES) == sorted(RELEASES, key=lambda name: [*map(int, name.split("."))])
    assert len(RELEASES) >= 75


def test_boundaries_are_known_releases_from_the_first_to_the_newest() -> None:
    assert list(BOUNDARIES) == [name for name in RELEASES if name in BOUNDARIES]
    assert all(BOUNDARIES.values())
    # A new release is a boundary until someone has looked at it and moved the mark.
    assert next(iter(BOUNDARIES)) == next(iter(RELEASES))
    assert list(BOUNDARIES)[-1] == NEWEST


def test_release_with_another_shape_is_a_boundary() -> None:
    for before, after in itertools.pairwise(ATLAS):
        if ATLAS[before] != ATLAS[after]:
            assert after in BOUNDARIES, after


def test_matrix_names_releases_and_pythons_that_exist() -> None:
    tinkers = MATRIX["tinkers"]
    assert set(tinkers) - {"newest"} <= set(RELEASES)
    assert {*MATRIX["everywhere"], *MATRIX["processes"].values()} <= set(tinkers)
    once = {MATRIX["main_python"], MATRIX["oldest_python"], *MATRIX["processes"]}
    assert once <= set(MATRIX["pythons"])


def test_every_file_of_tests_belongs_to_one_session() -> None:
    named = [f"test_{name}.py" for names in MATRIX["files"].values() for name in names]
    assert len(named) == len(set(named))
    there = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert there == set(named)


def test_core_tests_are_in_the_files_that_the_matrix_names() -> None:
    files_of_tests = Path(__file__).parent.glob("test_*.py")
    marked = [one for one in files_of_tests if "\n@pytest.mark.core\n" in one.read_text("utf-8")]
    assert sorted(path.stem for path in marked) == [f"test_{name}" for name in MATRIX["core"]]


def test_compatibility_page_agrees_with_the_release_data() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "docs/compatibility.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}: run `nox -s update-releases`"


@pytest.mark.parametrize("release", ATLAS)
def test_shim_fits_every_release(release: str) -> None:
    assert files.incompatible(ATLAS[release]) == []


def test_installed_tinker_agrees_with_the_atlas() -> None:
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
def test_incompatible_shape_is_reported_with_its_reason(
    where: str, doctored: dict[str, object], said: str
) -> None:
    shapes = ATLAS[NEWEST]
    doctored_shape = dataclasses.replace(shapes[where], **doctored)  # type: ignore[arg-type]
    (found,) = files.incompatible(shapes | {where: doctored_shape})
    assert found.startswith(where)
    assert said in found


def test_missing_seam_is_reported_as_incompatible() -> None:
    assert len(files.incompatible({})) >= len(look.SEAMS) + len(look.ATTRIBUTES)


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


def test_look_follows_bases_and_reports_missing_places(tmp_path: Path) -> None:
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
def test_import_inside_try_is_not_needed_and_a_plain_one_is(tmp_path: Path, source: str) -> None:
    module = tmp_path / "tinker" / "lib" / "deep" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"try:\n    {source}\nexcept ImportError: ...\n")
    assert not look.needs(tmp_path, "torch")
    module.write_text(source)
    assert look.needs(tmp_path, "torch")


# --- The tools can fail ------------------------------------------------------------------


SURVEYED = """
import os, pytest
def pytest_report_header(): return f"with tinker {os.environ.get('SAID', '0.18.0')},"
"""


@pytest.mark.parametrize(
    ("tests", "environment", "said"),
    [
        ("def test_it(): pass", {}, None),
        ("def test_it(): assert 0, 'the poll was lost'", {}, "the poll was lost"),
        ("import pytest\ndef test_it(): pytest.skip('no switch')", {}, "no switch"),
        ("", {}, "no tests ran"),
        ("def test_it(): pass", {"SAID": "0.19.0"}, "with tinker 0.19.0"),
    ],
    ids=["passes", "fails", "skipped", "nothing", "another-release"],
)
def test_survey_passes_only_if_this_releases_tests_ran_and_passed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tests: str,
    environment: dict[str, str],
    said: str | None,
) -> None:
    (tmp_path / "conftest.py").write_text(SURVEYED)
    (tmp_path / "test_it.py").write_text(tests)
    monkeypatch.setattr(survey, "ROOT", tmp_path)
    monkeypatch.setattr(index, "unpacked", lambda *_, **__: tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = functools.partial(survey.run_tests, "0.18.0", tmp_path, "-rs", "test_it.py")
    if said is None:
        run()
    else:
        with pytest.raises(AssertionError, match=said):
            run()


def test_release_that_does_not_fit_is_reported_as_new_with_what_is_missing() -> None:
    lines, incompatible = latest.report("99.0", ATLAS[NEWEST] | {ACLIENT: look.ABSENT})
    assert "a NEW release" in lines[0]
    assert f"  {ACLIENT}: absent" in lines
    assert len(incompatible) == 1


def test_shapes_that_differ_from_the_atlas_are_reported() -> None:
    then = ATLAS[NEWEST]
    now = then | {ACLIENT: look.ABSENT, REQUEST: dataclasses.replace(then[REQUEST], kind="odd")}
    told = latest.compared(now, then)
    assert told.pop(ACLIENT) == "absent"
    assert told.pop(REQUEST).startswith("changed")
    assert set(told.values()) == {"present"}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    """The index has what is written here, and one release more."""
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, "utf-8")
    monkeypatch.setattr(index, "published", lambda *_, **__: dict.fromkeys([*RELEASES, "99.0"]))
    monkeypatch.setattr(index, "unpacked", lambda *_, **__: tmp_path)
    monkeypatch.setattr(index, "releases_text", lambda *_: files.RELEASES.read_text("utf-8"))
    monkeypatch.setattr(index, "atlas_text", lambda *_: files.ATLAS.read_text("utf-8"))
    return CliRunner()


def test_unknown_release_is_reported_without_an_error(check: CliRunner) -> None:
    ended = check.invoke(index.main, ["--check"])
    assert ended.exit_code == 0, ended.output
    assert f"NEW: tinker 99.0: {ACLIENT} is not of the kind 'function': absent" in ended.output


def test_changed_fact_of_a_known_release_is_an_error(
    check: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "atlas_text", lambda *_: "another\n")
    ended = check.invoke(index.main, ["--check"])
    assert ended.exit_code == 1
    assert "+another" in ended.output


def test_unreachable_index_exits_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "get", unreachable)
    ended = CliRunner().invoke(index.main, ["--check", f"--cache={tmp_path}"])
    assert ended.exit_code == index.UNREACHABLE
    assert "cannot be reached" in ended.output
