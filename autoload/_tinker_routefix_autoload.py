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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

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
        watcher = _ImportWatcher(word)
        sys.meta_path.insert(0, watcher)
        # Something that Python started before us may have been quicker.
        if any(name in sys.modules for name in SDKS):
            watcher.sdk_comes()


class _ImportWatcher:
    """The first finder to be asked for any module: it has an SDK's loader call it."""

    def __init__(self, word: str) -> None:
        self._word = word
        self._done = False

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name not in SDKS or self._done:
            return None
        # Whoever only looks for an SDK, with `importlib.util.find_spec`, gets no further.
        for finder in sys.meta_path:
            if isinstance(finder, _ImportWatcher) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def sdk_comes(self) -> None:
        # It stays in the list when it has done its work: another thread may be walking through it.
        if not self._done:
            self._done = True
            _load_shim(self._word)


class _Loader:
    """An SDK's own loader, which loads the shim first."""

    def __init__(self, loader: object, watcher: _ImportWatcher) -> None:
        self._loader = loader
        self._watcher = watcher

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: object) -> object:
        return self._loader.create_module(spec)  # type: ignore[attr-defined]

    def exec_module(self, module: object) -> None:
        # What is left in the module is as if nobody had looked.
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[attr-defined]
        self._watcher.sdk_comes()
        self._loader.exec_module(module)  # type: ignore[attr-defined]


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
