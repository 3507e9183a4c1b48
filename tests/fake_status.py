"""The daemon's side of the status socket: answers as a test tells it to."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot

GPU: Final = GpuSnapshot(
    uuid="GPU-bf428e1d-2c9a-5d47-8f6a-3d0b6f1c2e11",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    resource="deepomatic.com/shared-gpu",
    healthy=True,
    reason="",
    since=1.0,
    memory_total=15 << 30,
    memory_used=7 << 30,
    memory_free=8 << 30,
    utilization=37,
    shares=100,
    allocated=3,
    withheld=0,
)
SNAPSHOT: Final = Snapshot(
    version="0.1.0",
    time=2.0,
    driver_version="550.54",
    waiting="",
    sampled_at=1.0,
    holders_known=True,
    processes_problem="",
    resources=(ResourceSnapshot("deepomatic.com/shared-gpu", registered=True, streams=1),),
    gpus=(GPU,),
)


@contextmanager
def answering(where: Path | socket.socket, answer: Callable[[bytes], bytes | None]) -> Iterator[list[bytes]]:
    """A server that answers each request as it is told, and hangs up; never, for None. Gives the requests.

    It listens on a path, or is a socket that listens.
    """
    requests: list[bytes] = []

    def serve() -> None:
        while True:
            with listener.accept()[0] as connection:
                request = connection.recv(65536)
                if not request:
                    return
                _, _, length = request.partition(b"\r\nContent-Length: ")
                while length and len(request.partition(b"\r\n\r\n")[2]) < int(length.split()[0]):
                    request += connection.recv(65536)
                requests.append(request)
                if (said := answer(request)) is None:
                    connection.recv(1)  # until the client has had enough
                else:
                    connection.sendall(said)

    with where if isinstance(where, socket.socket) else _listener(where) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield requests
        finally:
            with socket.socket(listener.family) as last:
                last.connect(listener.getsockname())
            thread.join()


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    return listener


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
