"""What a library's header says: taken from real compilers' files, and from files made by hand for other machines."""

from __future__ import annotations

import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from stub_driver import StubDriver

from sgpu.elf import Elf, ElfError, read_elf


def test_library(tmp_path: Path) -> None:
    """A shared library of this machine, with its soname, as the machine's own tools see it."""
    machine = subprocess.run(["uname", "-m"], check=True, capture_output=True, text=True).stdout.strip()
    assert read_elf(StubDriver(tmp_path).path) == Elf(64, machine, "libnvidia-ml.so.1")


def test_program() -> None:
    """A program has no soname."""
    assert read_elf(Path(sys.executable)).soname == ""


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


@pytest.mark.parametrize(
    ("bits", "order", "machine", "name"),
    [
        pytest.param(64, "<", 183, "aarch64", id="Arm"),
        pytest.param(64, "<", 21, "ppc64", id="Power"),
        pytest.param(32, "<", 3, "386", id="32 bit"),
        pytest.param(32, ">", 20, "ppc (big-endian)", id="big-endian"),
        pytest.param(64, "<", 9999, "9999", id="unheard of"),
    ],
)
def test_other_machines(tmp_path: Path, bits: int, order: str, machine: int, name: str) -> None:
    """Those of other machines are read, not loaded."""
    path = tmp_path / "library"
    path.write_bytes(made(bits, order, machine, b"libx.so.1"))
    assert read_elf(path) == Elf(bits, name, "libx.so.1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "not an ELF file", id="empty"),
        pytest.param(b"#!/bin/sh\n", "not an ELF file", id="script"),
        pytest.param(b"\x7fELF\x07\x01", "damaged", id="no such class"),
        pytest.param(made(64, "<", 62, b"x")[:60], "cut short", id="header cut short"),
    ],
)
def test_useless(tmp_path: Path, content: bytes, words: str) -> None:
    """What is no library, or not all of one, is said to be that."""
    path = tmp_path / "library"
    path.write_bytes(content)
    with pytest.raises(ElfError, match=words):
        read_elf(path)


def test_every_cut(tmp_path: Path) -> None:
    """Wherever a file ends, it is read or refused: nothing else happens."""
    whole = made(64, "<", 62, b"libx.so.1")
    path = tmp_path / "library"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with suppress(ElfError):
            assert read_elf(path) == Elf(64, "x86_64", "libx.so.1")


def test_half_copied(tmp_path: Path) -> None:
    """A real library of which the end is missing is refused, although all that is asked for is there."""
    path = StubDriver(tmp_path).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ElfError, match="cut short"):
        read_elf(path)
