"""What the import costs, as a script of pyperf's: a fresh interpreter for every value.

pyperf's workers do not inherit ``PYTHONDONTWRITEBYTECODE``, so that all but perhaps the first have
bytecode at hand, as with an installed package; what is reported is the median.
"""

from __future__ import annotations

import os
import time

import pyperf  # type: ignore[import-untyped]

CASES = {
    "switched off": ("", "import tinker_routefix", "0"),
    "wrapt": ("", "import wrapt", "0"),
    "on, beyond wrapt": ("import wrapt", "import tinker_routefix", "1"),
    "tinker": ("", "import tinker", "0"),
    "on, beyond wrapt, beside tinker": ("import wrapt, tinker", "import tinker_routefix", "1"),
}
"""What has been imported before, what is timed, and whether the shim is switched on."""


def first_import(loops: int, before: str, timed: str, switch: str) -> float:
    """The seconds of one import; there is no second one in a process."""
    assert loops == 1, "a module is imported once"
    os.environ["TINKER_ROUTEFIX"] = switch
    exec(before)  # noqa: S102 - our own code
    began = time.perf_counter()
    exec(timed)  # noqa: S102
    return time.perf_counter() - began


if __name__ == "__main__":
    runner = pyperf.Runner(values=1, warmups=0, loops=1)
    for name, case in CASES.items():
        runner.bench_time_func(name, first_import, *case)
