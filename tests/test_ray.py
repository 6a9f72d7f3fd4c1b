"""Ray workers, which no program starts itself: first on plain tinker, then with the shim.

The recipe of ``docs/processes.md`` as it stands there, told to stay on loopback.
"""

from __future__ import annotations

import importlib.util
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.common import exact
from tests.test_processes import AUTOLOAD, LINE, environment, race, recipe, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.test_processes import Run
    from tinker_routefix.lab import Lab

__all__ = ["environment", "run"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: the ray session of the noxfile does that",
)

ON_LOOPBACK = {
    # What Ray does on systems where it runs no clusters: it listens on loopback only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # No token in the home directory.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture
def small() -> Iterator[Callable[[str], str]]:
    """Makes a program's cluster a small one whose files are gone afterwards."""
    # pytest's own folder is too deep for the names of sockets, and nox's belongs to an
    # environment, where Ray wants none.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        size = f"num_cpus=2, object_store_memory=100_000_000, _temp_dir={folder!r}"

        def make(program: str) -> str:
            assert "ray.init(" in program
            return program.replace("ray.init(", f"ray.init({size}, include_dashboard=False, ")

        yield make


def without_the_variable(program: str) -> str:
    environment = 'runtime_env={"env_vars": {"TINKER_ROUTEFIX_AUTOLOAD": "1"}}'
    assert environment in program
    return program.replace(environment, "")


def line_in_the_driver(program: str) -> str:
    return LINE + without_the_variable(program)


def line_in_the_task(program: str) -> str:
    task = f"def train_with_the_line():\n    {LINE}    train()\n\n"
    return (
        without_the_variable(program)
        .replace("ray.get", f"{task}ray.get")
        .replace("remote(train)", "remote(train_with_the_line)")
    )


def as_it_stands(program: str) -> str:
    return program


@pytest.mark.parametrize(
    ("way", "variables", "helps"),
    [
        (without_the_variable, {}, False),
        (line_in_the_driver, {}, False),
        (line_in_the_task, {}, True),
        (as_it_stands, {}, True),
        # A cluster that the program starts has its environment.
        (without_the_variable, AUTOLOAD, True),
    ],
    ids=["plain", "line-in-the-driver", "line-in-the-task", "runtime-env", "own-cluster"],
)
def test_ray_workers_survive_only_with_the_shim_loaded_in_them(
    lab: Lab,
    run: Run,
    small: Callable[[str], str],
    way: Callable[[str], str],
    variables: dict[str, str],
    helps: bool,
) -> None:
    race(lab, processes=2)
    ended = run(lab, small(way(recipe("ray_workers.py"))), **ON_LOOPBACK, **variables)
    if helps:
        ended.survived()
        exact(lab, gradients=2, optim_steps=2)
    else:
        ended.crashed()
