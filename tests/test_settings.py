"""Settings: every value is checked by name, value and what was expected."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

import tinker_routefix
from tinker_routefix import SettingError, _settings
from tinker_routefix._settings import Overrides, Settings
from tinker_routefix._switch import OFF_WORDS, ON_WORDS, parse_switch

VARIABLES = {field.metadata["variable"]: field for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("word", ON_WORDS + OFF_WORDS)
def test_switch_accepts_every_on_and_off_word(word: str) -> None:
    for text in (word, word.upper(), f" {word.title()} "):
        assert parse_switch("X", text) is (word in ON_WORDS)


@pytest.mark.parametrize("text", ["2", "maybe", "yess", "enable", "none", "-1"])
def test_switch_with_another_word_is_refused_and_lists_those_accepted(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_switch("TINKER_ROUTEFIX", text)
    message = str(caught.value)
    assert "TINKER_ROUTEFIX" in message
    assert repr(text) in message
    assert all(word in message for word in ON_WORDS + OFF_WORDS)


def test_settings_of_an_empty_environment_are_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings(
        enabled=True,
        strict=False,
        warmup_successes=3,
        warmup_timeout=120,
        warmup_max_delay=8,
        max_replays=4,
        base_delay=2,
        max_delay=15,
        retry_budget=30,
        control_plane_url=None,
        control_plane_timeout=5,
        log=None,
    )


@pytest.mark.parametrize("variable", VARIABLES)
def test_empty_variable_counts_as_unset(variable: str) -> None:
    assert Settings.from_environment({variable: "  "}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("TINKER_ROUTEFIX", "off", False),
        ("TINKER_ROUTEFIX_STRICT", "Yes", True),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "0", 0),
        ("TINKER_ROUTEFIX_WARMUP_TIMEOUT", "0.5", 0.5),
        ("TINKER_ROUTEFIX_MAX_REPLAYS", " 7 ", 7),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "32", 32),
        ("TINKER_ROUTEFIX_MAX_REPLAYS", "1000", 1000),
        ("TINKER_ROUTEFIX_RETRY_BUDGET", "1e2", 100.0),
        ("TINKER_ROUTEFIX_RETRY_BUDGET", "86400", 86400.0),
        ("TINKER_ROUTEFIX_LOG", " Debug ", "debug"),
        ("TINKER_ROUTEFIX_LOG", "off", "off"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "https://api.example/v1x", "https://api.example/v1x"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "https://api.example/", "https://api.example"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "HTTPS://API.Example:443", "https://api.example"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "http://127.0.0.1:81/x", "http://127.0.0.1:81/x"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "http://localhost:80/", "http://localhost"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_URL", "http://[::1]:81", "http://[::1]:81"),
    ],
)
def test_valid_value_is_read_and_normalised(variable: str, text: str, value: object) -> None:
    read = Settings.from_environment({variable: text})
    assert getattr(read, VARIABLES[variable].name) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("TINKER_ROUTEFIX", "maybe"),
        ("TINKER_ROUTEFIX_STRICT", "2"),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "-1"),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "3.5"),
        ("TINKER_ROUTEFIX_WARMUP_TIMEOUT", "0"),
        ("TINKER_ROUTEFIX_WARMUP_TIMEOUT", "inf"),
        ("TINKER_ROUTEFIX_WARMUP_MAX_DELAY", "nan"),
        ("TINKER_ROUTEFIX_MAX_REPLAYS", "many"),
        ("TINKER_ROUTEFIX_BASE_DELAY", "-2"),
        ("TINKER_ROUTEFIX_MAX_DELAY", "15s"),
        ("TINKER_ROUTEFIX_RETRY_BUDGET", "half a minute"),
        ("TINKER_ROUTEFIX_CONTROL_PLANE_TIMEOUT", "0"),
        ("TINKER_ROUTEFIX_LOG", "loud"),
        ("TINKER_ROUTEFIX_LOG", "10"),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "33"),
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "3000"),
        ("TINKER_ROUTEFIX_MAX_REPLAYS", "1001"),
        ("TINKER_ROUTEFIX_WARMUP_TIMEOUT", "1e9"),
        ("TINKER_ROUTEFIX_RETRY_BUDGET", "86401"),
    ],
)
def test_invalid_value_is_refused_by_name_and_value(variable: str, text: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.from_environment({variable: text})
    assert f"{variable}={text!r}" in str(caught.value)
    assert caught.value.expected in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "api.example",
        "http://api.example",
        "ftp://api.example",
        "https://",
        "https://user:secret-key@api.example",
        "https://api.example?key=secret-key",
        "https://api.example#secret-key",
        "https://api.example/secret-key@",
        "https://api.example:port",
        "https://api.example:99999",
        "https://[::1",
        "https://[::1%25lo]",
        "https://api.example\\.other",
        "https://api.exam\nple",
        "https://api.example/a path",
        "https://bücher.example",
        "http://127.0.0.1.example",
        "http://localhost.example",
        "http://10.0.0.1",
        "//api.example",
        "secret-key",
    ],
)
def test_invalid_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SettingError, match="https URL") as caught:
        Settings.from_environment({"TINKER_ROUTEFIX_CONTROL_PLANE_URL": url})
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "bound"),
    [
        ("TINKER_ROUTEFIX_WARMUP_SUCCESSES", "a whole number from 0 to 32"),
        ("TINKER_ROUTEFIX_MAX_REPLAYS", "a whole number from 0 to 1000"),
        ("TINKER_ROUTEFIX_WARMUP_TIMEOUT", "a number of seconds above 0, at most 86400"),
    ],
)
def test_value_beyond_its_bound_is_refused_and_the_bound_is_said(variable: str, bound: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.from_environment({variable: "100000"})
    assert caught.value.expected == bound


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example/v1",
        "https://api.example/v1/",
        "https://api.example/eu/v1",
        "https://api.example/v1/accounts",
        "https://api.example/v1/accounts/a/rlorTrainerJobs/secret-key",
    ],
)
def test_url_that_contains_v1_is_refused_by_name(url: str) -> None:
    """The questions add that: nobody would answer there, and its 404s ended runs."""
    with pytest.raises(SettingError, match="up to, not including, /v1") as caught:
        Settings.from_environment({"TINKER_ROUTEFIX_CONTROL_PLANE_URL": url})
    assert caught.value.value == "https://api.example/…/v1"


def test_refused_url_is_named_by_its_host() -> None:
    with pytest.raises(SettingError, match=r"CONTROL_PLANE_URL='http://api\.example:81' is not"):
        Settings.from_environment({"TINKER_ROUTEFIX_CONTROL_PLANE_URL": "http://API.example:81/v2"})


UNKNOWN = {
    "TINKER_ROUTEFIX_MAX_REPLAY": "did you mean TINKER_ROUTEFIX_MAX_REPLAYS?",
    "TINKER_ROUTEFIX_WARMUP_TIMOUT": "did you mean TINKER_ROUTEFIX_WARMUP_TIMEOUT?",
    "TINKER_ROUTEFIX_AUTO_LOAD": "did you mean TINKER_ROUTEFIX_AUTOLOAD?",
    "TINKER_ROUTEFIX_X": "the settings are TINKER_ROUTEFIX, TINKER_ROUTEFIX_AUTOLOAD, ",
}


def import_it(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that imports the shim and prints `on`."""
    program = "import tinker_routefix; print('on')"
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_ROUTEFIX")}
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("variable", UNKNOWN)
def test_an_unknown_variable_is_warned_of_with_a_suggestion(variable: str) -> None:
    ended = import_it(**{variable: "a-secret"})
    assert (ended.returncode, ended.stdout) == (0, "on\n")
    assert f"RoutefixWarning: {variable} is not a setting of tinker_routefix" in ended.stderr
    assert UNKNOWN[variable] in ended.stderr
    assert "a-secret" not in ended.stderr


