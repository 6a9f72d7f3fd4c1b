"""The command line: ``tinker-routefix``, or ``python -m tinker_routefix``.

The base install has to be enough for ``status``, ``check`` and ``run``, and for being told
what the others need, so nothing is imported here but the standard library; each command
brings its own imports.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_routefix._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LAB_NEEDS = ("aiohttp", "google.protobuf", "rich", "trustme", "zstandard")
_DEMO_NEEDS = ("tinker", *_LAB_NEEDS)
_USAGE = 2
_INTERRUPTED = 130
_FEWEST_STEPS = 4
_MOST_STEPS = 100
_HELP_WIDTH = 79


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
            f"The {command} needs {', '.join(missing)}: in a checkout, pip install '.[{extras}]'\n"
        )
    return bool(missing)


def _number(least: float, most: float, kind: type[int | float] = float) -> Callable[[str], float]:
    """A parser of numbers within bounds; argparse names it in its messages."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            bounds = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    number.__name__ = "whole number" if kind is int else "number"
    return number


def _demo(options: argparse.Namespace) -> int:
    if _lacks("demo", _DEMO_NEEDS, "lab,tinker"):
        return _USAGE
    from tinker_routefix.demo import run

    return run(steps=options.steps, seed=options.seed, as_json=options.json, tls=options.tls)


def _lab(options: argparse.Namespace) -> int:
    if _lacks("lab", _LAB_NEEDS, "lab"):
        return _USAGE
    serve: Callable[..., int] = importlib.import_module("tinker_routefix.lab._serve").serve
    return serve(
        port=options.port,
        replicas=options.replicas,
        stale=options.stale,
        stale_from_start=options.stale_from_start,
        flap=options.flap,
        work=options.work,
        state=options.state,
        tls=options.tls,
    )


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
    """What comes after the program is the program's, so argparse only explains."""
    from . import run as command

    if arguments[:1] in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    try:
        return command.run(arguments)
    except command.UsageError as error:
        parser.error(str(error))


_STATUS_CODES = """\
exit codes:
  0  active: a program that loads the shim here is patched
  3  switched off
  4  no supported SDK found
  2  wrong usage"""
_CHECK_CODES = """\
exit codes:
  0    healthy: the control plane answers RUNNING, the pod answered every probe
  3    racing: the route was refused while the control plane answered RUNNING
  4    gone: the job has ended or is suspended, or there is none
  5    wrong key: the gateway or the control plane does not accept it
  6    unreachable: no answer from the gateway; what is at fault is named
  7    unclear: the job has not started, the control plane cannot be asked, or
       answers differ
  2    wrong usage, or no key
  130  interrupted
  143  terminated

The control plane is asked at the gateway's own origin, or where
TINKER_ROUTEFIX_CONTROL_PLANE_URL says. The key goes to these two and is never
shown."""
_RUN_HELP = """\
what PROGRAM can be:
  SCRIPT [ARGUMENT ...]     a file; a directory or zip file with a __main__.py
  -m MODULE [ARGUMENT ...]  a module
  -c CODE [ARGUMENT ...]    code
  - [ARGUMENT ...]          what comes from standard input
  COMMAND [ARGUMENT ...]    any other command, such as torchrun

OPTION is one of the interpreter's, such as -u, -O, -X or -W; -- ends them. With
one, and for a command, another process takes the place of this one; everything
else runs in this one."""


def _parsers(program: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line, and the part of it that is `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=program, description="Survive stale gateway routes in tinker training runs."
    )
    parser.add_argument("--version", action="version", version=f"tinker-routefix {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    status = commands.add_parser(
        "status",
        help="whether a program of this environment can be patched, and by which settings",
        description=textwrap.fill(
            "Import the SDKs that are installed, and show whether they can be patched, the "
            "settings with where each came from, and how a program gets the shim. It looks at this "
            "environment, not at a program that runs.",
            _HELP_WIDTH,
        ),
        epilog=_STATUS_CODES,
        formatter_class=raw,
    )
    status.set_defaults(command=_status)

    check = commands.add_parser(
        "check",
        help="ask a job's control plane and probe its route",
        description=textwrap.fill(
            "Ask the control plane about a trainer job, and probe its route over fresh "
            "connections. Ends early when the outcome is clear: after 20 answers in a row, at once "
            "when the job is gone or the key is wrong.",
            _HELP_WIDTH,
        ),
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
        help="go on until Ctrl-C, and say what changes: on a new job, whether its gateway still "
        "needs the shim",
    )
    check.set_defaults(command=_check)

    # Here for the help only: main() hands its arguments on as they are.
    run = commands.add_parser(
        "run",
        help="run a program with the shim on",
        usage=f"{program} run [-h] [OPTION ...] [--] PROGRAM",
        description=textwrap.fill(
            "Run a program as Python itself would, with the shim on. TINKER_ROUTEFIX=0 runs it "
            "without. The processes that it starts get TINKER_ROUTEFIX_AUTOLOAD=1. The exit code "
            "is the program's.",
            _HELP_WIDTH,
        ),
        epilog=_RUN_HELP,
        formatter_class=raw,
    )

    demo = commands.add_parser(
        "demo",
        help="race plain tinker, two earlier strategies and the shim over stale routes",
        description="Run one training script against a gateway on loopback that loses its "
        "routes: with plain tinker, with two earlier strategies, and with the shim. "
        "Exits with 0 if the shim trained everything exactly once.",
    )
    demo.add_argument(
        "--steps",
        # The race strikes up to step 4.
        type=_number(_FEWEST_STEPS, _MOST_STEPS, int),
        default=6,
        help="training steps (default: 6)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the lab and the data (default: 0)")
    demo.add_argument("--tls", action="store_true", help="race over https")
    demo.set_defaults(command=_demo)

    lab = commands.add_parser(
        "lab",
        help="serve a gateway that loses routes, to point a program at",
        description="Serve a control plane, a gateway that loses routes, and a trainer, until "
        "Ctrl-C.",
    )
    lab.add_argument(
        "--port",
        type=_number(0, 65535, int),
        default=0,
        help="to listen on (default: 0, a free one)",
    )
    lab.add_argument(
        "--replicas",
        type=_number(1, math.inf, int),
        default=1,
        help="of the gateway (default: 1)",
    )
    lab.add_argument(
        "--stale",
        metavar="SECONDS",
        type=_number(0, math.inf),
        default=0.0,
        help="refuse a job for so long, from its first create_session on",
    )
    lab.add_argument(
        "--stale-from-start", action="store_true", help="let --stale begin with the lab"
    )
    lab.add_argument(
        "--flap",
        metavar="CHANCE",
        type=_number(0, 1),
        default=0.0,
        help="refuse requests at random (0 to 1)",
    )
    lab.add_argument(
        "--work",
        metavar="SECONDS",
        type=_number(0, math.inf),
        default=0.0,
        help="how long an operation takes",
    )
    lab.add_argument(
        "--state",
        default="JOB_STATE_RUNNING",
        help="the state of the jobs in the control plane's response (default: JOB_STATE_RUNNING)",
    )
    lab.add_argument(
        "--tls", action="store_true", help="serve https, with a certificate authority of its own"
    )
    lab.set_defaults(command=_lab)

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
