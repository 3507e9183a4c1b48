"""The way to the API server: a child `kubectl proxy`, which has the credentials, or the address of one that runs.

The child listens on a unix socket that only its owner can open, where Python has such sockets (on Windows it has not),
and lets nothing through but what is asked for here.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Final

import trio

from sgpu.lib.logs import printable

#: Seconds for kubectl to listen. It reads its configuration and asks nobody.
START_TIMEOUT: Final = 30.0
#: What kubectl says as it listens.
SERVING: Final = re.compile(rb"Starting to serve on (\S+)\s")
#: Paths that are let through: lists of pods, and the status of one.
PATHS: Final = "^/api/v1/(namespaces/[^/]+/)?pods$,^/api/v1/namespaces/[^/]+/pods/[^/]+/proxy/status$"
METHODS: Final = "^(POST|PUT|PATCH|DELETE|CONNECT|OPTIONS)$"
_ADDRESS: Final = re.compile(
    r"unix:(?P<path>.+)|http://(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})/?", re.ASCII
)

Connect = Callable[[], Awaitable[trio.abc.Stream]]


class ProxyError(Exception):
    """The API server can't be reached. One line: why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def is_address(text: str) -> bool:
    """Return whether this is `http://HOST:PORT` or `unix:PATH`."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and int(found["port"] or 0) < 1 << 16


def connector(address: str) -> Connect:
    """Return what connects to a proxy's address."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(address)
    if found["path"]:
        return partial(trio.open_unix_socket, found["path"])
    return partial(trio.open_tcp_stream, found["host"].strip("[]"), int(found["port"]))


@asynccontextmanager
async def open_proxy(flags: Sequence[str]) -> AsyncIterator[Connect]:
    """Run `kubectl proxy` with these flags for as long as the context lasts. Raises ProxyError if it does not start."""
    with tempfile.TemporaryDirectory(prefix="sgpu-", ignore_cleanup_errors=True) as directory:
        path = Path(directory, "proxy.sock")
        listen = [f"--unix-socket={path}"] if hasattr(socket, "AF_UNIX") else ["--address=127.0.0.1", "--port=0"]
        command = ["kubectl", "proxy", *listen, f"--accept-paths={PATHS}", f"--reject-methods={METHODS}", *flags]
        try:
            process = await trio.lowlevel.open_process(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        except OSError as error:
            reason = "it is not in PATH" if isinstance(error, FileNotFoundError) else error.strerror
            raise ProxyError(
                f"cannot run kubectl: {reason}; install it, or name a running `kubectl proxy` by -address"
            ) from error
        try:
            async with trio.open_nursery() as nursery:
                connect = await _wait_serving(process)
                nursery.start_soon(_drain, process)
                yield connect
                nursery.cancel_scope.cancel()
        finally:
            process.kill()  # it has nothing to finish
            with trio.CancelScope(shield=True):
                await process.wait()


async def _wait_serving(process: trio.Process) -> Connect:
    assert process.stdout  # it is a pipe, as is the other
    assert process.stderr
    said = bytearray()
    with trio.move_on_after(START_TIMEOUT):
        async for chunk in process.stdout:
            said += chunk
            if found := SERVING.search(said):
                where = found[1].decode("utf-8", "replace")
                return connector(f"unix:{where}" if "/" in where else f"http://{where}")
        last: deque[bytes] = deque(maxlen=1)
        async for chunk in process.stderr:
            last.extend(line for line in (*last, *chunk.splitlines()) if line.strip())
        reason = last[0].decode("utf-8", "replace") if last else "no message"
        raise ProxyError(f"kubectl proxy has ended: {reason}; does `kubectl get nodes` work?")
    raise ProxyError(f"kubectl proxy does not serve within {START_TIMEOUT:g} s; does `kubectl get nodes` work?")


async def _drain(process: trio.Process) -> None:
    """Read what kubectl says of each request that was given up: it would wait for a reader."""
    assert process.stderr  # it is a pipe
    async for _ in process.stderr:
        pass
