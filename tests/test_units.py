"""Memory in words."""

from __future__ import annotations

import pytest

from sgpu.units import GIB, MIB, part_of

pytestmark = pytest.mark.pure


def test_part_of() -> None:
    """In one unit, to be compared at a glance."""
    assert part_of(300 * MIB, 15 * GIB) == "0.3 of 15.0 GiB"
