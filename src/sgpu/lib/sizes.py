"""Formats amounts of memory in the units of NVIDIA's tools and of Kubernetes. Imports nothing of sgpu."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30


def part_of(used: int, total: int) -> str:
    """Return bytes of a GPU's memory as text, as in `14.8 of 15.0 GiB`."""
    return f"{used / GIB:.1f} of {total / GIB:.1f} GiB"
