"""Who runs, and how: each contender is a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PLAIN = "plain"
STRATEGY_A = "strategy A"
STRATEGY_B = "strategy B"
SHIM = "tinker_routefix"
CONTENDERS = (PLAIN, STRATEGY_A, STRATEGY_B, SHIM)

COLOURS = {PLAIN: "#7f7f7f", STRATEGY_A: "#e69f00", STRATEGY_B: "#cc79a7", SHIM: "#0072b2"}
"""Also told apart by colour-blind eyes."""

_ROOT = Path(__file__).parents[1]


class FailedRunError(Exception):
    """A contender's process did not hand in a result."""


class Stage:
    """Where the contenders' processes run."""

    def __init__(self, environment: Mapping[str, str], bytecode: str) -> None:
        self._labs = environment
        self._bytecode = bytecode

    def environment(self, contender: str) -> dict[str, str]:
        """A contender's environment."""
        # Whatever is set for tinker or the shim out there must not decide anything.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TINKER_")
        }
        # Where nobody may write bytecode, imports would be measured as compilations.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment |= self._labs
        environment |= {
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), *sys.path])),
            "PYTHONPYCACHEPREFIX": self._bytecode,
            "TINKER_API_KEY": "tml-benchmark",
            # Its requests would be met by the same faults, and be counted.
            "TINKER_TELEMETRY": "0",
        }
        if contender != SHIM:
            environment["TINKER_ROUTEFIX"] = "0"
        return environment

    def run(
        self, program: str, contender: str = SHIM, *, seconds: float = 180, **about: Any
    ) -> dict[str, Any] | None:
        """Run a program for a contender; None where it hung and was killed.

        Raises:
            FailedRunError: It ended without a result.
        """
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "benchmarks.programs", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=self.environment(contender),
        )
        try:
            said, errors = process.communicate(
                json.dumps({"contender": contender, **about}), timeout=seconds
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        if process.returncode or not said.strip():
            raise FailedRunError(f"{program} of {contender} failed:\n{errors[-2000:]}")
        result: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return result

    def python(self, code: str, contender: str) -> str:
        """Run a piece of code in a bare interpreter, and return what it prints."""
        return subprocess.run(  # noqa: S603 - our own code
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=self.environment(contender),
        ).stdout


@contextmanager
def stage() -> Iterator[Stage]:
    """Labs, and a place for bytecode, while benchmarks run."""
    from benchmarks import labs

    with labs.serving() as environment, tempfile.TemporaryDirectory() as bytecode:
        yield Stage(environment, bytecode)
