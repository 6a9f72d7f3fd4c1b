"""The settings: read once from the environment, checked, frozen.

A run costs too much to find out an hour later that a limit had a typo in it, so every
value is parsed when the shim is imported and a bad one is refused by name. The defaults
are those of a client-side wrapper that was in use before this shim existed; the table in
docs/settings.md is compared with this module by a test.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit

from ._log import RoutefixWarning, warn_the_program
from ._switch import AUTOLOAD, KILL_SWITCH, SettingError, parse_switch

Parser = Callable[[str, Any], Any]

_PREFIX = f"{KILL_SWITCH}_"

RETIRED = {"TINKER_ROUTEFIX_MATCH": "a 404 of unknown shape is told from the pod's own without it"}
"""Settings of earlier versions, and why they went."""


def _switch(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else parse_switch(name, str(value))


MOST_PROBES = 32
"""Probes of a warm-up, which are sent at the same time over as many connections."""
MOST_REPLAYS = 1000
LONGEST = 86_400.0
"""Seconds of any duration: a day. More is a slip of the keyboard, not a wish."""


def _count(name: str, value: Any, most: int) -> int:
    try:
        number = None if isinstance(value, bool | float) else int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not 0 <= number <= most:
        raise SettingError(name, value, f"a whole number from 0 to {most}")
    return number


def _probes(name: str, value: Any) -> int:
    return _count(name, value, MOST_PROBES)


def _replays(name: str, value: Any) -> int:
    return _count(name, value, MOST_REPLAYS)


def _seconds(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= LONGEST:
        raise SettingError(name, value, f"a number of seconds above 0, at most {LONGEST:g}")
    return number


def http_on_loopback(base: str) -> bool:
    """Whether a URL is plain http to this very machine."""
    parts = urlsplit(base)
    host = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return parts.scheme == "http" and loopback


def _control_plane_url(name: str, value: Any) -> str:
    # Here, because it is seldom needed, and the import of this module has to be cheap.
    from ._job import base_of

    text = str(value)
    base = base_of(text)
    more = any(mark in text for mark in "@?#")
    if base is not None and re.search(r"/v1(/accounts\b.*)?$", base):
        # The questions add that themselves, and would ask an address that nobody answers at.
        raise SettingError(
            name, "/".join(base.split("/")[:3]) + "/…/v1", "the URL up to, not including, /v1"
        )
    if base is None or more or not (base.startswith("https:") or http_on_loopback(base)):
        # Whatever was pasted here may hold a key: the refusal repeats no more than the host.
        shown = "(hidden)" if base is None else "/".join(base.split("/")[:3])
        raise SettingError(
            name, shown, "an https URL (http only on loopback) without user name, query or fragment"
        )
    return base


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Which setting a wrong name resembles; all of them where it resembles none."""
    # Here, because it is seldom needed, and the import of this module has to be cheap.
    import difflib

    # The prefix they all have would make each resemble any other.
    names = {one.removeprefix(prefix): one for one in sorted(known)}
    close = difflib.get_close_matches(name.removeprefix(prefix), names, n=1)
    if close:
        return f"did you mean {names[close[0]]}?"
    return f"the settings are {', '.join(names.values())}"


def _unknown(variable: str, known: Iterable[str], *, strict: bool) -> None:
    message = (
        f"{variable} is not a setting of tinker_routefix and has no effect: "
        f"{_did_you_mean(variable, known, _PREFIX)}"
    )
    if strict:
        # Its value is not repeated: nobody knows what it is.
        raise SettingError(variable, None, "a setting", message)
    _warn(message)


def _warn(message: str) -> None:
    try:
        warn_the_program(message)
    except RoutefixWarning:
        # `-W error`: an import is no place to raise, and logging is not configured yet.
        if sys.stderr is not None:
            sys.stderr.write(f"tinker_routefix: {message}\n")


def _setting(default: Any, parse: Parser, variable: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "variable": variable})


LOG_WORDS = ("debug", "info", "warning", "off")


