"""Which trainer job a base URL leads to, if any.

This is where it is decided whom the shim touches at all: only clients whose base URL is a
trainer job's route on a gateway. The URL is the only source; nothing is asked. Keys are sent
to the addresses that are made here, so what httpx, a proxy or a server could read in another
way than this module is nobody's route.
"""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import urlsplit

_CHARACTER = r"[\w.~%!$&'()*+,;=:@-]"
"""What may stand in a path without being encoded."""
_ROUTE = re.compile(
    rf"(?P<gateway>https?://[^/]+(?:/(?:{_CHARACTER}|/)*?)??)/training/v1/rlorTrainerJobs"
    rf"/(?P<account>{_CHARACTER}+)/(?P<name>{_CHARACTER}+)(?:/.*)?",
    re.ASCII,
)
_DOTS = re.compile(r"(?:^|/)(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)
_SLASH = re.compile(r"%(?:2f|5c)", re.IGNORECASE)
"""A slash or backslash that may be taken for one only further on."""
_PORTS = {"http": 80, "https": 443}


def base_of(url: str) -> str | None:
    """Scheme, host, port and path of a URL, always spelt alike; None for any other text.

    Never a user name, a query or a fragment. The host is in lower case, the scheme's own
    port and slashes at the end are left out.
    """
    # What tinker hands over is httpx's spelling, and that has nothing else in it.
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host or "%" in host:
        return None
    host = f"[{host}]" if ":" in host else host
    netloc = host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"


def origin_of(url: str) -> str | None:
    """Scheme, host and port of a URL, and nothing else of it; None for any other text."""
    base = base_of(url)
    return None if base is None else "/".join(base.split("/")[:3])


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A trainer job behind a gateway."""

    gateway: str
    """Scheme, host, port and any path in front of ``/training``; never a user name."""
    account: str
    name: str

    @classmethod
    def from_url(cls, url: str) -> Job | None:
        """The job that a base URL leads to, or None where it is no trainer-job route."""
        base = base_of(url) or ""
        match = _ROUTE.fullmatch(base)
        if match is None or _DOTS.search(base):
            return None
        gateway, account, name = match.group("gateway", "account", "name")
        if _SLASH.search(f"{account}{name}"):
            return None
        return cls(gateway.rstrip("/"), account, name)

    @property
    def url(self) -> str:
        """The base URL that leads to this job."""
        return f"{self.gateway}/training/v1/rlorTrainerJobs/{self.account}/{self.name}"

    def control_plane_url(self, root: str | None = None) -> str:
        """Where the control plane answers for this job; ``root`` defaults to the gateway."""
        return f"{root or self.gateway}/v1/accounts/{self.account}/rlorTrainerJobs/{self.name}"

    def owns(self, url: str) -> bool:
        """Whether an address lies behind this job's route, and not where a redirect led."""
        return Job.from_url(url) == self

    def __str__(self) -> str:
        return f"{self.account}/{self.name}"
