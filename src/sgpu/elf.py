"""What the header of a library or a program says: for which machine it is, and the name that others link to it by.

Read, never loaded: files of other machines can be looked at. Imports nothing of sgpu.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import attrs
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

#: Our own program.
_OURSELVES: Final = Path("/proc/self/exe")


class ElfError(Exception):
    """The file is no ELF file, or not a whole one."""


@attrs.frozen
class Elf:
    """`bits` is 32 or 64, `machine` in the words of `elf.h`, as in x86_64 or aarch64; `soname` empty if it has none."""

    bits: int
    machine: str
    soname: str = ""

    @property
    def kind(self) -> tuple[int, str]:
        """What has to be the same for a program to load a library."""
        return (self.bits, self.machine)


def read_elf(path: Path) -> Elf:
    """What the file's header says. Raises ElfError, or OSError where it can't be read."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            raise ElfError("it is not an ELF file")
        try:
            return _read(ELFFile(file))
        except Exception as error:  # damaged headers lead the parser anywhere: out of the file, into its assertions
            raise ElfError("it is cut short or damaged") from error


@cache
def ours() -> Elf:
    """What runs here: libraries that are to be loaded on this machine are of the same kind."""
    return read_elf(_OURSELVES)


def _read(elf: ELFFile) -> Elf:
    # The section headers are the last thing in the files that linkers write.
    if elf["e_shoff"] + elf["e_shentsize"] * elf["e_shnum"] > elf.stream_len:
        raise ValueError("cut short")
    machine = str(elf["e_machine"]).removeprefix("EM_").lower() + ("" if elf.little_endian else " (big-endian)")
    for segment in elf.iter_segments(type="PT_DYNAMIC"):
        if isinstance(segment, DynamicSegment):
            for tag in segment.iter_tags("DT_SONAME"):
                return Elf(elf.elfclass, machine, tag.soname)  # type: ignore[attr-defined]  # named after the tag
    return Elf(elf.elfclass, machine)
