"""What a person sees of a wait, in the stderr of a real process."""

from __future__ import annotations

import _thread
import asyncio
import io
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import traceback
import warnings
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tenacity

import tinker_routefix
from tests.common import leaks, shown_on, until
from tests.conftest import of_the_shim
from tinker_routefix import _errors, _log, _routes, _submissions, events
from tinker_routefix._job import origin_of
from tinker_routefix.lab import Answer, Fault, Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tinker_routefix.lab import Exchange

ROOT = Path(__file__).parent.parent

TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends."""

PROGRAM = """
import sys
{first}
import tinker_routefix
from tests import programs
client = programs.connect(sys.argv[1])
{then}
futures = [programs.forward_backward(client) for _ in range({futures})]
for future in futures:
    future.result(programs.PATIENCE)
print("trained")
"""


def program(first: str = "", then: str = "", futures: int = 1) -> list[str]:
    code = PROGRAM.format(first=first, then=then, futures=futures)
    return [sys.executable, "-c", code]


def start(command: list[str], lab: Lab, **how: Any) -> subprocess.Popen[str]:
    variables = {"TINKER_TELEMETRY": "0", **how.pop("environment", {})}
    return subprocess.Popen(
        [*command, lab.base_url],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=how.pop("stdout", subprocess.PIPE),
        stderr=how.pop("stderr", subprocess.PIPE),
        text=True,
        # A shell's background job, as CI may be, inherits that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **how,
    )


def run(command: list[str], lab: Lab, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(command, lab, environment=environment)
    printed, said = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, said)


def outage(lab: Lab, seconds: float) -> Fault:
    """The route is gone from the first forward_backward on, for so long from the first probe on.

    By then the program has its 404, however slow the machine is.
    """
    began: dict[str, float] = {}

    def stale(exchange: Exchange) -> bool:
        if exchange.kind == "forward_backward" or began:
            began.setdefault(exchange.kind, exchange.at)
        return bool(began) and exchange.at - began.get("get_info", exchange.at) < seconds

    return lab.fault(Fault(when=stale))


WAITS = (
    r"tinker_routefix: job lab/job-1: the gateway has had no route for \d+ s \(HTTP 404\); "
    r"control plane: JOB_STATE_RUNNING; trying again, for at most (\d+) s more"
)
RECOVERED = r"tinker_routefix: job lab/job-1: the route works again after \d+ s; the run goes on"
GAVE_UP = (
    r"tinker_routefix: job lab/job-1: gave up on the route after \d+ s \(control plane: "
    r"JOB_STATE_RUNNING\); the exception says what to do"
)


def lines(said: str, *patterns: str) -> list[re.Match[str]]:
    """Matches of each line; there are no others."""
    found = said.splitlines()
    assert len(found) == len(patterns), said
    matches = [re.fullmatch(*both) for both in zip(patterns, found, strict=True)]
    assert all(matches), said
    return [match for match in matches if match]


# --- Nothing is configured ---------------------------------------------------------------


def test_healthy_run_prints_nothing(lab: Lab) -> None:
    ended = run(program(), lab)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "trained\n", "")


def test_short_wait_prints_nothing(lab: Lab) -> None:
    lab.fault(Fault(kinds=["forward_backward"], count=1))
    # Though a machine that stands still may make it a long one.
    patient = "from tinker_routefix import _voice; _voice.FIRST = 60.0"
    ended = run(program(first=patient), lab)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "trained\n", "")
    assert lab.count(refused=True) == 1


@pytest.mark.slow
@pytest.mark.core
def test_long_wait_of_many_requests_prints_one_line_and_its_end(lab: Lab) -> None:
    outage(lab, 5)
    ended = run(program(futures=100), lab, LANG="C", LC_ALL="C")
    assert (ended.returncode, ended.stdout) == (0, "trained\n")
    waits, _ = lines(ended.stderr, WAITS, RECOVERED)
    (waited,) = re.findall(r"route for (\d+) s", waits[0])
    assert 29 <= int(waited) + int(waits[1]) <= 31
    assert ended.stderr.isascii()


def test_long_wait_at_connect_prints_how_long_connecting_may_take(lab: Lab) -> None:
    # From the first request on, however long a busy machine takes until then.
    lab.fault(Fault(count=1, then=Fault(seconds=4)))
    ended = run(program(), lab)
    waits, _ = lines(ended.stderr, WAITS, RECOVERED)
    assert 100 <= int(waits[1]) <= 118


@pytest.mark.parametrize(
    ("mode", "said"),
    [("drop", r"no answer \(\w+\)"), ("hang", "no answer yet"), ("error", r"HTTP 50\d")],
)
def test_long_wait_without_a_control_plane_says_so(lab: Lab, mode: Any, said: str) -> None:
    lab.control_plane.mode = mode
    outage(lab, 4)
    ended = run(program(), lab)
    lines(
        ended.stderr,
        r"tinker_routefix: job lab/job-1: the gateway has had no route for \d+ s \(HTTP 404\); no "
        rf"usable response of the control plane: {said}; asking it and trying again, for at most "
        r"\d+ s more",
        RECOVERED,
    )


def test_answer_that_comes_after_a_probe_has_proven_the_job_is_told(lab: Lab) -> None:
    # Probes come through: no replay waits for so slow an answer, and none asks again.
    lab.fault(Fault(kinds=["poll:forward_backward"]))
    lab.control_plane.delay = 1.8
    ended = run(program(), lab, TINKER_ROUTEFIX_RETRY_BUDGET="5")
    assert ended.returncode == 1
    *_, last = ended.stderr.partition("Traceback")[0].splitlines()
    lines(last, GAVE_UP)


def test_failed_wait_of_many_polls_prints_its_end_once_before_the_traceback(lab: Lab) -> None:
    # No result is ready before all are polled for, and then the route is gone.
    unready = Answer(408, {"type": "try_again", "request_id": "any", "queue_state": "active"})
    lab.fault(Fault(kinds=["poll"], when=lambda _: lab.ledger.gradients == 20))
    lab.fault(Fault(kinds=["poll:forward_backward"], at="pod", answer=unready, delay=0.5))
    ended = run(program(futures=20), lab, TINKER_ROUTEFIX_RETRY_BUDGET="4")
    assert ended.returncode == 1
    ours, _, rest = ended.stderr.partition("Traceback")
    lines(ours, WAITS, GAVE_UP)
    assert rest.count("tinker_routefix: job") == 0


def test_failed_warm_up_prints_its_end(lab: Lab) -> None:
    lab.fault(Fault(kinds=["get_info"]))
    ended = run(program(), lab, TINKER_ROUTEFIX_WARMUP_TIMEOUT="4")
    assert ended.returncode == 1
    lines(ended.stderr.partition("Traceback")[0], WAITS, GAVE_UP)


def test_wait_that_ends_in_another_error_claims_no_route(lab: Lab) -> None:
    outage(lab, 4)
    lab.fault(Fault(kinds=["forward_backward"], at="pod", answer=Answer(422, {"detail": "no"})))
    ended = run(program(), lab)
    assert ended.returncode == 1
    lines(
        ended.stderr.partition("Traceback")[0],
        WAITS,
        r"tinker_routefix: job lab/job-1: nothing waits for the route any more, after \d+ s",
    )


@pytest.mark.slow
def test_telemetry_of_a_survived_outage_prints_no_traceback(lab: Lab) -> None:
    """tinker's own, which is refused as well: every second until 0.38, every 10 s later."""
    outage(lab, 12)
    ended = run(program(), lab, TINKER_TELEMETRY="1")
    assert ended.returncode == 0
    lines(ended.stderr, WAITS, RECOVERED)


