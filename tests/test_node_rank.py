"""Ranking of units for a container that asks for a share."""

from __future__ import annotations

import pytest

from sgpu.node.rank import Placement, UnitLoad, rank

pytestmark = pytest.mark.pure

SPREAD, PACK = Placement.SPREAD, Placement.PACK


def load(allocated: int, memory: int | None = None, utilization: int | None = None, shares: int = 12) -> UnitLoad:
    return UnitLoad(allocated, shares, memory, utilization)


@pytest.mark.parametrize(
    ("placement", "a", "b", "best"),
    [
        pytest.param(SPREAD, load(2, 9, 0), load(1, 1, 99), "b", id="spread: fewest allocated"),
        pytest.param(SPREAD, load(1, shares=2), load(2, shares=100), "a", id="spread: fewest, not the smallest part"),
        pytest.param(SPREAD, load(1, 8, 0), load(1, 9, 99), "b", id="spread: then most free memory"),
        pytest.param(SPREAD, load(1, 8, 10), load(1, 8, 9), "b", id="spread: then lowest utilization"),
        pytest.param(SPREAD, load(1, 8, 9), load(1, 8, 9), "a", id="spread: then as given"),
        pytest.param(SPREAD, load(1, None, 5), load(1, 9, 5), "a", id="spread: memory unknown for one"),
        pytest.param(SPREAD, load(1, None, 6), load(1, 9, 5), "b", id="spread: memory unknown, utilization known"),
        pytest.param(SPREAD, load(1, 8, 9), load(1, 8, None), "a", id="spread: utilization unknown for one"),
        pytest.param(PACK, load(1, 1, 99), load(2, 9, 0), "b", id="pack: most allocated, whatever the figures"),
        pytest.param(PACK, load(5, shares=100), load(2, shares=4), "b", id="pack: by the part that is allocated"),
        pytest.param(PACK, UnitLoad(5, 12, others=12), load(1), "b", id="pack: not what another plugin gave away"),
        pytest.param(PACK, load(1, 1, 9), load(1, 9, 0), "a", id="pack: ties as given, whatever the figures"),
    ],
)
def test_rank(placement: Placement, a: UnitLoad, b: UnitLoad, best: str) -> None:
    """Spread prefers the unit with most room, pack the fullest. A figure counts only where it is known for all."""
    loads = {"a": a, "b": b}
    allocated = {uuid: load.allocated or 0 for uuid, load in loads.items()}
    assert rank(loads, allocated, placement)[0] == best


def test_allocated() -> None:
    """The counts to go by are those that are passed: they are known for every candidate."""
    loads = {"a": UnitLoad(None, 12), "b": UnitLoad(3, 12)}
    assert rank(loads, {"a": 4, "b": 3}, SPREAD) == ["b", "a"]
    assert rank(loads, {"a": 4, "b": 3}, PACK) == ["a", "b"]
    assert rank({}, {}, SPREAD) == []
