"""The ids of shares, which kubelets remember: their syntax must never change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.shares import Share, ids, unit_of

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("share_id", "share"),
    [
        pytest.param("GPU-1::0", Share("GPU-1", 0), id="first"),
        pytest.param("GPU-1::10", Share("GPU-1", 10), id="two digits"),
        pytest.param("GPU-1::999999999", Share("GPU-1", 999_999_999), id="nine digits"),
        pytest.param("MIG-GPU-1/7/0::3", Share("MIG-GPU-1/7/0", 3), id="slashes in the UUID"),
        pytest.param("a::b::2", Share("a::b", 2), id="the last separator counts"),
    ],
)
def test_id(share_id: str, share: Share) -> None:
    """An id is the UUID and the number, with the last `::` between them."""
    assert Share.parse(share_id) == share
    assert str(share) == share_id
    assert unit_of(share_id) == share.uuid


@pytest.mark.parametrize(
    "share_id",
    [
        *("", "::", "::0", "GPU-1", "GPU-1::", "GPU-1:0", "GPU-1::x", "GPU-1::-1", "GPU-1::+1", "GPU-1::01"),
        *("GPU-1:: 1", "GPU-1::1\n", "GPU-1::1_0", "GPU-1::1.0", "GPU-1::0x1", "GPU-1::١", "GPU-1::1000000000"),
        pytest.param(f"GPU-1::{'9' * 5000}", id="more digits than Python converts"),
    ],
)
def test_not_an_id(share_id: str) -> None:
    """A share has exactly one id. What Python would also read as that number is refused."""
    assert Share.parse(share_id) is None


@given(text=st.text(max_size=40))
def test_any_text(text: str) -> None:
    """An id that parses prints unchanged: no two ids name the same share."""
    share = Share.parse(text)
    assert share is None or str(share) == text


def test_ids() -> None:
    """The ids of the first shares are those with the numbers from 0."""
    assert list(ids("GPU-1", 3)) == [str(Share("GPU-1", number)) for number in range(3)]
    assert list(ids("GPU-1", 0)) == []


def test_unit_of_no_id() -> None:
    """Text without a separator is of no unit."""
    assert unit_of("GPU-1") == ""
