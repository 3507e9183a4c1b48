"""The header of a library or a program: for which machine it is, its soname, and whether the file is whole.

Read, never loaded: files of other machines can be looked at. Knows nothing of GPUs.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from sgpu.lib.files import open_regular_file

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

#: Our own program.
_OURSELVES: Final = Path("/proc/self/exe")
#: Of a 64-bit ELF header: where the section headers are, how large one is, how many there are (elf(5)).
_HEADER: Final = struct.Struct("<40xQ10xHH2x")


class ElfError(Exception):
    """The file is no ELF file, or not a whole one."""


@attrs.frozen
class Elf:
    """`bits` is 32 or 64, `machine` as `elf.h` names it (x86_64, aarch64); `soname` is empty if it has none."""

    bits: int
    machine: str
    soname: str = ""

    @property
    def kind(self) -> tuple[int, str]:
        """Return what has to be the same for a program to load a library."""
        return (self.bits, self.machine)


def is_cut_short(path: Path) -> bool:
    """Return whether a 64-bit ELF file ends before its section headers do, which the loader answers with SIGBUS.

    The section headers are the last thing in the files that linkers write. Raises OSError.
    """
    with open_regular_file(path) as file:
        header = file.read(_HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(header) < _HEADER.size or not header.startswith(b"\x7fELF\x02"):
        return False
    offset, entry_size, entries = _HEADER.unpack(header)
    return int(offset + entry_size * entries) > size


def read_elf(path: Path) -> Elf:
    """Return what the file's header says. Raises ElfError, or OSError where it can't be read."""
    from elftools.elf.elffile import ELFFile  # here: the driver's process has no use for it, and pays for each module

    with open_regular_file(path) as file:
        if file.read(4) != b"\x7fELF":
            raise ElfError("it is not an ELF file")
        try:
            elf = _read(ELFFile(file))
        except Exception as error:  # damaged headers lead the parser anywhere: out of the file, into its assertions
            raise ElfError("it is cut short or damaged") from error
    if is_cut_short(path):
        raise ElfError("it is cut short or damaged")
    return elf


@cache
def ours() -> Elf:
    """Return the header of the program that runs here: libraries that it can load are of the same kind."""
    return read_elf(_OURSELVES)


def _read(elf: ELFFile) -> Elf:
    from elftools.elf.dynamic import DynamicSegment

    if elf["e_shoff"] > elf.stream_len:
        raise ValueError("cut short")
    machine = str(elf["e_machine"]).removeprefix("EM_").lower() + ("" if elf.little_endian else " (big-endian)")
    for segment in elf.iter_segments(type="PT_DYNAMIC"):
        if isinstance(segment, DynamicSegment):
            for tag in segment.iter_tags("DT_SONAME"):
                return Elf(elf.elfclass, machine, tag.soname)  # type: ignore[attr-defined]  # named after the tag
    return Elf(elf.elfclass, machine)
