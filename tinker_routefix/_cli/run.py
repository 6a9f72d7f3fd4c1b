"""``tinker-routefix run``: a program as Python itself would run it, with the shim on.

Importing this package has switched the shim on already, or the kill switch has not let it. A
script, a module and code run in this process: they get a ``__main__`` of their own that stays
when it has ended (threads and child processes look things up in it), their own ``sys.argv`` and
``sys.path``, and tracebacks without our frames. Options of the interpreter need an interpreter
that begins with them, and a command is another program: these take the place of this process,
and find the shim by ``TINKER_ROUTEFIX_AUTOLOAD`` where it is not passed on to them.
"""

from __future__ import annotations

import builtins
import dataclasses
import io
import linecache
import os
import pkgutil
import runpy
import shutil
import sys
from importlib.machinery import BuiltinImporter, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from tinker_routefix._switch import AUTOLOAD, switched_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, TracebackType

_NO_PROGRAM = 2
"""What Python exits with when it cannot open a script."""
_FLAGS = "bBdEIOPqRsuv"
"""Options of the interpreter that take nothing. Not ``-S``, which hides installed packages, us
among them; nor ``-i`` and ``-x``, which are for programs that the interpreter itself begins."""
_WITH_VALUE = "WX"
_LONG_WITH_VALUE = "--check-hash-based-pycs"


class UsageError(Exception):
    """What was asked for is no program, or cannot be run like this."""


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """What to run, and how."""

    kind: Literal["script", "module", "code"]
    words: list[str]
    """Its ``sys.argv``; of a module and of code the first is its name or text."""
    options: list[str]
    """Of the interpreter."""


def parse(arguments: Sequence[str]) -> Program:
    """Read a command line as the interpreter does; what comes after the program is the program's.

    Raises:
        UsageError: It is not one that can be run.
    """
    options: list[str] = []
    left = list(arguments)
    while left and left[0].startswith("-") and left[0] not in ("-", "--"):
        word = left.pop(0)
        if word == _LONG_WITH_VALUE:
            options += [word, _value(word, left)]
            continue
        flags = ""
        for position, letter in enumerate(word[1:], start=1):
            rest = word[position + 1 :]
            if letter in "mc":
                options += [f"-{flags}"] if flags else []
                kind: Literal["module", "code"] = "module" if letter == "m" else "code"
                return Program(kind, [rest or _value(f"-{letter}", left), *left], options)
            if letter in _WITH_VALUE:
                options += [f"-{flags}"] if flags else []
                options += [f"-{letter}", rest or _value(f"-{letter}", left)]
                flags = ""
                break
            if letter not in _FLAGS:
                raise UsageError(
                    f"{word} is no option of run; those of the interpreter are, but for -i, -S, -x"
                )
            flags += letter
        options += [f"-{flags}"] if flags else []
    if left[:1] == ["--"]:
        del left[0]
    if not left:
        raise UsageError("which program? Give a script, a command, -m and a module, -c or -")
    return Program("script", left, options)


def _value(option: str, left: list[str]) -> str:
    if not left:
        raise UsageError(f"{option} needs a value")
    return left.pop(0)


def run(arguments: Sequence[str]) -> int:
    """Run a program to its end; whatever it raises goes on to the interpreter.

    Raises:
        UsageError: The arguments are not those of a program.
    """
    program = parse(arguments)
    if switched_on():
        # For the processes that it starts, unless somebody has decided about them.
        os.environ.setdefault(AUTOLOAD, "1")
    if program.options:
        _in_another_interpreter(program, arguments)
    if program.kind == "script":
        name = program.words[0]
        if name == "-":
            return _run_stdin(program.words)
        if (command := _command(name)) is not None:
            _say_where_nobody_looks_for_the_variable(name)
            _become(command, program.words)
        return _run_script(program.words)
    if program.kind == "code":
        text, *rest = program.words
        return _run_text(text, "<string>", ["-c", *rest])
    return _run_module(program.words)


# -- in another process --------------------------------------------------------------------------


def _command(name: str) -> str | None:
    """Where a command is; None where the name is that of a Python program.

    Python would run any file. What says by its first bytes that it is something else (a shell
    script, a binary) is a command, and so is a name that only the PATH knows.
    """
    if os.path.isfile(name):  # noqa: PTH113 - as Python does, links and all
        return os.path.abspath(name) if _is_foreign(name) else None  # noqa: PTH100
    if os.path.isdir(name) and os.path.exists(os.path.join(name, "__main__.py")):  # noqa: PTH110, PTH112, PTH118
        return None
    return None if os.path.dirname(name) else shutil.which(name)  # noqa: PTH120


