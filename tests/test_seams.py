"""Patching: all or nothing, in any import order, undone by identity."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import modulefinder
import os
import subprocess
import sys
import threading
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tinker.lib.api_future_impl
import tinker.lib.internal_client_holder
import wrapt

import tinker_routefix
from tests.conftest import of_the_shim, run_python
from tinker_routefix import _metadata, _patching, _seams
from tinker_routefix._patching import SeamState
from tinker_routefix._seams import TINKER
from tinker_routefix.lab import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinker_routefix.lab import Lab


OWNERS: dict[str, Any] = {
    seam.attribute: wrapt.resolve_path(importlib.import_module(seam.module), seam.attribute)[0]
    for seam in TINKER
}


def everything() -> dict[str, dict[str, Any]]:
    """All that stands in every class that is touched, and in its bases."""
    return {
        f"{name} {base.__qualname__}": {
            # Python adds an empty one where somebody only asks for it.
            attribute: value
            for attribute, value in vars(base).items()
            if attribute != "__annotations__" or value
        }
        for name, owner in OWNERS.items()
        for base in owner.__mro__[:-1]
    }


def states() -> set[str]:
    """What stands at tinker's seams."""
    return {
        seam.state for seam in tinker_routefix.status().seams if seam.name.startswith("tinker.")
    }


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Whatever a test did to tinker's classes is gone afterwards."""
    tinker_routefix.uninstall()
    found = everything()
    tinker_routefix.install()
    yield
    tinker_routefix.uninstall()
    assert_same(everything(), found)
    _patching._complained.clear()
    _patching._missing.clear()


def assert_same(now: dict[str, dict[str, Any]], then: dict[str, dict[str, Any]]) -> None:
    assert now.keys() == then.keys()
    for owner, attributes in then.items():
        assert now[owner].keys() == attributes.keys(), owner
        for name, value in attributes.items():
            assert now[owner][name] is value, f"{owner}.{name}"


@pytest.mark.core
def test_uninstall_restores_every_touched_class_exactly() -> None:
    tinker_routefix.uninstall()
    before = everything()
    tinker_routefix.install()
    with pytest.raises(AssertionError):
        assert_same(everything(), before)
    assert states() == {"ours"}
    tinker_routefix.uninstall()
    assert_same(everything(), before)
    assert states() == {"original"}
    status = tinker_routefix.status()
    assert (status.active, status.reason) == (False, "uninstalled")


def test_install_emits_shim_installed_once(overheard: Any) -> None:
    tinker_routefix.uninstall()
    overheard.events.clear()
    tinker_routefix.install()
    assert overheard.events == ["shim.installed"]
    tinker_routefix.install()
    assert overheard.events == ["shim.installed"]


def test_second_install_wraps_nothing_again() -> None:
    tinker_routefix.install()
    once = everything()
    tinker_routefix.install()
    assert_same(everything(), once)
    for seam in TINKER:
        standing: Any = wrapt.resolve_path(sys.modules[seam.module], seam.attribute)[2]
        assert not isinstance(standing.__wrapped__, wrapt.FunctionWrapper)


def test_reinstall_adds_no_import_hooks(mocker: Any) -> None:
    """Those for modules that never come would pile up."""
    hook = mocker.spy(wrapt, "when_imported")
    tinker_routefix.uninstall()
    tinker_routefix.install()
    tinker_routefix.install()
    assert hook.call_count == 0
    assert states() == {"ours"}


def test_wrapped_functions_keep_their_kind_and_signature() -> None:
    future = tinker.lib.api_future_impl._APIFuture
    pool: Any = tinker.lib.internal_client_holder.ClientConnectionPool
    assert inspect.iscoroutinefunction(future._result_async)
    assert inspect.iscoroutinefunction(tinker._client.AsyncTinker.request)
    assert not inspect.iscoroutinefunction(pool.aclient)
    wrapped = inspect.signature(pool.aclient)
    tinker_routefix.uninstall()
    assert inspect.signature(pool.aclient) == wrapped
    tinker_routefix.install()


