"""Every way in which a run gets a second process: first on plain tinker, then with the shim.

The programs are the recipes of ``docs/processes.md``, as they stand there. Each runs in an
environment with the start-up files that the wheel places, as whole processes, against a lab
whose gateway loses the route just where the second process is at work.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.common import CANARY, exact
from tests.test_autoload import ROOT, VARIABLE, Environment
from tinker_routefix.lab import Exchange, Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends: less than one in a hundred."""

LINE = "import tinker_routefix\n"
GUARD = 'if __name__ == "__main__":\n'
AUTOLOAD = {VARIABLE: "1"}
PAGE = ROOT / "docs" / "processes.md"

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def cells(title: str) -> list[str]:
    """The blocks of that name on the page."""
    fence = rf'^```python title="{re.escape(title)}"\n(.*?)^```$'
    return re.findall(fence, PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def recipe(title: str) -> str:
    """The program of that name on the page."""
    (program,) = cells(title)
    return program


def tinker() -> tuple[int, ...]:
    """The release that is installed."""
    return tuple(int(part) for part in metadata.version("tinker").split(".")[:3])


@dataclass
class Ended:
    """A program that has come to its end."""

    code: int
    printed: str
    complained: str

    def crashed(self) -> None:
        """As plain tinker does."""
        assert self.code != 0, self.printed
        assert "Trainer job not found" in self.complained, self.complained[-3000:]

    def survived(self, printed: str = "") -> None:
        assert (self.code, self.printed.strip()) == (0, printed), self.complained[-3000:]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


Run = Any
"""``run(lab, program, **variables)``: a program as a whole process, and how it ended."""


@pytest.fixture
def run(environment: Environment, tmp_path: Path) -> Run:
    shutil.copy(Path(__file__).with_name("process_programs.py"), tmp_path / "work.py")
    (tmp_path / "rank.py").write_text(recipe("rank.py"), encoding="utf-8")

    def start(lab: Lab, program: str, *options: str, **variables: str) -> Ended:
        (tmp_path / "program.py").write_text(program, encoding="utf-8")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TINKER_", "PYTHON"))
        }
        process = subprocess.Popen(
            [str(environment.python), *options, "program.py"],
            env={
                **inherited,
                "TINKER_API_KEY": CANARY,
                "TINKER_BASE_URL": lab.base_url,
                # Its drain would hold every crash for 30 s.
                "TINKER_TELEMETRY": "0",
                "TINKER_ROUTEFIX_STRICT": "1",
                **variables,
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # So that what hangs goes with its children.
            start_new_session=True,
        )
        try:
            printed, complained = process.communicate(timeout=150)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Ended(process.returncode, printed, complained)

    return start


def race(lab: Lab, processes: int = 1, *, skip: int = 0) -> None:
    """Every process that connects and trains meets 404s where it begins and on a poll."""
    polls = Counter[str]()

    def first(exchange: Exchange) -> bool:
        """Of its future: the first process may be through before another one has begun."""
        future = (exchange.said or {})["request_id"]
        polls[future] += 1
        return polls[future] == 1

    lab.fault(Fault(kinds=["create_session"], count=processes, skip=skip))
    lab.fault(Fault(kinds=["poll:forward_backward"], count=processes, when=first))


def at_the_top(program: str) -> str:
    return LINE + program


def below_the_guard(program: str) -> str:
    assert GUARD in program
    return program.replace(GUARD, GUARD + "    " + LINE)


def with_both(program: str) -> str:
    return recipe("both.py") + program


def unchanged(program: str) -> str:
    return program


# --- Children, and other programs ---------------------------------------------------------


SPAWNED = {
    "plain": (unchanged, {}, False),
    "line-below-the-guard": (below_the_guard, {}, False),
    "line-at-the-top": (at_the_top, {}, True),
    "variable": (unchanged, AUTOLOAD, True),
    "both": (with_both, {}, True),
    "switched-off": (with_both, {"TINKER_ROUTEFIX": "0"}, False),
}
"""How the shim is loaded: what is done to the program, the environment, and whether it helps."""


@posix
@pytest.mark.parametrize(
    ("method", "way"),
    [("spawn", way) for way in SPAWNED]
    + [("forkserver", way) for way in ("plain", "line-at-the-top", "variable")],
)
def test_spawned_child_survives_only_with_the_shim_loaded_in_it(
    lab: Lab, run: Run, method: str, way: str
) -> None:
    loaded, variables, helps = SPAWNED[way]
    race(lab)
    program = loaded(recipe("spawned.py")).replace('"spawn"', f'"{method}"')
    ended = run(lab, program, **variables)
    if helps:
        ended.survived()
        exact(lab, gradients=1, optim_steps=1)
    else:
        ended.crashed()


@pytest.mark.parametrize(
    ("loaded", "variables", "helps"),
    [
        (unchanged, {}, False),
        (at_the_top, {}, False),
        (unchanged, AUTOLOAD, True),
        (with_both, {}, True),
    ],
    ids=["plain", "line-in-the-parent", "variable", "both"],
)
def test_started_program_survives_only_with_the_shim_loaded_in_it(
    lab: Lab, run: Run, loaded: Callable[[str], str], variables: dict[str, str], helps: bool
) -> None:
    race(lab)
    ended = run(lab, loaded(recipe("popen.py")), **variables)
    if helps:
        ended.survived()
        exact(lab, gradients=1, optim_steps=1)
    else:
        ended.crashed()


@pytest.mark.parametrize("way", ["plain", "line-in-the-launcher", "line-in-the-ranks", "variable"])
def test_launched_ranks_survive_only_with_the_shim_loaded_in_them(
    lab: Lab, run: Run, tmp_path: Path, way: str
) -> None:
    race(lab, processes=2)
    program = recipe("launch.py")
    if way == "line-in-the-ranks":
        (tmp_path / "rank.py").write_text(LINE + recipe("rank.py"), encoding="utf-8")
    if way == "line-in-the-launcher":
        program = LINE + program
    ended = run(lab, program, **(AUTOLOAD if way == "variable" else {}))
    if way in ("plain", "line-in-the-launcher"):
        ended.crashed()
    else:
        ended.survived()
        exact(lab, gradients=2, optim_steps=2)


def test_each_process_prints_its_own_final_report(lab: Lab, run: Run) -> None:
    race(lab, processes=2)
    ended = run(lab, with_both(recipe("launch.py")), LEVEL="INFO")
    ended.survived()
    # Of the ranks, that is: the launcher has met nothing.
    assert ended.complained.count("process.report") == 2, ended.complained


def test_child_asks_the_configured_control_plane(make_lab: Callable[..., Lab], run: Run) -> None:
    """What a job manager knows stays in its process; a setting goes along."""
    lab, other = make_lab(), make_lab()
    lab.control_plane.mode = "missing"
    # For good: said once, and with a pod that answers, it would end nothing.
    lab.stale()
    program = with_both(recipe("popen.py"))
    run(lab, program).crashed()
    lab.clear()
    race(lab)
    run(lab, program, TINKER_ROUTEFIX_CONTROL_PLANE_URL=other.origin).survived()
    exact(lab, gradients=1, optim_steps=1)
    assert other.control_plane.questions


# --- Sampling elsewhere --------------------------------------------------------------------

spawned_each_way = pytest.mark.parametrize(
    ("loaded", "variables", "helps"),
    [
        (unchanged, {}, False),
        (below_the_guard, {}, False),
        (at_the_top, {}, True),
        (unchanged, AUTOLOAD, True),
    ],
    ids=["plain", "line-below-the-guard", "line-at-the-top", "variable"],
)


def sampling_race(lab: Lab) -> None:
    """The route is lost where samples are asked for, and again where they are waited for."""
    lab.fault(Fault(kinds=["sample"], count=2))
    lab.fault(Fault(kinds=["polls", "poll:sample"], count=2))


@spawned_each_way
def test_pickled_sampling_client_survives_only_with_the_shim_in_the_worker(
    lab: Lab, run: Run, loaded: Callable[[str], str], variables: dict[str, str], helps: bool
) -> None:
    if tinker() < (0, 12):
        pytest.skip("sampling clients can be pickled from tinker 0.12.0 on")
    sampling_race(lab)
    ended = run(lab, loaded(recipe("pickled.py")), **variables)
    if helps:
        ended.survived("4")
        assert lab.ledger.count("sample") == 4, lab.ledger.summary()
    else:
        ended.crashed()


def test_exception_of_a_worker_carries_the_note(lab: Lab, run: Run) -> None:
    if tinker() < (0, 12):
        pytest.skip("sampling clients can be pickled from tinker 0.12.0 on")
    lab.control_plane.state = "JOB_STATE_DELETED"
    lab.fault(Fault(kinds=["sample"]))
    ended = run(lab, recipe("pickled.py"), **AUTOLOAD)
    ended.crashed()
    # In what the executor shows of the worker's own traceback.
    assert "JOB_STATE_DELETED" in ended.complained
    assert lab.ledger.count("sample") == 0


OWN_CALL = """
from dataclasses import dataclass
from tinker.lib.sidecar import SidecarRPC, create_sidecar_handle
from work import make_sampler, sample
@dataclass
class Sample(SidecarRPC):
    async def execute(self, target):
        import tinker
        prompt = tinker.types.ModelInput.from_ints([1, 2, 3])
        params = tinker.types.SamplingParams(max_tokens=4)
        return target.sample(prompt=prompt, num_samples=1, sampling_params=params)
if __name__ == "__main__":
    handle = create_sidecar_handle(make_sampler())
    print(len(handle.submit_rpc(Sample()).result(60).sequences))
"""
"""What a release does for itself later: hand a sampling client to the sidecar."""

WATCHED = """
    import multiprocessing
    assert len(multiprocessing.active_children()) == 1, "there is no sidecar"
"""


@spawned_each_way
def test_sampling_in_the_sidecar_survives_only_with_the_shim_in_it(
    lab: Lab, run: Run, loaded: Callable[[str], str], variables: dict[str, str], helps: bool
) -> None:
    if not (0, 15) <= tinker() <= (0, 27, 0):
        pytest.skip("tinker has its sidecar from 0.15.0 to 0.27.0 only")
    program = OWN_CALL if tinker() < (0, 16) else recipe("sidecar.py")
    sampling_race(lab)
    ended = run(lab, loaded(program + WATCHED), **variables, TINKER_SUBPROCESS_SAMPLING="1")
    if helps:
        ended.survived("1")
        assert lab.ledger.count("sample") == 1, lab.ledger.summary()
    else:
        ended.crashed()


# --- Fork ---------------------------------------------------------------------------------

FORKS = ("-W", "ignore::DeprecationWarning")
"""From 3.12 on Python warns of every fork of a process that has threads."""


@posix
@pytest.mark.parametrize(
    ("loaded", "variables", "helps"),
    [
        (unchanged, {}, False),
        (below_the_guard, {}, True),
        (unchanged, AUTOLOAD, True),
    ],
    ids=["plain", "line", "variable"],
)
def test_child_forked_before_use_survives_only_with_the_shim(
    lab: Lab, run: Run, loaded: Callable[[str], str], variables: dict[str, str], helps: bool
) -> None:
    race(lab)
    ended = run(lab, loaded(recipe("forked.py")), *FORKS, **variables)
    if helps:
        ended.survived()
        exact(lab, gradients=1, optim_steps=1)
    else:
        ended.crashed()


IDLE_CHILD = """
import os
from work import train
train()
child = os.fork()
if not child:
    # Whatever is collected in a child that has no use for it, at its regular end.
    import gc
    gc.collect()
    raise SystemExit(0)
print(os.waitpid(child, 0)[1])
train()
"""

USING_CHILD = """
import os, signal
from work import train
train()
child = os.fork()
if not child:
    # Its end, where nothing comes.
    signal.alarm(5)
    train()
    os._exit(0)
print(os.waitpid(child, 0)[1])
train()
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("child", [IDLE_CHILD, USING_CHILD], ids=["idle", "using-tinker"])
def test_child_forked_after_use_ends_as_on_plain_tinker(
    make_lab: Callable[..., Lab], run: Run, child: str
) -> None:
    """One that uses tinker waits for ever: tinker's loop is not there."""
    plain = make_lab()
    ended = run(plain, child, *FORKS)
    assert ended.code == 0, ended.complained
    assert int(ended.printed) in ({0} if child is IDLE_CHILD else {0, signal.SIGALRM})
    lab = make_lab()
    run(lab, child, *FORKS, **AUTOLOAD).survived(ended.printed.strip())
    assert lab.ledger.gradients == plain.ledger.gradients
    assert not lab.ledger.duplicates()


@posix
def test_forked_child_does_not_report_the_404s_of_its_parent(lab: Lab, run: Run) -> None:
    race(lab)
    ended = run(lab, IDLE_CHILD, *FORKS, **AUTOLOAD, LEVEL="INFO")
    ended.survived("0")
    assert ended.complained.count("process.report") == 1, ended.complained
    assert "was destroyed" not in ended.complained
    exact(lab, gradients=2, optim_steps=2)


RENEWED_CHILD = """
import os, signal, sys, time
import tinker
from tinker import types
from tinker.lib import internal_client_holder as holders
import work

client = tinker.ServiceClient().create_lora_training_client(base_model=work.MODEL, rank=8)
client = getattr(client, "result", lambda _: client)(60)
client.forward_backward(work.batch(), "cross_entropy").result(60)
step = client.optim_step(types.AdamParams(learning_rate=1e-4))
shim = sys.modules.get("tinker_routefix")
while shim is not None and shim.status().jobs[0].route != "waiting":
    time.sleep(0.01)
child = os.fork()
if not child:
    signal.alarm(60)
    code = 1
    try:
        # tinker's own loop did not come along: what a tinker that minds forks would do.
        renewed = holders.InternalClientHolderThreadSingleton()
        holders._internal_client_holder_thread_singleton = renewed
        work.train()
        code = 0
    finally:
        os._exit(code)
step.result(60)
print(os.waitpid(child, 0)[1])
"""


@posix
@pytest.mark.parametrize("variables", [{}, AUTOLOAD], ids=["plain", "variable"])
def test_child_forked_during_an_incident_starts_afresh(
    make_lab: Callable[..., Lab], run: Run, variables: dict[str, str]
) -> None:
    """The child begins anew, on a loop of its own; the parent's wait ends as it would have."""
    # tinker's second transport has threads of its own that a fork leaves behind.
    lab = make_lab(config={"use_pyqwest_transport": False})
    lab.fault(Fault(kinds=["create_session"], skip=1, count=1))
    lab.fault(Fault(kinds=["optim_step"], count=4))
    ended = run(lab, RENEWED_CHILD, *FORKS, **variables)
    if variables:
        ended.survived("0")
        exact(lab, gradients=2, optim_steps=2)
    else:
        ended.crashed()


FORKED_UNDER_LOCKS = """
import os, signal, sys, threading
import tinker_routefix
import work
work.train()
import tinker_routefix.events
kinds = (type(threading.Lock()), type(threading.RLock()))
locks = [
    (f"{name}.{key}", value)
    for name, module in list(sys.modules.items())
    if name.partition(".")[0] == "tinker_routefix"
    for key, value in list(vars(module).items())
    if isinstance(value, kinds)
]
assert len(locks) >= 3, locks
held, leave = threading.Event(), threading.Event()
def hold():
    for _, lock in locks:
        lock.acquire()
    held.set()
    leave.wait()
    for _, lock in locks:
        lock.release()
holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    import faulthandler
    faulthandler.dump_traceback_later(10)
    assert not tinker_routefix.status().jobs
    tinker_routefix.configure(retry_budget=7)
    tinker_routefix.subscribe(print)()
    tinker_routefix.uninstall()
    tinker_routefix.install()
    os._exit(0)
leave.set()
holder.join()
print(os.waitpid(child, 0)[1], len(tinker_routefix.status().jobs))
"""


@posix
def test_forked_child_holds_no_lock_of_its_parents_threads(lab: Lab, run: Run) -> None:
    """Threads that held one in the parent are not there to let go."""
    run(lab, FORKED_UNDER_LOCKS, *FORKS).survived("0 1")
