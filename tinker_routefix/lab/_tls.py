"""The lab's own certificate authority: nothing of it is installed, ``SSL_CERT_FILE`` names it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import ssl
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trustme

_NAMES = ("127.0.0.1", "localhost")


@functools.cache
def _authority() -> trustme.CA:
    # It brings cryptography, which is heavy, and most labs do without.
    import trustme

    # One a process: TLS contexts are kept, and have to trust the next lab as well.
    return trustme.CA(organization_name="tinker_routefix lab")


@functools.cache
def ca_file() -> Path:
    """The certificate of the authority of this process, until its end."""
    folder = Path(tempfile.mkdtemp(prefix="tinker-routefix-lab-"))
    atexit.register(_remove, folder, os.getpid())
    path = folder / "ca.pem"
    _authority().cert_pem.write_to_path(str(path))
    return path


def _remove(folder: Path, owner: int) -> None:
    # A fork runs this too.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def issue() -> trustme.LeafCert:
    """A certificate of a server on loopback."""
    return _authority().issue_cert(*_NAMES)


def server_context() -> ssl.SSLContext:
    """What a lab serves with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    issue().configure_cert(context)
    return context
