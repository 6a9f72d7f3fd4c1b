"""nginx as replicas of a gateway, and HAProxy in front of them: real ones, on loopback."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Mode = Literal["tcp", "http"]
Switch = Literal["stale", "html", "502", "503", "504", "moved", "slow"]

PROGRAMS: Final = ("nginx", "haproxy")
_TEMPLATES: Final = Path(__file__).parent
_START_SECONDS: Final = 15.0
# Debian has them where only root looks.
_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin"


def find(program: str) -> str | None:
    """Where a program is."""
    return shutil.which(program) or shutil.which(program, path=_PATH)


def missing() -> list[str]:
    """What has to be installed."""
    return [program for program in PROGRAMS if find(program) is None]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Answered(NamedTuple):
    """A line of an nginx's access log."""

    status: int
    """499 where the client has gone away first."""
    version: str
    connection: tuple[str, int]
    path: str


class Server:
    """A program that serves on a port of its own while it is entered.

    Args:
        folder: For its configuration, its logs and what it writes.
        template: The name of its configuration in this folder.
        arguments: Its command line, after its own path.
        values: What stands in the template between two @.
    """

    def __init__(
        self, folder: Path, template: str, arguments: list[str], values: Mapping[str, object]
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port = free_port()
        text = (_TEMPLATES / template).read_text()
        for name, value in {**values, "folder": folder, "port": self.port}.items():
            text = text.replace(f"@{name}@", str(value))
        self._configuration = folder / template
        self._configuration.write_text(text)
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def origin(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        program, *arguments = self._arguments
        path = find(program)
        assert path is not None
        output = self.folder / "output"
        with output.open("wb") as said:
            self._process = subprocess.Popen(
                [path, *arguments, str(self._configuration)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        until = time.monotonic() + _START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError(f"{program} does not serve: {output.read_text()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(15)

    def _listens(self) -> bool:
        with socket.socket() as one:
            one.settimeout(1)
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def children(self) -> list[int]:
        """The processes that it has started: an nginx's workers."""
        assert self._process is not None
        pid = self._process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Replica(Server):
    """An nginx that forwards to a lab.

    Args:
        folder: As of every server.
        lab: Where it forwards to.
        certificate: Of the server, with its key.
        gateway_404: The body that it refuses a job with.
        http2: Whether it speaks HTTP/2 as well.
        idle: Seconds after which it closes a connection that is not used; 0: at once.
        moved: The address that it redirects to where it does, without the path.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lab: str,
        certificate: Path,
        gateway_404: str,
        http2: bool = True,
        idle: int = 60,
        moved: str = "/moved",
    ) -> None:
        values = {
            "lab": lab,
            "certificate": certificate,
            "gateway_404": gateway_404,
            "http2": "http2" if http2 else "",
            "idle": idle,
            "moved": moved,
        }
        super().__init__(folder, "nginx.conf", ["nginx", "-e", f"{folder}/error.log", "-c"], values)

    def switch(self, what: Switch, on: bool = True) -> None:
        """From now on it does this, on every connection, or no longer does."""
        file = self.folder / what
        if on:
            file.touch()
        else:
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def switched(self, what: Switch) -> Iterator[None]:
        self.switch(what)
        try:
            yield
        finally:
            self.switch(what, on=False)

    def reload(self) -> None:
        """Let new workers take over: the old ones end with what they have begun."""
        before = set(self.children())
        self.signal(signal.SIGHUP)
        until = time.monotonic() + _START_SECONDS
        while not set(self.children()) - before:
            assert time.monotonic() < until, "no new worker has come"
            time.sleep(0.02)

    def kill_workers(self) -> None:
        """Kill what serves: its connections are gone, and others are taken up by a new worker."""
        for pid in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def answered(self) -> list[Answered]:
        """All that it has answered so far."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return [
            Answered(int(status), version, (str(self.folder), int(connection)), path)
            for status, version, connection, path in (line.split(" ", 3) for line in lines)
        ]


class Balancer(Server):
    """A HAProxy in front of replicas.

    Args:
        folder: As of every server.
        mode: ``tcp`` gives each connection to a replica, ``http`` each request.
        replicas: Where to.
        certificate: Of the server, with its key; it needs one in ``http`` mode.
        ca_file: What it trusts the replicas by.
        http2: Whether it speaks HTTP/2 as well.
        idle: Seconds after which it closes a connection on which nothing moves; 0: in HTTP mode
            after each answer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Mode,
        replicas: list[Replica],
        certificate: Path,
        ca_file: Path,
        http2: bool = True,
        idle: int = 60,
    ) -> None:
        self.mode = mode
        self._statistics = free_port()
        alpn = "alpn h2,http/1.1" if http2 else "alpn http/1.1"
        to_replica = f"ssl verify required ca-file {ca_file} {alpn}" if mode == "http" else ""
        values = {
            "mode": mode,
            "statistics": self._statistics,
            "idle": idle or 60,
            "options": "" if idle or mode == "tcp" else "option httpclose",
            "bind": f"ssl crt {certificate} {alpn}" if mode == "http" else "",
            "servers": "\n".join(
                f"    server replica{number} 127.0.0.1:{replica.port} {to_replica}"
                for number, replica in enumerate(replicas)
            ),
        }
        super().__init__(folder, "haproxy.cfg", ["haproxy", "-db", "-f"], values)

    def opened(self) -> int:
        """How many connections have been made to it."""
        with socket.create_connection(("127.0.0.1", self._statistics), 5) as asked:
            asked.sendall(b"show stat\n")
            said = b"".join(iter(lambda: asked.recv(65536), b"")).decode()
        rows = csv.DictReader(said.removeprefix("# ").splitlines())
        return next(int(row["conn_tot"]) for row in rows if row["svname"] == "FRONTEND")
