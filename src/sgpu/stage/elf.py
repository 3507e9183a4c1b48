"""What a library says of itself: its soname, and whether it is for this machine. Knows nothing of NVIDIA."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from sgpu.elf import Elf, ElfError, read_elf

#: Our own program, which is of the kind that libraries have to be of.
_OURSELVES: Final = Path("/proc/self/exe")


class NotWholeError(Exception):
    """A file that should be a library or a program is none, or is cut short."""


def soname(path: Path) -> str | None:
    """The soname of a library, empty if it has none; None if it is for another machine, or for 32 bits.

    Raises NotWholeError, and OSError when it can't be read.
    """
    try:
        elf = read_elf(path)
    except ElfError as error:
        raise NotWholeError(f"{path} is not a whole file ({error}); is the driver being installed?") from error
    return elf.soname if elf.kind == _own().kind else None


@cache
def _own() -> Elf:
    return read_elf(_OURSELVES)
