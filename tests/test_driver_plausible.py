"""The driver's numbers: right, or unknown."""

from __future__ import annotations

import pytest

from sgpu.driver.plausible import MOST_MEMORY, free_memory, percent, process_memory, reserved_memory, total_memory

pytestmark = pytest.mark.pure

GIB = 1 << 30
FILLER = (1 << 64) - 1


@pytest.mark.parametrize(
    ("total", "known"),
    [(0, None), (1, 1), (16 * GIB, 16 * GIB), (MOST_MEMORY, MOST_MEMORY), (MOST_MEMORY + 1, None), (FILLER, None)],
)
def test_total_memory(total: int, known: int | None) -> None:
    """Neither none at all nor more than any GPU has."""
    assert total_memory(total) == known


@pytest.mark.parametrize(
    ("free", "used", "total", "known"),
    [
        *((3, 7, 10, 3), (0, 10, 10, 0), (10, 0, 10, 10)),
        *((11, 0, 10, None), (0, 11, 10, None), (3, 7, None, None), (FILLER, FILLER, 10, None)),
    ],
)
def test_free_memory(free: int, used: int, total: int | None, known: int | None) -> None:
    """It fits into the total, and so does what is used."""
    assert free_memory(free, used, total) == known


@pytest.mark.parametrize(
    ("reserved", "total", "known"), [(3, 10, 3), (10, 10, None), (None, 10, None), (3, None, None)]
)
def test_reserved_memory(reserved: int | None, total: int | None, known: int | None) -> None:
    """Less than the total."""
    assert reserved_memory(reserved, total) == known


@pytest.mark.parametrize(("value", "known"), [(-1, None), (0, 0), (100, 100), (101, None), (4294967295, None)])
def test_percent(value: int, known: int | None) -> None:
    """From 0 to 100."""
    assert percent(value) == known


@pytest.mark.parametrize(
    ("used", "total", "known"),
    [
        *((None, 10, None), (0, 10, 0), (10, 10, 10), (11, 10, None)),
        *((GIB, None, GIB), (MOST_MEMORY + 1, None, None), (12_000_000_000_000_000_000, 16 * GIB, None)),
    ],
)
def test_process_memory(used: int | None, total: int | None, known: int | None) -> None:
    """No process has more than the GPU."""
    assert process_memory(used, total) == known
