"""Install the seams, verify them, and uninstall them again.

Installing inspects every seam of an SDK, then wraps them all, then publishes; any failure undoes
what was done, so there is never half a patch. The ledger keeps the very object that stood in the
owner's ``vars()``, so uninstalling restores by identity. Nothing of tinker is imported here:
post-import hooks wait for its modules.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import inspect
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import wrapt

from . import _log, _settings
from ._metadata import release_of, tracker
from ._seams import SDKS, Sdk, Seam

if TYPE_CHECKING:
    from collections.abc import Callable


SeamStateName = Literal[
    "not loaded", "original", "ours", "ours, under another wrapper", "replaced", "absent"
]


class SeamState(enum.Enum):
    """What stands at a seam now."""

    _value_: SeamStateName

    NOT_LOADED = "not loaded"
    """Its module has not been imported."""
    ORIGINAL = "original"
    OURS = "ours"
    WRAPPED_OVER = "ours, under another wrapper"
    REPLACED = "replaced"
    """Someone put something else there after us: the shim is without effect here."""
    ABSENT = "absent"


class _Patch(NamedTuple):
    """A line of the ledger."""

    seam: Seam
    owner: Any
    name: str
    inherited: bool
    raw: Any
    """What stood in the owner's ``vars()``, where it was not inherited."""
    wrapper: Any


class _MissingSeamError(Exception):
    pass


_FOLLOW_TRIES = ("_requests:follow_submission", "_requests:note_try")
_lock = threading.RLock()
_ledger: list[_Patch] = []
_loaded: set[str] = set()
_hooked: set[str] = set()
_active = False
_missing: dict[str, str] = {}
"""Why an SDK is not patched, by its name."""
_complained: set[Seam] = set()


def is_active() -> bool:
    """Whether the wrappers do anything; asked at every call of a wrapped function."""
    return _active


def follows_tries() -> bool:
    """Whether what tinker repeats can still be seen: nobody has taken these wrappers away."""
    with _lock:
        return _active and all(
            _state(patch.seam) is not SeamState.REPLACED
            for patch in _ledger
            if patch.seam.wrapper in _FOLLOW_TRIES
        )


def unusable() -> str | None:
    """Why an SDK that was found is not patched, where there is one."""
    return "; ".join(_missing[sdk.name] for sdk in SDKS if sdk.name in _missing) or None


def incompatibility(sdk: Sdk) -> str | None:
    """Why an SDK that was found is not patched."""
    return _missing.get(sdk.name)


def install() -> None:
    """Switch the shim on: wrap what is imported already, and the rest when it comes.

    Calling it twice is harmless.

    Raises:
        RuntimeError: The settings are strict and a seam is missing.
    """
    global _active
    with _lock:
        _active = True
        for sdk in SDKS:
            _patch_if_complete(sdk)
    # Outside of the lock: a hook for a module that is there already runs at once.
    for module in sorted({seam.module for sdk in SDKS for seam in sdk.seams} - _hooked):
        if module in sys.modules:
            # Another thread may be in the midst of importing it: wait for that.
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        wrapt.when_imported(module)(_module_came)
        _hooked.add(module)


def uninstall() -> None:
    """Switch the shim off and put back exactly what stood at every seam.

    A wrapper of ours that someone has wrapped again since stays where it is, passes
    everything through, and is reported by ``status()``.
    """
    global _active
    with _lock:
        _active = False
        _unwrap(_ledger)


def _module_came(module: Any) -> None:
    """Run when one of the modules has been imported; must not disturb that import."""
    with _lock:
        _loaded.add(module.__name__)
        for sdk in SDKS if _active else ():
            _patch_if_complete(sdk)


def _patch_if_complete(sdk: Sdk) -> None:
    if sdk.name in _missing or not all(seam.module in _loaded for seam in sdk.seams):
        return
    # What is in the ledger is wrapped already, or was left behind under another wrapper.
    wrapped = {patch.seam for patch in _ledger}
    begun: list[_Patch] = []
    try:
        patches = [_inspect(seam) for seam in sdk.seams if seam not in wrapped]
        for patch in patches:
            begun.append(patch)
            setattr(patch.owner, patch.name, patch.wrapper)
    except Exception as error:
        _unwrap(begun)
        if sdk.optional:
            _loaded.difference_update(seam.module for seam in sdk.seams)
            _log.event(logging.DEBUG, "shim.optional", f"{sdk.name} is not used: {error}")
            return
        _missing[sdk.name] = f"{sdk.name} {release_of(sdk.distribution)}: {error}"
        message = (
            f"tinker_routefix does not fit {_missing[sdk.name]}. Nothing of it has been patched: "
            "it works as without the shim, and a stale gateway route can end the run. Please "
            f"report it, with this message: {tracker()}"
        )
        if _settings.current().strict:
            raise RuntimeError(message) from error
        # Where warnings are errors, the user's own import must still not fail.
        _log.warn("shim.cannot_help", message)
        return
    _ledger.extend(begun)
    if begun:
        release = release_of(sdk.distribution)
        text = f"{sdk.name} {release} is patched at {len(begun)} seams"
        _log.event(logging.DEBUG, "shim.installed", text, release=release)


