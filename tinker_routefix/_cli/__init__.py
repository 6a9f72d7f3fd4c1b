"""The command line: ``tinker-routefix``, or ``python -m tinker_routefix``.

The base install has to be enough for ``status``, ``check`` and ``run``, and for being told
what the others need, so nothing is imported here but the standard library; each command
brings its own imports.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LAB_NEEDS = ("aiohttp", "click", "google.protobuf", "rich", "zstandard")
_DEMO_NEEDS = ("tinker", *_LAB_NEEDS)
_USAGE = 2
_INTERRUPTED = 130
_FEWEST_STEPS = 4
_MOST_STEPS = 100


def _missing(modules: Sequence[str]) -> list[str]:
    """List the modules that are not installed, without importing them."""
    missing = []
    for module in modules:
        try:
            found = find_spec(module)
        except (ModuleNotFoundError, ValueError):  # not even the package around it is there
            found = None
        if found is None:
            missing.append(module)
    return missing


def _lacks(command: str, modules: Sequence[str], extras: str) -> bool:
    """Say what a command needs and does not find."""
    missing = _missing(modules)
    if missing:
        sys.stderr.write(
            f"The {command} needs {', '.join(missing)}: pip install 'tinker-routefix[{extras}]'\n"
        )
    return bool(missing)


def _steps(text: str) -> int:
    steps = int(text)
    if not _FEWEST_STEPS <= steps <= _MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"{steps} is not between {_FEWEST_STEPS} (the race strikes up to step 4) "
            f"and {_MOST_STEPS}"
        )
    return steps


def _number(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    return number


def _demo(options: argparse.Namespace) -> int:
    if _lacks("demo", _DEMO_NEEDS, "lab,tinker"):
        return _USAGE
    from tinker_routefix.demo import run

    return run(steps=options.steps, seed=options.seed, as_json=options.json)


def _lab(arguments: Sequence[str], program: str) -> int:
    if _lacks("lab", _LAB_NEEDS, "lab"):
        return _USAGE
    command: Callable[..., int] = importlib.import_module("tinker_routefix.lab.__main__").main
    return command(args=list(arguments), prog_name=f"{program} lab")


def _status(options: argparse.Namespace) -> int:
    from . import status as command

    return command.show(as_json=options.json)


def _check(options: argparse.Namespace) -> int:
    from . import check as command

    return command.check(
        options.url,
        key_variable=options.key_env,
        seconds=options.seconds,
        rate=options.rate,
        watch=options.watch,
        as_json=options.json,
    )


def _run(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Take `run` apart by hand: what comes after the program is the program's own."""
    own = list(itertools.takewhile(lambda word: word.startswith("-"), arguments))
    options = parser.parse_args(own)
    rest = list(arguments[len(own) :])
    if not rest:
        parser.error("which program? Give a script, or -m and a module")
    from . import run as command

    return command.run(rest, as_module=options.m)


_STATUS_CODES = "exit codes: 0 active, 3 switched off, 4 it cannot help, 2 wrong usage"
_CHECK_CODES = """\
exit codes:
  0  healthy: every probe was answered, from the first one on
  3  racing: the route was refused while the control plane said RUNNING, over now or not
  4  gone: the control plane says that the job is over or that there is none
  5  wrong key: the gateway or the control plane does not accept it for this job
  6  unreachable: no answer from the gateway
  7  unclear: the job has not started, or the answers leave it open
  2  wrong usage, or no key; 130 interrupted

The control plane is asked at the gateway's own origin, or where
TINKER_ROUTEFIX_CONTROL_PLANE_URL says. The key goes to these two and is never shown.

Where the gateway was seen to tell stale routes from jobs that are gone, or to retry the lookup
itself, the last line says so: "cure seen"."""


def _parsers(program: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line, and the part of it that is `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=program, description="Survive stale gateway routes in tinker training runs."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    status = commands.add_parser(
        "status",
        help="what is patched here, by which settings, and how it was activated",
        description="Import the SDKs that are installed, and show whether they are patched, the "
        "settings with where each came from, and how the shim is activated.",
        epilog=_STATUS_CODES,
    )
    status.set_defaults(command=_status)

    check = commands.add_parser(
        "check",
        help="ask a job's control plane and probe its route",
        description="Ask the control plane about a trainer job, and probe its route over fresh "
        "connections. Ends early when the outcome is clear: after 20 answers in a row, at once "
        "when the job is gone or the key is wrong.",
        epilog=_CHECK_CODES,
        formatter_class=raw,
    )
    check.add_argument(
        "url", metavar="URL", help="https://.../training/v1/rlorTrainerJobs/ACCOUNT/JOB"
    )
    check.add_argument(
        "--key-env",
        metavar="NAME",
        default="FIREWORKS_API_KEY",
        help="the environment variable that holds the key (default: FIREWORKS_API_KEY)",
    )
    check.add_argument(
        "--seconds",
        type=_number(0.5, 86400 * 7),
        help="how long to probe at most (default: 15; with --watch: until Ctrl-C)",
    )
    check.add_argument(
        "--rate",
        type=_number(0.1, 20),
        default=4.0,
        help="probes per second at most (default: 4; --watch goes down to 1 when all is quiet)",
    )
    check.add_argument(
        "--watch",
        action="store_true",
        help="go on, and say what changes: on a new job, whether its gateway still needs the shim",
    )
    check.set_defaults(command=_check)

    # `run` and `lab` are here for the help only: main() hands their arguments on as they are.
    run = commands.add_parser(
        "run",
        help="run a program with the shim on",
        usage=f"{program} run [-h] [-m] PROGRAM [ARGUMENT ...]",
        description="Run a script, or with -m a module, as Python itself would, with the shim on. "
        "TINKER_ROUTEFIX=0 runs it without. The processes that it starts get "
        "TINKER_ROUTEFIX_AUTOLOAD=1. The exit code is the program's.",
    )
    run.add_argument("-m", action="store_true", help="PROGRAM is a module")

    demo = commands.add_parser(
        "demo",
        help="race plain tinker, two earlier strategies and the shim over stale routes",
        description="Run one training script against a gateway on loopback that loses its "
        "routes: with plain tinker, with two earlier strategies, and with the shim. "
        "Exits with 0 if the shim trained everything exactly once.",
    )
    demo.add_argument("--steps", type=_steps, default=6, help="training steps (default: 6)")
    demo.add_argument("--seed", type=int, default=0, help="of the lab and the data (default: 0)")
    demo.set_defaults(command=_demo)

    commands.add_parser(
        "lab", help="serve a gateway that loses routes, to point a program at", add_help=False
    )
    for command in (status, check, demo):
        command.add_argument("--json", action="store_true", help="print JSON instead")
    return parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = Path(sys.argv[0]).stem
    program = name if name == "tinker-routefix" else "python -m tinker_routefix"
    parser, run = _parsers(program)
    if arguments[:1] == ["run"]:
        # How this one ends, by an exception too, is for the program to say.
        return _run(arguments[1:], run)
    try:
        if arguments[:1] == ["lab"]:
            return _lab(arguments[1:], program)
        options = parser.parse_args(arguments)
        code: int = options.command(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read it has seen enough. Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
