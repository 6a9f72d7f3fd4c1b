"""A TCP proxy on loopback that holds everything back for a while: `python -m tests.wire.delay`.

In a process of its own, as what it delays is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def delayed(port: int, round_trip: float) -> Iterator[int]:
    """A port that leads to another one, so many seconds of round trip away."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(port), str(round_trip / 2)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    with process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
) -> None:
    clock = asyncio.get_running_loop().time
    coming: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def hand_on() -> None:
        while True:
            due, data = await coming.get()
            await asyncio.sleep(due - clock())
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    handing_on = asyncio.ensure_future(hand_on())
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            coming.put_nowait((clock() + seconds, data))
    coming.put_nowait((clock() + seconds, b""))
    with contextlib.suppress(ConnectionError):
        await handing_on


async def _serve(port: int, seconds: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # What loopback has done at once: TCP's own round trip.
        await asyncio.sleep(2 * seconds)
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_carry(reader, back, seconds), _carry(there, writer, seconds))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=2048)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