def _inspect(seam: Seam) -> _Patch:
    """Look whether a seam is what we take it for, and make its wrapper; changes nothing."""
    try:
        owner, name, original = wrapt.resolve_path(sys.modules[seam.module], seam.attribute)
    except AttributeError as error:
        raise _MissingSeamError(f"{seam.module} has no {seam.attribute}") from error
    where = f"{seam.module}.{seam.attribute}"
    if not callable(original) or inspect.iscoroutinefunction(original) is not seam.coroutine:
        kind = "a coroutine function" if seam.coroutine else "a plain function"
        raise _MissingSeamError(f"{where} is not {kind}")
    parameters = inspect.signature(original).parameters
    for parameter in seam.parameters:
        if parameter not in parameters:
            raise _MissingSeamError(f"{where} has no parameter {parameter!r}")
    wrapper = wrapt.FunctionWrapper(original, _behaviour(seam), enabled=is_active)
    inherited = name not in vars(owner)
    return _Patch(seam, owner, name, inherited, vars(owner).get(name), wrapper)


def _behaviour(seam: Seam) -> Callable[..., Any]:
    name, _, function = seam.wrapper.partition(":")
    module: Any = importlib.import_module(f"{__package__}.{name}")
    behaviour: Callable[..., Any] = getattr(module, function)
    return behaviour


def _unwrap(patches: list[_Patch]) -> None:
    """Undo patches, the last one first; what was wrapped over stays, also in the list."""
    for patch in reversed(patches.copy()):
        standing = vars(patch.owner).get(patch.name)
        if standing is patch.wrapper:
            if patch.inherited:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.raw)
        elif _is_wrapped_over(patch):
            _log.event(
                logging.WARNING,
                "seam.wrapped_over",
                f"{patch.seam.attribute} has been wrapped by someone else since; the shim's "
                "wrapper stays below it and passes everything through",
                seam=patch.seam.attribute,
            )
            continue
        patches.remove(patch)


def _is_wrapped_over(patch: _Patch) -> bool:
    standing = vars(patch.owner).get(patch.name)
    while standing is not None and standing is not patch.wrapper:
        standing = getattr(standing, "__wrapped__", None)
    return standing is not None


def _state(seam: Seam) -> SeamState:
    for patch in _ledger:
        if patch.seam is seam:
            if vars(patch.owner).get(patch.name) is patch.wrapper:
                return SeamState.OURS
            return SeamState.WRAPPED_OVER if _is_wrapped_over(patch) else SeamState.REPLACED
    module = sys.modules.get(seam.module)
    if module is None:
        return SeamState.NOT_LOADED
    try:
        wrapt.resolve_path(module, seam.attribute)
    except AttributeError:
        return SeamState.ABSENT
    return SeamState.ORIGINAL


def states() -> list[tuple[Sdk, Seam, SeamState]]:
    """What stands at every seam now."""
    with _lock:
        return [(sdk, seam, _state(seam)) for sdk in SDKS for seam in sdk.seams]


def verify() -> None:
    """At connect: wrap again what someone has replaced since, or say once that it cannot be."""
    if not _active:
        return
    for sdk, seam, state in states():
        if state is SeamState.REPLACED:
            _wrap_again(sdk, seam)


def _wrap_again(sdk: Sdk, seam: Seam) -> None:
    with _lock:
        if _state(seam) is not SeamState.REPLACED:  # another thread was quicker
            return
        (lost,) = (patch for patch in _ledger if patch.seam is seam)
        try:
            patch = _inspect(seam)
        except Exception as error:  # noqa: BLE001 - what stands there is not ours
            if seam not in _complained:
                _complained.add(seam)
                _log.warn(
                    "shim.cannot_help",
                    f"{seam.attribute} of {sdk.name} {release_of(sdk.distribution)} was replaced "
                    f"by another package, and what stands there cannot be wrapped: {error}. There "
                    "the shim no longer works; import tinker_routefix after that package.",
                )
            return
        setattr(patch.owner, patch.name, patch.wrapper)
        _ledger[_ledger.index(lost)] = patch
    _log.event(
        logging.INFO,
        "seam.wrapped_again",
        f"{seam.attribute} had been replaced by another package; it is wrapped again",
        seam=seam.attribute,
    )


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
