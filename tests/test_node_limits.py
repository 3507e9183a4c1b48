"""The memory that a container may use: its part of a unit, by its shares."""

from __future__ import annotations

import pytest

from sgpu.node.container import Container
from sgpu.node.gpu import Gpu, units
from sgpu.node.limits import allowed_by_container, allowed_memory
from sgpu.node.offers import Offer
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure

MAIN = Container("team", "trainer", "main")
OTHER = Container("team", "trainer", "sidecar")


def offer(letter: str = "a", memory: int | None = 1000, factor: float = 1.0, shares: int = 8) -> Offer:
    return Offer(units(Gpu(f"GPU-{letter}", "T4", "0:3B:0.0", (), memory))[0], shares, limit_factor=factor)


@pytest.mark.parametrize(
    ("memory", "factor", "shares", "allowed"),
    [
        pytest.param(1000, 1, 1, 125, id="fair"),
        pytest.param(1000, 1, 3, 375, id="several shares"),
        pytest.param(1000, 1.5, 2, 375, id="burst"),
        pytest.param(1000, 5, 4, 1000, id="at most all"),
        pytest.param(1000, 1, 9, 1000, id="retained shares, more than there are"),
        pytest.param(1000, 0, 2, 250, id="off"),
        pytest.param(1003, 1, 1, 125, id="rounded down"),
        pytest.param(None, 1, 1, None, id="unknown"),
    ],
)
def test_allowed_memory(memory: int | None, factor: float, shares: int, allowed: int | None) -> None:
    """A container may use the part of its shares, or a multiple of that."""
    assert allowed_memory(offer(memory=memory, factor=factor), shares) == allowed


def test_by_container() -> None:
    """Shares of one unit add up; each unit and each container counts by itself."""
    holders = {Share("GPU-a", 0): MAIN, Share("GPU-a", 5): MAIN, Share("GPU-b", 0): MAIN, Share("GPU-a", 1): OTHER}
    gone = {Share("GPU-x", 0): MAIN, Share("GPU-c", 0): MAIN}
    allowed = allowed_by_container([offer("a"), offer("b", 80), offer("c", None)], holders | gone)
    assert allowed == {"GPU-a": {MAIN: 250, OTHER: 125}, "GPU-b": {MAIN: 10}}
