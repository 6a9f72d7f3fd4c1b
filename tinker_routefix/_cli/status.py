"""``tinker-routefix status``: whether the shim would help a program of this environment.

It patches its own process to find out, and says nothing about any other: a reader who takes
"this command is patched" for "my training is patched" finds out when the training has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import platform
import sys
import time
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tinker_routefix import _patching, _seams, _settings
from tinker_routefix._log import RoutefixWarning
from tinker_routefix._status import AutoloadStatus, SdkStatus, Status, status
from tinker_routefix._switch import AUTOLOAD

from .output import Mark, Row, Screen, screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinker_routefix._status import SdkState

ACTIVE = 0
OFF = 3
CANNOT_HELP = 4

_NOT_HERE = ("not installed", "not in this release")
_PRESENT = ("patched", "does not fit", "replaced", "cannot be imported")


def show(*, as_json: bool, to: Screen | None = None) -> int:
    """Import what can be patched here, and say what came of it.

    Returns:
        The exit code: whether the shim is active, switched off, or found no SDK that it supports.
    """
    to = to or screen(as_json=as_json)
    enabled = _settings.current().enabled
    found = _import_sdks() if enabled else {}
    now = status()
    sdks = tuple(_with_what_was_found(sdk, found) for sdk in now.sdks)
    now = dataclasses.replace(now, sdks=sdks)
    if enabled and not now.active and not any(sdk.state in _PRESENT for sdk in sdks):
        now = dataclasses.replace(now, reason="no supported SDK found")
    to.record(_document(now))
    _say(now, to)
    return ACTIVE if now.active else CANNOT_HELP if enabled else OFF


def _import_sdks() -> dict[str, tuple[SdkState, str | None]]:
    """Import every module that has a seam; the state of each SDK that is not there to import."""
    found: dict[str, tuple[SdkState, str | None]] = {}
    # Whatever they print has no place in our own output, and what does not fit is shown there.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", RoutefixWarning)
        for sdk in _seams.SDKS:
            top = sdk.seams[0].module.partition(".")[0]
            if find_spec(top) is None:
                found[sdk.name] = ("not installed", None)
                continue
            try:
                for seam in sdk.seams:
                    importlib.import_module(seam.module)
            except ModuleNotFoundError as error:
                own = str(error.name).startswith(top)
                found[sdk.name] = (
                    ("not in this release", None)
                    if own
                    else ("cannot be imported", f"there is no module {error.name}")
                )
            except Exception as error:  # noqa: BLE001 - somebody else's import
                found[sdk.name] = ("cannot be imported", type(error).__name__)
    return found


def _with_what_was_found(
    sdk: SdkStatus, found: dict[str, tuple[SdkState, str | None]]
) -> SdkStatus:
    if sdk.name not in found or sdk.state != "not imported":
        return sdk
    state, detail = found[sdk.name]
    return dataclasses.replace(sdk, state=state, detail=detail)


def _document(now: Status) -> dict[str, Any]:
    return {
        **dataclasses.asdict(now),
        "process": "tinker-routefix status",
        "last_intervention": now.last_intervention,
        "python": platform.python_version(),
        "at": time.time(),
    }


def _say(now: Status, to: Screen) -> None:
    if now.active:
        # One distribution can have two parts that are patched.
        sdks = dict.fromkeys(_release(sdk) for sdk in now.sdks if sdk.state == "patched")
        can = " and ".join(sdks)
        to.line(f"tinker_routefix {now.version} can patch {can} in this environment", "good")
    else:
        to.line(f"tinker_routefix {now.version} patches NOTHING here: {now.reason}", "bad")
    to.line(_WHOM)
    to.table("SDKs in this environment", [_sdk(sdk) for sdk in now.sdks])
    here = {sdk.name for sdk in now.sdks if sdk.state not in _NOT_HERE}
    functions = [
        Row(
            (seam.name, _STANDING.get(seam.state, seam.state)),
            "good" if seam.state.startswith("ours") else "dim",
        )
        for seam, (sdk, _, _) in zip(now.seams, _patching.states(), strict=True)
        if sdk.name in here
    ]
    if functions:
        to.table("Functions, as they are in this command", functions)
    to.table("Settings", list(_settings_rows(now)))
    to.table("How a program gets the shim", list(_activation(now.autoload)))


_WHOM = (
    "This command looked at itself. It says nothing about a training run that is under way: only "
    "a program that gets the shim in one of the ways below is patched, and only there does "
    "print(tinker_routefix.status()) tell."
)
_STANDING = {
    "ours": "patched",
    "ours, under another wrapper": "patched, and wrapped by another package",
    "original": "not patched",
}


def _sdk(sdk: SdkStatus) -> Row:
    state = "can be patched" if sdk.state == "patched" else sdk.state
    said = state if sdk.detail is None else f"{state}: {sdk.detail}"
    mark: Mark = "good" if sdk.state == "patched" else "dim" if sdk.state in _NOT_HERE else "warn"
    return Row((sdk.name, _release(sdk), said), mark)


def _release(sdk: SdkStatus) -> str:
    return f"{sdk.distribution} {sdk.release or ''}".rstrip()


def _settings_rows(now: Status) -> Iterator[Row]:
    for setting in now.settings:
        value = setting.value
        if isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, float):
            value = f"{value:g}"
        mark: Mark = "dim" if setting.source == "default" else ""
        yield Row((setting.variable, "" if value is None else str(value), setting.source), mark)


def _activation(autoload: AutoloadStatus) -> Iterator[Row]:
    yield Row(("import tinker_routefix", "in the program, before its first client"))
    yield Row(("tinker-routefix run", "starts a program with it"))
    wanted = autoload.requested == "on"
    if autoload.file is None:
        said = "does nothing: its startup file is not in place, reinstall"
    elif wanted:
        said = "set: programs started from here load it"
    elif autoload.requested == "unset":
        said = "not set; with 1, programs started from here load it"
    else:
        said = autoload.requested
    missing = wanted and autoload.file is None
    yield Row((AUTOLOAD, said), "warn" if missing or autoload.requested == "refused" else "")
    if autoload.file is not None:
        yield Row(("its startup file", autoload.file))
    how = "by the startup file" if autoload.in_force else "imported"
    yield Row(("in this command", how), "good" if autoload.in_force else "")
