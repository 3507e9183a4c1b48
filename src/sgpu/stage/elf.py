"""What a library says of itself: its soname, and whether it is for this machine. Knows nothing of NVIDIA."""

from __future__ import annotations

from pathlib import Path

from sgpu.elf import ElfError, ours, read_elf


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
    return elf.soname if elf.kind == ours().kind else None
