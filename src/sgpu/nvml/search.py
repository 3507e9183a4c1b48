"""Where libnvidia-ml may lie under a directory, and opening the first one that loads."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sgpu.nvml._bindings import ffi

#: Relative to the host path, in the order tried: what GKE's installers make, what a distribution's package
#: makes (multi-arch, RHEL, Debian's alternatives), and a directory that holds just the libraries.
DIRECTORIES: Final = (
    "lib64",
    "lib",
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    ".",
)
#: The soname first: the bare name is a development link that can point anywhere.
NAMES: Final = ("libnvidia-ml.so.1", "libnvidia-ml.so")
#: Of a 64-bit ELF header: where the section headers are, how large one is, how many there are (elf(5)).
_ELF_HEADER: Final = struct.Struct("<40xQ10xHH2x")


class LibraryNotFoundError(Exception):
    """No libnvidia-ml under the host path could be loaded. `refused` has each that is there with the loader's words."""

    def __init__(self, host_path: Path, refused: tuple[tuple[Path, str], ...]) -> None:
        self.host_path = host_path
        self.refused = refused
        if refused:
            words = "; ".join(f"{path}: {words}" for path, words in refused)
        else:
            words = f"there is none in {', '.join(DIRECTORIES)}"
        super().__init__(f"no libnvidia-ml could be loaded from under {host_path} ({words})")


def candidates(host_path: Path) -> Iterator[Path]:
    """Every path that is tried, in order."""
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
        if _truncated(path):
            refused.append((path, "the file is cut short; is it being copied?"))
            continue
        try:
            return path, ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
        except OSError as error:
            refused.append((path, _loader_words(path, error)))
    raise LibraryNotFoundError(host_path, tuple(refused))


def _truncated(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers do, which the loader would answer with SIGBUS.

    By hand, because what `elf` takes to read them is too much for the driver's process.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_ELF_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False  # the loader has the better words for it
    if len(header) < _ELF_HEADER.size or not header.startswith(b"\x7fELF\x02"):
        return False
    offset, entry_size, entries = _ELF_HEADER.unpack(header)
    return int(offset + entry_size * entries) > size


def _loader_words(path: Path, error: OSError) -> str:
    # cffi reports "cannot load library 'PATH': PATH: words"; the path is already said.
    return str(error).rpartition(f"{path}: ")[2]
