"""Probes of ``tinker-routefix check``: one request through the route, and what its answer means.

A health check proves nothing about a route: it can be answered while the paths that training
uses are still refused. So a path that does go through the route table is probed, over a fresh
connection each time, because connections stay with one replica of the gateway and only some of
those may know the route.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from typing import TYPE_CHECKING

import httpx

from tinker_routefix import _verdict
from tinker_routefix._verdict import Fix, Verdict
from tinker_routefix._version import __version__

from .diagnosis import Fault, explain, proxy_for

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "/api/v1/get_server_capabilities"
"""What is probed: light, and through the route table."""
PROBE_SECONDS = 10.0
_TIMEOUT = httpx.Timeout(PROBE_SECONDS, connect=5.0)


class UsageError(Exception):
    """What was given cannot be checked; for people."""


class Seen(enum.Enum):
    """What came of one probe."""

    ANSWERED = "answered"
    """By the pod, whatever it said."""
    REFUSED = "refused"
    """The gateway's 404, or one of unknown origin."""
    NOT_READY = "not ready"
    """503 with ``queue_state: route_not_ready``."""
    DENIED = "denied"
    """401 or 403."""
    FAILED = "failed"
    """No HTTP answer."""
    OTHER = "other"


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One answer of the gateway, or the lack of one."""

    seen: Seen
    message: str
    status: int | None = None
    """None where there was no HTTP answer."""
    fault: Fault | None = None
    """What kept it from being answered."""


def read_probe(status: int, body: bytes) -> Probe:
    """What an answer to a probe means; never raises."""
    if _verdict.is_route_not_ready(status, body):
        return Probe(Seen.NOT_READY, Fix.ROUTE_NOT_READY.value, status)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Probe(Seen.DENIED, f"HTTP {status}", status)
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        if _verdict.of_body(body) is Verdict.POD:
            return Probe(Seen.ANSWERED, "answers", status)
        return Probe(Seen.REFUSED, f"the gateway's {status}", status)
    if status < httpx.codes.MULTIPLE_CHOICES:
        return Probe(Seen.ANSWERED, "answers", status)
    fault = Fault.PROXY if status == httpx.codes.PROXY_AUTHENTICATION_REQUIRED else None
    return Probe(Seen.OTHER, f"HTTP {status}", status, fault=fault)


class Prober:
    """Sends probes, with the proxies and certificates that tinker's own requests have."""

    def __init__(self, base: str, headers: Mapping[str, str]) -> None:
        self._url = f"{base}{PATH}"
        self.proxy = proxy_for(self._url)
        self.client = _client(headers)

    async def probe(self) -> tuple[Probe, float]:
        """Send one; what came of it, and how many seconds that took."""
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                self.client.stream("GET", self._url) as response,
            ):
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _verdict.MAX_BODY:
                        break
            probe = read_probe(response.status_code, bytes(body))
        except TimeoutError:
            message = f"no answer within {PROBE_SECONDS:g} s"
            probe = Probe(Seen.FAILED, message, fault=Fault.NETWORK)
        except Exception as error:  # noqa: BLE001 - its text could hold a header
            fault, message = explain(error, self._url, self.proxy)
            probe = Probe(Seen.FAILED, message, fault=fault)
        return probe, time.monotonic() - began


def _client(headers: Mapping[str, str]) -> httpx.AsyncClient:
    """A client that keeps no connection."""
    try:
        return httpx.AsyncClient(
            headers={
                **headers,
                "user-agent": f"tinker-routefix/{__version__}",
                "accept": "application/json",
                "accept-encoding": "identity",
            },
            limits=httpx.Limits(max_keepalive_connections=0),
            follow_redirects=False,
            timeout=_TIMEOUT,
        )
    except Exception as error:
        # Its text may hold a proxy's password.
        raise UsageError(
            "the environment names a proxy or certificates that cannot be used "
            f"({type(error).__name__}): look at HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and "
            "SSL_CERT_DIR"
        ) from error
