"""The demo: what its tables claim is what the ledger says, on whatever tinker is installed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tinker_routefix.demo import race, report

DEMO = [sys.executable, "-m", "tinker_routefix", "demo"]


@pytest.mark.slow
def test_demo_outcomes_match_its_tables() -> None:
    # One test: with several workers, each would run a demo of its own for its share of them.
    demo = subprocess.run([*DEMO, "--json"], capture_output=True, text=True, timeout=180)
    assert (demo.returncode, demo.stderr) == (0, "")
    played = json.loads(demo.stdout)
    acts = {act["name"]: act["contenders"] for act in played["acts"]}
    assert list(acts) == ["cold", "mid-training"]

    for act, error, steps in (("cold", "NotFoundError", 0), ("mid-training", "ValueError", 1)):
        plain = acts[act]["plain"]
        assert (plain["outcome"], plain["error"], plain["steps"]) == ("died", error, steps)

    assert played["exact"]
    assert played["flaws"] == []
    for contenders in acts.values():
        shim = contenders["tinker_routefix"]
        assert shim["outcome"] == "survived"
        assert shim["steps"] == shim["gradients"] == shim["updates"] == 6
        assert shim["saves"] == 1
        assert shim["duplicates"] == shim["out_of_order"] == shim["missing"] == 0
        assert shim["again_at"] == []
        assert shim["refused"] > 0  # there was something to survive

    for strategy in ("strategy A", "strategy B"):
        assert acts["cold"][strategy]["outcome"] == "died"
        run = acts["mid-training"][strategy]
        assert run["outcome"] == "survived"
        assert run["gradients"] > run["gradients_asked"] == 6
        assert run["updates"] > run["updates_asked"] == 6
        # What is more than asked for is told apart by its step, too.
        assert len(run["again_at"]) == run["gradients"] + run["updates"] - 12


def test_hung_contender_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "CHILD_SECONDS", 0.1)
    with race.start(race.ACTS[0], steps=6, seed=0) as runs:
        report.Json().follow(race.ACTS[0], runs)
        results = [run.result() for run in runs]
    assert {one.outcome for one in results} == {"hung"}
    assert results[-1].flaws() == ["it hung (hung: ) after 0 of 6 steps"]


def test_interrupted_demo_ends_without_a_traceback() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        DEMO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background job, as CI may be, inherits that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as demo:
        assert demo.stdout is not None
        while "started" not in demo.stdout.readline():
            assert demo.poll() is None
        began = time.monotonic()
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=30)
    assert (demo.returncode, errors) == (130, "interrupted\n")
    assert time.monotonic() - began < 20


def result(**about: Any) -> race.Result:
    usual: dict[str, Any] = {
        "contender": "tinker_routefix",
        "shim": True,
        "outcome": "survived",
        "error": None,
        "message": None,
        "seconds": 9.0,
        "steps": 6,
        "steps_asked": 6,
        "gradients": 6,
        "gradients_asked": 6,
        "updates": 6,
        "updates_asked": 6,
        "saves": 1,
        "refused": 3,
        "duplicates": 0,
        "out_of_order": 0,
        "missing": 0,
        "connected_at": 1.0,
        "steps_at": [2.0, 3.0, 4.0, 6.0, 7.0, 8.0],
        "refused_at": [4.2, 4.7, 5.2],
        "again_at": [],
    }
    return race.Result(**{**usual, **about})


@pytest.mark.parametrize(
    ("about", "flaw"),
    [
        ({"steps": 5}, "5 of 6 steps are done"),
        ({"gradients": 7}, "7 gradients were executed, not 6"),
        ({"updates": 5}, "5 optimizer steps were executed, not 6"),
        ({"saves": 0}, "0 checkpoints were saved, not 1"),
        ({"duplicates": 1}, "1 requests were executed twice"),
        ({"out_of_order": 1}, "1 requests were executed out of order"),
        ({"missing": 1}, "1 requests are missing"),
        ({"again_at": [5.0]}, "1 operations were trained again"),
        (
            {"outcome": "died", "error": "ValueError", "message": "404", "steps": 2},
            "it died (ValueError: 404) after 2 of 6 steps",
        ),
    ],
)
def test_inexact_result_is_reported_as_a_flaw(about: dict[str, Any], flaw: str) -> None:
    assert result().flaws() == []
    assert result(**about).flaws() == [flaw]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_demo_table_fits_80_columns_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    died = result(
        contender="plain", outcome="died", error="NotFoundError", message="…", gradients=7
    )
    screen = report.Screen()
    screen.act(race.ACTS[0], [died, result(again_at=[5.0])])
    screen.end([(race.ACTS[0], [result()])], ["it died …"], steps=6, seed=0)
    sys.stdout.flush()
    lines = raw.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    marks = "o.X+#x2" if encoding == "ascii" else "○·✗✓█x2"
    assert all(mark in text for mark in marks)
    # Nothing is folded: a line per contender in the table, and one in the timelines.
    assert sum(line.startswith(("plain  ", "tinker_routefix ")) for line in lines) == 4
    assert "NotFoundError" in text


@pytest.mark.parametrize("module", ["tinker", "aiohttp", "google", "rich"])
def test_demo_without_its_extra_names_it(module: str) -> None:
    program = f"""
import sys
sys.modules[{module!r}] = None
from tinker_routefix.__main__ import main
code = main(["demo"])
assert not any(map(sys.modules.get, ["aiohttp", "httpx", "tinker.types", "rich.table"]))
sys.exit(code)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"The demo needs {module}")
    assert ended.stderr.endswith(": in a checkout, pip install '.[lab,tinker]'\n")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("steps", ["3", "101", "many"])
def test_demo_steps_out_of_bounds_exit_2(steps: str) -> None:
    ended = subprocess.run([*DEMO, "--steps", steps], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--steps" in ended.stderr
