"""A notebook, whose kernel's event loop runs: first on plain tinker, then with the shim.

The cells are those of ``docs/processes.md``, run by a real kernel in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest

from tests.common import exact
from tests.test_processes import AUTOLOAD, LINE, cells, environment, race, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.test_processes import Run
    from tinker_routefix.lab import Lab

__all__ = ["environment", "run"]

MODULES = ("ipykernel", "nbclient", "nbformat", "nest_asyncio")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason=f"not installed: {', '.join(MODULES)}; the jupyter session of the noxfile does that",
)

PROGRAM = """
import json, sys
import nbclient, nbformat
with open("cells.json") as file:
    cells = [nbformat.v4.new_code_cell(cell) for cell in json.load(file)]
notebook = nbformat.v4.new_notebook(cells=cells)
try:
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
except nbclient.exceptions.CellExecutionError as error:
    sys.exit(str(error))
for output in (output for cell in notebook.cells for output in cell.outputs):
    if output.get("name") == "stdout":
        print(output["text"])
"""

LOOP = "import asyncio\nprint(asyncio.get_running_loop().is_running())\n"
NESTED = "import nest_asyncio\nnest_asyncio.apply()\n"
NESTING = "from work import train_async\nimport asyncio\nasyncio.run(train_async())\n"


@pytest.mark.parametrize("nested", [False, True], ids=["loop", "nest-asyncio"])
@pytest.mark.parametrize("way", ["plain", "line-first", "line-last", "variable"])
def test_notebook_survives_only_with_the_shim_loaded(
    lab: Lab, run: Run, tmp_path: Path, way: str, nested: bool
) -> None:
    line, *work = cells("notebook")
    assert line == LINE
    if nested:
        work = [NESTED, *work, NESTING]
    if way == "line-first":
        work = [line, *work]
    if way == "line-last":
        # When tinker has been imported and its loop runs, and the race is still to come.
        work = ["from work import make_sampler\nkept = make_sampler()\n", line, *work]
    # One session for each cell that trains.
    trains = 3 if nested else 2
    race(lab, skip=way == "line-last", processes=trains)
    (tmp_path / "cells.json").write_text(json.dumps([LOOP, *work]), encoding="utf-8")
    folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    ended = run(
        lab,
        PROGRAM,
        **{name: str(tmp_path / name.lower()) for name in folders},
        **(AUTOLOAD if way == "variable" else {}),
    )
    if way == "plain":
        ended.crashed()
    else:
        ended.survived("True")
        exact(lab, gradients=trains, optim_steps=trains)