def _log_word(name: str, value: Any) -> str:
    word = str(value).strip().lower()
    if word not in LOG_WORDS:
        raise SettingError(name, value, f"one of {', '.join(LOG_WORDS)}")
    return word


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shim may do, and for how long. All durations are in seconds."""

    enabled: bool = _setting(True, _switch, KILL_SWITCH)
    """The kill switch, as it stood when the shim was imported."""
    strict: bool = _setting(False, _switch, "TINKER_ROUTEFIX_STRICT")
    """Raise where the shim would otherwise warn and step aside."""
    warmup_successes: int = _setting(3, _probes, "TINKER_ROUTEFIX_WARMUP_SUCCESSES")
    """Successes in a row, over as many fresh connections, that make a route warm; 0: no warm-up."""
    warmup_timeout: float = _setting(120.0, _seconds, "TINKER_ROUTEFIX_WARMUP_TIMEOUT")
    """How long connecting may wait for the route, all its calls together."""
    warmup_max_delay: float = _setting(8.0, _seconds, "TINKER_ROUTEFIX_WARMUP_MAX_DELAY")
    """The longest single wait while connecting."""
    max_replays: int = _setting(4, _replays, "TINKER_ROUTEFIX_MAX_REPLAYS")
    """Replays of one request that waited in full; 0: no replay."""
    base_delay: float = _setting(2.0, _seconds, "TINKER_ROUTEFIX_BASE_DELAY")
    """The first wait; each further one is twice as long."""
    max_delay: float = _setting(15.0, _seconds, "TINKER_ROUTEFIX_MAX_DELAY")
    """The longest single wait after connecting."""
    retry_budget: float = _setting(30.0, _seconds, "TINKER_ROUTEFIX_RETRY_BUDGET")
    """How long one request may wait for the route after connecting."""
    control_plane_url: str | None = _setting(
        None, _control_plane_url, "TINKER_ROUTEFIX_CONTROL_PLANE_URL"
    )
    """The control plane's URL up to, not including, ``/v1``; default: the gateway's own origin.

    It must be https. On loopback it may be http, but is asked only about jobs whose gateway is
    http on loopback too.
    """
    control_plane_timeout: float = _setting(5.0, _seconds, "TINKER_ROUTEFIX_CONTROL_PLANE_TIMEOUT")
    """How long the control plane may take to answer, from connecting to the last byte."""
    log: str | None = _setting(None, _log_word, "TINKER_ROUTEFIX_LOG")
    """What is printed on stderr where the program has not configured logging: this level and
    above, or nothing; default: long waits and their end, and what no exception tells."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read and check every setting; unset and empty variables take the default.

        Raises:
            SettingError: A variable holds a value that is not accepted; or, where the settings
                are strict, a variable with the shim's prefix is not a setting.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        known = {AUTOLOAD}
        for field in dataclasses.fields(cls):
            variable = field.metadata["variable"]
            known.add(variable)
            text = environment.get(variable, "").strip()
            if text:
                values[field.name] = field.metadata["parse"](variable, text)
        settings = cls(**values)
        for variable in sorted(RETIRED.keys() & environment.keys()):
            _warn(f"{variable} no longer has an effect: {RETIRED[variable]}")
        for variable in sorted(environment):
            if variable.startswith(_PREFIX) and variable not in {*known, *RETIRED}:
                _unknown(variable, known, strict=settings.strict)
        return settings

    def replace(self, **overrides: Any) -> Settings:
        """A copy with some settings changed, checked like the environment's.

        Raises:
            SettingError: A value is not accepted.
            TypeError: A name is not a setting, or is ``enabled``: that is what
                ``install()`` and ``uninstall()`` are for.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        for name, value in overrides.items():
            if name not in fields or name == "enabled":
                meant = _did_you_mean(name, fields.keys() - {"enabled"})
                raise TypeError(f"{name!r} is not a setting; {meant}")
            optional = fields[name].default is None
            if not (optional and value is None):
                overrides[name] = fields[name].metadata["parse"](name, value)
        return dataclasses.replace(self, **overrides)


class Overrides(TypedDict, total=False):
    """What ``configure()`` takes: all settings but ``enabled``. Durations are in seconds."""

    strict: bool
    warmup_successes: int
    warmup_timeout: float
    warmup_max_delay: float
    max_replays: int
    base_delay: float
    max_delay: float
    retry_budget: float
    control_plane_url: str | None
    control_plane_timeout: float
    log: Literal["debug", "info", "warning", "off"] | None


_current: Settings | None = None


def current() -> Settings:
    """The settings in force."""
    global _current
    if _current is None:
        _current = Settings.from_environment()
    return _current


def set_current(settings: Settings) -> None:
    """Put other settings in force."""
    global _current
    _current = settings
