"""What claims have of units."""

from __future__ import annotations

import pytest

from sgpu.node.claims import UNLIMITED, ClaimedUnit, PreparedClaim, free_shares, promised, used_parts
from sgpu.node.gpu import Gpu, units
from sgpu.node.offers import Offer
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure


def claimed(number: int, *shares: int, memory: int = 0, limited: bool = True) -> PreparedClaim:
    unit = ClaimedUnit(
        f"s-{number}", "GPU-a", "r", tuple(Share("GPU-a", each) for each in shares), memory, limited=limited
    )
    return PreparedClaim(f"u-{number}", "team", f"claim-{number}", (), (unit,))


def test_free_shares() -> None:
    """The first that no claim has, on that unit."""
    claims = [claimed(1, 0, 2), claimed(2, 3)]
    assert [share.number for share in free_shares("GPU-a", 3, claims)] == [1, 4, 5]
    assert [share.number for share in free_shares("GPU-b", 1, claims)] == [0]
    assert free_shares("GPU-a", 0, claims) == ()


def test_promised() -> None:
    """A claim's memory is on its first share; one without memory has its fair part; one without a limit all."""
    claims = [claimed(1, 0, 1, memory=5), claimed(2, 2), claimed(3, 3, limited=False)]
    assert promised(claims) == {Share("GPU-a", 0): 5, Share("GPU-a", 1): 0, Share("GPU-a", 3): UNLIMITED}


@pytest.mark.parametrize(("memory", "part"), [(100, 0.6), (None, 0.4)], ids=["known", "unknown"])
def test_used_parts(memory: int | None, part: float) -> None:
    """Memory counts or shares, whichever is used more."""
    offers = [Offer(units(Gpu(f"GPU-{letter}", "T4", "", (), memory))[0], 5) for letter in "ab"]
    claims = [claimed(1, 0, memory=30), claimed(2, 1, memory=30)]
    assert used_parts(claims, offers) == {"GPU-a": pytest.approx(part), "GPU-b": 0}


def test_named() -> None:
    """In messages a claim is what `kubectl` shows."""
    assert str(claimed(1)) == "team/claim-1"