def test_failed_wait_is_not_delayed_by_telemetry(lab: Lab) -> None:
    """Of which there is some to be sent all the time."""
    outage(lab, 60)
    talks = """
import threading, time
telemetry = client.holder.get_telemetry()
def talk():
    while True:
        telemetry.log("talk")
        telemetry._trigger_flush()
        time.sleep(0.1)
threading.Thread(target=talk, daemon=True).start()
began = time.monotonic()
import atexit
atexit.register(lambda: print(time.monotonic() - began))
"""
    variables = {"TINKER_TELEMETRY": "1", "TINKER_ROUTEFIX_RETRY_BUDGET": "4"}
    ended = run(program(then=talks), lab, **variables)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert float(ended.stdout) < 20


INTERRUPTED = (
    r"tinker_routefix: {how} while a request waits for the route to job lab/job-1, for \d+ s "
    r"\(control plane: JOB_STATE_RUNNING\); `tinker-routefix check \S+/lab/job-1` tells whether it "
    "works again"
)


@pytest.mark.parametrize("after", [0.5, 3.0])
def test_interrupt_in_a_wait_says_what_was_waited_for(lab: Lab, after: float) -> None:
    outage(lab, 60)
    with start(program(), lab, environment={"TINKER_TELEMETRY": "1"}) as process:
        while not lab.count("forward_backward", refused=True) or not lab.control_plane.questions:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        printed, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 15
    assert (process.returncode, printed) == (-signal.SIGINT, "")
    *_, interrupt, last = said.splitlines()
    assert interrupt == "KeyboardInterrupt"
    assert re.fullmatch(INTERRUPTED.format(how="interrupted"), last)


