"""The command line: real processes against a lab, and what they say and exit with."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tinker_routefix
from tests.common import CANARIES, CANARY, leaks
from tests.test_autoload import startup_file
from tinker_routefix import _cli, _settings, _verdict
from tinker_routefix._cli import check as checking
from tinker_routefix._cli.check import Seen, read_probe
from tinker_routefix._cli.output import Plain, Rich, Row, screen
from tinker_routefix._verdict import Cure
from tinker_routefix.lab import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_mock import MockerFixture

    from tinker_routefix.lab import Exchange, Lab

    Check = Callable[..., dict[str, Any]]

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "tinker_routefix"]
PROBE = {"capabilities"}


def start(command: list[str], environment: dict[str, str], **how: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, "FIREWORKS_API_KEY": CANARY, **environment},
        stdout=how.pop("stdout", subprocess.PIPE),
        stderr=how.pop("stderr", subprocess.PIPE),
        text=True,
        # A shell's background job, as CI may be, inherits that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **how,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, errors = process.communicate(timeout=60)
    assert not leaks(out + errors)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return finish(start([*COMMAND, *arguments], environment))


def in_a_program(program: str, *arguments: str, **environment: str) -> Any:
    """The command line after a few lines of Python."""
    code = f"import sys\n{program}\nfrom tinker_routefix._cli import main\nsys.exit(main())"
    return finish(start([sys.executable, "-c", code, *arguments], environment))


def on_a_terminal(command: list[str], **environment: str) -> tuple[int, str]:
    """Run a command whose output goes to a terminal; its exit code and all that it shows."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm", "COLUMNS": "100", **environment}
    process = start(command, variables, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end has been closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    return process.wait(60), shown.decode()


# --- The parser ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "status", "check", "run", "demo", "lab"])
def test_help_of_every_command_prints_its_usage(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinker-routefix"])
    with pytest.raises(SystemExit) as ended:
        _cli.main([*command.split(), "--help"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert said.out.lower().startswith(f"usage: tinker-routefix {command}".rstrip())


JOB = "/training/v1/rlorTrainerJobs/lab/job-1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["chekc"], "chekc"),
        (["status", "now"], "now"),
        (["status", "--jsn"], "--jsn"),
        (["check"], "URL"),
        (["check", f"https://gateway.example{JOB}", "--rate", "0"], "--rate"),
        (["check", f"https://gateway.example{JOB}", "--rate", "fast"], "--rate"),
        (["check", f"https://gateway.example{JOB}", "--seconds", "-1"], "--seconds"),
        (["check", "https://user:secret@gateway.example/v1"], "no trainer job's URL"),
        (["check", f"http://user:secret@gateway.example{JOB}"], "plain http"),
        (["check", f"https://gateway.example{JOB}", "--key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["check", f"https://gateway.example{JOB}", "--key-env", "BLANK"], "BLANK"),
        (["check", f"https://gateway.example{JOB}", "--key-env", "STRANGE"], "STRANGE"),
        (["check", f"https://gateway.example{JOB}", "--key-env", CANARY], "not the key"),
        (["check", f"https://gateway.example{JOB}", "--key-env", ""], "the name of a variable"),
        (["check", "https://[::1"], "no trainer job's URL"),
        (["run"], "which program"),
        (["run", "-m"], "which program"),
        (["run", "-x", "program.py"], "-x"),
        (["demo", "--steps", "3"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
        (["demo", "--seed", "x"], "--seed"),
        (["lab", "now"], "now"),
        (["lab", "--prot", "1"], "--prot"),
        (["lab", "--port", "65536"], "--port"),
        (["lab", "--replicas", "0"], "--replicas"),
        (["lab", "--stale", "-1"], "--stale"),
        (["lab", "--flap", "2"], "--flap"),
        (["lab", "--work", "long"], "--work"),
    ],
)
def test_wrong_arguments_exit_2_with_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLANK", "  ")
    monkeypatch.setenv("STRANGE", f"{CANARY}\n{CANARY}")
    monkeypatch.setenv("FIREWORKS_API_KEY", CANARY)
    try:
        code: Any = _cli.main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    last = said.err.splitlines()[-1]
    assert message in last
    assert not {"secret", CANARY} & set(re.split(r"[^\w-]", said.err))


def test_lab_without_its_extra_names_it() -> None:
    ended = in_a_program("sys.modules['click'] = None", "lab")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "The lab needs click: pip install 'tinker-routefix[lab]'\n"


def test_demo_gets_the_options_given(mocker: MockerFixture) -> None:
    run = mocker.patch("tinker_routefix.demo.run", return_value=1)
    assert _cli.main(["demo", "--steps", "4", "--seed", "7", "--json"]) == 1
    run.assert_called_once_with(steps=4, seed=7, as_json=True)


@pytest.mark.parametrize("module", ["google.protobuf", "google"])
def test_lab_without_a_namespace_module_names_its_extra(module: str) -> None:
    ended = in_a_program(f"sys.modules[{module!r}] = None", "lab")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "The lab needs google.protobuf: pip install 'tinker-routefix[lab]'\n"


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("ALL_PROXY", "ftp://user:secret@proxy.example", "ValueError"),
        ("HTTPS_PROXY", "http://user:secret@proxy.example:9x", "InvalidURL"),
        ("SSL_CERT_FILE", "/no/such/secret", "FileNotFoundError"),
    ],
)
def test_check_with_a_broken_proxy_or_certificate_variable_prints_one_line(
    variable: str, value: str, error: str
) -> None:
    ended = call("check", f"https://gateway.example{JOB}", **{variable: value})
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert f"({error})" in line
    assert variable in line
    assert "secret" not in line


def test_console_script_is_the_cli_main() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["tinker-routefix"]) is _cli.main


AS_SCRIPT = """
import sys
sys.argv[0] = "/somewhere/bin/tinker-routefix"
from tinker_routefix.__main__ import main
sys.exit(main())
"""
ENTRIES = {
    "the script": [sys.executable, "-c", AS_SCRIPT],
    "the module": COMMAND,
    "the module, in one word": [sys.executable, "-mtinker_routefix"],
    "the lab": [sys.executable, "-m", "tinker_routefix.lab"],
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("arguments", [[], ["status"], ["run", "-m", "tinker_routefix", "status"]])
@pytest.mark.parametrize("variable", ["TINKER_ROUTEFIX", "TINKER_ROUTEFIX_MAX_REPLAYS"])
def test_cli_with_a_bad_setting_prints_one_line(
    entry: str, arguments: list[str], variable: str
) -> None:
    ended = finish(start([*ENTRIES[entry], *arguments], {variable: "x"}))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"tinker-routefix: {variable}='x' is not accepted: expected ")


def test_other_program_with_a_bad_setting_gets_the_exception(tmp_path: Path) -> None:
    stub(tmp_path, {"package/__init__.py": "import tinker_routefix", "package/__main__.py": ""})
    stub(tmp_path, {"program.py": "import tinker_routefix"})
    variables = {"PYTHONPATH": str(ROOT), "TINKER_ROUTEFIX_MAX_REPLAYS": "x"}
    bare = ["-c", "import sys; del sys.argv[:]; import tinker_routefix"]
    for arguments in (["-m", "package", "tinker_routefix"], ["program.py", "-m"], bare):
        command = [sys.executable, *arguments, "status"]
        ended = finish(start(command, variables, cwd=tmp_path))
        assert ended.returncode == 1
        assert ended.stderr.startswith("Traceback")
        assert "SettingError: TINKER_ROUTEFIX_MAX_REPLAYS='x'" in ended.stderr


def test_interrupt_exits_130_with_one_line(
    mocker: MockerFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    mocker.patch("tinker_routefix._cli.status.show", side_effect=KeyboardInterrupt)
    assert _cli.main(["status"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_interrupt_during_sdk_import_exits_130_with_one_line(tmp_path: Path) -> None:
    slow = "import sys, time; sys.stderr.write('slow\\n'); sys.stderr.flush(); time.sleep(60)"
    path = stub(tmp_path, {"tinker/__init__.py": slow})
    with start([*COMMAND, "status"], {"PYTHONPATH": path}) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "slow\n"
        process.send_signal(signal.SIGINT)
        ended = finish(process)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_interrupt_before_the_first_probe_reports_unclear(lab: Lab) -> None:
    lab.control_plane.mode = "hang"
    with start([*COMMAND, "check", lab.base_url], {}) as process:
        while not lab.control_plane.questions:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert ended.stdout.splitlines()[-1] == "unclear: nothing was probed"


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_lab_on_a_signal_prints_what_it_has_seen(
    number: signal.Signals, code: int, line: str
) -> None:
    with start([*COMMAND, "lab"], {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("base URL: http://127.0.0.1:")
        process.send_signal(number)
        ended = finish(process)
    assert (ended.returncode, ended.stderr) == (code, f"{line}\n")
    assert "What the trainer did" in ended.stdout


def test_lab_on_a_taken_port_prints_one_line(lab: Lab) -> None:
    ended = call("lab", "--port", lab.origin.rpartition(":")[2])
    assert (ended.returncode, ended.stdout) == (1, "")
    (said,) = ended.stderr.splitlines()
    assert said.startswith("Error: cannot listen on port ")
    assert "in use" in said


def test_closed_stdout_causes_no_traceback() -> None:
    with start([*COMMAND, "status"], {"TINKER_ROUTEFIX": "0"}) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


# --- status -------------------------------------------------------------------------------


def test_status_of_a_healthy_installation_reports_active() -> None:
    ended = call("status", "--json", TINKER_ROUTEFIX_RETRY_BUDGET="60")
    assert (ended.returncode, ended.stderr) == (0, "")
    said = json.loads(ended.stdout)
    assert said.keys() == {
        *("version", "active", "reason", "seams", "jobs", "sdks", "settings", "autoload"),
        *("last_intervention", "python", "at"),
    }
    assert said["active"] is True
    assert said["last_intervention"] is None
    tinker = next(sdk for sdk in said["sdks"] if sdk["name"] == "tinker")
    assert tinker == {
        "name": "tinker",
        "distribution": "tinker",
        "release": metadata.version("tinker"),
        "state": "patched",
        "detail": None,
    }
    settings = {one["variable"]: (one["value"], one["source"]) for one in said["settings"]}
    assert settings["TINKER_ROUTEFIX"] == (True, "default")
    assert settings["TINKER_ROUTEFIX_STRICT"] == (True, "environment")
    assert settings["TINKER_ROUTEFIX_RETRY_BUDGET"] == (60.0, "environment")
    assert settings["TINKER_ROUTEFIX_MAX_REPLAYS"] == (4, "default")
    assert said["autoload"].keys() == {"requested", "file", "in_force"}


def test_status_as_text_shows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["status"]) == 0
    out, errors = capsys.readouterr()
    assert (out.isascii(), errors) == (True, "")
    lines = out.splitlines()
    assert lines[0].startswith("tinker_routefix ")
    assert " is active: all seams of tinker are wrapped" in lines[0]
    assert f"tinker {metadata.version('tinker')}" in out
    assert set(lines) >= {"SDKs", "Seams", "Settings", "Activation"}
    assert all(setting.variable in out for setting in tinker_routefix.status().settings)


def test_status_after_configure_names_it_as_the_source() -> None:
    tinker_routefix.configure(max_replays=9)
    sources = {one.name: one.source for one in tinker_routefix.status().settings}
    assert (sources["max_replays"], sources["strict"]) == ("configure()", "environment")
    assert sources["base_delay"] == "default"


def test_status_after_an_environment_change_shows_the_value_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINKER_ROUTEFIX_STRICT", "perhaps")
    (strict,) = (one for one in tinker_routefix.status().settings if one.name == "strict")
    assert (strict.value, strict.source) == (True, "configure()")


def test_status_switched_off_exits_3() -> None:
    ended = call("status", "--json", TINKER_ROUTEFIX="off")
    assert (ended.returncode, ended.stderr) == (3, "")
    said = json.loads(ended.stdout)
    assert (said["active"], said["reason"]) == (False, "switched off by TINKER_ROUTEFIX")
    assert {seam["state"] for seam in said["seams"]} == {"not loaded"}


def stub(where: Path, files: dict[str, str]) -> str:
    """A package for PYTHONPATH."""
    for name, text in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(textwrap.dedent(text))
    return os.pathsep.join([str(where), *filter(None, [os.environ.get("PYTHONPATH")])])


MISFIT = {
    "tinker/__init__.py": "print('noise of its own')",
    "tinker/_client.py": "",
    "tinker/lib/__init__.py": "",
    "tinker/lib/internal_client_holder.py": "",
    "tinker/lib/api_future_impl.py": "",
}


@pytest.mark.parametrize("strict", ["0", "1"])
def test_status_of_an_incompatible_build_exits_4(tmp_path: Path, strict: str) -> None:
    path = stub(tmp_path, MISFIT)
    ended = call("status", "--json", PYTHONPATH=path, TINKER_ROUTEFIX_STRICT=strict)
    assert ended.returncode == 4
    said = json.loads(ended.stdout)
    tinker = said["sdks"][0]
    assert tinker["state"] == "does not fit"
    assert "has no " in tinker["detail"]
    assert tinker["detail"] in said["reason"]


def test_status_of_an_unimportable_sdk_names_the_missing_module(tmp_path: Path) -> None:
    path = stub(tmp_path, {"tinker/__init__.py": "import a_torch_that_is_not_there"})
    ended = call("status", PYTHONPATH=path)
    assert ended.returncode == 4
    assert "cannot be imported: there is no module a_torch_that_is_not_there" in ended.stdout


def test_status_without_any_sdk_exits_4() -> None:
    hidden = "sys.modules['tinker'] = sys.modules['fireworks'] = None"
    ended = in_a_program(hidden, "status")
    assert ended.returncode == 4
    assert "there is no SDK here that it patches" in ended.stdout.splitlines()[0]


def test_status_tells_how_the_shim_was_loaded() -> None:
    folder = str(startup_file("_tinker_routefix_autoload.py").parent)
    # What Python does at its start where the file is in place.
    loads = f"sys.path.append({folder!r}); import _tinker_routefix_autoload as it; it.load()"
    ended = in_a_program(loads, "status", TINKER_ROUTEFIX_AUTOLOAD="1")
    assert ended.returncode == 0
    assert re.search(r"in this process +loaded at start, by the startup file\n", ended.stdout)
    ended = call("status", TINKER_ROUTEFIX_AUTOLOAD="0")
    assert re.search(r"in this process +imported, by this command\n", ended.stdout)


# --- check --------------------------------------------------------------------------------


@pytest.fixture
def check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Probe a lab quickly; the report, after what holds for each."""
    monkeypatch.setenv("FIREWORKS_API_KEY", CANARY)

    def probe(lab: Lab, *arguments: str) -> dict[str, Any]:
        user, password = (CANARIES[f"a {what} in a URL"] for what in ("user name", "password"))
        url = lab.base_url.replace("http://", f"http://{user}:{password}@")
        code = _cli.main(["check", url, "--json", "--rate", "20", *arguments])
        out, errors = capsys.readouterr()
        assert errors == ""
        assert not leaks(out)
        lines = out.splitlines() if "--watch" in arguments else [out]
        report: dict[str, Any] = json.loads(lines[-1])
        assert code == report["exit_code"]
        kinds = ("answered", "refused", "not_ready", "denied", "failed", "other")
        assert sum(report[kind] for kind in kinds) == report["probes"] > 0
        changes = [json.loads(line)["change"] for line in lines[:-1]]
        assert changes in ([], report["changes"])
        return report

    return probe


def probes(lab: Lab) -> list[Exchange]:
    return [one for one in lab.exchanges if one.kind == "capabilities"]


def test_check_of_a_healthy_route_reports_healthy(
    check: Check, make_lab: Callable[..., Lab]
) -> None:
    lab = make_lab(replicas=3)
    report = check(lab)
    assert (report["verdict"], report["exit_code"]) == ("healthy", 0)
    assert (report["probes"], report["answered"], report["questions"]) == (20, 20, 1)
    assert report["control_plane"] == "JOB_STATE_RUNNING"
    assert report["cure"] is None
    # Fresh connections, and the key in both of the places where the SDKs have it.
    assert len({one.connection for one in probes(lab)}) == 20
    for one in lab.exchanges:
        assert one.headers["x-api-key"] == CANARY
        assert one.headers["authorization"] == f"Bearer {CANARY}"


def test_check_of_a_race_that_ends_reports_racing(check: Check, lab: Lab) -> None:
    lab.fault(Fault(kinds=PROBE, count=8))
    report = check(lab)
    assert (report["verdict"], report["exit_code"]) == ("racing", 3)
    assert (report["raced"], report["answered"]) == (8, 20)
    assert 0 < report["race_seconds"] < report["seconds"]
    assert "the last 20 were answered" in report["said"]
    assert report["cure"] is None


def test_check_of_one_stale_replica_reports_racing(
    check: Check, make_lab: Callable[..., Lab]
) -> None:
    lab = make_lab(replicas=3)
    lab.stale(replica=1)
    report = check(lab, "--seconds", "2")
    assert report["verdict"] == "racing"
    assert 0 < report["raced"] < report["probes"] - report["raced"]
    assert report["route"] == "mixed: answers, the gateway's 404"


def test_check_of_a_deleted_job_reports_gone(check: Check, lab: Lab) -> None:
    lab.end_job()
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["probes"]) == ("gone", 4, 1)
    assert "JOB_STATE_DELETED" in report["said"]


@pytest.mark.parametrize("who", ["gateway", "control plane", "control plane, not visible"])
def test_check_with_a_wrong_key_reports_wrong_key(check: Check, lab: Lab, who: str) -> None:
    if who == "gateway":
        lab.fault(Fault(kinds=PROBE, answer=Answer(401, {"error": "unauthorized"})))
    else:
        lab.control_plane.mode = "forbidden" if "visible" in who else "unauthorized"
        lab.stale()
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["probes"]) == ("wrong key", 5, 1)
    assert who.partition(",")[0] in report["said"]


def test_check_of_a_stopped_gateway_reports_unreachable(check: Check, lab: Lab) -> None:
    lab.stop()
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["failed"]) == ("unreachable", 6, 3)
    assert "no connection" in report["said"]


@pytest.mark.parametrize(
    ("arrange", "reason"),
    [
        (lambda lab: setattr(lab.control_plane, "state", "JOB_STATE_CREATING"), "not started"),
        (lambda lab: setattr(lab.control_plane, "mode", "hang"), "cannot tell"),
        (lambda lab: setattr(lab.control_plane, "mode", "rubbish"), "cannot tell"),
    ],
)
def test_check_of_a_job_not_known_to_run_reports_unclear(
    check: Check,
    lab: Lab,
    settings: Callable[..., None],
    arrange: Callable[[Lab], None],
    reason: str,
) -> None:
    arrange(lab)
    lab.stale()
    settings(control_plane_timeout=0.3)
    report = check(lab, "--seconds", "1")
    assert (report["verdict"], report["exit_code"]) == ("unclear", 7)
    assert reason in report["said"]


def test_check_does_not_follow_a_redirect(
    check: Check, lab: Lab, make_lab: Callable[..., Lab]
) -> None:
    elsewhere = make_lab()
    away = Answer(302, headers={"Location": f"{elsewhere.base_url}/api/v1/healthz"})
    lab.fault(Fault(kinds=PROBE, answer=away))
    report = check(lab, "--seconds", "1")
    assert (report["verdict"], report["other"]) == ("unclear", report["probes"])
    assert elsewhere.exchanges == []


def test_check_counts_a_pod_404_as_an_answer(check: Check, make_lab: Callable[..., Lab]) -> None:
    assert check(make_lab(without={"capabilities"}))["verdict"] == "healthy"
    # Also one that comes in pieces.
    lab = make_lab()
    text = '{"detail": "%s"}' % ("x" * (_verdict.MAX_BODY - 100))
    lab.fault(Fault(kinds=PROBE, answer=Answer(404, text)))
    assert check(lab)["verdict"] == "healthy"


@pytest.mark.parametrize(
    ("answer", "cure", "shown"),
    [
        (Answer(503, {"queue_state": "route_not_ready"}), "503 route_not_ready", "503 route"),
        (Answer(404, {"error": {"code": "ROUTE_STALE"}}), "distinct code", "ROUTE_STALE"),
    ],
)
def test_check_recognises_a_fixed_gateway(
    check: Check, lab: Lab, answer: Answer, cure: str, shown: str
) -> None:
    lab.fault(Fault(kinds=PROBE, count=5, answer=answer))
    report = check(lab)
    assert (report["verdict"], report["raced"], report["cure"]) == ("racing", 5, cure)
    assert shown in report["cure_says"]


def test_check_of_a_gone_job_recognises_a_distinct_code(check: Check, lab: Lab) -> None:
    # The stale route keeps the answer that it has today; the job that is over has got one.
    lab.control_plane.state = "JOB_STATE_DELETED"
    lab.fault(Fault(kinds=PROBE, answer=Answer(410, {"error": {"code": "JOB_GONE"}})))
    report = check(lab)
    assert (report["verdict"], report["cure"]) == ("gone", "distinct code")
    assert "410 with the code JOB_GONE" in report["cure_says"]


@pytest.mark.parametrize("cut_off", ["long", "slow", "dropped"])
def test_check_of_a_gateway_without_a_proper_answer_is_not_healthy(
    check: Check, lab: Lab, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    if cut_off == "long":
        # Longer than is looked at: nobody's 404.
        text = '{"detail": "%s"}' % ("x" * 2 * _verdict.MAX_BODY)
        lab.fault(Fault(kinds=PROBE, answer=Answer(404, text)))
        report = check(lab, "--seconds", "1")
        assert (report["verdict"], report["raced"]) == ("racing", report["probes"])
        return
    monkeypatch.setattr(checking, "PROBE_SECONDS", 0.3)
    lab.fault(Fault(kinds=PROBE, hang=cut_off == "slow", drop=cut_off == "dropped"))
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["failed"]) == ("unreachable", 6, 3)
    said = {"slow": "no answer within 0.3 s", "dropped": "no answer (RemoteProtocolError)"}
    assert report["said"] == said[cut_off]


@pytest.mark.parametrize("cured", [True, False])
def test_check_watching_a_new_job_reports_each_change(check: Check, lab: Lab, cured: bool) -> None:
    lab.control_plane.state = "JOB_STATE_CREATING"
    starting = lab.fault(Fault(kinds=PROBE, count=10 if cured else 30))

    def goes_on(exchange: Exchange) -> bool:
        if starting.hits >= 10 and lab.control_plane.state != "JOB_STATE_RUNNING":
            lab.control_plane.state = "JOB_STATE_RUNNING"
            if cured:  # the gateway holds a request until it has found the route
                lab.fault(Fault(kinds=PROBE, answer=None, delay=0.5, count=2))
        return False

    lab.fault(Fault(kinds={"control_plane"}, at="control_plane", when=goes_on))
    report = check(lab, "--watch", "--seconds", "8")
    assert [change["control_plane"] for change in report["changes"]][:1] == ["JOB_STATE_CREATING"]
    assert report["changes"][-1]["control_plane"] == "JOB_STATE_RUNNING"
    assert report["changes"][-1]["route"] == "answers"
    assert report["answered"] >= 20
    if cured:
        assert (report["verdict"], report["raced"]) == ("healthy", 0)
        assert report["cure"] == "lookup retried"
        assert report["slowest"] > 0.4
    else:
        assert (report["verdict"], report["cure"]) == ("racing", None)
        assert 0 < report["raced"] < report["refused"] == 30


@pytest.mark.parametrize("as_json", [True, False])
def test_check_watch_interrupted_reports_what_was_seen(lab: Lab, as_json: bool) -> None:
    flags = ["--watch", *(["--json"] if as_json else [])]
    with start([*COMMAND, "check", lab.base_url, *flags], {}) as process:
        assert process.stdout is not None
        seen = ""
        while "RUNNING" not in seen:
            assert process.poll() is None
            seen = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    if as_json:
        report = json.loads(ended.stdout.splitlines()[-1])
        assert (report["interrupted"], report["exit_code"]) == (True, 130)
        assert report["verdict"] == "healthy"
    else:
        assert ended.stdout.splitlines()[-1].startswith("healthy: ")


def test_read_probe_classifies_each_answer() -> None:
    assert read_probe(200, b"{}").seen is Seen.ANSWERED
    assert read_probe(404, b'{"detail": "Not Found"}').seen is Seen.ANSWERED
    assert read_probe(404, b"<html>").seen is Seen.REFUSED
    assert read_probe(404, b'{"error": {"code": "NOT_FOUND"}}').cure is None
    assert read_probe(404, b'{"error": {"code": 5}}').cure is None
    gone = read_probe(410, b'{"error": {"code": "JOB_GONE"}}')
    assert (gone.seen, gone.cure) == (Seen.REFUSED, Cure.DISTINCT_CODE)
    assert read_probe(404, f'{{"error": {{"code": "tell {CANARY}"}}}}'.encode()).said.endswith(
        "(strange)"
    )
    assert read_probe(404, b'{"error": {"code": "route_stale"}}').said.endswith(" route_stale")
    for body in (b'{"error": {"queue_state": "route_not_ready"}}', b'{"queue_state": 1, "x": 2}'):
        assert (read_probe(503, body).seen is Seen.NOT_READY) is (b"route" in body)
    assert read_probe(503, b"[").seen is Seen.OTHER
    assert read_probe(403, b"").seen is Seen.DENIED


# --- Terminals ----------------------------------------------------------------------------


def test_check_on_a_terminal_uses_rich(lab: Lab) -> None:
    lab.fault(Fault(kinds=PROBE, count=5))
    code, shown = on_a_terminal([*COMMAND, "check", lab.base_url, "--rate", "20"])
    assert code == 3
    assert "\x1b[" in shown
    assert re.search(r"\d+ probes in \d+ s: \d+ answered, \d+ refused; JOB_STATE_RUNNING", shown)
    assert "5 of 25 probes were refused while the job was RUNNING" in shown
    assert CANARY not in shown


def test_check_on_a_terminal_without_rich_prints_plain_text(lab: Lab) -> None:
    hidden = "import sys; sys.modules['rich'] = None; from tinker_routefix._cli import main"
    program = [sys.executable, "-c", f"{hidden}; sys.exit(main())"]
    code, shown = on_a_terminal([*program, "check", lab.base_url, "--rate", "20"])
    assert code == 0
    assert "\x1b[" not in shown
    assert re.search(r"\r\d+ probes in \d+ s: \d+ answered, 0 refused; JOB_STATE_RUNNING", shown)
    assert "healthy: 20 of 20 probes were answered" in shown


@pytest.mark.parametrize("on_a_tty", [True, False])
def test_plain_and_rich_screens_show_the_same_text(
    capsys: pytest.CaptureFixture[str], mocker: MockerFixture, on_a_tty: bool
) -> None:
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    shown = []
    for to in (Plain(), Rich(console)):
        to.line("a line", "good")
        to.progress("1 of 2 [done]")
        to.progress("2 of 2")
        to.close()
        to.close()
        to.table("A title", [Row(("name", "[x]")), Row(("a longer name", "y"), "bad")])
        shown.append(capsys.readouterr().out or console.export_text())
    said = [
        [words for line in one.splitlines() if (words := re.findall(r"[\w\[\]]+", line))]
        for one in shown
    ]
    lines = ["a line", "A title", "name [x]", "a longer name y"]
    assert said == [[line.split() for line in lines]] * 2
    mocker.patch("sys.stdout.isatty", return_value=on_a_tty)
    assert isinstance(screen(as_json=False), Rich if on_a_tty else Plain)


# --- run ----------------------------------------------------------------------------------

LOOKS_AROUND = """
import atexit, os, sys
main = sys.modules["__main__"]
print(__name__, __file__, __package__, __spec__ and __spec__.name, sys.argv, sys.path[0])
print(main.__dict__ is globals(), sorted(set(globals()) - {"atexit", "os", "sys", "main"}))
atexit.register(lambda: print("at exit", sys.modules["__main__"] is main))
"""
LATER = """
import threading, time, pickle
class Thing: pass
def late():
    time.sleep(0.3)
    print(type(pickle.loads(pickle.dumps(Thing()))).__name__)
threading.Thread(target=late).start()
"""
SPAWNS = """
import multiprocessing
def work(): print("a child of", __name__)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start(); child.join()
"""
OWN_HOOK = """
import sys, traceback
def hook(kind, error, tb): print("my hook", kind.__name__, len(traceback.extract_tb(tb)))
sys.excepthook = hook
raise ValueError("for the hook")
"""
CHAINED = """
def inner(): raise KeyError("first")
try: inner()
except KeyError as error: raise ValueError("second") from error
"""
PROGRAMS = {
    "looks around": LOOKS_AROUND,
    "works on after its end": LATER,
    "spawns": SPAWNS,
    "exits": "import sys; sys.exit(7)",
    "exits with a message": "import sys; sys.exit('so long')",
    "fails": "def f(): raise ValueError('no')\nf()",
    "fails twice": CHAINED,
    "has a hook": OWN_HOOK,
    "is interrupted": "raise KeyboardInterrupt",
    "cannot be compiled": "print('never'\nnonsense here",
    "drops out": "import os; os._exit(9)",
}


def both(
    arguments: list[str], cwd: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """A program as Python runs it, and as `run` does."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **environment,
    }
    started = [
        start([*command, *arguments], environment, cwd=cwd)
        for command in ([sys.executable], [*COMMAND, "run"])
    ]
    plain, ran = map(finish, started)
    return plain, ran


def same(plain: Any, ran: Any) -> None:
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_run_of_a_program_behaves_like_python(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "program.py").write_text(PROGRAMS[name], encoding="utf-8")
    plain, ran = both(["here/program.py", "-m", "--", "--help", "-x"], tmp_path)
    same(plain, ran)
    assert plain.stdout or plain.stderr or plain.returncode  # there was something to compare


@pytest.mark.parametrize("arguments", [["-m", "package", "-h"], ["-m", "package.module"]])
@pytest.mark.parametrize("ends", ["", "1 / 0"])
def test_run_of_a_module_behaves_like_python(
    tmp_path: Path, arguments: list[str], ends: str
) -> None:
    for name in ("__init__", "__main__", "module"):
        text = "" if name == "__init__" else f"{LOOKS_AROUND}\n{ends}"
        stub(tmp_path / "package", {f"{name}.py": text})
    same(*both(arguments, tmp_path))


def test_run_of_a_directory_or_zip_file_behaves_like_python(tmp_path: Path) -> None:
    stub(tmp_path / "folder", {"__main__.py": LOOKS_AROUND})
    with zipfile.ZipFile(tmp_path / "file.zip", "w") as file:
        file.writestr("__main__.py", LOOKS_AROUND)
    same(*both(["folder", "-v"], tmp_path))
    same(*both(["file.zip", "-v"], tmp_path))


@pytest.mark.parametrize("arguments", [["-m", "no_such_module"], ["no_such.py"], ["."]])
def test_run_of_a_missing_program_fails_like_python(tmp_path: Path, arguments: list[str]) -> None:
    plain, ran = both(arguments, tmp_path)
    same(plain, ran)
    assert ran.returncode in (1, 2)
    assert len(ran.stderr.splitlines()) == 1


def test_run_with_safe_path_leaves_sys_path_like_python(tmp_path: Path) -> None:
    stub(tmp_path, {"program.py": LOOKS_AROUND, "folder/__main__.py": LOOKS_AROUND})
    for program in ("program.py", "folder"):
        same(*both([program], tmp_path, PYTHONSAFEPATH="1"))


STATE = """
import os, sys
shim = sys.modules["tinker_routefix._seams"] if "tinker_routefix._seams" in sys.modules else None
print(bool(shim and shim.is_active()), os.environ.get("TINKER_ROUTEFIX_AUTOLOAD"))
"""


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "True 1"),
        ({"TINKER_ROUTEFIX_AUTOLOAD": "0"}, "True 0"),
        ({"TINKER_ROUTEFIX": "0"}, "False None"),
    ],
)
def test_run_activates_the_shim_unless_switched_off(
    tmp_path: Path, environment: dict[str, str], state: str
) -> None:
    (tmp_path / "program.py").write_text(STATE, encoding="utf-8")
    ended = call("run", str(tmp_path / "program.py"), **environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{state}\n", "")


TRAINS = """
import sys, tinker
service = tinker.ServiceClient(base_url=sys.argv[1])
client = service.create_lora_training_client(base_model="lab/base", rank=8)
getattr(client, "result", lambda _: client)(60)
print("trained")
"""


def test_run_in_a_race_lets_the_program_survive(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    (tmp_path / "trains.py").write_text(TRAINS, encoding="utf-8")
    outcomes = []
    for command in ([sys.executable], [*COMMAND, "run"]):
        lab = make_lab()
        lab.fault(Fault(kinds={"create_session"}, count=2))
        program = [*command, str(tmp_path / "trains.py"), lab.base_url]
        outcomes.append(finish(start(program, {"TINKER_TELEMETRY": "0"})))
    plain, ran = outcomes
    assert plain.returncode == 1
    assert "404" in plain.stderr
    assert (ran.returncode, ran.stdout) == (0, "trained\n")


def test_settings_accept_the_autoload_variable_without_a_warning() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _settings.Settings.from_environment({"TINKER_ROUTEFIX_AUTOLOAD": "1"})
