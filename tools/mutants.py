"""Break the shim's core on purpose, one small change at a time: do its tests notice?

cosmic-ray makes the changes, in a copy of the sources, and runs the tests of the module for
each. How many may go unnoticed in a function, and why, is said in ``tests/mutants.toml``, which
also says which tests belong to which module. About half an hour for all on two cores.

    python -m tools.mutants                 # every module
    python -m tools.mutants _replay _route
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KNOWN = tomllib.loads((ROOT / "tests/mutants.toml").read_text("utf-8"))
TESTS = {module: row["by"] for row in KNOWN["tests"] for module in row["of"]}


def survivors(module: str, directory: Path) -> tuple[int, dict[str, list[str]]]:
    """Try every change of a module; how many there were, and by function what survived."""
    for name in ("tinker_routefix", "tests", "tools"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory)
    # A change can make a test wait for ever.
    options = (
        "-x -q -p no:cacheprovider -p no:logging -p pytest_mock -p pytest_timeout --timeout 60"
        " -p pytest_rerunfailures"
    )
    pytest = shlex.join([sys.executable, "-m", "pytest", *options.split(), *TESTS[module]])
    config = KNOWN["cosmic-ray"] | {
        "module-path": f"tinker_routefix/{module}.py",
        "test-command": pytest,
    }
    (directory / "config.toml").write_text(f"cosmic-ray = {_toml(config)}")

    def run(command: str) -> str:
        return subprocess.run(  # noqa: S603 - our own commands
            shlex.split(command),
            cwd=directory,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    # Unchanged, they have to pass.
    run(pytest)
    run("cosmic-ray init config.toml session.sqlite")
    run("cr-filter-operators session.sqlite config.toml")
    run("cosmic-ray exec config.toml session.sqlite")
    tried, survived = 0, defaultdict[str, list[str]](list)
    for item, result in map(json.loads, run("cosmic-ray dump session.sqlite").splitlines()):
        tried += result["worker_outcome"] == "normal"
        if result["test_outcome"] == "survived" and result["worker_outcome"] == "normal":
            function = item["mutations"][0]["definition_name"] or "the module"
            survived[function].append(result["diff"])
    return tried, survived


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def main(modules: list[str]) -> int:
    """Change what was asked for, and compare with what is explained."""
    failed = 0
    with (
        tempfile.TemporaryDirectory() as scratch,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        running = {
            module: pool.submit(survivors, module, Path(scratch) / module)
            for module in modules or TESTS
        }
        for module, future in running.items():
            tried, survived = future.result()
            count = sum(map(len, survived.values()))
            print(f"{module}: {tried} mutants, {count} survived")  # noqa: T201
            explained = KNOWN["survivors"].get(module, {})
            source = (ROOT / f"tinker_routefix/{module}.py").read_text("utf-8")
            for function in sorted({*survived, *explained}):
                diffs = survived.get(function, [])
                expected = sum(explained.get(function, {}).values())
                expected += function == "the module" and "if TYPE_CHECKING:" in source
                if len(diffs) != expected:
                    failed = 1
                    print(f"{module}.{function}: {len(diffs)} survived, {expected} are explained")  # noqa: T201
                    print(*diffs, sep="\n")  # noqa: T201
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
