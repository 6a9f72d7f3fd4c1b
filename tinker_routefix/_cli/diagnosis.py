"""Why a request of ``check`` got no answer: the proxy, certificate, scheme or name at fault.

An exception of httpx says what failed, not whose fault it is, and its text can be empty or hold
a proxy's password. So the errors below it are looked at, and only what is known to hold no
secret is repeated.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import socket
import ssl
import urllib.request
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator


_E = TypeVar("_E", bound=BaseException)


class Fault(enum.Enum):
    """What kept a request from being answered."""

    PROXY = "proxy"
    CERTIFICATE = "certificate"
    SCHEME = "scheme"
    NAME = "name"
    """The host's name cannot be resolved."""
    NETWORK = "network"
    """Nobody answers, or not in time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that the environment names for a URL."""

    variable: str
    """Which variable names it, as it is written there."""
    host: str
    """Host and port, without the user name and password that may be before them."""

    def __str__(self) -> str:
        return f"{self.host} ({self.variable})"


def proxy_for(url: str) -> Proxy | None:
    """The proxy that requests to a URL go through, by the rules of httpx and the standard library.

    Only variables of the environment are looked at: a proxy from the system's settings has no name
    that could be said.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies_environment()
    if urllib.request.proxy_bypass_environment(host, proxies):  # type: ignore[attr-defined]
        return None
    for kind in (parts.scheme, "all"):
        value = proxies.get(kind)
        if value:
            names = (f"{kind}_proxy", f"{kind.upper()}_PROXY")
            variable = next((name for name in names if os.environ.get(name)), names[-1])
            return Proxy(variable, _host_of(value))
    return None


def _host_of(value: str) -> str:
    parts = urlsplit(value if "://" in value else f"http://{value}")
    try:
        port = parts.port
    except ValueError:
        port = None
    host = parts.hostname or "a proxy"
    return host if port is None else f"{host}:{port}"


def explain(error: BaseException, url: str, proxy: Proxy | None) -> tuple[Fault, str]:
    """Whose fault it is that a request was not answered, and what happened."""
    causes = list(_causes(error))
    where = urlsplit(url).netloc.rpartition("@")[2]
    through = "" if proxy is None else f", through the proxy {proxy},"
    verification = _first(causes, ssl.SSLCertVerificationError)
    if verification is not None:
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        by = f" with {' and '.join(names)}" if names else ""
        return Fault.CERTIFICATE, (
            f"the certificate of {where}{through} is not accepted{by}: "
            f"{verification.verify_message}"
        )
    if _first(causes, ssl.SSLError) is not None:
        return Fault.SCHEME, f"{where}{through} does not speak TLS, which https needs"
    if proxy is not None and _first(causes, httpx.ProxyError, httpx.ConnectError) is not None:
        status = re.match(r"(\d{3})\b", str(error))
        said = f" answered HTTP {status[1]}" if status else " cannot be reached"
        return Fault.PROXY, f"the proxy {proxy}{said}"
    if _first(causes, socket.gaierror) is not None:
        return Fault.NAME, f"the name {urlsplit(url).hostname} cannot be resolved"
    if _first(causes, ConnectionRefusedError) is not None:
        return Fault.NETWORK, f"{where} refuses connections"
    if isinstance(error, httpx.ConnectTimeout):
        return Fault.NETWORK, f"no connection to {where} in time{through}".rstrip(",")
    if isinstance(error, httpx.ConnectError):
        return Fault.NETWORK, f"no connection to {where}"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return Fault.NETWORK, f"the connection was closed without an answer{through}".rstrip(",")
    return Fault.NETWORK, f"no answer ({type(error).__name__}){through}".rstrip(",")


def _first(causes: list[BaseException], *kinds: type[_E]) -> _E | None:
    return next((cause for cause in causes if isinstance(cause, kinds)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, all that it was raised from, and the members of groups."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        waiting += [link for link in (one.__cause__, one.__context__) if link is not None]