def test_an_unknown_variable_does_not_break_an_import_with_warnings_as_errors() -> None:
    ended = import_it("-W", "error", TINKER_ROUTEFIX_MAX_REPLAY="3")
    assert (ended.returncode, ended.stdout) == (0, "on\n")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tinker_routefix: TINKER_ROUTEFIX_MAX_REPLAY is not a setting")


def test_an_unknown_variable_without_stderr_is_passed_over() -> None:
    program = (
        "import sys; sys.stderr = None; import warnings; warnings.simplefilter('error')\n"
        "import tinker_routefix; print('on')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TINKER_ROUTEFIX_STRICT": "", "TINKER_ROUTEFIX_X": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "on\n")


@pytest.mark.parametrize("variable", UNKNOWN)
def test_an_unknown_variable_is_an_error_where_it_is_strict(variable: str) -> None:
    ended = import_it(**{variable: "a-secret", "TINKER_ROUTEFIX_STRICT": "1"})
    assert (ended.returncode, ended.stdout) == (1, "")
    last = ended.stderr.splitlines()[-1]
    named = f"tinker_routefix.SettingError: {variable} is not a setting of tinker_routefix"
    assert last.startswith(named)
    assert UNKNOWN[variable] in last
    assert "a-secret" not in ended.stderr
    with pytest.raises(SettingError) as caught:
        Settings.from_environment({variable: "x", "TINKER_ROUTEFIX_STRICT": "1"})
    assert caught.value.name == variable