def test_interrupt_in_a_wait_is_the_last_that_is_said(lab: Lab) -> None:
    """The loop of tinker goes on while a process ends slowly."""
    outage(lab, 60)
    ends_slowly = "import atexit, time; atexit.register(time.sleep, 4)"
    with start(program(ends_slowly), lab) as process:
        while not lab.count("forward_backward", refused=True) or not lab.control_plane.questions:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    last = said.splitlines()[-1]
    assert re.fullmatch(INTERRUPTED.format(how="interrupted"), last), said


def test_thread_that_outlives_the_main_one_survives_an_outage(lab: Lab) -> None:
    """Python starts no threads any more, then."""
    outage(lab, 4)
    trains_on = """
import threading
def train():
    threading.main_thread().join()
    programs.forward_backward(client).result(programs.PATIENCE)
    print("trained in a thread")
threading.Thread(target=train).start()
sys.exit()
"""
    ended = run(program(then=trains_on), lab)
    assert (ended.returncode, ended.stdout) == (0, "trained in a thread\n"), ended.stderr
    lines(ended.stderr, WAITS, RECOVERED)


def test_process_that_ends_in_a_wait_says_what_was_waited_for(lab: Lab) -> None:
    outage(lab, 60)
    leaves = """
import threading, time
waits = threading.Event()
tinker_routefix.subscribe(lambda event: event.name == "route.waiting" and waits.set())
programs.forward_backward(client)
waits.wait(60)
# A replay comes two seconds after the 404, and the next one four seconds later.
time.sleep(1.5)
sys.exit(3)
"""
    ended = run(program(then=leaves), lab)
    assert ended.returncode == 3
    lines(ended.stderr, WAITS, INTERRUPTED.format(how="the process ends"))


# --- Logging is configured, or the variable is set ---------------------------------------


def test_configured_logging_gets_the_lines_and_stderr_does_not(lab: Lab) -> None:
    outage(lab, 4)
    ended = run(program(first="import logging; logging.basicConfig()"), lab)
    assert ended.returncode == 0
    prefix = "WARNING:tinker_routefix:route."
    found = lines(
        ended.stderr,
        WAITS.replace("tinker_routefix", f"{prefix}waiting", 1),
        RECOVERED.replace("tinker_routefix", f"{prefix}wait_over", 1),
    )
    assert found


