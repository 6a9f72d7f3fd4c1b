"""``tinker-routefix status``: whether the shim would help a program of this environment."""

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

from tinker_routefix import _seams, _settings
from tinker_routefix._log import RoutefixWarning
from tinker_routefix._status import AutoloadStatus, SdkStatus, Status, status
from tinker_routefix._switch import AUTOLOAD

from .output import Mark, Row, Screen, screen

if TYPE_CHECKING:
    from collections.abc import Iterator

ACTIVE = 0
OFF = 3
CANNOT_HELP = 4

_NOT_HERE = ("not installed", "not in this release")
_PRESENT = ("patched", "does not fit", "replaced", "cannot be imported")


def show(*, as_json: bool, to: Screen | None = None) -> int:
    """Import what can be patched here, and say what came of it.

    Returns:
        The exit code: whether the shim is active, switched off, or cannot help.
    """
    to = to or screen(as_json=as_json)
    enabled = _settings.current().enabled
    found = _import_sdks() if enabled else {}
    now = status()
    sdks = tuple(_with_what_was_found(sdk, found) for sdk in now.sdks)
    now = dataclasses.replace(now, sdks=sdks)
    if enabled and not now.active and not any(sdk.state in _PRESENT for sdk in sdks):
        now = dataclasses.replace(now, reason="there is no SDK here that it patches")
    to.record(_document(now))
    _say(now, to)
    return ACTIVE if now.active else CANNOT_HELP if enabled else OFF


def _import_sdks() -> dict[str, tuple[str, str | None]]:
    """Import every module that has a seam; the state of each SDK that is not there to import."""
    found: dict[str, tuple[str, str | None]] = {}
    # Whatever they print has no place in our own output, and a misfit is shown there.
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


def _with_what_was_found(sdk: SdkStatus, found: dict[str, tuple[str, str | None]]) -> SdkStatus:
    if sdk.name not in found or sdk.state != "not imported":
        return sdk
    state, detail = found[sdk.name]
    return dataclasses.replace(sdk, state=state, detail=detail)


def _document(now: Status) -> dict[str, Any]:
    return {
        **dataclasses.asdict(now),
        "last_intervention": now.last_intervention,
        "python": platform.python_version(),
        "at": time.time(),
    }


def _say(now: Status, to: Screen) -> None:
    state = "active" if now.active else "NOT active"
    to.line(
        f"tinker_routefix {now.version} is {state}: {now.reason}", "good" if now.active else "bad"
    )
    to.table("SDKs", [_sdk(sdk) for sdk in now.sdks])
    here = {sdk.name for sdk in now.sdks if sdk.state not in _NOT_HERE}
    seams = [
        Row((seam.name, seam.state), "good" if seam.state.startswith("ours") else "dim")
        for seam, (sdk, _, _) in zip(now.seams, _seams.states(), strict=True)
        if sdk.name in here
    ]
    if seams:
        to.table("Seams", seams)
    to.table("Settings", list(_settings_rows(now)))
    to.table("Activation", list(_activation(now.autoload)))


def _sdk(sdk: SdkStatus) -> Row:
    said = sdk.state if sdk.detail is None else f"{sdk.state}: {sdk.detail}"
    release = f"{sdk.distribution} {sdk.release or ''}".rstrip()
    mark: Mark = "good" if sdk.state == "patched" else "dim" if sdk.state in _NOT_HERE else "warn"
    return Row((sdk.name, release, said), mark)


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
    yield Row(("import tinker_routefix", "always works"))
    wanted = autoload.requested == "on"
    yield Row((AUTOLOAD, autoload.requested), "warn" if wanted and not autoload.in_force else "")
    yield Row(
        ("its startup file", autoload.file or "not in place: reinstall, or use the import"),
        "" if autoload.file else "warn",
    )
    if autoload.in_force:
        yield Row(("in this process", "loaded at start, by the startup file"), "good")
    else:
        yield Row(("in this process", "imported, by this command"))
