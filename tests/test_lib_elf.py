"""ELF headers: of real compilers' files, and of files made by hand for other machines."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from stub_driver import StubDriver

from sgpu.lib.elf import Elf, ElfError, is_cut_short, ours, read_elf
from sgpu.lib.files import NotRegularError


def made(bits: int, order: str, machine: int, soname: bytes) -> bytes:
    """A library with one loaded segment, in which its dynamic section and its strings are."""
    wide = bits == 64
    header, segment = (64, 56) if wide else (52, 32)
    entry = "QQ" if wide else "II"
    table, base = header, 0x1000
    strings = table + 2 * segment
    dynamic = strings + len(soname) + 2
    entries = struct.pack(order + entry * 3, 5, base + strings, 14, 1, 0, 0)
    end = dynamic + len(entries)
    content = bytearray(header)
    content[:6] = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2])
    struct.pack_into(order + "H", content, 18, machine)
    struct.pack_into(order + ("Q" if wide else "I"), content, 32 if wide else 28, table)
    struct.pack_into(order + "HH", content, 54 if wide else 42, segment, 2)
    for kind, start, length in ((1, 0, end), (2, dynamic, len(entries))):
        flags = (0,) if wide else ()
        fields = (kind, *flags, start, base + start, 0, length, 0, 0)
        content += struct.pack(order + ("IIQQQQQQ" if wide else "IIIIIIII"), *fields, *(() if wide else (0,)))
    return bytes(content) + b"\0" + soname + b"\0" + entries


def test_library_of_this_machine(tmp_path: Path) -> None:
    """A compiled library has its soname, and is of the kind that this program can load."""
    elf = read_elf(StubDriver(tmp_path).path)
    assert elf == Elf(64, os.uname().machine, "libnvidia-ml.so.1")
    assert elf.kind == ours().kind


def test_program() -> None:
    """A program has no soname."""
    assert read_elf(Path(sys.executable)).soname == ""


MACHINES = {
    "Arm": (64, "<", 183, "aarch64"),
    "Power": (64, "<", 21, "ppc64"),
    "32 bit": (32, "<", 3, "386"),
    "big-endian": (32, ">", 20, "ppc (big-endian)"),
    "unknown machine": (64, "<", 9999, "9999"),
}


@pytest.mark.parametrize(("bits", "order", "machine", "name"), MACHINES.values(), ids=MACHINES)
def test_other_machines(tmp_path: Path, bits: int, order: str, machine: int, name: str) -> None:
    """Libraries of other machines are read, not loaded, and are of another kind."""
    path = tmp_path / "library"
    path.write_bytes(made(bits, order, machine, b"libx.so.1"))
    elf = read_elf(path)
    assert elf == Elf(bits, name, "libx.so.1")
    assert elf.kind != ours().kind


def test_pipe(tmp_path: Path) -> None:
    """What is no file is refused, and not waited for."""
    os.mkfifo(tmp_path / "library")
    with pytest.raises(NotRegularError):
        read_elf(tmp_path / "library")


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"\x7fELF\x07\x01", made(64, "<", 62, b"x")[:60]],
    ids=["empty", "script", "no such class", "header cut short"],
)
def test_useless(tmp_path: Path, content: bytes) -> None:
    """A file that is no ELF file, or has no whole header, is refused; that its end is missing is not what is wrong."""
    path = tmp_path / "library"
    path.write_bytes(content)
    with pytest.raises(ElfError):
        read_elf(path)
    assert not is_cut_short(path)


def test_every_cut(tmp_path: Path) -> None:
    """Wherever a file ends, it is read or refused: nothing else happens."""
    whole = made(64, "<", 62, b"libx.so.1")
    path = tmp_path / "library"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with suppress(ElfError):
            assert read_elf(path) == Elf(64, "x86_64", "libx.so.1")


def test_half_copied(tmp_path: Path) -> None:
    """A library of which the last byte is missing is refused, although all that is read of it is there."""
    path = StubDriver(tmp_path).path
    assert not is_cut_short(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert is_cut_short(path)
    with pytest.raises(ElfError):
        read_elf(path)


@pytest.mark.parametrize("read", [read_elf, is_cut_short])
def test_absent(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A file that can't be read is an OSError."""
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "library")
