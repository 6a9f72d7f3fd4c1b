"""Fixtures for tests that need a lab: load them with ``-p tinker_routefix.lab.pytest_plugin``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tinker_routefix.lab._server import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make_lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lab]]:
    """Start labs with the arguments of :class:`Lab`; all are stopped after the test.

    Until then ``SSL_CERT_FILE`` names the certificate authority of those with ``tls``.
    """
    with ExitStack() as labs:

        def make(*args: Any, **kwargs: Any) -> Lab:
            lab = labs.enter_context(Lab(*args, **kwargs))
            if lab.ca_file is not None:
                monkeypatch.setenv("SSL_CERT_FILE", str(lab.ca_file))
            return lab

        yield make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """Start a lab with the defaults."""
    return make_lab()
