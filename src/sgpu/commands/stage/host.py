"""The host's file system as it is seen at some directory, which need not be `/`. Knows nothing of NVIDIA."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from sgpu.lib.files import read_regular_file

#: As many links as the kernel follows (path_resolution(7)).
_MOST_LINKS: Final = 40
#: Where the format of glibc's `sysdeps/generic/dl-cache.h` begins; older loaders' format may come before it.
_CACHE_MAGIC: Final = b"glibc-ld.so.cache1.1"
#: Entries, then what is of no use here: the length of the strings, flags, extensions.
_CACHE_HEADER: Final = struct.Struct("=20xI24x")
#: Of an entry: where the soname and the path are, from the magic on.
_CACHE_ENTRY: Final = struct.Struct("=4xII12x")
#: How often entries may use each byte on average: few share a name. What is read takes no more memory than that.
_MOST_USES: Final = 2


@attrs.frozen
class Host:
    """A file system with its root at `root`. Paths are absolute, as the host has them."""

    root: Path

    def here(self, path: PurePosixPath) -> Path:
        """Return where the host's `path` is seen from here."""
        return self.root / path.relative_to("/")

    def resolve(self, path: PurePosixPath) -> PurePosixPath | None:
        """Return where `path` leads on the host. Absolute links are followed below `root`.

        None where there is nothing.
        """
        done: list[str] = []
        pending = list(reversed(path.parts))
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":
                del done[-1:]
            elif part == "/":
                done.clear()
            else:
                try:
                    target = PurePosixPath(os.readlink(self.root.joinpath(*done, part)))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        return None
                    done.append(part)  # no link
                    continue
                links += 1
                if links > _MOST_LINKS:
                    return None
                pending.extend(reversed(target.parts))
        return PurePosixPath("/", *done)

    def is_file(self, path: PurePosixPath) -> bool:
        """Return whether the host has a file there, and not a link."""
        parent = self.resolve(path.parent)
        return parent is not None and stat.S_ISREG(os.lstat(self.here(parent) / path.name).st_mode)

    def is_empty(self, path: PurePosixPath) -> bool:
        """Return whether a path leads to a file without content, as a bind mount leaves behind."""
        resolved = self.resolve(path)
        try:
            return resolved is not None and self.here(resolved).stat().st_size == 0
        except OSError:
            return False

    def names(self, directory: PurePosixPath) -> list[str]:
        """Return the names in a directory, sorted; none if there is no such directory."""
        resolved = self.resolve(directory)
        try:
            return sorted(os.listdir(self.here(resolved))) if resolved else []
        except OSError:
            return []

    def loader_cache(self) -> list[tuple[str, PurePosixPath]]:
        """Return the sonames that the loader knows, of all architectures, with their paths, in the loader's order.

        Read here, because `ldconfig -r` has to change the root, which takes a capability. Nothing where there is no
        cache, or one that can't be read.
        """
        path = self.resolve(PurePosixPath("/etc/ld.so.cache"))
        try:
            data = read_regular_file(self.here(path)) if path else b""
        except OSError:
            return []
        start = data.find(_CACHE_MAGIC)
        try:
            return list(_entries(data[start:])) if start >= 0 else []
        except (struct.error, ValueError):
            return []


def _entries(cache: bytes) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield the cache's entries. Raises struct.error or ValueError where it is cut short, or no loader's."""
    (count,) = _CACHE_HEADER.unpack_from(cache)
    room = _MOST_USES * len(cache)
    for index in range(count):
        key, value = _CACHE_ENTRY.unpack_from(cache, _CACHE_HEADER.size + index * _CACHE_ENTRY.size)
        name, path = _string(cache, key), _string(cache, value)
        room -= len(name) + len(path)
        if room < 0:
            raise ValueError("the same bytes are named again and again")
        if path.startswith(b"/"):
            yield os.fsdecode(name), PurePosixPath(os.fsdecode(path))


def _string(cache: bytes, offset: int) -> bytes:
    return cache[offset : cache.index(b"\0", offset)]