def _is_foreign(path: str) -> bool:
    if not os.access(path, os.X_OK):
        return False
    with open(path, "rb") as file:  # noqa: PTH123
        line = file.readline(256)
    return line.startswith(b"\x7fELF") or (line.startswith(b"#!") and b"python" not in line)


def _in_another_interpreter(program: Program, arguments: Sequence[str]) -> NoReturn:
    """Begin again in an interpreter that has these options from its start."""
    here, called = sys.orig_argv[1:], ["run", *arguments]
    # In its own words, lest `-m` put the working directory before the standard library.
    ours = here[: -len(called)] if here[-len(called) :] == called else ["-m", "tinker_routefix"]
    letter = {"module": "-m", "code": "-c", "script": "--"}[program.kind]
    again = [*program.options, *ours, "run", letter, *program.words]
    _become(sys.executable, [sys.executable, *again])


def _become(file: str, words: list[str]) -> NoReturn:
    # Either is None in a process without a console.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    if os.name == "nt":  # pragma: no cover - there it would not be waited for
        import subprocess

        raise SystemExit(subprocess.call([file, *words[1:]]))  # noqa: S603 - what was asked for
    os.execv(file, words)  # noqa: S606


def _say_where_nobody_looks_for_the_variable(name: str) -> None:
    from tinker_routefix._status import status

    if switched_on() and status().autoload.file is None and sys.stderr is not None:
        sys.stderr.write(
            f"tinker-routefix run: this environment has no startup file that looks for {AUTOLOAD}: "
            f"what {name} starts is not patched (see tinker-routefix status)\n"
        )


# -- in this process -----------------------------------------------------------------------------


def _new_main(**names: Any) -> dict[str, Any]:
    """The names of a new ``__main__``, in the place of ours."""
    # Which of these a __main__ begins with differs between Python's releases.
    usual: dict[str, Any] = {"__annotations__": {}, "__cached__": None}
    there = usual.keys() & vars(sys.modules["__main__"]).keys()
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update({name: usual[name] for name in there}, __builtins__=builtins, **names)
    return main.__dict__


def _run_module(words: list[str]) -> int:
    sys.argv = words
    _new_main()
    _put_first_on_path(os.getcwd())  # noqa: PTH109
    return _run_as_main(words[0], alter_argv=True)


def _run_as_main(name: str, *, alter_argv: bool) -> int:
    # What the interpreter itself calls for `-m`: the public functions of runpy take the program's
    # __main__ away when it ends.
    run_module: Any = vars(runpy)["_run_module_as_main"]
    try:
        run_module(name, alter_argv=alter_argv)
    except SystemExit:
        raise
    except BaseException as error:
        _hide_our_frame(error.__traceback__)
        raise
    return 0


def _run_script(words: list[str]) -> int:
    program = words[0]
    path = os.path.abspath(program)  # noqa: PTH100 - as Python does, links and all
    sys.argv = words
    if pkgutil.get_importer(path) is not None:  # a directory or a zip file
        _new_main()
        _put_first_on_path(path, always=True)
        return _run_as_main("__main__", alter_argv=False)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: {reason}\n")
        return _NO_PROGRAM
    _put_first_on_path(os.path.dirname(os.path.realpath(program)))  # noqa: PTH120
    loader = SourceFileLoader("__main__", path)
    return _execute(source, path, _new_main(__file__=path, __loader__=loader))


def _run_stdin(words: list[str]) -> int:
    if sys.stdin is None or sys.stdin.isatty():
        # Somebody types; the prompt is the interpreter's own.
        _become(sys.executable, [sys.executable, *words])
    return _run_text(sys.stdin.buffer.read(), "<stdin>", words)


def _run_text(source: str | bytes, name: str, words: list[str]) -> int:
    sys.argv = words
    _put_first_on_path("")
    if isinstance(source, str) and sys.version_info >= (3, 13):  # pragma: no cover - not on each
        # From then on tracebacks show the lines of `-c`.
        lines = source.splitlines(keepends=True)
        linecache.cache[name] = (len(source), None, lines, name)
    names = _new_main(__loader__=BuiltinImporter)
    if isinstance(source, str):
        names.pop("__cached__", None)
    else:
        names["__file__"] = name
    return _execute(source, name, names)


def _execute(source: str | bytes, name: str, names: dict[str, Any]) -> int:
    try:
        code: CodeType = compile(source, name, "exec", dont_inherit=True)
        exec(code, names)  # noqa: S102 - what was asked for
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
