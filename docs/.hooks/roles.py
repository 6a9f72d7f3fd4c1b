"""Docstrings name classes and methods by role; a page shows them as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`[.~]?([^`]+)`")


class Roles(griffe.Extension):
    """Turns ``:class:`X``` into what Markdown knows."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
