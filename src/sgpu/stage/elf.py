"""What a library says of itself: its soname, and whether it is for this machine. Knows nothing of NVIDIA."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

#: Our own program, which is of the kind that libraries have to be of.
_OURSELVES: Final = Path("/proc/self/exe")


class NotWholeError(Exception):
    """A file that should be a library or a program is none, or is cut short."""


def soname(path: Path) -> str | None:
    """The soname of a library, empty if it has none; None if it is for another machine, or for 32 bits.

    Raises NotWholeError, and OSError when it can't be read.
    """
    with path.open("rb") as file:
        try:
            elf = ELFFile(file)
            if _kind(elf) != _own_kind():
                return None
            # The section headers are the last thing in the files that linkers write.
            if elf["e_shoff"] + elf["e_shentsize"] * elf["e_shnum"] > elf.stream_len:
                raise ELFError("cut short")
            for segment in elf.iter_segments(type="PT_DYNAMIC"):
                if isinstance(segment, DynamicSegment):
                    for tag in segment.iter_tags("DT_SONAME"):
                        return str(tag.soname)  # type: ignore[attr-defined]  # named after the tag
        except Exception as error:  # damaged headers lead the parser anywhere: out of the file, into its assertions
            raise NotWholeError(f"{path} is not a whole file ({error}); is the driver being installed?") from error
    return ""


def _kind(elf: ELFFile) -> tuple[object, ...]:
    return (elf.elfclass, elf.little_endian, elf["e_machine"])


@cache
def _own_kind() -> tuple[object, ...]:
    with _OURSELVES.open("rb") as file:
        return _kind(ELFFile(file))
