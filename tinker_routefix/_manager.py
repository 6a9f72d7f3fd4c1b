"""The job manager's seam: where the control plane of a gateway is, and with whose key."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from . import _addresses, _log, _settings

if TYPE_CHECKING:
    from collections.abc import Callable


def note_manager(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """``TrainerJobManager.__init__``: it knows where the control plane of its gateway is."""
    wrapped(*args, **kwargs)
    try:
        root = str(instance.base_url)
        gateway = getattr(instance, "trainer_gateway_url", None) or root
        verify = getattr(instance, "_verify_for_url", None)
        manager = weakref.ref(instance)
        _addresses.register(
            str(gateway).rstrip("/"),
            _addresses.Manager(
                functools.partial(_address_of, manager, root, verify is None or bool(verify(root))),
                functools.partial(_account_of, manager),
            ),
        )
    except Exception as error:  # noqa: BLE001 - then the gateway's own origin is asked
        _log.own_failure("noting a job manager", error, strict=_settings.current().strict)


def _account_of(manager: weakref.ref[Any]) -> str | None:
    """Whose jobs it manages, where it knows: asking it could send a request."""
    account = getattr(manager(), "_account_id", None)
    return account if isinstance(account, str) else None


def _address_of(manager: weakref.ref[Any], root: str, verify: bool) -> _addresses.Address:
    """Where the manager asks, with its headers for as long as the program keeps it."""
    instance = manager()
    if instance is None:
        return _addresses.Address(root, None, verify)
    added = instance.additional_headers or {}
    headers = {
        name.lower(): value
        for name, value in instance._headers().items()
        if name.lower() in _addresses.CREDENTIALS or name in added
    }
    return _addresses.Address(root, headers, verify)
