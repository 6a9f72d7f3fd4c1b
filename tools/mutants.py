"""Break the shim's core on purpose, one small change at a time: do its tests notice?

cosmic-ray makes the changes, in a copy of the sources, and runs the tests of the module for
each. What these do not notice has to be explained in ``tests/mutants.toml``, which also says
which tests belong to which module. About half an hour for all on two cores.

    python -m tools.mutants                 # every module
    python -m tools.mutants _retry _route
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent

CONFIG = """
[cosmic-ray]
module-path = "tinker_routefix/{module}.py"
test-command = {command}
timeout = 600.0
excluded-modules = []
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = [
  # Of what an arithmetic operator can become, the five that calculate with any number.
  "core/ReplaceBinaryOperator_[A-Za-z]+_(Mod|FloorDiv|LShift|RShift|BitOr|BitAnd|BitXor)",
  # Types, at run time.
  "core/ReplaceBinaryOperator_BitOr_",
  # Comparing identities by size, and sizes by identity.
  "core/ReplaceComparisonOperator_Is(Not)?_(Eq|NotEq|Lt|LtE|Gt|GtE)",
  "core/ReplaceComparisonOperator_(Eq|NotEq|Lt|LtE|Gt|GtE)_Is(Not)?",
]
"""


@dataclass(frozen=True)
class Mutant:
    """One change, found again by what it changes and not by where that stands."""

    module: str
    function: str
    was: str
    becomes: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}\n  - {self.was}\n  + {self.becomes}"


def mutant(module: str, record: list[Any]) -> Mutant:
    """What a line of ``cosmic-ray dump`` is about."""
    item, result = record
    (mutation,) = item["mutations"]
    lines = result["diff"].split("\n")[3:]
    gone, come = (
        [line[1:].strip() for line in lines if line.startswith(sign)] for sign in ("-", "+")
    )
    return Mutant(
        module,
        mutation["definition_name"] or "",
        " ".join(line for line in gone if line not in come),
        " ".join(line for line in come if line not in gone),
    )


def mutate(module: str, tests: list[str], directory: Path) -> tuple[int, set[Mutant]]:
    """Try every change of a module; how many there were, and what survived."""
    for name in ("tinker_routefix", "tests", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    for name in ("pyproject.toml", "noxfile.py", "README.md"):
        shutil.copy(ROOT / name, directory)
    # A change can make a test wait for ever.
    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:logging", "--timeout", "60")
    plugins = ("-p", "pytest_mock", "-p", "pytest_timeout")
    pytest = [sys.executable, "-m", "pytest", *options, *plugins, *tests]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    (directory / "config.toml").write_text(
        CONFIG.format(module=module, command=json.dumps(shlex.join(pytest)))
    )

    def run(*command: str) -> str:
        ended = subprocess.run(  # noqa: S603 - our own commands
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise click.ClickException(f"{shlex.join(command)}: {ended.stdout}{ended.stderr}")
        return ended.stdout

    # Unchanged, they have to pass; and from here on only the changed module is compiled anew.
    run(*pytest)
    run("cosmic-ray", "init", "config.toml", "session.sqlite")
    run("cr-filter-operators", "session.sqlite", "config.toml")
    run("cosmic-ray", "exec", "config.toml", "session.sqlite")
    records = [
        json.loads(line) for line in run("cosmic-ray", "dump", "session.sqlite").splitlines()
    ]
    tried = [record for record in records if record[1]["worker_outcome"] == "normal"]
    survived = [record for record in tried if record[1]["test_outcome"] == "survived"]
    return len(tried), {mutant(module, record) for record in survived}


@click.command(help=__doc__)
@click.argument("modules", nargs=-1)
@click.option("--jobs", default=2, show_default=True, help="Modules at a time.")
def main(modules: tuple[str, ...], jobs: int) -> None:
    """Change what was asked for, and compare with what is explained."""
    known = tomllib.loads((ROOT / "tests/mutants.toml").read_text(encoding="utf-8"))
    tests: dict[str, list[str]] = known["tests"]
    explained = {
        Mutant(entry["module"], entry["function"], entry["was"], becomes)
        for entry in known["survivor"]
        for becomes in entry["becomes"]
    }
    if strange := set(modules) - tests.keys():
        raise click.UsageError(f"{', '.join(sorted(strange))}: not one of {', '.join(tests)}")
    chosen = modules or tuple(tests)
    failed = False
    with (
        tempfile.TemporaryDirectory() as directory,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        running = {
            module: pool.submit(mutate, module, tests[module], Path(directory) / module)
            for module in chosen
        }
        for module, future in running.items():
            count, survived = future.result()
            expected = {one for one in explained if one.module == module}
            click.echo(f"{module}: {count} mutants, {len(survived)} survived")
            for one in sorted(survived - expected, key=str):
                click.echo(f"not explained: {one}")
            for one in sorted(expected - survived, key=str):
                click.echo(f"explained, but killed or gone: {one}")
            failed |= survived != expected
    sys.exit(failed)


if __name__ == "__main__":
    main()