@pytest.mark.parametrize(
    ("seam", "how"),
    [
        pytest.param(seam, how, id=f"{seam.attribute}-{how}")
        for seam in TINKER
        for how in ("absent", "kind", "parameters")
        # The wrappers of the others accept any parameters; and every class has an `__init__`.
        if (how != "parameters" or seam.parameters)
        and not (how == "absent" and seam.attribute.endswith(".__init__"))
    ],
)
def test_install_with_a_missing_seam_patches_nothing_and_warns(
    monkeypatch: pytest.MonkeyPatch, settings: Any, seam: _seams.Seam, how: str
) -> None:
    """A release without one of the seams is left alone, with one warning that names it."""
    tinker_routefix.uninstall()
    owner = OWNERS[seam.attribute]
    name = seam.attribute.rsplit(".", 1)[1]
    with monkeypatch.context() as patch:
        if how == "absent":
            holder = next(base for base in owner.__mro__ if name in vars(base))
            patch.delattr(holder, name)
        elif how == "kind":
            patch.setattr(owner, name, _plain if seam.coroutine else _coroutine, raising=False)
        else:
            patch.setattr(owner, name, _coroutine, raising=False)
        before = everything()
        with pytest.raises(RuntimeError, match=name):
            tinker_routefix.install()
        assert_same(everything(), before)
        settings(strict=False)
        _patching._missing.clear()
        with pytest.warns(tinker_routefix.RoutefixWarning, match=name) as warned:
            tinker_routefix.install()
        (message,) = of_the_shim(warned)
        # 0.1 calls itself 0.0.1-alpha.1.
        assert f"tinker {metadata.version('tinker')}:" in message
        assert message.endswith("https://pypi.org/project/tinker-routefix/")
        assert_same(everything(), before)
        status = tinker_routefix.status()
        assert not status.active
        assert name in status.reason
        tinker_routefix.uninstall()


@pytest.mark.parametrize(
    ("name", "instead", "reason"),
    [
        ("request", "_plain", "AsyncTinker.request is not a coroutine function"),
        ("request", "_coroutine", "AsyncTinker.request has no parameter 'cast_to'"),
        ("aclient", "_coroutine", "ClientConnectionPool.aclient is not a plain function"),
    ],
)
def test_install_with_an_incompatible_seam_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: str, reason: str
) -> None:
    tinker_routefix.uninstall()
    owner = next(owner for attribute, owner in OWNERS.items() if attribute.endswith(name))
    monkeypatch.setattr(owner, name, globals()[instead], raising=False)
    with pytest.raises(RuntimeError, match=reason):
        tinker_routefix.install()
    tinker_routefix.uninstall()


