"""Amounts as Kubernetes writes them."""

from __future__ import annotations

import pytest

from sgpu.lib.quantity import parse_quantity

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("0", 0),
        ("1", 1),
        ("4Gi", 4 << 30),
        ("15360Mi", 15360 << 20),
        ("1k", 1000),
        ("1.5Gi", 3 << 29),
        ("2e3", 2000),
        ("1E", 10**18),
        ("100m", 1),
        ("-5", -5),
    ],
)
def test_amounts(text: str, amount: int) -> None:
    """Suffixes of both kinds and exponents; parts of one are rounded up."""
    assert parse_quantity(text) == amount


@pytest.mark.parametrize("text", ["", "4GiB", "Gi", "1 Gi", "0x4", "1e", "٤", "1\n", "1" * 31])
def test_no_amount(text: str) -> None:
    """What Kubernetes would not write is refused."""
    with pytest.raises(ValueError, match="is not an amount"):
        parse_quantity(text)
