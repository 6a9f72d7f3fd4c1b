"""The command line: real processes against a lab, and what they say and exit with."""

from __future__ import annotations

import http.server
import io
import json
import os
import pkgutil
import pty
import re
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest
import trustme

import tinker_routefix
from tests.common import CANARIES, CANARY, leaks, shown_on
from tests.test_autoload import startup_file
from tinker_routefix import _cli, _settings, _verdict
from tinker_routefix._cli import diagnosis
from tinker_routefix._cli import probes as checking
from tinker_routefix._cli import run as run_command
from tinker_routefix._cli.output import Plain, Rich, Row, screen
from tinker_routefix._cli.probes import Seen, read_probe
from tinker_routefix.lab import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_mock import MockerFixture

    from tinker_routefix.lab import Exchange, Lab

    Check = Callable[..., dict[str, Any]]

ROOT = Path(__file__).parent.parent
TRANSPORT = "httpx"
"""What the labs tell tinker to use. With pyqwest a process, also one of plain tinker, now and then
aborts when it ends."""

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


def on_a_terminal(command: list[str], *, columns: int = 100, **environment: str) -> tuple[int, str]:
    """Run a command whose output goes to a terminal; its exit code and all that it shows."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm", "COLUMNS": str(columns), **environment}
    process = start(command, variables, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = shown_on(ours)
    return process.wait(60), shown.decode()


# --- The parser ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "status", "check", "run", "demo", "lab"])
def test_help_of_every_command_prints_its_usage(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinker-routefix"])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        code: Any = _cli.main([*command.split(), "--help"])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert said.out.startswith(f"usage: tinker-routefix {command}".rstrip())
    assert max(map(len, said.out.splitlines())) <= 80
    assert "options:\n  -h, --help" in said.out


def test_the_version_is_said() -> None:
    ended = call("--version")
    assert (ended.returncode, ended.stdout) == (
        0,
        f"tinker-routefix {metadata.version('tinker-routefix')}\n",
    )


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
        (["run", "-m"], "-m needs a value"),
        (["run", "-x", "program.py"], "-x is no option of run"),
        (["run", "-uS", "program.py"], "-uS is no option of run"),
        (["run", "--isolated", "program.py"], "--isolated is no option of run"),
        (["run", "-c"], "-c needs a value"),
        (["run", "-u", "-X"], "-X needs a value"),
        (["run", "--check-hash-based-pycs"], "needs a value"),
        (["run", "--"], "which program"),
        (["demo", "--steps", "3"], "--steps: 3 is not between 4 and 100"),
        (["demo", "--steps", "many"], "--steps: invalid whole number value: 'many'"),
        (["demo", "--seed", "x"], "--seed"),
        (["lab", "now"], "now"),
        (["lab", "--prot", "1"], "--prot"),
        (["lab", "--port", "65536"], "--port: 65536 is not between 0 and 65535"),
        (["lab", "--replicas", "0"], "--replicas: 0 is not 1 or more"),
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


def test_the_lab_needs_its_extra() -> None:
    ended = in_a_program("sys.modules['rich'] = None", "lab")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "The lab needs rich: in a checkout, pip install '.[lab]'\n"


def test_the_demo_needs_its_extras() -> None:
    ended = in_a_program("sys.modules['aiohttp'] = None", "demo")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "The demo needs aiohttp: in a checkout, pip install '.[lab,tinker]'\n"


def test_demo_gets_the_options_given(mocker: MockerFixture) -> None:
    run = mocker.patch("tinker_routefix.demo.run", return_value=1)
    assert _cli.main(["demo", "--steps", "4", "--seed", "7", "--json", "--tls"]) == 1
    run.assert_called_once_with(steps=4, seed=7, as_json=True, tls=True)


@pytest.mark.parametrize("module", ["google.protobuf", "google"])
def test_lab_without_a_namespace_module_names_its_extra(module: str) -> None:
    ended = in_a_program(f"sys.modules[{module!r}] = None", "lab")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "The lab needs google.protobuf: in a checkout, pip install '.[lab]'\n"


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
    assert ended.stdout.splitlines()[-2] == "unclear: nothing was probed"


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
    assert said.startswith("tinker-routefix lab: cannot listen on port ")
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
        "left_alone",
        *("last_intervention", "process", "python", "at"),
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


def test_status_for_a_person_says_what_it_says_as_json() -> None:
    ended = call("status", TINKER_ROUTEFIX_AUTOLOAD="")
    assert (ended.returncode, ended.stderr, ended.stdout.isascii()) == (0, "", True)
    lines = ended.stdout.splitlines()
    release = f"tinker {metadata.version('tinker')}"
    assert lines[0] == (
        f"tinker_routefix {tinker_routefix.__version__} can patch {release} in this environment"
    )
    assert {"SDKs in this environment", "Settings", "How a program gets the shim"} <= set(lines)
    assert re.search(rf"  tinker +{re.escape(release)} +can be patched\n", ended.stdout)
    assert all(setting.variable in ended.stdout for setting in tinker_routefix.status().settings)


@pytest.mark.parametrize("environment", [{}, {"TINKER_ROUTEFIX": "0"}])
def test_status_does_not_speak_for_a_training_run(environment: dict[str, str]) -> None:
    ended = call("status", **environment)
    assert "says nothing about a training run that is under way" in ended.stdout.splitlines()[1]
    # "active" and "patched" are for what was looked at: this command, by its name.
    assert not re.search(r"\bactive\b", ended.stdout)
    assert json.loads(call("status", "--json", **environment).stdout)["process"] == (
        "tinker-routefix status"
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TINKER_ROUTEFIX_AUTOLOAD": ""}, "not set; with 1, programs started from here load it"),
        ({"TINKER_ROUTEFIX_AUTOLOAD": "1"}, "set: programs started from here load it"),
        ({"TINKER_ROUTEFIX_AUTOLOAD": "0"}, "off"),
        ({"TINKER_ROUTEFIX_AUTOLOAD": "perhaps"}, "refused"),
    ],
)
def test_status_says_what_the_variable_does(environment: dict[str, str], said: str) -> None:
    hidden = "from tinker_routefix import _status; _status._startup_file = lambda: 'a.pth'"
    ended = in_a_program(hidden, "status", **environment)
    assert re.search(rf"TINKER_ROUTEFIX_AUTOLOAD +{re.escape(said)}\n", ended.stdout)
    hidden = "from tinker_routefix import _status; _status._startup_file = lambda: None"
    ended = in_a_program(hidden, "status", **environment)
    assert "does nothing: its startup file is not in place" in ended.stdout


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_cuts_no_name(rich: bool, columns: int) -> None:
    hidden = "" if rich else "sys.modules['rich'] = None; "
    program = f"import sys; {hidden}from tinker_routefix._cli import main; sys.exit(main())"
    code, shown = on_a_terminal(
        [sys.executable, "-c", program, "status"], columns=columns, TINKER_ROUTEFIX_AUTOLOAD=""
    )
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for name in (
        *(setting.variable for setting in tinker_routefix.status().settings),
        *(seam.name for seam in tinker_routefix.status().seams if "fireworks" not in seam.name),
        "fireworks-ai's copy of tinker",
        "a training run that is" if columns == 80 else "training run",
    ):
        assert name in text
    too_long = [line for line in text.splitlines() if len(line) > columns]
    # Only what has to be copied in one piece.
    assert all(len(line.split()) == 1 for line in too_long), too_long


def test_colours_are_shown_on_ci() -> None:
    assert "\x1b[32mtinker_routefix" in call("status", FORCE_COLOR="1").stdout
    assert "\x1b[" not in call("status", FORCE_COLOR="").stdout


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


INCOMPATIBLE = {
    "tinker/__init__.py": "print('noise of its own')",
    "tinker/_client.py": "",
    "tinker/lib/__init__.py": "",
    "tinker/lib/internal_client_holder.py": "",
    "tinker/lib/api_future_impl.py": "",
}


@pytest.mark.parametrize("strict", ["0", "1"])
def test_status_of_an_incompatible_build_exits_4(tmp_path: Path, strict: str) -> None:
    path = stub(tmp_path, INCOMPATIBLE)
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
    assert ended.stdout.splitlines()[0].endswith("patches NOTHING here: no supported SDK found")


def test_status_tells_how_the_shim_was_loaded() -> None:
    folder = str(startup_file("_tinker_routefix_autoload.py").parent)
    # What Python does at its start where the file is in place.
    loads = f"sys.path.append({folder!r}); import _tinker_routefix_autoload as it; it.load()"
    ended = in_a_program(loads, "status", TINKER_ROUTEFIX_AUTOLOAD="1")
    assert ended.returncode == 0
    assert re.search(r"in this command +by the startup file\n", ended.stdout)
    ended = call("status", TINKER_ROUTEFIX_AUTOLOAD="0")
    assert re.search(r"in this command +imported\n", ended.stdout)


# --- check --------------------------------------------------------------------------------

SCHEMA = json.loads((ROOT / "docs" / "check.schema.json").read_text(encoding="utf-8"))


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
        for line in lines:
            jsonschema.validate(json.loads(line), SCHEMA)
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


def test_check_over_tls_trusts_the_authority_that_the_environment_names(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(tls=True)
    environment = {"FIREWORKS_API_KEY": CANARY, "SSL_CERT_FILE": str(lab.ca_file)}
    ended = call("check", lab.base_url, "--json", "--rate", "20", **environment)
    report = json.loads(ended.stdout)
    assert (ended.returncode, report["answered"], report["probes"]) == (0, 20, 20)
    assert report["control_plane"] == "JOB_STATE_RUNNING"


def test_check_of_a_healthy_route_reports_healthy(
    check: Check, make_lab: Callable[..., Lab]
) -> None:
    lab = make_lab(replicas=3)
    report = check(lab)
    assert (report["verdict"], report["exit_code"]) == ("healthy", 0)
    assert (report["probes"], report["answered"]) == (20, 20)
    # It asks every five seconds.
    assert 1 <= report["questions"] <= 1 + report["seconds"] / 5
    assert report["control_plane"] == "JOB_STATE_RUNNING"
    assert report["gateway_fix"] is None
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
    assert "the last 20 were answered" in report["message"]
    assert report["gateway_fix"] is None


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
    assert "JOB_STATE_DELETED" in report["message"]


@pytest.mark.parametrize("who", ["gateway", "control plane", "control plane, not visible"])
def test_check_with_a_wrong_key_reports_wrong_key(check: Check, lab: Lab, who: str) -> None:
    if who == "gateway":
        lab.fault(Fault(kinds=PROBE, answer=Answer(401, {"error": "unauthorized"})))
    else:
        lab.control_plane.mode = "forbidden" if "visible" in who else "unauthorized"
        lab.stale()
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["probes"]) == ("wrong key", 5, 1)
    assert who.partition(",")[0] in report["message"]


def test_check_of_a_stopped_gateway_reports_unreachable(check: Check, lab: Lab) -> None:
    lab.stop()
    report = check(lab)
    assert (report["verdict"], report["exit_code"], report["failed"]) == ("unreachable", 6, 3)
    assert "refuses connections" in report["message"]
    assert (report["slowest"], report["fault"]) == (None, "network")


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize(
    ("arrange", "reason", "advice"),
    [
        (
            lambda lab: setattr(lab.control_plane, "state", "JOB_STATE_CREATING"),
            "the job has not started: JOB_STATE_CREATING",
            "Wait until it is RUNNING",
        ),
        (
            lambda lab: setattr(lab.control_plane, "mode", "hang"),
            "no usable response of the control plane: no answer within 0.3 s",
            "Check again in a minute",
        ),
        (
            lambda lab: setattr(lab.control_plane, "mode", "error"),
            "no usable response of the control plane: HTTP 500",
            "Check again in a minute",
        ),
        (
            lambda lab: setattr(lab.control_plane, "mode", "rubbish"),
            "no usable response of the control plane: an answer without a job state",
            "Set TINKER_ROUTEFIX_CONTROL_PLANE_URL: there seems to be no control plane at http",
        ),
    ],
)
def test_a_route_is_not_called_healthy_where_the_job_may_not_run(
    check: Check,
    lab: Lab,
    settings: Callable[..., None],
    arrange: Callable[[Lab], None],
    reason: str,
    advice: str,
    stale: bool,
) -> None:
    arrange(lab)
    if stale:
        lab.stale()
    settings(control_plane_timeout=0.3)
    report = check(lab, "--seconds", "1.5")
    assert (report["verdict"], report["exit_code"]) == ("unclear", 7)
    assert reason in report["message"]
    assert report["advice"].startswith(advice)
    assert ("although its route answers" in report["message"]) is (
        not stale and "has not started" in reason
    )
    assert report["gateway_fix"] is None


def test_check_of_an_ended_job_whose_route_answers_says_so(check: Check, lab: Lab) -> None:
    lab.control_plane.state = "JOB_STATE_FAILED"
    report = check(lab)
    assert (report["verdict"], report["exit_code"]) == ("gone", 4)
    assert report["message"].endswith("JOB_STATE_FAILED, although the route still answers")


@pytest.mark.parametrize("mode", ["unauthorized", "forbidden"])
def test_check_with_a_key_that_only_the_gateway_accepts_says_so(
    check: Check, lab: Lab, mode: str
) -> None:
    lab.control_plane.mode = mode  # type: ignore[assignment]
    report = check(lab)
    assert (report["verdict"], report["exit_code"]) == ("wrong key", 5)
    assert "although the gateway does" in report["message"]
    assert "FIREWORKS_API_KEY" in report["advice"]
    assert "TINKER_ROUTEFIX_CONTROL_PLANE_URL" in report["advice"]


def test_check_does_not_follow_a_redirect(
    check: Check, lab: Lab, make_lab: Callable[..., Lab]
) -> None:
    elsewhere = make_lab()
    away = Answer(302, headers={"Location": f"{elsewhere.base_url}/api/v1/healthz"})
    lab.fault(Fault(kinds=PROBE, answer=away))
    report = check(lab, "--seconds", "1")
    assert (report["verdict"], report["other"]) == ("unclear", report["probes"])
    assert elsewhere.exchanges == []
    assert report["message"].startswith(f"the answer was HTTP 302, {report['probes']} times in ")
    assert "redirect" in report["advice"]


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (503, "tinker repeats such a request by itself"),
        (429, "a lower --rate"),
        (407, "wants a login"),
        (400, "the URL is that of a trainer job"),
    ],
)
def test_an_answer_that_is_not_the_pods_is_called_an_answer(
    check: Check, lab: Lab, status: int, advice: str
) -> None:
    lab.fault(Fault(kinds=PROBE, answer=Answer(status, "no")))
    report = check(lab, "--seconds", "0.5")
    assert (report["verdict"], report["exit_code"]) == ("unclear", 7)
    assert report["message"].startswith(
        f"the answer was HTTP {status}, {report['probes']} times in "
    )
    assert advice in report["advice"]
    assert report["slowest"] > 0


def test_a_route_that_answers_now_and_then_is_unclear(check: Check, lab: Lab) -> None:
    failing = Fault(kinds=PROBE, answer=Answer(502, "no"), chance=0.5)
    lab.fault(failing)
    report = check(lab, "--seconds", "1.2")
    assert (report["verdict"], report["exit_code"]) == ("unclear", 7)
    assert report["message"].endswith("the last ones: mixed: HTTP 502, answers")
    assert f"{report['answered']} of {report['probes']} probes were answered" in report["message"]


@pytest.mark.parametrize(
    ("environment", "said", "advice"),
    [
        (
            {"HTTP_PROXY": "http://user:secret@127.0.0.1:9"},
            "the proxy 127.0.0.1:9 (HTTP_PROXY) cannot be reached",
            "Correct the proxy in HTTP_PROXY",
        ),
        ({"all_proxy": "http://127.0.0.1:9"}, "the proxy 127.0.0.1:9 (all_proxy)", "NO_PROXY"),
    ],
)
def test_check_names_the_proxy_at_fault(
    lab: Lab, environment: dict[str, str], said: str, advice: str
) -> None:
    ended = call("check", lab.base_url, "--rate", "20", **environment)
    assert (ended.returncode, ended.stderr) == (6, "")
    *_, verdict, advised = ended.stdout.splitlines()
    assert verdict.startswith(f"unreachable: {said}")
    assert advice in advised
    assert "secret" not in ended.stdout


def test_check_names_a_proxy_that_works(lab: Lab) -> None:
    # A server answers for any host that it is asked about: as good as a proxy here.
    proxy = lab.origin.removeprefix("http://")
    url = lab.base_url.replace(proxy, "127.0.0.2:1")
    ended = call("check", url, "--rate", "20", HTTP_PROXY=f"http://user:secret@{proxy}")
    assert ended.returncode == 7  # the control plane is asked directly
    assert re.search(rf"proxy +{re.escape(proxy)} \(HTTP_PROXY\)", ended.stdout)
    assert ended.stdout.splitlines()[-1].endswith("It is asked directly, not through the proxy.")
    assert "secret" not in ended.stdout
    ended = call("check", lab.base_url, "--rate", "20", HTTP_PROXY="http://x:1", NO_PROXY="*")
    assert ended.returncode == 0
    assert "proxy" not in ended.stdout


def test_check_names_the_scheme_at_fault(lab: Lab) -> None:
    url = lab.base_url.replace("http://", "https://")
    ended = call("check", url, "--rate", "20")
    assert ended.returncode == 6
    *_, verdict, advised = ended.stdout.splitlines()
    address = lab.origin.removeprefix("http://")
    assert verdict == f"unreachable: {address} does not speak TLS, which https needs"
    assert "expects http, not https" in advised
    assert "slowest" not in ended.stdout


def test_check_names_the_certificate_at_fault(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ended = {}
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
    ) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        for name in ("", "another.pem", "ca.pem"):
            file = str(tmp_path / name) if name else ""
            variables = {"SSL_CERT_FILE": file, "SSL_CERT_DIR": ""}
            ended[name] = call(
                "check", f"https://{address}{JOB}", "--rate", "20", "--seconds", "0.5", **variables
            )
        unasked = call(
            *("check", f"https://{address}{JOB}", "--rate", "20", "--seconds", "0.5"),
            SSL_CERT_FILE=str(tmp_path / "ca.pem"),
            TINKER_ROUTEFIX_CONTROL_PLANE_URL="http://127.0.0.1:9",
            TINKER_ROUTEFIX_STRICT="0",
        )
        server.shutdown()
        thread.join()
    assert unasked.returncode == 7
    *_, verdict, advised = unasked.stdout.splitlines()
    assert verdict.endswith("not asked, because its URL is not https")
    assert "TINKER_ROUTEFIX_CONTROL_PLANE_URL to the https URL" in advised
    assert [one.returncode for one in ended.values()] == [6, 6, 7]
    for name, by in (("", ""), ("another.pem", " with SSL_CERT_FILE")):
        *_, verdict, advised = ended[name].stdout.splitlines()
        said = f"unreachable: the certificate of {address} is not accepted{by}: unable to get"
        assert verdict.startswith(said)
        assert "name its file in SSL_CERT_FILE" in advised
    assert "certificate" not in ended["ca.pem"].stdout


@pytest.mark.parametrize(
    ("error", "fault", "said"),
    [
        (httpx.ConnectTimeout(""), "network", "no connection to a.example:81 in time"),
        (httpx.ConnectError(""), "network", "no connection to a.example:81"),
        (httpx.ReadError(""), "network", "the connection was closed without an answer"),
        (httpx.PoolTimeout(CANARY), "network", "no answer (PoolTimeout)"),
    ],
)
def test_an_error_without_a_text_is_explained(
    error: httpx.HTTPError, fault: str, said: str
) -> None:
    error.__cause__ = error.__context__ = OSError(CANARY)
    found = diagnosis.explain(error, f"https://user:secret@a.example:81{JOB}", None)
    assert (found[0].value, found[1]) == (fault, said)
    proxy = diagnosis.Proxy("ALL_PROXY", "proxy.example:3128")
    fault_there, said_there = diagnosis.explain(error, f"https://a.example:81{JOB}", proxy)
    assert str(proxy) in said_there
    assert (fault_there.value == "proxy") is isinstance(error, httpx.ConnectError)


def test_an_error_of_several_addresses_is_explained() -> None:
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = ExceptionGroup("", [OSError(CANARY), ConnectionRefusedError(CANARY)])
    fault, said = diagnosis.explain(error, f"https://a.example{JOB}", None)
    assert (fault.value, said) == ("network", "a.example refuses connections")


def test_a_proxy_that_refuses_is_named_with_its_answer() -> None:
    proxy = diagnosis.Proxy("HTTPS_PROXY", "proxy.example")
    error = httpx.ProxyError(f"407 {CANARY}")
    fault, said = diagnosis.explain(error, f"https://a.example{JOB}", proxy)
    assert (fault.value, said) == (
        "proxy",
        "the proxy proxy.example (HTTPS_PROXY) answered HTTP 407",
    )


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("proxy.example:3128", "proxy.example:3128"),
        ("http://user:secret@proxy.example", "proxy.example"),
        ("http://proxy.example:port", "proxy.example"),
        ("http://", "a proxy"),
    ],
)
def test_a_proxy_is_named_by_its_host(
    monkeypatch: pytest.MonkeyPatch, value: str, host: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    found = diagnosis.proxy_for(f"https://a.example{JOB}")
    assert (found and found.host) == host


def test_check_names_a_host_that_is_not_there() -> None:
    ended = call("check", f"https://no-such-host.invalid{JOB}", "--rate", "20")
    assert ended.returncode == 6
    assert "unreachable: the name no-such-host.invalid cannot be resolved" in ended.stdout


def test_check_counts_a_pod_404_as_an_answer(check: Check, make_lab: Callable[..., Lab]) -> None:
    assert check(make_lab(without={"capabilities"}))["verdict"] == "healthy"
    # Also one that comes in pieces.
    lab = make_lab()
    text = '{"detail": "%s"}' % ("x" * (_verdict.MAX_BODY - 100))
    lab.fault(Fault(kinds=PROBE, answer=Answer(404, text)))
    assert check(lab)["verdict"] == "healthy"


def test_check_recognises_a_fixed_gateway(check: Check, lab: Lab) -> None:
    answer = Answer(503, {"queue_state": "route_not_ready"})
    lab.fault(Fault(kinds=PROBE, count=5, answer=answer))
    report = check(lab)
    fix = "503 route_not_ready"
    assert (report["verdict"], report["raced"], report["gateway_fix"]) == ("racing", 5, fix)
    assert "503 route" in report["gateway_fix_message"]


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
    said = {
        "slow": "no answer within 0.3 s",
        "dropped": "the connection was closed without an answer",
    }
    assert report["message"] == said[cut_off]


def test_check_that_ends_soon_after_errors_advises_to_check_for_longer(
    check: Check, lab: Lab
) -> None:
    lab.fault(Fault(kinds=PROBE, count=3, at="pod", answer=Answer(500, "")))
    report = check(lab, "--rate", "4", "--seconds", "4")
    assert (report["verdict"], report["other"]) == ("unclear", 3)
    assert 0 < report["answered"] < 20
    assert report["advice"] == "Check again, with more --seconds."


@pytest.mark.slow
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
    report = check(lab, "--watch", "--seconds", "12")
    assert [change["control_plane"] for change in report["changes"]][:1] == ["JOB_STATE_CREATING"]
    assert report["changes"][-1]["control_plane"] == "JOB_STATE_RUNNING"
    assert report["changes"][-1]["route"] == "answers"
    assert report["start_seen"] is True
    assert report["answered"] >= 20
    if cured:
        assert (report["verdict"], report["raced"]) == ("healthy", 0)
        assert report["gateway_fix"] == "lookup retried"
        assert report["slowest"] > 0.4
    else:
        assert (report["verdict"], report["gateway_fix"]) == ("racing", None)
        assert 0 < report["raced"] < report["refused"] == 30


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_signal_ends_the_watch_with_what_was_seen(
    lab: Lab, as_json: bool, number: signal.Signals, code: int, line: str
) -> None:
    flags = ["--watch", *(["--json"] if as_json else [])]
    with start([*COMMAND, "check", lab.base_url, *flags], {}) as process:
        assert process.stdout is not None
        seen = ""
        while "route: answers" not in seen and '"route": "answers"' not in seen:
            assert process.poll() is None
            seen += process.stdout.readline()
        process.send_signal(number)
        ended = finish(process)
    assert (ended.returncode, ended.stderr) == (code, line)
    if as_json:
        report = json.loads(ended.stdout.splitlines()[-1])
        jsonschema.validate(report, SCHEMA)
        assert (report["interrupted"], report["exit_code"]) == (True, code)
        assert report["verdict"] == "healthy"
    else:
        assert "The job was RUNNING before this watch began: too late to see its start" in seen
        assert ended.stdout.splitlines()[-2].startswith("healthy: ")


def test_read_probe_classifies_each_answer() -> None:
    assert read_probe(200, b"{}").seen is Seen.ANSWERED
    assert read_probe(404, b'{"detail": "Not Found"}').seen is Seen.ANSWERED
    assert read_probe(404, b"<html>").seen is Seen.REFUSED
    assert read_probe(404, b'{"error": {"code": "NOT_FOUND"}}').seen is Seen.REFUSED
    assert read_probe(404, b'{"error": {"code": 5}}').seen is Seen.REFUSED
    assert read_probe(410, b'{"error": {"code": "JOB_GONE"}}').seen is Seen.REFUSED
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
    assert "healthy: all 20 probes were answered by the pod" in shown


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


SAYS = "import sys; print(sys.argv, sys.path[0], __name__, sorted(globals())); "


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", SAYS, "-m", "--", "-x"],
        [f"-c{SAYS}", "a"],
        ["-c", f"{SAYS}1 / 0"],
        ["-c", "print(\n"],
        ["-c", "import sys; sys.exit(5)"],
        ["-u", "-c", SAYS, "-c"],
        ["-uB", "-Wignore", "-X", "dev", "here/program.py", "-u"],
        ["-OBc", f"{SAYS}print(__debug__)"],
        ["-W", "error", "here/program.py"],
        ["-P", "here/program.py"],
        ["-I", "-c", SAYS],
        ["-Xutf8=1", "-m", "module", "-m"],
        ["--check-hash-based-pycs", "never", "here/program.py"],
        ["--", "here/program.py", "--"],
        ["-u", "--", "here/program.py", "-"],
        ["-u", "no_such.py"],
    ],
    ids=str,
)
def test_run_reads_its_command_line_as_python_does(tmp_path: Path, arguments: list[str]) -> None:
    look = f"{SAYS}print(sys.flags, sys.warnoptions, sys._xoptions, __file__)"
    stub(tmp_path, {"here/program.py": look, "module.py": look})
    plain, ran = both(arguments, tmp_path)
    same(plain, ran)
    assert plain.stdout or plain.stderr or plain.returncode


@pytest.mark.parametrize(
    ("arguments", "kind", "words", "options"),
    [
        (["a.py", "-u"], "script", ["a.py", "-u"], []),
        (["-uBm", "mod", "-c"], "module", ["mod", "-c"], ["-uB"]),
        (["-ccode"], "code", ["code"], []),
        (["-uWerror", "-X", "dev", "-"], "script", ["-"], ["-u", "-W", "error", "-X", "dev"]),
        (
            ["--check-hash-based-pycs", "never", "--", "-x.py"],
            "script",
            ["-x.py"],
            ["--check-hash-based-pycs", "never"],
        ),
    ],
)
def test_a_command_line_of_run_is_taken_apart(
    arguments: list[str], kind: str, words: list[str], options: list[str]
) -> None:
    program = run_command.parse(arguments)
    assert (program.kind, program.words, program.options) == (kind, words, options)


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize("ends", ["", "1 / 0", "print("])
def test_run_runs_what_comes_from_stdin(tmp_path: Path, options: list[str], ends: str) -> None:
    program = f"{SAYS.rstrip('; ')}\n{ends}\n"
    ended = []
    for command in ([sys.executable], [*COMMAND, "run"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended.append(
            subprocess.run(
                [*command, *options, "-", "-x"],
                input=program,
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )
    same(*ended)


def test_run_of_stdin_on_a_terminal_is_the_interpreters_own_prompt() -> None:
    ours, theirs = pty.openpty()
    process = start(
        [*COMMAND, "run", "-"], {"TERM": "dumb"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, b"print(6 * 7)\nexit()\n")
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the other end has been closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    assert b">>> " in shown
    assert b"42" in shown


COMMAND_STATE = "import os, sys; print(os.environ.get('TINKER_ROUTEFIX_AUTOLOAD'), sys.argv[1:])"


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, "1"),
        ({"TINKER_ROUTEFIX_AUTOLOAD": "0"}, "0"),
        ({"TINKER_ROUTEFIX": "0"}, "None"),
    ],
)
@pytest.mark.parametrize("how", ["by name", "by path"])
def test_run_of_a_command_sets_the_variable_for_it(
    tmp_path: Path, environment: dict[str, str], variable: str, how: str
) -> None:
    launcher = tmp_path / "bin" / "launcher"
    text = f'#!/bin/sh\nexec {sys.executable} -c "{COMMAND_STATE}" "$@"\n'
    stub(tmp_path, {"bin/launcher": text})
    launcher.chmod(0o755)
    path = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    program = "launcher" if how == "by name" else str(launcher)
    ended = call("run", program, "-m", "--help", PATH=path, **environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{variable} ['-m', '--help']\n"


def test_run_of_python_itself_loads_the_shim() -> None:
    state = "import tinker, sys; print('tinker_routefix' in sys.modules)"
    ended = call("run", sys.executable, "-c", state)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_run_of_a_command_says_where_no_startup_file_would_load_the_shim(
    tmp_path: Path,
) -> None:
    hidden = "from tinker_routefix import _status; _status._startup_file = lambda: None"
    ended = in_a_program(hidden, "run", "true")
    assert (ended.returncode, ended.stdout) == (0, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tinker-routefix run: this environment has no startup file")
    assert "what true starts is not patched" in line
    ended = in_a_program(hidden, "run", "true", TINKER_ROUTEFIX="0")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_folder_with_the_name_of_a_command_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "true").mkdir()
    plain, ran = both(["true"], tmp_path)
    assert (plain.returncode, ran.returncode) == (1, 0)
    stub(tmp_path, {"true/__main__.py": "print('the folder')"})
    same(*both(["true"], tmp_path))


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
shim = sys.modules.get("tinker_routefix._patching")
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
