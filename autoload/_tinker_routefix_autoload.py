"""Load the shim without a line of code: `TINKER_ROUTEFIX_AUTOLOAD=1`.

Python calls `load` at the start of every process of an environment that has the shim
installed, because of the files `tinker_routefix.pth` (until 3.17) and `tinker_routefix.start`
(from 3.15 on) beside this module. So it lies outside of the package, whose import would patch
already, and does nothing but wait: only a process that imports an SDK pays for the shim, and
only there the variable's value is read. Whatever is wrong with it or with the installation,
no interpreter and no program may fail from it: one line on stderr, and the SDK is imported
as it is.
"""

import os
import sys

VARIABLE = "TINKER_ROUTEFIX_AUTOLOAD"
SDKS = ("tinker", "fireworks")
"""What is waited for: the packages that the shim patches."""

waiting = False
"""Whether this process began with the variable set."""


def load() -> None:
    """Let the first import of an SDK load the shim, where the variable asks for it."""
    global waiting
    word = os.environ.get(VARIABLE, "").strip()
    if word and not waiting:
        waiting = True
        doorman = _Doorman(word)
        sys.meta_path.insert(0, doorman)
        # Something that Python started before us may have been quicker.
        for name in SDKS:
            if name in sys.modules:
                doorman.find_spec(name)


class _Doorman:
    """The first finder to be asked for any module; it finds none."""

    def __init__(self, word: str) -> None:
        self._word = word
        self._done = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        # It stays when it has done its work: another thread may be walking through the list.
        if name in SDKS and not self._done:
            self._done = True
            _load_shim(self._word)


def _load_shim(word: str) -> None:
    try:
        from importlib.util import find_spec
        from runpy import run_path

        shim = find_spec("tinker_routefix")
        if shim is None or not shim.submodule_search_locations:
            raise ModuleNotFoundError("there is no package tinker_routefix")  # noqa: TRY301
        # Read as a file: where the word is one for off, the package is not imported at all.
        file = os.path.join(shim.submodule_search_locations[0], "_switch.py")  # noqa: PTH118
        switch = run_path(file)
        if switch["parse_switch"](VARIABLE, word):
            import tinker_routefix  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever it is, the SDK is imported as it is
        if sys.stderr is not None:
            said = " ".join(str(error).split())
            sys.stderr.write(
                f"tinker_routefix is not loaded by {VARIABLE}: {type(error).__name__}: {said}\n"
            )
