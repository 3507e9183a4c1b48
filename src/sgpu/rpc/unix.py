"""Listening on a unix socket that nobody else listens on."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

#: Longest path of a unix socket in bytes (`sun_path` of unix(7), less the closing NUL).
MAX_PATH_BYTES: Final = 107
#: What Linux has for SO_PEERCRED: process, user, group.
_CREDENTIALS: Final = struct.Struct("3i")
#: Connections that may wait to be accepted.
BACKLOG: Final = 16


class AddressInUseError(Exception):
    """Another live process listens on that socket. Its process id is 0 when it is not visible from here."""

    def __init__(self, path: Path, pid: int) -> None:
        who = f"process {pid} ({_command_line(pid)})" if pid else "another process"
        super().__init__(f"{who} already listens on {path}")
        self.path = path
        self.pid = pid


@attrs.frozen
class Identity:
    """Which file a path names: a file made anew has another identity, as long as the old one is held open."""

    device: int
    inode: int


def identity(path: Path) -> Identity | None:
    """What `path` names now; None when there is nothing, or nothing that can be reached."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return Identity(status.st_dev, status.st_ino)


@contextmanager
def listen(path: Path) -> Iterator[trio.SocketListener]:
    """Listen on `path`, readable and writable by the owner alone. At the end, remove the socket if it is still ours.

    A socket left by a process that is gone is replaced. Raises AddressInUseError for a live one, OSError otherwise,
    also when what is there is no socket at all.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with _only_one(path.parent):
            _remove_stale(path)
            sock.bind(str(path))
            os.chmod(path, 0o600)
            sock.listen(BACKLOG)
            bound = identity(path)  # no other file gets the same for as long as `sock` is open
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        try:
            yield listener
        finally:
            if bound is not None and identity(path) == bound:
                path.unlink(missing_ok=True)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Keep two processes that start at once from each taking the other's new socket for a stale one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):  # whose connections are refused as well
        raise FileExistsError(errno.EEXIST, "there is something that is not a socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog means alive, and must not be waited for
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return  # just removed
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            raise AddressInUseError(path, 0) from None
        raise AddressInUseError(path, peer_pid(probe))


def peer_pid(connected: socket.socket | trio.socket.SocketType) -> int:
    """Who is at the other end of a unix socket; 0 where that process is not visible from here."""
    pid: int = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "not visible from here"
    return b" ".join(words).decode("utf-8", "replace").strip()
