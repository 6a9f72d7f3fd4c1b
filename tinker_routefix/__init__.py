"""Survive stale gateway routes in tinker training runs.

``import tinker_routefix`` patches the tinker SDK so that creating a training client warms
the gateway's route up, and a 404 of the gateway is replayed once the control plane, or an
answer of the trainer, has shown that the job runs. ``TINKER_ROUTEFIX=0`` switches it off.

The import itself loads neither tinker nor httpx; switched off, it loads next to nothing.
"""

# No `__future__`: where the shim is switched off, the import has little to load but this file.
from ._switch import SettingError, switched_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Unpack

    # What is in the table of seams by name only: what bundles a program has to see it.
    from . import _clients, _connecting, _futures, _manager, _requests  # noqa: F401
    from ._errors import RouteTimeoutError, may_have_been_carried_out
    from ._log import RoutefixWarning
    from ._settings import Overrides
    from ._status import (
        AutoloadStatus,
        JobStatus,
        SdkStatus,
        SeamStatus,
        SettingStatus,
        Status,
        status,
    )
    from ._version import __version__
    from .events import subscribe

__all__ = [
    "AutoloadStatus",
    "JobStatus",
    "RouteTimeoutError",
    "RoutefixWarning",
    "SdkStatus",
    "SeamStatus",
    "SettingError",
    "SettingStatus",
    "Status",
    "__version__",
    "configure",
    "install",
    "may_have_been_carried_out",
    "status",
    "subscribe",
    "uninstall",
]

_LAZY = {
    "AutoloadStatus": "_status",
    "JobStatus": "_status",
    "RouteTimeoutError": "_errors",
    "RoutefixWarning": "_log",
    "SdkStatus": "_status",
    "SeamStatus": "_status",
    "SettingStatus": "_status",
    "Status": "_status",
    "__version__": "_version",
    "may_have_been_carried_out": "_errors",
    "status": "_status",
    "subscribe": "events",
}


def __getattr__(name: str) -> "Any":
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def install() -> None:
    """Patch tinker, now if it is imported and else when it is; harmless when repeated.

    ``import tinker_routefix`` calls this, unless ``TINKER_ROUTEFIX`` switched it off; this
    overrules that.

    Raises:
        SettingError: A setting in the environment is not accepted.
        RuntimeError: ``TINKER_ROUTEFIX_STRICT`` is on and this tinker does not fit.
    """
    from . import _patching, _settings

    _settings.current()
    _patching.install()


def uninstall() -> None:
    """Put tinker back exactly as it was; requests that wait at this moment go on to wait.

    Except for wrappers that another package has wrapped since: they stay and pass through.
    """
    from . import _patching

    _patching.uninstall()


def configure(**settings: "Unpack[Overrides]") -> None:
    """Override settings from the program, before the first client connects.

    Args:
        settings: Names and values as in docs/settings.md, without the prefix and in
            lower case: ``configure(retry_budget=60)``. Durations are in seconds.

    Raises:
        SettingError: A value is not accepted.
        TypeError: A name is not a setting.
        RuntimeError: A client has connected to a trainer job already.
    """
    import sys

    from . import _settings

    routes = sys.modules.get(f"{__name__}._routes")
    if routes is not None and routes.all_routes():
        raise RuntimeError("configure() comes too late: a client has connected to a trainer job")
    _settings.set_current(_settings.current().replace(**settings))


def _is_the_program() -> bool:
    """Whether what imports this is `tinker-routefix` or `python -m tinker_routefix`."""
    import sys
    from os.path import basename, splitext

    # An embedded interpreter may have none.
    argv: list[str] = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":  # until Python has found the module
        return sys.orig_argv[-len(argv)].removeprefix("-m").partition(".")[0] == __name__
    return splitext(basename(argv[0]))[0] == "tinker-routefix"  # noqa: PTH119, PTH122 - no pathlib


try:
    if switched_on():
        install()
except SettingError as error:
    # The command line has not begun yet, and could not say it in a line.
    if not _is_the_program():
        raise
    import sys

    sys.stderr.write(f"tinker-routefix: {error}\n")
    raise SystemExit(2) from None
