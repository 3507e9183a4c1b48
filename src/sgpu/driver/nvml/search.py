"""Finds libnvidia-ml under a directory, and opens the first one that loads."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sgpu.driver.nvml._bindings import ffi
from sgpu.lib.elf import is_cut_short

#: What Debian calls the directories of this machine's libraries.
_MULTIARCH: Final = f"{os.uname().machine}-linux-gnu"
#: Relative to the host path, in the order tried: what GKE's installers make, what a distribution's package
#: makes (multi-arch, RHEL, Debian's alternatives), and a directory that holds just the libraries.
DIRECTORIES: Final = (
    "lib64",
    "lib",
    f"lib/{_MULTIARCH}",
    f"usr/lib/{_MULTIARCH}",
    "usr/lib64",
    f"usr/lib/{_MULTIARCH}/nvidia/current",
    ".",
)
#: The soname first: the bare name is a development link that can point anywhere.
NAMES: Final = ("libnvidia-ml.so.1", "libnvidia-ml.so")


class LibraryNotFoundError(Exception):
    """No libnvidia-ml under the host path could be loaded. `refused` has each file with the loader's message."""

    def __init__(self, host_path: Path, refused: tuple[tuple[Path, str], ...]) -> None:
        self.host_path = host_path
        self.refused = refused
        if refused:
            reason = "; ".join(f"{path}: {message}" for path, message in refused)
        else:
            reason = f"there is none in {', '.join(DIRECTORIES)}"
        super().__init__(f"no libnvidia-ml could be loaded from under {host_path} ({reason})")


def candidates(host_path: Path) -> Iterator[Path]:
    """Yield every path that is tried, in order."""
    for directory in DIRECTORIES:
        for name in NAMES:
            yield host_path / directory / name


def dlopen(host_path: Path) -> tuple[Path, Any]:
    """Load the first candidate that the loader accepts: its path, and the cffi library.

    Raises LibraryNotFoundError when none does.
    """
    refused = []
    for path in candidates(host_path):
        if not os.path.lexists(path):  # nothing is said of it; a link to nowhere is a find
            continue
        if _is_cut_short(path):
            refused.append((path, "the file is cut short; is it being copied?"))
            continue
        try:
            return path, ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
        except OSError as error:
            refused.append((path, _loader_message(path, error)))
    raise LibraryNotFoundError(host_path, tuple(refused))


def _is_cut_short(path: Path) -> bool:
    try:
        return is_cut_short(path)
    except OSError:
        return False  # the loader's own message is better


def _loader_message(path: Path, error: OSError) -> str:
    with suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            return "it is on a file system mounted noexec"
    # cffi reports "cannot load library 'PATH': PATH: message"; the path is already named.
    return str(error).rpartition(f"{path}: ")[2]
