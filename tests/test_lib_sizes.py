"""Sizes of memory, as people read them."""

from __future__ import annotations

import pytest

from sgpu.lib.sizes import GIB, MIB, part_of

pytestmark = pytest.mark.pure


def test_part_of() -> None:
    """Give both in one unit, to be compared at a glance."""
    assert part_of(300 * MIB, 15 * GIB) == "0.3 of 15.0 GiB"
