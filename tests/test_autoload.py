"""The zero-line way: real environments with the files that the wheel places, and whole processes.

The environments are made from what is installed, without a network: the package itself is
copied into them, its dependencies stay where they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import tinker_routefix
from tests.common import CANARY
from tinker_routefix import _seams, _switch
from tinker_routefix.lab import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_mock import MockerFixture

    from tinker_routefix.lab import Lab

TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends: less than one in a hundred."""

ROOT = Path(__file__).parent.parent
VARIABLE = "TINKER_ROUTEFIX_AUTOLOAD"
MODULE = "_tinker_routefix_autoload"
FILES = (f"{MODULE}.py", "tinker_routefix.pth", "tinker_routefix.start")


def startup_file(name: str) -> Path:
    """One of the files beside the package: as installed, or in a checkout its source."""
    for file in metadata.files("tinker-routefix") or []:
        if file.as_posix() == name:
            return Path(str(file.locate()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    placed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    source: str = next(source for source, target in placed.items() if target == name)
    return ROOT / source


class Environment:
    """A virtual environment that has the shim installed."""

    def __init__(self, where: Path) -> None:
        venv.create(where, symlinks=True)
        paths = {"base": str(where), "platbase": str(where)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        self.python = Path(sysconfig.get_path("scripts", "venv", vars=paths)) / "python"
        assert tinker_routefix.__file__ is not None
        shutil.copytree(
            Path(tinker_routefix.__file__).parent,
            self.site / "tinker_routefix",
        )
        for name in FILES:
            shutil.copy(startup_file(name), self.site / name)
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            # A test run that is measured measures these interpreters too, from their start. What
            # else is installed beside coverage is not theirs.
            place = sysconfig.get_path("purelib")
            (self.site / "0_coverage.pth").write_text(
                f"import sys; sys.path.append({place!r}); import coverage; "
                f"coverage.process_startup(); sys.path.remove({place!r})",
                encoding="utf-8",
            )
        # Paths only: what the files there would start is not started here.
        dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (self.site / "a_dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")

    def run(self, code: str, *options: str, **environment: str) -> Any:
        """Run a program of it."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TINKER_ROUTEFIX", "PYTHON"))
        }
        return subprocess.run(
            [str(self.python), *options, "-c", code],
            env={**inherited, **environment},
            cwd=self.site.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def says(self, code: str, *options: str, **environment: str) -> str:
        """What a program prints that ends well and has nothing to complain about."""
        ended = self.run(code, *options, **environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        return str(ended.stdout).strip()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """For tests that change nothing in it."""
    return Environment(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def own(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def with_stub(environment: Environment) -> Environment:
    """An SDK that is imported quickly; it has no seams."""
    (environment.site / "tinker").mkdir()
    (environment.site / "tinker" / "__init__.py").write_text("", encoding="utf-8")
    return environment


@pytest.fixture(scope="session")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """For tests that change nothing in it."""
    return with_stub(Environment(tmp_path_factory.mktemp("stubbed")))


LOADED = "import sys; print(*sorted(sys.modules))"
LOADS = "import sys, tinker; print('tinker_routefix._seams' in sys.modules)"


# --- What a process pays ------------------------------------------------------------------


def test_autoload_unset_imports_nothing(own: Environment) -> None:
    with_it = own.says(LOADED)
    for name in FILES:
        (own.site / name).unlink()
    assert with_it == own.says(LOADED)


@pytest.mark.parametrize("value", ["", " "])
def test_autoload_empty_counts_as_unset(shared: Environment, value: str) -> None:
    assert "wrapt" not in shared.says(f"import json\n{LOADED}", **{VARIABLE: value}).split()


def test_autoload_set_imports_the_shim_only_with_an_sdk(shared: Environment) -> None:
    loaded = shared.says(f"import json\n{LOADED}", **{VARIABLE: "1"}).split()
    assert MODULE in loaded
    assert not [name for name in loaded if name.partition(".")[0] in ("tinker_routefix", "wrapt")]


# --- What it does -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-I"], ["-W", "error"]])
def test_autoload_set_loads_the_shim(stubbed: Environment, options: list[str]) -> None:
    assert stubbed.says(LOADS, *options, **{VARIABLE: " Yes "}) == "True"


def test_autoload_beside_the_import_changes_nothing(stubbed: Environment) -> None:
    assert stubbed.says(f"import tinker_routefix; {LOADS}", **{VARIABLE: "1"}) == "True"
    assert stubbed.says(f"import tinker_routefix; {LOADS}", **{VARIABLE: "0"}) == "True"


@pytest.mark.parametrize(
    "environment",
    [{VARIABLE: "0"}, {VARIABLE: "off"}, {VARIABLE: "1", "TINKER_ROUTEFIX": "0"}, {}],
)
def test_autoload_switched_off_loads_nothing(
    stubbed: Environment, environment: dict[str, str]
) -> None:
    assert stubbed.says(LOADS, **environment) == "False"
    assert "wrapt" not in stubbed.says(f"import tinker; {LOADED}", **environment).split()


def test_autoload_patches_an_sdk_imported_before_it(own: Environment) -> None:
    # Started by somebody else's file, before ours.
    (own.site / "b_early.pth").write_text("import tinker\n", encoding="utf-8")
    assert with_stub(own).says(LOADS, **{VARIABLE: "1"}) == "True"


def test_autoload_without_an_sdk_changes_no_error(own: Environment) -> None:
    (own.site / "a_dependencies.pth").unlink()
    fails = "try: import tinker\nexcept ModuleNotFoundError as error: print(error)"
    assert own.says(fails, **{VARIABLE: "1"}) == "No module named 'tinker'"


def test_autoload_leaves_a_folder_of_an_sdks_name_as_it_is(own: Environment) -> None:
    """A package without a file: there is nothing to load, and nothing to patch."""
    (own.site / "a_dependencies.pth").unlink()
    (own.site / "tinker").mkdir()
    program = f"import tinker; print(tinker.__spec__.origin)\n{LOADS}"
    assert own.says(program, **{VARIABLE: "1"}).split() == ["None", "False"]


AGAIN = """
from importlib import util
spec = util.find_spec("tinker")
import tinker
assert spec.loader.get_filename("tinker") == tinker.__file__
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
print("goes on")
"""


def test_autoload_with_an_sdk_loaded_again_is_done_once(stubbed: Environment) -> None:
    """Whoever has asked for an SDK before it was imported can load it by hand."""
    assert stubbed.says(AGAIN, **{VARIABLE: "1"}) == "goes on"
    ended = stubbed.run(AGAIN, **{VARIABLE: "maybe"})
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    assert len(ended.stderr.splitlines()) == 1


SPAWNS = """
import multiprocessing, sys
def work():
    import tinker
    print("tinker_routefix._seams" in sys.modules, flush=True)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
"""


def test_autoload_in_a_spawned_child_loads_the_shim(stubbed: Environment, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SPAWNS, encoding="utf-8")
    code = f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
    assert stubbed.says(code, **{VARIABLE: "1"}) == "True"


TRAINS = """
import os, tinker
service = tinker.ServiceClient(base_url=os.environ["URL"])
client = service.create_lora_training_client(base_model="lab/base", rank=8)
getattr(client, "result", lambda _: client)(60)
print("trained")
"""


@pytest.mark.parametrize("loaded", [False, True])
def test_autoload_in_a_race_lets_the_program_survive(
    shared: Environment, lab: Lab, loaded: bool
) -> None:
    lab.fault(Fault(kinds={"create_session"}, count=2))
    environment = {"TINKER_API_KEY": CANARY, "TINKER_TELEMETRY": "0", "URL": lab.base_url}
    ended = shared.run(TRAINS, **environment, **{VARIABLE: str(int(loaded))})
    assert (ended.returncode, ended.stdout) == ((0, "trained\n") if loaded else (1, ""))
    assert ("Error code: 404" in ended.stderr) is not loaded


# --- What can be wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({VARIABLE: "maybe"}, f"{VARIABLE}='maybe' is not accepted"),
        ({VARIABLE: "1", "TINKER_ROUTEFIX": "maybe"}, "TINKER_ROUTEFIX='maybe' is not accepted"),
        ({VARIABLE: "1", "TINKER_ROUTEFIX_MAX_REPLAYS": "many"}, "MAX_REPLAYS='many'"),
    ],
)
def test_autoload_with_a_bad_value_prints_one_line_and_goes_on(
    stubbed: Environment, environment: dict[str, str], said: str
) -> None:
    ended = stubbed.run("import tinker, json; print('goes on')", **environment)
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tinker_routefix is not loaded")
    assert said in line
    # Nobody else hears of it.
    assert stubbed.says("print('nothing to do with it')", **environment)


def test_autoload_without_stderr_stays_silent(stubbed: Environment) -> None:
    # As on Windows without a console.
    program = "import sys; sys.stderr = None; import tinker; print('goes on')"
    assert stubbed.says(program, **{VARIABLE: "maybe"}) == "goes on"


def test_autoload_with_warnings_as_errors_breaks_nothing(stubbed: Environment) -> None:
    environment = {VARIABLE: "1", "TINKER_ROUTEFIX_NO_SUCH_SETTING": "1"}
    ended = stubbed.run("import tinker; print('goes on')", "-W", "error", **environment)
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    assert len(ended.stderr.splitlines()) == 1


def without_the_package(site: Path) -> None:
    shutil.rmtree(site / "tinker_routefix")
    # The one of the tests' own environment must not step in.
    (site / "tinker_routefix").write_text("not a package", encoding="utf-8")
    (site / "a_dependencies.pth").unlink()


def without_the_switch(site: Path) -> None:
    (site / "tinker_routefix" / "_switch.py").unlink()


def with_half_a_package(site: Path) -> None:
    (site / "tinker_routefix" / "__init__.py").write_text("def install(", encoding="utf-8")


def without_wrapt(site: Path) -> None:
    (site / "wrapt.py").write_text("raise ImportError('built for another Python')")


def without_the_module(site: Path) -> None:
    (site / f"{MODULE}.py").unlink()
    (site / "a_dependencies.pth").unlink()


def with_half_the_module(site: Path) -> None:
    (site / f"{MODULE}.py").write_text("def load(", encoding="utf-8")


@pytest.mark.parametrize(
    ("wreck", "lines"),
    [
        (without_the_package, 1),
        (without_the_switch, 1),
        (with_half_a_package, 1),
        (without_wrapt, 1),
        (without_the_module, 0),
        # Python's own report, with a traceback.
        (with_half_the_module, None),
    ],
)
def test_autoload_of_a_broken_install_breaks_no_interpreter(
    own: Environment, wreck: Callable[[Path], None], lines: int | None
) -> None:
    with_stub(own)
    wreck(own.site)
    ended = own.run("import tinker; print('goes on')", **{VARIABLE: "1"})
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    if lines is not None:
        assert len(ended.stderr.splitlines()) == lines
    assert own.says("import tinker; print('unset')") == "unset"


# --- The files ----------------------------------------------------------------------------


def test_wheel_contains_the_startup_files() -> None:
    files = {file.as_posix() for file in metadata.files("tinker-routefix") or []}
    if "tinker_routefix/__init__.py" not in files:
        pytest.skip("not installed from a wheel: an editable install")
    assert files >= set(FILES)


def test_startup_files_name_the_same_module() -> None:
    line = startup_file("tinker_routefix.pth").read_text(encoding="utf-8")
    # One line, and the variable is looked at before anything but os is imported.
    assert line.count("\n") == 1
    assert line.startswith(f'import os; os.environ.get("{VARIABLE}") and ')
    entries = startup_file("tinker_routefix.start").read_text(encoding="utf-8").splitlines()
    assert entries == [f"{MODULE}:load"]


def test_start_file_entry_loads_the_shim_like_the_pth_file(own: Environment) -> None:
    # This is how 3.15 resolves and calls what a .start file names; it has no .pth line then.
    entry = (own.site / "tinker_routefix.start").read_text(encoding="utf-8").strip()
    (own.site / "tinker_routefix.pth").unlink()
    begins, nothing = (
        f"import pkgutil; pkgutil.resolve_name({one!r})()" for one in (entry, "os:getcwd")
    )
    assert with_stub(own).says(f"{begins}\n{LOADS}", **{VARIABLE: "1"}) == "True"
    more = set(own.says(f"{begins}\n{LOADED}").split()) - set(
        own.says(f"{nothing}\n{LOADED}").split()
    )
    assert more == {MODULE}


def test_startup_module_has_the_constants_of_the_package() -> None:
    source = startup_file(f"{MODULE}.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": MODULE}
    exec(source, names)
    assert names["VARIABLE"] == _switch.AUTOLOAD == VARIABLE
    tops = {seam.module.partition(".")[0] for sdk in _seams.SDKS for seam in sdk.seams}
    assert set(names["SDKS"]) == tops


STATUS = """
import json, sys
from tinker_routefix import status
found = status().autoload
print(json.dumps([found.requested, found.file, found.in_force]))
"""


def test_status_tells_whether_autoload_is_in_place_and_in_force(own: Environment) -> None:
    file = str(own.site / "tinker_routefix.pth")
    assert json.loads(own.says(STATUS)) == ["unset", file, False]
    assert json.loads(own.says(STATUS, **{VARIABLE: "1"})) == ["on", file, True]
    assert json.loads(own.says(STATUS, **{VARIABLE: "0"})) == ["off", file, False]
    assert json.loads(own.says(STATUS, **{VARIABLE: "maybe"})) == ["refused", file, False]
    late = f"import os; os.environ['{VARIABLE}'] = '1'\n{STATUS}"
    assert json.loads(own.says(late)) == ["on", file, False]
    # As an editable install may leave it.
    (own.site / "tinker_routefix.pth").unlink()
    assert json.loads(own.says(STATUS, **{VARIABLE: "1"})) == ["on", None, False]


def test_status_finds_the_startup_file_where_python_looks(
    tmp_path: Path, mocker: MockerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str | None:
        return tinker_routefix.status().autoload.file

    environment, user = tmp_path / "environment", tmp_path / "user"
    mocker.patch("site.getsitepackages", side_effect=lambda: [str(environment)])
    mocker.patch("site.getusersitepackages", return_value=str(user))
    monkeypatch.setattr("site.ENABLE_USER_SITE", True)
    assert found() is None
    user.mkdir()
    (user / "tinker_routefix.pth").touch()
    assert found() == str(user / "tinker_routefix.pth")
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    assert found() is None
    # From 3.15 on the other file is read.
    environment.mkdir()
    (environment / "tinker_routefix.start").touch()
    with monkeypatch.context() as newer:
        newer.setattr("sys.version_info", (3, 15))
        assert found() == str(environment / "tinker_routefix.start")


def test_status_without_site_reports_no_startup_file(
    shared: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `-S` leaves them: what is imported has to be put on the path by hand.
    paths = [str(shared.site), *dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))]
    by_hand = f"import sys; sys.path += {paths!r}\n{STATUS}"
    assert json.loads(shared.says(by_hand, "-S", **{VARIABLE: "1"})) == ["on", None, False]
    # And here, where it is seen by those who measure the tests.
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
    with monkeypatch.context() as without:
        without.setattr("sys.flags", SimpleNamespace(**flags | {"no_site": 1}))
        assert tinker_routefix.status().autoload.file is None
