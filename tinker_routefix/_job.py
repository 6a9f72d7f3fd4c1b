"""Which trainer job a base URL leads to, if any.

This is where it is decided whom the shim touches at all: only clients whose base URL is a
trainer job's route on a gateway. The URL is the only source; nothing is asked.
"""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import urlsplit

_PATH = re.compile(
    r"(?P<prefix>.*?)/training/v1/rlorTrainerJobs/(?P<account>[^/]+)/(?P<name>[^/]+)(?:/.*)?",
    re.DOTALL,
)
_DOTS = (".", "..")


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
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            return None
        match = _PATH.fullmatch(parts.path)
        if parts.scheme not in ("http", "https") or not host or match is None:
            return None
        prefix, account, name = match.group("prefix", "account", "name")
        if account in _DOTS or name in _DOTS:
            return None
        host = f"[{host}]" if ":" in host else host
        netloc = host if port is None else f"{host}:{port}"
        return cls(f"{parts.scheme}://{netloc}{prefix}", account, name)

    def control_plane_url(self, root: str | None = None) -> str:
        """Where the control plane answers for this job; ``root`` defaults to the gateway."""
        return f"{root or self.gateway}/v1/accounts/{self.account}/rlorTrainerJobs/{self.name}"

    def owns(self, url: str) -> bool:
        """Whether an address lies behind this job's route, and not where a redirect led."""
        return Job.from_url(url) == self

    def __str__(self) -> str:
        return f"{self.account}/{self.name}"
