"""Replaces impossible numbers of the driver by None, so that a figure is right or unknown for all readers. Pure.

Drivers fill answers with zeros, with all bits set, or with leftovers of other structures, and report success.
"""

from __future__ import annotations

from typing import Final

#: Bytes of GPU memory: more than any GPU has, less than any filler (2^60 is 1 EiB).
MOST_MEMORY: Final = 1 << 50


def total_memory(total: int) -> int | None:
    """Return a GPU's memory in bytes, or None if no GPU has as much or as little."""
    return total if 0 < total <= MOST_MEMORY else None


def free_memory(free: int, used: int, total: int | None) -> int | None:
    """Return a GPU's free memory in bytes, or None if it contradicts the total or what is used."""
    if total is None or free > total or used > total:
        return None
    return free


def reserved_memory(reserved: int | None, total: int | None) -> int | None:
    """Return the bytes that the driver keeps for itself, or None if that is all there is or more."""
    if reserved is None or total is None or reserved >= total:
        return None
    return reserved


def percent(value: int) -> int | None:
    """Return a percentage, or None if it is none."""
    return value if 0 <= value <= 100 else None


def process_memory(used: int | None, total: int | None) -> int | None:
    """Return the bytes that a process uses, or None if it is more than the GPU has."""
    if used is None or used > (MOST_MEMORY if total is None else total):
        return None
    return used
