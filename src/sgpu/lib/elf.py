"""The header of a library or a program: for which machine it is, its soname, and whether the file is whole.

Read, never loaded: files of other machines can be looked at. Whatever a file says, little of it is read (elf(5)). Knows
nothing of GPUs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import BinaryIO, Final

import attrs

from sgpu.lib.files import open_regular_file

#: Our own program.
_OURSELVES: Final = Path("/proc/self/exe")
#: Characters of a soname: those of a file's name.
LONGEST_SONAME: Final = 255
#: Segments, and bytes of the dynamic one; real files have a dozen, and some hundred.
_MOST_SEGMENTS: Final = 256
_MOST_DYNAMIC: Final = 64 * 1024
_DAMAGED: Final = "it is cut short or damaged"
#: How the identification that a file begins with says bits and byte order.
_IDENTIFICATION: Final = 16
_BITS: Final = {1: 32, 2: 64}
_ORDERS: Final = {1: "<", 2: ">"}
#: By bits. Header: the machine; where the headers of segments and sections are; the size and number of each.
_HEADER: Final = {32: "2xH8xII6xHHHH2x", 64: "2xH12xQQ6xHHHH2x"}
#: Header of a segment: type, place in the file, address, bytes in the file.
_SEGMENT: Final = {32: "III4xI12x", 64: "I4xQQ8xQ16x"}
#: Entry of the dynamic segment: tag, value.
_DYNAMIC: Final = {32: "II", 64: "QQ"}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_STRTAB, _DT_SONAME = 0, 5, 14
#: Names as in `elf.h`, of the machines that Linux has been seen on in clusters. Others are their numbers.
_MACHINES: Final = {
    3: "386",
    20: "ppc",
    21: "ppc64",
    22: "s390",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv",
    258: "loongarch",
}


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
    """Return whether an ELF file ends before its section headers do, which the loader answers with SIGBUS.

    The section headers are the last thing in the files that linkers write. Raises OSError.
    """
    with open_regular_file(path) as file:
        try:
            return _File.opened(file).is_cut_short
        except ElfError:
            return False


def read_elf(path: Path) -> Elf:
    """Return what the file's header says. Raises ElfError, or OSError where it can't be read."""
    with open_regular_file(path) as file:
        opened = _File.opened(file)
        if opened.is_cut_short:
            raise ElfError(_DAMAGED)
        return Elf(opened.bits, opened.machine, opened.soname())


@cache
def ours() -> Elf:
    """Return the header of the program that runs here: libraries that it can load are of the same kind."""
    return read_elf(_OURSELVES)


@attrs.frozen
class _File:
    """An open file, and what its header says."""

    file: BinaryIO
    size: int
    bits: int
    order: str
    header: tuple[int, ...] = ()

    @classmethod
    def opened(cls, file: BinaryIO) -> _File:
        start = file.read(_IDENTIFICATION)
        if not start.startswith(b"\x7fELF"):
            raise ElfError("it is not an ELF file")
        try:
            bits, order = _BITS[start[4]], _ORDERS[start[5]]
        except LookupError as error:
            raise ElfError(_DAMAGED) from error
        opened = cls(file, os.fstat(file.fileno()).st_size, bits, order)
        return attrs.evolve(opened, header=opened._unpack(_HEADER, _IDENTIFICATION))

    @property
    def machine(self) -> str:
        number = self.header[0]
        return _MACHINES.get(number, str(number)) + ("" if self.order == "<" else " (big-endian)")

    @property
    def is_cut_short(self) -> bool:
        _, _, sections_at, _, _, section_size, sections = self.header
        return sections_at + section_size * sections > self.size

    def soname(self) -> str:
        _, segments_at, _, segment_size, count, _, _ = self.header
        if count > _MOST_SEGMENTS:
            raise ElfError(_DAMAGED)
        segments = [self._unpack(_SEGMENT, segments_at + number * segment_size) for number in range(count)]
        tags = {tag: value for kind, *place in segments if kind == _PT_DYNAMIC for tag, value in self._tags(*place)}
        if _DT_SONAME not in tags:
            return ""
        address = tags.get(_DT_STRTAB, 0)
        for kind, offset, begin, length in segments:
            if kind == _PT_LOAD and begin <= address < begin + length:
                return self._string(offset + address - begin + tags[_DT_SONAME])
        raise ElfError(_DAMAGED)

    def _tags(self, offset: int, _: int, length: int) -> Iterator[tuple[int, int]]:
        layout = struct.Struct(self.order + _DYNAMIC[self.bits])
        length = min(length, _MOST_DYNAMIC)
        for tag, value in layout.iter_unpack(self._read(offset, length - length % layout.size)):
            if tag == _DT_NULL:
                return
            yield tag, value

    def _string(self, offset: int) -> str:
        text, end, _ = self._read(offset, min(LONGEST_SONAME + 1, max(self.size - offset, 1))).partition(b"\0")
        if not end:
            raise ElfError(_DAMAGED)
        return os.fsdecode(text)

    def _unpack(self, formats: Mapping[int, str], offset: int) -> tuple[int, ...]:
        layout = struct.Struct(self.order + formats[self.bits])
        return layout.unpack(self._read(offset, layout.size))

    def _read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise ElfError(_DAMAGED)
        self.file.seek(offset)
        return self.file.read(length)