def test_install_failing_at_the_last_seam_undoes_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tinker_routefix.uninstall()
    before = everything()
    wrapped: list[str] = []

    def refuse(owner: Any, name: str, value: Any) -> None:
        if name == "_result_async":
            raise TypeError("cannot set attributes of an immutable type")
        wrapped.append(name)
        type.__setattr__(owner, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(_patching, "setattr", refuse, raising=False)
        with pytest.raises(RuntimeError, match="immutable"):
            tinker_routefix.install()
    assert wrapped[:2] == ["aclient", "request"]
    assert_same(everything(), before)
    _patching._missing.clear()


def _plain() -> None:
    """Not a coroutine function."""


async def _coroutine() -> None:
    """A coroutine function, without parameters."""


def test_failed_install_with_warnings_as_errors_does_not_raise(settings: Any) -> None:
    tinker_routefix.uninstall()
    settings(strict=False)
    pool = OWNERS["ClientConnectionPool.aclient"]
    aclient = pool.aclient
    del pool.aclient
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tinker_routefix.install()
        assert not tinker_routefix.status().active
    finally:
        pool.aclient = aclient


def test_uninstall_below_a_foreign_wrapper_passes_through(lab: Lab) -> None:
    from tests import programs

    future = OWNERS["_APIFuture._result_async"]
    calls = 0

    @wrapt.decorator
    async def theirs(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return await wrapped(*args, **kwargs)

    ours = vars(future)["_result_async"]
    on_top = theirs(ours)
    future._result_async = on_top
    try:
        assert (TINKER[-1], SeamState.WRAPPED_OVER) in [found[1:] for found in _patching.states()]
        tinker_routefix.uninstall()
        assert vars(future)["_result_async"] is on_top, "theirs has to stay"
        assert states() == {"original", "ours, under another wrapper"}
        lab.flap(1.0)
        with pytest.raises(tinker.NotFoundError):
            programs.connect(lab.base_url)
        lab.clear()
        tinker_routefix.install()
        assert tinker_routefix.status().active
        lab.stale(1)
        programs.train(programs.connect(lab.base_url))
        assert calls >= 3
        programs.exact(lab, gradients=1, optim_steps=1)
    finally:
        future._result_async = ours
        tinker_routefix.install()


def test_replaced_seam_is_wrapped_again_at_connect(lab: Lab, overheard: Any) -> None:
    from tests import programs

    future = OWNERS["_APIFuture._result_async"]
    ours = vars(future)["_result_async"]

    async def theirs(self: Any) -> Any:
        # Calls what it found: our first wrapper.
        return await ours.__get__(self)()

    future._result_async = theirs
    assert "replaced" in states()
    assert not tinker_routefix.status().active
    client = programs.connect(lab.base_url)
    assert "seam.wrapped_again" in overheard.events
    assert states() == {"ours"}
    lab.stale(1)
    programs.train(client)
    programs.exact(lab, gradients=1, optim_steps=1)
    tinker_routefix.uninstall()
    assert vars(future)["_result_async"] is theirs, "what was replaced stays replaced"
    future._result_async = ours.__wrapped__


def test_replaced_seam_is_wrapped_again_once_where_two_threads_see_it(
    overheard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = OWNERS["_APIFuture._result_async"]
    ours = vars(future)["_result_async"]

    async def theirs(self: Any) -> Any:
        return await ours.__wrapped__(self)

    look = _patching.states

    def look_and_be_overtaken() -> list[Any]:
        seen = look()
        monkeypatch.setattr(_patching, "states", look)
        other = threading.Thread(target=_patching.verify)
        other.start()
        other.join()
        return seen

    monkeypatch.setattr(_patching, "states", look_and_be_overtaken)
    future._result_async = theirs
    _patching.verify()
    assert overheard.events.count("seam.wrapped_again") == 1
    tinker_routefix.uninstall()
    assert vars(future)["_result_async"] is theirs
    future._result_async = ours.__wrapped__


def test_request_given_up_by_an_inner_wrapper_is_not_retried_again(lab: Lab) -> None:
    """Someone put a function on our first wrapper, and we wrapped that one again."""
    from tests import programs

    client = OWNERS["AsyncTinker.request"]
    ours = vars(client)["request"]

    async def theirs(self: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        return await ours.__get__(self)(cast_to, options, **kwargs)

    client.request = theirs
    try:
        training = programs.connect(lab.base_url)
        assert states() == {"ours"}
        lab.end_job()
        with pytest.raises(tinker.NotFoundError) as caught:
            programs.train(training)
        assert len(caught.value.__notes__) == 1
        job = programs.job_of(lab)
        assert job.failed_fast == job.refused
        tinker_routefix.uninstall()
        assert vars(client)["request"] is theirs, "what was replaced stays replaced"
    finally:
        del client.request


def test_uninstall_during_a_connect_lets_it_finish(lab: Lab) -> None:
    """And from then on nothing is patched."""
    from concurrent.futures import ThreadPoolExecutor

    from tests import programs

    lab.fault(Fault(kinds=["poll:create_model"]))
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(programs.connect, lab.base_url)
        while not lab.count("poll:create_model", refused=True):
            time.sleep(0.01)
        tinker_routefix.uninstall()
        lab.clear()
        client = connecting.result(programs.PATIENCE)
    assert states() == {"original"}
    assert lab.count("get_info") >= 3, "the warm-up has to go on"
    programs.train(client)
    programs.exact(lab, gradients=1, optim_steps=1)
    lab.fault(Fault(kinds=["optim_step"]))
    with pytest.raises(tinker.NotFoundError):
        programs.train(client)


@pytest.mark.parametrize("signed", [True, False], ids=["no coroutine", "no signature"])
def test_replaced_seam_that_cannot_be_wrapped_is_reported_once(
    lab: Lab, overheard: Any, *, signed: bool
) -> None:
    from tests import programs

    future = OWNERS["_APIFuture._result_async"]
    ours = vars(future)["_result_async"]

    def theirs(self: Any) -> Any:
        return ours.__wrapped__(self)

    async def unsigned(self: Any, *args: Any) -> Any:
        return await ours.__wrapped__(self, *args)

    # As of a function that is written in C.
    unsigned.__signature__ = "none"  # type: ignore[attr-defined]
    future._result_async = theirs if signed else unsigned
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tinker_routefix.RoutefixWarning)
            programs.connect(lab.base_url)
            programs.connect(lab.base_url)
        assert overheard.events.count("shim.cannot_help") == 1
        assert "_result_async" in "".join(overheard.lines)
        assert "replaced" in states()
        assert not tinker_routefix.status().active
    finally:
        future._result_async = ours


def test_call_stack_stays_flat_over_many_requests(lab: Lab) -> None:
    """Five thousand requests through one client, and no chain that grows."""
    from tests import programs

    client = programs.connect(lab.base_url)
    depths: list[int] = []

    async def ask(http: Any) -> None:
        request = type(http)._build_request

        def deep(self: Any, *args: Any, **kwargs: Any) -> Any:
            depths.append(len(inspect.stack(0)))
            return request(self, *args, **kwargs)

        type(http)._build_request = deep
        try:
            for _ in range(500):
                await http.get("/api/v1/healthz", cast_to=object)
        finally:
            del type(http)._build_request

    programs.on_loop(client, ask)
    # Some steps are taken from a callback and some from the task's start: no two frames
    # of ours more or less, but never one more a request.
    assert max(depths) - min(depths) < 10


# --- Import order, each in an interpreter of its own -------------------------------------

PROGRAM = """
import os, sys, warnings
{imports}
import tinker
from tests import programs
from tinker_routefix.lab import Fault, Lab
with Lab() as lab:
    # By count and not by time: a loaded machine may take its time to get here.
    # Before 0.3.0 there is no session, and the model comes first.
    lab.fault(Fault(kinds=["create_session", "create_model"], count=2))
    {connect}
    programs.train(client)
    programs.exact(lab, gradients=1, optim_steps=1)
    import tinker_routefix
    (job,) = tinker_routefix.status().jobs
    assert job.recovered >= 1, job
    ours = [s.name for s in tinker_routefix.status().seams if s.state == "ours"]
    assert len(ours) == len(tinker_routefix._seams.TINKER), ours
sys.stdout.write("survived")
sys.stdout.flush()
os._exit(0)
"""
CONNECT = "client = programs.connect(lab.base_url)"
CONNECT_BY_NAME = (
    "client = programs.settled(ServiceClient(base_url=lab.base_url)"
    '.create_lora_training_client(base_model="lab/base"))'
)


@pytest.mark.parametrize(
    ("imports", "connect"),
    [
        ("import tinker_routefix, tinker", CONNECT),
        ("import tinker, tinker_routefix", CONNECT),
        ("from tinker import ServiceClient\nimport tinker_routefix", CONNECT_BY_NAME),
        ("import tinker.lib.api_future_impl, tinker_routefix", CONNECT),
        ("import tinker_routefix, tinker.lib.internal_client_holder", CONNECT),
    ],
    ids=["before", "after", "after-from-import", "after-a-submodule", "before-a-submodule"],
)
def test_shim_works_in_any_import_order(imports: str, connect: str) -> None:
    ended = run_python(PROGRAM.format(imports=imports, connect=connect))
    assert (ended.stdout, ended.returncode) == ("survived", 0), ended.stderr


IMPORTED_MEANWHILE = """
import sys, threading
halfway, go_on = threading.Event(), threading.Event()
CLASSES = {
    "tinker._client": "AsyncTinker",
    "tinker.lib.api_future_impl": "_APIFuture",
    "tinker.lib.internal_client_holder": "InternalClientHolder",
}

def stop_halfway(event, _):
    if event != "import" or halfway.is_set() or not sys.modules.keys() >= CLASSES.keys():
        return
    if not all(hasattr(sys.modules[module], name) for module, name in CLASSES.items()):
        halfway.set()
        go_on.wait(60)

sys.addaudithook(stop_halfway)
other = threading.Thread(target=lambda: __import__("tinker.lib.api_future_impl"))
other.start()
while other.is_alive() and not halfway.wait(0.1):
    pass
import wrapt, tenacity.asyncio  # What takes time, and is not what is waited for.
threading.Timer(0.5, go_on.set).start()
import tinker_routefix
other.join()
import tinker.lib.internal_client_holder
assert tinker_routefix.status().active, tinker_routefix.status().reason
sys.stdout.write(f"halfway: {halfway.is_set()}")
"""


def test_import_beside_a_thread_that_imports_tinker_waits_for_it() -> None:
    ended = run_python(IMPORTED_MEANWHILE)
    assert ended.returncode == 0, ended.stderr
    if int(metadata.version("tinker").split(".")[1]) < 22 and ended.stdout == "halfway: False":
        pytest.skip("this release imports nothing else in the midst of its last module")
    assert ended.stdout == "halfway: True"


@pytest.mark.core
@pytest.mark.parametrize("word", ["0", " OFF "])
def test_switched_off_shim_patches_and_imports_nothing(word: str) -> None:
    """Nothing patched, nothing heavy imported, and a 404 is final."""
    ended = run_python(
        """
import sys
before = set(sys.modules)
import tinker_routefix
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert loaded <= {"tinker_routefix", "__future__"}, loaded
import tinker, tinker.lib.api_future_impl, wrapt, importlib
status = tinker_routefix.status()
assert not status.active and "TINKER_ROUTEFIX" in status.reason, status
assert {seam.state for seam in status.seams} == {"original", "not loaded"}, status
from tests import programs
from tinker_routefix.lab import Lab
with Lab() as lab:
    lab.stale(60)
    try:
        programs.connect(lab.base_url)
    except tinker.NotFoundError:
        sys.stdout.write("crashed")
        sys.stdout.flush()
import os
os._exit(0)
""",
        TINKER_ROUTEFIX=word,
    )
    assert (ended.stdout, ended.returncode) == ("crashed", 0), ended.stderr


def test_import_of_the_shim_loads_no_heavy_package() -> None:
    ended = run_python(
        "import sys, tinker_routefix\n"
        "loaded = {'tinker', 'httpx', 'tenacity', 'pydantic'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert ended.returncode == 0, ended.stderr


def test_bundler_finds_every_module_of_the_shim() -> None:
    """What is only imported by a name made at run time is missing in a frozen program."""
    (folder,) = tinker_routefix.__path__
    parent = str(Path(folder).parent)
    others = {one.name.partition(".")[0] for one in Path(parent).iterdir()} - {"tinker_routefix"}
    finder = modulefinder.ModuleFinder([parent], excludes=sorted(others))
    finder.import_hook("tinker_routefix")
    modules = {f"tinker_routefix.{path.stem}" for path in Path(folder).glob("[!_]*.py")}
    modules |= {f"tinker_routefix.{path.stem}" for path in Path(folder).glob("_[!_]*.py")}
    assert modules <= set(finder.modules)


def test_bad_settings_are_refused_at_import() -> None:
    ended = run_python("import tinker_routefix", TINKER_ROUTEFIX_MAX_REPLAYS="many")
    assert ended.returncode == 1
    assert "TINKER_ROUTEFIX_MAX_REPLAYS='many'" in ended.stderr
    ended = run_python("import tinker_routefix", TINKER_ROUTEFIX="maybe")
    assert "TINKER_ROUTEFIX='maybe'" in ended.stderr
    assert "yes" in ended.stderr


def test_forked_child_starts_without_jobs_or_held_locks() -> None:
    ended = run_python(
        """
import os, threading, tinker_routefix, tinker, warnings
from tests import programs
from tinker_routefix import _patching, _routes
from tinker_routefix.lab import Lab
with Lab() as lab:
    programs.connect(lab.base_url)
    assert tinker_routefix.status().jobs
    # Both are held at that moment, by a thread that the child does not have.
    held = threading.Event()
    def hold():
        with _patching._lock, _routes._lock:
            held.set()
            threading.Event().wait()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    warnings.simplefilter("ignore", DeprecationWarning)
    child = os.fork()
    if not child:
        tinker_routefix.install()
        os._exit(3 if not tinker_routefix.status().jobs else 4)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert ended.returncode == 3, ended.stderr


MANAGER = """
class TrainerJobManager:
    additional_headers = {"X-Team": "blue"}
    def __init__(self, api_key, base_url):
        self.base_url = base_url
        self.api_key = api_key
    def _headers(self):
        return {"X-API-Key": self.api_key, "X-Team": "blue", "User-Agent": "sdk"}
"""


def fireworks(directory: Path, module: str, code: str) -> str:
    """A package that stands for the Fireworks SDK, with nothing in it but one module."""
    path = directory.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(code)
    for package in path.relative_to(directory).parents[:-1]:
        (directory / package / "__init__.py").touch()
    return in_front(directory)


def in_front(directory: Path) -> str:
    """A `PYTHONPATH` that begins with a directory."""
    return os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))


def test_job_manager_gives_its_control_plane_while_it_lives(tmp_path: Path) -> None:
    """For as long as the program keeps it, with its headers."""
    ended = run_python(
        """
import tinker_routefix, tinker
import fireworks.training.sdk.trainer as trainer
from tinker_routefix import _addresses
manager = trainer.TrainerJobManager("key", "https://api.example/")
states = [seam.state for seam in tinker_routefix.status().seams]
assert states.count("ours") == len(tinker_routefix._seams.TINKER) + 1
(known,) = _addresses._managers["https://api.example"]
address = known.address()
assert address.root.rstrip("/") == "https://api.example" and address.verify, address
assert address.headers == {"x-api-key": "key", "x-team": "blue"}, address.headers
del manager
assert known.address().headers is None
tinker_routefix.uninstall()
assert vars(trainer.TrainerJobManager)["__init__"].__class__.__name__ == "function"
""",
        PYTHONPATH=fireworks(tmp_path, "fireworks.training.sdk.trainer", MANAGER),
    )
    assert ended.returncode == 0, ended.stderr


def test_release_without_a_job_manager_causes_no_warning(tmp_path: Path) -> None:
    ended = run_python(
        """
import warnings
warnings.simplefilter("error", RuntimeWarning)
import tinker_routefix, tinker, tinker.lib.api_future_impl, tinker.lib.internal_client_holder
import fireworks.training.sdk.trainer
status = tinker_routefix.status()
assert status.active, status
seams = len(tinker_routefix._seams.TINKER)
states = ["ours"] * seams + ["not loaded"] * seams + ["absent"]
assert [seam.state for seam in status.seams] == states
# One that comes later is wrapped by the next call.
class TrainerJobManager:
    def __init__(self):
        pass
fireworks.training.sdk.trainer.TrainerJobManager = TrainerJobManager
tinker_routefix._patching._module_came(fireworks.training.sdk.trainer)
assert tinker_routefix.status().seams[-1].state == "ours"
""",
        PYTHONPATH=fireworks(tmp_path, "fireworks.training.sdk.trainer", ""),
    )
    assert ended.returncode == 0, ended.stderr


def test_incompatible_copy_of_tinker_leaves_tinker_patched(tmp_path: Path) -> None:
    """And where no distribution says which release it is, the warning says that."""
    core = "fireworks.training.sdk._core"
    fireworks(tmp_path, f"{core}._client", "")
    library = tmp_path.joinpath(*core.split("."), "lib")
    library.mkdir()
    for name in ("__init__", "internal_client_holder", "api_future_impl"):
        (library / f"{name}.py").touch()
    ended = run_python(
        f"""
import warnings
import tinker_routefix, tinker, tinker.lib.api_future_impl, tinker.lib.internal_client_holder
import {core}._client, {core}.lib.internal_client_holder
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import {core}.lib.api_future_impl
(warning,) = [w for w in warned if w.category is tinker_routefix.RoutefixWarning]
assert "fireworks-ai's copy of tinker" in str(warning.message), warning.message
states = [seam.state for seam in tinker_routefix.status().seams]
seams = len(tinker_routefix._seams.TINKER)
assert states == ["ours"] * seams + ["absent"] * seams + ["not loaded"], states
assert "copy of tinker" in tinker_routefix.status().reason
""",
        PYTHONPATH=in_front(tmp_path),
        TINKER_ROUTEFIX_STRICT="0",
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("first", ["tinker", "tinker_routefix", "os"])
def test_warning_of_an_unknown_release_points_at_the_programs_import(
    tmp_path: Path, first: str
) -> None:
    """Not at what lies between: wrapt, Python's import system, or tinker's own modules.

    Where another module is imported first, the shim is loaded by the variable.
    """
    library = tmp_path / "tinker/lib"
    library.mkdir(parents=True)
    modules = "import tinker._client, tinker.lib.api_future_impl, tinker.lib.internal_client_holder"
    (tmp_path / "tinker/__init__.py").write_text(f"{modules}\n")
    for name in ("_client", "lib/api_future_impl", "lib/client_connection_pool_type"):
        (tmp_path / f"tinker/{name}.py").touch()
    (library / "internal_client_holder.py").touch()
    program = tmp_path / "program.py"
    second = "tinker_routefix" if first == "tinker" else "tinker"
    program.write_text(f"import {first}\nimport {second}\n")
    ended = subprocess.run(
        [sys.executable, program],
        env={
            **os.environ,
            "PYTHONPATH": in_front(tmp_path),
            "TINKER_ROUTEFIX_STRICT": "0",
            "TINKER_ROUTEFIX_AUTOLOAD": "1" if first == "os" else "",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ended.stderr.startswith(f"{program}:2: RoutefixWarning: tinker_routefix does not fit")


def test_warning_without_metadata_still_has_release_and_tracker(mocker: Any) -> None:
    """Where the shim was put on the path, and not installed."""
    missing = metadata.PackageNotFoundError("tinker")
    mocker.patch("importlib.metadata.version", side_effect=missing)
    mocker.patch("importlib.metadata.metadata", side_effect=missing)
    assert _metadata.release_of("tinker") == "of an unknown release"
    assert _metadata.tracker() == "the shim's issue tracker"


def test_shim_leaves_asyncio_unpatched() -> None:
    async def program() -> str:
        await asyncio.sleep(0)
        return asyncio.get_running_loop().__class__.__name__

    assert "EventLoop" in asyncio.run(program())