@pytest.fixture
def unconnected(mocker: Any) -> None:
    """As in a process in which no client has connected yet."""
    mocker.patch("tinker_routefix._routes._routes", weakref.WeakKeyDictionary())


@pytest.mark.usefixtures("unconnected")
def test_configure_changes_the_current_settings() -> None:
    words: dict[str, Any] = {"strict": "no"}
    tinker_routefix.configure(retry_budget=60, control_plane_url=None, **words)
    assert _settings.current().retry_budget == 60
    assert _settings.current().strict is False


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("bad", [{"retry_budget": True}, {"max_replays": 2.5}, {"strict": 3}])
def test_configure_with_an_invalid_value_raises_setting_error(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        tinker_routefix.configure(**bad)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("retries", "the settings are .*retry_budget"),
        ("enabled", "the settings are .*retry_budget"),
        ("retry_bugdet", r"did you mean retry_budget\?"),
    ],
)
def test_configure_checks_names(name: str, suggestion: str) -> None:
    unknown: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=suggestion):
        tinker_routefix.configure(**unknown)


def test_configure_has_the_type_of_every_setting() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    del fields["enabled"]
    given = {name: hint.__forward_arg__ for name, hint in Overrides.__annotations__.items()}
    # Its words are spelt out.
    assert given.pop("log").startswith("Literal")
    del fields["log"]
    assert given == fields


def test_exceptions_and_warnings_are_named_as_programs_find_them() -> None:
    for one in (SettingError, tinker_routefix.RouteTimeoutError, tinker_routefix.RoutefixWarning):
        assert f"{one.__module__}.{one.__qualname__}" == f"tinker_routefix.{one.__name__}"
        assert getattr(tinker_routefix, one.__name__) is one


def test_warning_at_import_points_at_the_line_that_imports(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("# the first line\nimport tinker_routefix\n")
    ended = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "TINKER_ROUTEFIX_STRICT": "0", "TINKER_ROUTEFIX_RETRY_BUGDET": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr.startswith(f"{program}:2: RoutefixWarning: TINKER_ROUTEFIX_RETRY_BUGDET")
    assert ended.stderr.endswith("import tinker_routefix\n")


def test_settings_attributes_are_read_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _settings.current().strict = True  # type: ignore[misc]


def test_the_page_of_settings_has_every_setting_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    table = page.partition("| variable | default |")[2].partition("\n\n")[0]
    rows = {
        cells[1].strip().strip("`"): cells[2].strip().strip("`")
        for line in table.splitlines()
        if line.startswith("| `TINKER_ROUTEFIX")
        for cells in [line.split("|")]
    }
    assert rows.keys() == VARIABLES.keys()
    for variable, field in VARIABLES.items():
        default: Any = field.default
        shown: Any
        if isinstance(default, bool):
            shown = "on" if default else "off"
        else:
            shown = "" if default is None else f"{default:g}" if field.type == "float" else default
        assert rows[variable] == str(shown), variable


def test_retired_variable_is_accepted_with_one_line() -> None:
    ended = import_it(TINKER_ROUTEFIX_MATCH="any", TINKER_ROUTEFIX_STRICT="1")
    assert (ended.returncode, ended.stdout) == (0, "on\n")
    assert "RoutefixWarning: TINKER_ROUTEFIX_MATCH no longer has an effect" in ended.stderr
