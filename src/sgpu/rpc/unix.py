"""Listen on a unix socket that no other process listens on."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.lib.files import MAX_SOCKET_PATH_BYTES

#: What Linux has for SO_PEERCRED: process, user, group.
_CREDENTIALS: Final = struct.Struct("3i")
#: Connections that may wait to be accepted; beyond it they are refused. With 16, one burst of 300 peers in four lost
#: some, with 128 none; a waiting connection costs nothing. The kernel cuts it to net.core.somaxconn, 4096 by default.
BACKLOG: Final = 1024


class AddressInUseError(Exception):
    """Another live process listens on that socket. Its process id is 0 when it is not visible from here."""

    def __init__(self, path: Path, pid: int) -> None:
        self.who = f"process {pid} ({_command_line(pid)})" if pid else "another process"
        super().__init__(f"{self.who} already listens on {path}")
        self.path = path
        self.pid = pid


@attrs.frozen
class Identity:
    """Identity of the file at a path. A file that replaces it has another, as long as the old one is held open."""

    device: int
    inode: int


def identity(path: Path) -> Identity | None:
    """Return which file `path` names; None when there is none, or none that can be reached."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return Identity(status.st_dev, status.st_ino)


@contextmanager
def listen(path: Path) -> Iterator[trio.SocketListener]:
    """Listen on `path`, readable and writable by the owner alone. At the end, remove the socket if it is still ours.

    A socket left by a process that is gone is replaced. Raises AddressInUseError for a live one, OSError otherwise,
    also when what is there is no socket at all. Never waits: there is no lock, which somebody else could hold.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"path too long for a socket ({MAX_SOCKET_PATH_BYTES} bytes)", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        new = _unused_name(path)
        try:
            sock.bind(str(new))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            os.chmod(new, 0o600)
            sock.listen(BACKLOG)
            bound = identity(new)  # no other file gets the same for as long as `sock` is open
            # Only now does it get its name: a socket that is bound and does not listen yet would look stale to others.
            _link(new, path)
        finally:
            new.unlink(missing_ok=True)
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        try:
            yield listener
        finally:
            if bound is not None and identity(path) == bound:
                path.unlink(missing_ok=True)


def _unused_name(path: Path) -> Path:
    """Return a name beside `path` that nobody else uses, no longer than the names of our sockets."""
    return path.with_name(f".sgpu-{os.urandom(4).hex()}")


def _link(new: Path, path: Path) -> None:
    while True:
        try:
            os.link(new, path)  # where a rename would replace a live socket
            return
        except FileExistsError:
            remove_stale(path)


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises AddressInUseError where somebody does, OSError for no socket."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):  # whose connections are refused as well
        raise FileExistsError(errno.EEXIST, "there is something that is not a socket", str(path))
    if pid := _listener_pid(path):
        raise AddressInUseError(path, pid if pid > 0 else 0)
    # Another process can have replaced it since: look again at what was taken away, and put a live socket back.
    taken = _unused_name(path)
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    try:
        if _listener_pid(taken):
            with suppress(FileExistsError):  # a third process was faster; the owner sees that its socket is gone
                os.link(taken, path)
    finally:
        taken.unlink(missing_ok=True)


def _listener_pid(path: Path) -> int:
    """Return the process that listens on the socket: -1 where it is not visible from here, 0 where there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog means alive, and must not be waited for
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return 0
        except BlockingIOError:
            return -1
        return peer_pid(probe) or -1


def peer_pid(connected: socket.socket | trio.socket.SocketType) -> int:
    """Return the process at the other end of a unix socket; 0 where it is not visible from here."""
    pid: int = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "not visible from here"
    return b" ".join(words).decode("utf-8", "replace").strip()
