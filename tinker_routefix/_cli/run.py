"""``tinker-routefix run``: a program as Python itself would run it, with the shim on.

Importing this package has switched the shim on already, or the kill switch has not let it. The
program gets a ``__main__`` of its own that stays when it has ended (threads and child processes
look things up in it), its own ``sys.argv`` and ``sys.path``, and tracebacks without our frames.
"""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tinker_routefix._switch import AUTOLOAD, switched_on

if TYPE_CHECKING:
    from types import TracebackType

_NO_PROGRAM = 2
"""What Python exits with when it cannot open a script."""


def run(arguments: list[str], *, as_module: bool) -> int:
    """Run a program to its end; whatever it raises goes on to the interpreter."""
    if switched_on():
        # For the processes that it starts, unless somebody has decided about them.
        os.environ.setdefault(AUTOLOAD, "1")
    program = arguments[0]
    path = os.path.abspath(program)  # noqa: PTH100 - as Python does, links and all
    sys.argv = arguments
    # Which of these a __main__ begins with differs between Python's releases.
    usual: dict[str, Any] = {"__annotations__": {}, "__cached__": None}
    names = usual.keys() & vars(sys.modules["__main__"]).keys()
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update({name: usual[name] for name in names}, __builtins__=builtins)
    # What the interpreter itself calls for `-m`: the public functions of runpy take the program's
    # __main__ away when it ends.
    run_module: Any = vars(runpy)["_run_module_as_main"]
    try:
        if as_module:
            _put_first_on_path(os.getcwd())  # noqa: PTH109
            run_module(program, alter_argv=True)
        elif pkgutil.get_importer(path) is not None:  # a directory or a zip file
            _put_first_on_path(path, always=True)
            run_module("__main__", alter_argv=False)
        else:
            try:
                with io.open_code(path) as file:
                    source = file.read()
            except OSError as error:
                reason = f"[Errno {error.errno}] {error.strerror}"
                sys.stderr.write(f"{sys.executable}: can't open file {path!r}: {reason}\n")
                return _NO_PROGRAM
            _put_first_on_path(os.path.dirname(os.path.realpath(program)))  # noqa: PTH120
            loader = SourceFileLoader("__main__", path)
            main.__dict__.update(__file__=path, __loader__=loader)
            exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # noqa: S102
    except SystemExit:
        raise
    except BaseException as error:
        _hide_our_frame(error.__traceback__)
        raise
    return 0


def _put_first_on_path(directory: str, *, always: bool = False) -> None:
    """In the place of what Python has put there for us, unless it was told to put nothing there.

    What it has to find ``__main__`` in, it puts there all the same.
    """
    if not sys.flags.safe_path:
        sys.path[0] = directory
    elif always:
        sys.path.insert(0, directory)


def _hide_our_frame(ours: TracebackType | None) -> None:
    """Let the interpreter report an exception as it would have without us, and then exit."""
    hook = sys.excepthook
    traceback = None if ours is None else ours.tb_next

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        sys.excepthook = hook
        hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = report