def test_handler_of_the_programs_gets_the_lines_and_stderr_does_not(
    lab: Lab, tmp_path: Path
) -> None:
    outage(lab, 4)
    file = tmp_path / "log"
    own = f"""
import logging
logging.getLogger("tinker_routefix").addHandler(logging.FileHandler({str(file)!r}))
"""
    ended = run(program(first=own), lab)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert file.read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("off", []),
        ("warning", ["the gateway has had no route", "the route works again"]),
        ("info", ["the gateway has had no route", "forward_backward of job lab/job-1 got through"]),
        ("debug", ["the gateway has had no route", "sending forward_backward", "control plane's"]),
    ],
)
def test_variable_sets_what_is_printed(lab: Lab, word: str, said: list[str]) -> None:
    outage(lab, 4)
    ended = run(program(), lab, TINKER_ROUTEFIX_LOG=word)
    assert ended.returncode == 0
    assert all(one in ended.stderr for one in said), ended.stderr
    assert bool(ended.stderr) is bool(said)
    assert all(line.startswith("tinker_routefix: ") for line in ended.stderr.splitlines())


def test_warning_is_printed_once_where_the_variable_is_set(lab: Lab) -> None:
    """Python prints the warning: the line that goes with it is not printed as well."""
    foreign = "http://gateway.invalid/training/v1/rlorTrainerJobs/a/b"
    code = f"""
import asyncio, tinker_routefix
from tinker_routefix._control_plane import ControlPlane
from tinker_routefix._job import Job
ControlPlane(Job.from_url({foreign!r}))
"""
    variables = {"TINKER_ROUTEFIX_LOG": "debug", "TINKER_ROUTEFIX_STRICT": "0"}
    ended = run([sys.executable, "-c", code], lab, **variables)
    assert ended.returncode == 0
    assert ended.stderr.count("is not asked") == 1


# --- Tracebacks --------------------------------------------------------------------------

NOTE = """\
tinker_routefix: the gateway answered {request} of job lab/job-1
with a 404; the control plane's response on the job, \\d+\\.\\d s before:
JOB_STATE_DELETED; 0 replays in \\d+\\.\\d s\\.
What to do: see what ended the job, and resume from its last checkpoint on one
that runs: it has ended, is suspended or is not visible with this key\\.
"""


def comparable(shown: str) -> str:
    """Whether the result was there already where the program asked for it is a matter of luck."""
    shown = re.sub(r"(concurrent/futures/_base.py\"), line \d+", r"\1", shown)
    return re.sub(r"future-\d+", "future", shown)


def from_the_traceback(ended: subprocess.CompletedProcess[str]) -> str:
    """Without the lines of a wait: on a slow machine one may last longer than meant."""
    _, traceback, rest = ended.stderr.partition("Traceback ")
    return traceback + rest


@pytest.mark.parametrize("kind", ["forward_backward", "poll:forward_backward"])
def test_traceback_is_tinkers_own_with_one_note_below(lab: Lab, kind: str) -> None:
    lab.control_plane.state = "JOB_STATE_DELETED"
    lab.fault(Fault(kinds=[kind]))
    plain = run(program(), lab, TINKER_ROUTEFIX="0")
    ended = run(program(), lab)
    assert (plain.returncode, ended.returncode) == (1, 1)
    assert "NotFoundError: Error code: 404" in plain.stderr
    request = "forward_backward"
    if kind != request:
        request = r"retrieve_future \(ForwardBackward\)"
    shown, mark, note = from_the_traceback(ended).partition("tinker_routefix: ")
    assert comparable(shown) == comparable(from_the_traceback(plain))
    pattern = " ".join(NOTE.format(request=request).split())
    assert re.fullmatch(pattern, " ".join(f"{mark}{note}".split())), note
    assert max(map(len, note.splitlines())) < COLUMNS


def test_command_in_a_note_stands_on_one_line(lab: Lab) -> None:
    outage(lab, 60)
    ended = run(program(), lab, TINKER_ROUTEFIX_RETRY_BUDGET="1")
    note = from_the_traceback(ended).partition("tinker_routefix: ")[2]
    assert f"`tinker-routefix check {lab.base_url}`" in note
    others = [line for line in note.splitlines() if lab.base_url not in line]
    assert len(others) > 3
    assert max(map(len, others)) < COLUMNS


