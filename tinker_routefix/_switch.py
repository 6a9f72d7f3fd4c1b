"""The kill switch, read before anything else is imported.

A process in which the shim is switched off must pay nothing for having the import
line, so this module needs only ``os`` and is all that such a process loads.
"""

import os

KILL_SWITCH = "TINKER_ROUTEFIX"
AUTOLOAD = "TINKER_ROUTEFIX_AUTOLOAD"
"""Read at the start of Python, outside of this package."""

ON_WORDS = ("1", "true", "t", "yes", "y", "on")
OFF_WORDS = ("0", "false", "f", "no", "n", "off")


class SettingError(ValueError):
    """A setting has a value that the shim does not accept."""

    # Where a program finds it, and a traceback should name it.
    __module__ = __package__

    def __init__(self, name: str, value: object, expected: str, message: str | None = None) -> None:
        super().__init__(message or f"{name}={value!r} is not accepted: expected {expected}")
        self.name = name
        self.value = value
        self.expected = expected


def parse_switch(name: str, value: str) -> bool:
    """Read a switch word, in any case and with blanks around it.

    Raises:
        SettingError: The word is neither one for on nor one for off.
    """
    word = value.strip().lower()
    if word in ON_WORDS:
        return True
    if word in OFF_WORDS:
        return False
    raise SettingError(name, value, f"one of {', '.join(ON_WORDS)} or {', '.join(OFF_WORDS)}")


def switched_on() -> bool:
    """Whether the environment leaves the shim on; unset and empty mean on.

    Raises:
        SettingError: ``TINKER_ROUTEFIX`` holds something else than a switch word.
    """
    value = os.environ.get(KILL_SWITCH, "").strip()
    return parse_switch(KILL_SWITCH, value) if value else True
