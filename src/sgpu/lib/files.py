"""Files: is it the same one, files and directories that only their owner can open. Imports nothing of sgpu."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

#: Longest path of a unix socket in bytes (`sun_path` of unix(7), less the closing NUL).
MAX_SOCKET_PATH_BYTES: Final = 107
#: Longest file that is read as a whole, in bytes: settings, state, manifests and caches are far smaller.
MAX_FILE_BYTES: Final = 8 * 1024 * 1024


def content_identity(path: Path) -> tuple[int, ...] | None:
    """Return which file a path leads to, links followed; None if none. A file rewritten in place counts as new."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


class NotRegularError(OSError):
    """The path leads to something other than a file: a directory, a pipe, a device, a socket."""


def read_regular_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file that others may have put there. Never blocks on what is no file.

    Raises OSError: NotRegularError for a pipe or a device, EFBIG for more than `limit` bytes.
    """
    with open_regular_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return content


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError: NotRegularError for a pipe or a device, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def make_private_directory(path: Path) -> None:
    """Make the directory and its missing parents, each with mode 0700 whatever the umask. Raises OSError.

    One that is there keeps its mode: it may be others' too, as /run is.
    """
    for directory in (*reversed(path.parents), path):
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        except OSError:
            if directory.is_dir():  # a read-only file system says so before it says that it is there
                continue
            raise
        directory.chmod(0o700)


def write_private_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file with mode 0600 in one step: a reader sees the old or the new one. Raises OSError.

    `durable`: also one who reads it after the node lost its power.
    """
    _replace(path, path.with_name(f"{path.name}.new"), content, 0o600, durable=durable)


def write_public_file(path: Path, content: bytes) -> None:
    """Write a file with mode 0644 in one step, where whoever reads the directory ignores names with a dot in front."""
    _replace(path, path.with_name(f".{path.name}.new"), content, 0o644)


def _replace(path: Path, new: Path, content: bytes, mode: int, *, durable: bool = False) -> None:
    new.unlink(missing_ok=True)  # left by a process that was killed, or a link that leads elsewhere
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # the umask may have taken even the owner's rights
        file.write(content)
        if durable:
            file.flush()
            os.fsync(descriptor)
    os.replace(new, path)