def test_traceback_that_cannot_be_changed_is_left_as_it_is() -> None:
    class Frozen(Exception):  # noqa: N818 - as a frozen dataclass
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name, value)

    async def fail() -> None:
        raise Frozen

    with pytest.raises(Frozen) as caught:
        asyncio.run(_submissions.follow(fail))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "fail"


def test_traceback_keeps_the_programs_own_tenacity() -> None:
    @tenacity.retry(stop=tenacity.stop_after_attempt(1), reraise=True)
    def step() -> None:
        raise ValueError

    with pytest.raises(ValueError) as caught:
        step()
    before = traceback.extract_tb(caught.value.__traceback__)
    _errors.trim(caught.value)
    assert traceback.extract_tb(caught.value.__traceback__) == before


def test_traceback_of_a_failed_warm_up_names_what_can_be_imported(lab: Lab) -> None:
    lab.fault(Fault(kinds=["get_info"]))
    ended = run(program(), lab, TINKER_ROUTEFIX_WARMUP_TIMEOUT="1")
    assert "\ntinker_routefix.RouteTimeoutError: tinker_routefix: job lab/job-1: " in ended.stderr
    assert "tenacity" not in ended.stderr
    said = ended.stderr.rpartition("\ntinker_routefix.")[2].splitlines()
    assert max(len(line) for line in said if lab.base_url not in line) < COLUMNS


def test_note_of_one_404_is_carried_to_each_error_that_it_causes() -> None:
    """Samples can be polled for together; and a result can be asked for twice."""
    cause, first, second = KeyError(), ValueError(), ValueError()
    cause.add_note("tinker's own")
    _errors.add_note(cause, "what was seen")
    first.__cause__ = second.__cause__ = cause
    for _ in range(2):
        _errors.carry_note(first)
        _errors.carry_note(second)
    assert cause.__notes__ == ["tinker's own"]
    assert first.__notes__ == second.__notes__ == ["what was seen"]
    other = ValueError()
    other.__context__ = cause
    _errors.carry_note(other)
    assert not hasattr(other, "__notes__")


def test_error_of_the_shims_own_keeps_its_frames() -> None:
    error = RuntimeError()
    with pytest.raises(RuntimeError) as caught:
        _log.own_failure("testing", error, strict=True)
    frames = traceback.extract_tb(caught.value.__traceback__)
    _errors.trim(caught.value)
    assert traceback.extract_tb(caught.value.__traceback__) == frames
    assert len(frames) == 2


# --- That it is there --------------------------------------------------------------------


def test_clients_of_a_job_are_told_once_at_info(lab: Lab) -> None:
    ended = run(
        program(then="programs.connect(sys.argv[1])"),
        lab,
        TINKER_ROUTEFIX_LOG="info",
        TINKER_ROUTEFIX_CONTROL_PLANE_URL=lab.origin,
    )
    assert ended.returncode == 0
    release = re.escape(metadata.version("tinker"))
    lines(
        ended.stderr,
        rf"tinker_routefix: a client of tinker {release} connects to job lab/job-1 through the "
        rf"shim; the control plane is at {re.escape(lab.origin)}",
    )


def test_client_that_leads_elsewhere_is_told_with_its_origin_at_debug(lab: Lab) -> None:
    host = lab.direct_url.partition("://")[2]
    code = f"""
import tinker_routefix
from tests import programs
programs.connect("http://somebody:a-secret@{host}")
print(tinker_routefix.status().left_alone)
"""
    ended = run([sys.executable, "-c", code], lab, TINKER_ROUTEFIX_LOG="debug")
    origin = f"http://{host.partition('/')[0]}"
    assert (ended.returncode, ended.stdout) == (0, f"{(origin,)}\n")
    said = {line for line in ended.stderr.splitlines() if "left alone" in line}
    assert said == {
        (
            f"tinker_routefix: a client of {origin} is left alone: its URL is not a trainer job's "
            "route (.../training/v1/rlorTrainerJobs/ACCOUNT/JOB)"
        )
    }
    assert "a-secret" not in ended.stderr


