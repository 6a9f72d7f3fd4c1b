"""Where a job's control plane is, and with whose key it is asked.

The question carries a key. So it goes over https, or within this machine where the gateway is
http on loopback as well; anywhere else it is not asked, and that is said when the first client
connects. A gateway that is plain http on a network gets its key from tinker anyway, but the
shim does not add to that: an https control plane has to be configured for it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from . import _settings
from ._job import base_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._job import Job

CREDENTIALS = ("authorization", "x-api-key", "cf-access-client-id", "cf-access-client-secret")
"""The request headers that tinker and the SDKs on top of it carry their keys in."""


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where a control plane is, as an SDK in this process knows it."""

    root: str
    """Its URL up to, not including, ``/v1``."""
    headers: Mapping[str, str] | None = dataclasses.field(repr=False)
    """What it is asked with; None: the refused request's own credentials."""
    verify: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Manager:
    """A job manager of the program: it knows where the control plane of a gateway is."""

    address: Callable[[], Address]
    """Without headers once the program has let go of the manager."""
    account: Callable[[], str | None] = lambda: None
    """None where the manager has not found out yet."""


_managers: dict[str, list[Manager]] = {}
"""By gateway. Of those that the program has let go of, one is kept: for its address."""


def register(gateway: str, manager: Manager) -> None:
    """Note a job manager."""
    gateway = base_of(gateway) or gateway
    kept = [known for known in _managers.get(gateway, ()) if known.address().headers is not None]
    _managers[gateway] = [*kept, manager]


def asker(job: Job, credentials: Mapping[str, str]) -> Address | None:
    """Who asks about a job: where, and with whose key.

    The manager with this account and key; else the only one of this gateway and account; else
    the refused request itself, where a manager's control plane is.
    """
    known = [(manager.account(), manager.address()) for manager in _managers.get(job.gateway, ())]
    if not known:
        return None
    of_account = [
        address
        for account, address in known
        if address.headers is not None and account in (None, job.account)
    ]
    keys = _keys(credentials)
    for address in reversed(of_account):
        if keys & _keys(address.headers or {}):
            return address
    if len({frozenset(_keys(address.headers or {})) for address in of_account}) == 1:
        return of_account[-1]
    _, last = known[-1]
    return Address(last.root, None, last.verify)


def _keys(headers: Mapping[str, str]) -> set[str]:
    return {
        headers[name].removeprefix("Bearer ")
        for name in ("authorization", "x-api-key")
        if name in headers
    }


def address_of(job: Job, credentials: Mapping[str, str]) -> Address:
    """What was configured, else what a job manager of this process knows, else the gateway."""
    configured = _settings.current().control_plane_url
    if configured is None:
        address = asker(job, credentials)
        if address is not None:
            # As the program wrote it, perhaps with a password in it.
            return dataclasses.replace(address, root=base_of(address.root) or "")
    return Address(configured or job.gateway, None, verify=True)


def may_carry_key(root: str, job: Job) -> bool:
    """Whether a key may be sent to a control plane."""
    on_loopback = _settings.http_on_loopback
    return root.startswith("https:") or (on_loopback(root) and on_loopback(job.gateway))


def is_known(gateway: str) -> bool:
    """Whether a job manager of the program knows the control plane of a gateway."""
    return gateway in _managers
