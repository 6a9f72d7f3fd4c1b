"""``python -m tinker_routefix``: what can be done with the shim from a shell.

The base install has to be enough to get this far and to be told what is missing, so nothing
is imported here but the standard library; each command brings its own imports.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEMO_NEEDS = ("tinker", "aiohttp", "click", "google.protobuf", "rich", "zstandard")
_INTERRUPTED = 130
_FEWEST_STEPS = 4
_MOST_STEPS = 100


def _missing(modules: Sequence[str]) -> list[str]:
    """List the modules that are not installed, without importing them."""
    missing = []
    for module in modules:
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # not even the package around it is there
            found = None
        if found is None:
            missing.append(module)
    return missing


def _steps(text: str) -> int:
    steps = int(text)
    if not _FEWEST_STEPS <= steps <= _MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"{steps} is not between {_FEWEST_STEPS} (the race strikes up to step 4) "
            f"and {_MOST_STEPS}"
        )
    return steps


def _demo(options: argparse.Namespace) -> int:
    if missing := _missing(_DEMO_NEEDS):
        sys.stderr.write(
            f"The demo needs {', '.join(missing)}: pip install 'tinker-routefix[lab,tinker]'\n"
        )
        return 2
    from tinker_routefix.demo import run

    return run(steps=options.steps, seed=options.seed, as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tinker_routefix",
        description="Survive stale gateway routes in tinker training runs.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="race plain tinker, two earlier strategies and the shim over stale routes",
        description="Run one training script against a gateway on loopback that loses its "
        "routes: with plain tinker, with two earlier strategies, and with the shim. "
        "Exits with 0 if the shim trained everything exactly once.",
    )
    demo.add_argument("--steps", type=_steps, default=6, help="training steps (default: 6)")
    demo.add_argument("--seed", type=int, default=0, help="of the lab and the data (default: 0)")
    demo.add_argument("--json", action="store_true", help="print the results as JSON instead")
    demo.set_defaults(command=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.command(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