def test_status_lists_the_last_8_origins_that_were_left_alone() -> None:
    for number in (*range(10), 5):
        _routes.leave_alone(f"https://{number}.example")
    listed = tinker_routefix.status().left_alone
    assert [origin[8] for origin in listed] == ["2", "3", "4", "6", "7", "8", "9", "5"]


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://me:password@Api.Example:443/a/b?c=d#e", "https://api.example"),
        ("http://[::1]:81/training", "http://[::1]:81"),
        ("mailto:somebody", None),
    ],
)
def test_origin_is_scheme_host_and_port(url: str, origin: str | None) -> None:
    assert origin_of(url) == origin


# --- Odd ends of stderr ------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        "sys.stderr = None",
        "sys.stderr.close()",
        "import io; sys.stderr = io.BytesIO()",
        "import warnings; warnings.simplefilter('error')",
    ],
    ids=["none", "closed", "bytes", "warnings-as-errors"],
)
def test_odd_stderr_breaks_nothing(lab: Lab, first: str) -> None:
    outage(lab, 4)
    ended = run(program(first=first), lab)
    assert (ended.returncode, ended.stdout) == (0, "trained\n")
    assert lab.count(refused=True) > 1


def test_stderr_that_nobody_reads_breaks_nothing(lab: Lab) -> None:
    outage(lab, 4)
    with start(program(), lab) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout is not None
        assert process.stdout.read() == "trained\n"
    assert process.returncode == 0


COLUMNS, ROWS = 80, 24


def screen(command: list[str], lab: Lab) -> list[str]:
    """What a terminal shows in the end of a program that writes to it, by line."""
    pyte = pytest.importorskip("pyte")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
    process = start(
        command, lab, stdout=theirs, stderr=theirs, environment={"TERM": "xterm-256color"}
    )
    os.close(theirs)
    shown = shown_on(ours)
    assert not leaks(shown)
    display = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(display).feed(shown)
    assert process.wait(60) == 0, display.display
    text = [line.rstrip() for line in display.display]
    while text and not text[-1]:
        del text[-1]
    return text


TQDM = """
from tqdm import tqdm
bar = tqdm(range(3), ascii=True, desc="training", mininterval=0)
for step in bar:
    programs.forward_backward(client).result()
sys.exit()
"""
RICH = """
from rich.progress import Progress
with Progress() as progress:
    task = progress.add_task("training", total=3)
    for step in range(3):
        programs.forward_backward(client).result()
        progress.advance(task)
sys.exit()
"""


def on_screen(text: list[str]) -> tuple[int, int]:
    """On which lines the two of the shim's begin; each is whole, and begins a line."""
    starts = [n for n, line in enumerate(text) if line.startswith("tinker_routefix: ")]
    assert len(starts) == 2, text
    first, second = starts
    assert re.fullmatch(WAITS, unwrapped(text[first : first + 2])), text
    assert re.fullmatch(RECOVERED, unwrapped(text[second : second + 2][:1])) or re.fullmatch(
        RECOVERED, unwrapped(text[second : second + 2])
    ), text
    return first, second


def unwrapped(text: list[str]) -> str:
    return "".join(line.ljust(COLUMNS) for line in text).rstrip()


def test_lines_on_a_terminal_begin_at_its_edge_without_blank_lines(lab: Lab) -> None:
    outage(lab, 4)
    text = screen(program(then="print('connected')"), lab)
    first, second = on_screen(text)
    assert text[0] == "connected"
    assert text[-1] == "trained"
    assert (first, second, len(text)) == (1, 3, second + 2 + (len(text[second + 1]) > 7))


def test_lines_beside_an_unfinished_line_begin_a_new_one(lab: Lab) -> None:
    outage(lab, 4)
    text = screen(program(then="print('step 1: ', end='', flush=True)"), lab)
    assert on_screen(text)[0] == 1
    assert text[0] == "step 1:"


def test_lines_beside_a_tqdm_bar_leave_it_whole(lab: Lab) -> None:
    pytest.importorskip("tqdm")
    outage(lab, 4)
    text = screen(program(then=TQDM), lab)
    first, _ = on_screen(text)
    assert first == 1
    assert text[0].startswith("training:   0%|")
    assert text[-1].startswith("training: 100%|#")


def test_lines_beside_a_rich_bar_leave_it_whole(lab: Lab) -> None:
    outage(lab, 4)
    text = screen(program(then=RICH), lab)
    # It wraps by words.
    assert text[0].startswith("tinker_routefix: job lab/job-1: the gateway has had no route")
    said = " ".join(" ".join(text[:-1]).split())
    assert re.fullmatch(f"{WAITS} {RECOVERED}", said), text
    assert text[-1].startswith("training ")
    assert "100%" in text[-1]


# --- In detail ---------------------------------------------------------------------------


@contextmanager
def bare() -> Iterator[logging.Logger]:
    """The shim's logger as in a process that has not configured logging."""
    logger, root = _log.logger, logging.getLogger()
    kept = [
        (one, one.handlers[:], one.level, one.propagate, one.disabled) for one in (logger, root)
    ]
    logger.handlers[:] = [logging.NullHandler()]
    root.handlers[:] = []
    logger.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    try:
        yield logger
    finally:
        for one, handlers, level, propagate, disabled in kept:
            one.handlers[:], one.propagate, one.disabled = handlers, propagate, disabled
            one.setLevel(level)


WAITING = events.Waiting(
    job="a/b", state="running", control_plane_said="JOB_STATE_RUNNING", seconds=2, at_most=28
)


def test_logger_without_a_handler_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bare():
        events.publish(WAITING)
    assert capsys.readouterr().err == f"tinker_routefix: {WAITING}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_stderr_without_a_file_gets_the_line_alone(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    with bare():
        events.publish(WAITING)
    assert written.getvalue() == f"tinker_routefix: {WAITING}\n"


@pytest.mark.parametrize(
    "silence",
    [
        lambda logger: setattr(logger, "disabled", True),
        lambda logger: logger.setLevel(logging.ERROR),
        lambda logger: logger.addHandler(logging.StreamHandler(io.StringIO())),
        lambda _: logging.getLogger().addHandler(logging.StreamHandler(io.StringIO())),
    ],
    ids=["disabled", "level", "handler", "root-handler"],
)
def test_logger_that_was_configured_prints_nothing(
    capsys: pytest.CaptureFixture[str],
    silence: Callable[[logging.Logger], object],
) -> None:
    with bare() as logger:
        silence(logger)
        events.publish(WAITING)
    assert capsys.readouterr().err == ""


def test_logger_cut_off_from_a_configured_root_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the root is given does not come from here."""
    with bare() as logger:
        logging.getLogger().addHandler(logging.StreamHandler(io.StringIO()))
        logger.propagate = False
        events.publish(WAITING)
    assert capsys.readouterr().err == f"tinker_routefix: {WAITING}\n"


def test_what_an_exception_tells_is_printed_only_on_request(
    capsys: pytest.CaptureFixture[str], settings: Callable[..., None]
) -> None:
    given_up = events.GivenUp(
        job="a/b",
        request="optim_step",
        replays=4,
        state="unknown",
        control_plane_said="",
        age_seconds=0,
        seconds=30,
    )
    with bare():
        events.publish(given_up)
        assert capsys.readouterr().err == ""
        settings(log="warning")
        events.publish(given_up)
    assert capsys.readouterr().err == f"tinker_routefix: {given_up}\n"


def test_warning_with_no_line_of_the_programs_is_given_all_the_same() -> None:
    """As where a program that is not Python's imports the shim."""
    with warnings.catch_warnings(record=True, action="always") as warned:
        # A thread that begins in the shim: nothing of the program's leads there.
        _thread.start_new_thread(_log.warn, ("shim.cannot_help", "it cannot help"))
        until(lambda: bool(of_the_shim(warned)))
    assert [one.filename for one in warned if of_the_shim([one])] == [_log.__file__]
