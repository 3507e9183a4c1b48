"""What the command sends and the daemon answers, as JSON."""

from __future__ import annotations

import pytest

from sgpu.observe.orders import MOST_REASON, BadOrderError, Done, Order, decode_done, decode_order, encode

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("order", [Order("0"), Order("GPU-ä", "x" * MOST_REASON)])
def test_round_trip(order: Order) -> None:
    """Decode what was encoded; without a reason, it is empty."""
    assert decode_order(encode(order)) == order
    assert decode_order(b'{"gpu": "0"}') == Order("0")
    assert decode_done(encode(Done("GPU-a", "T4", "0:1:2.0", changed=True))) == Done("GPU-a", "T4", "0:1:2.0", True)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"reason": ""}', b'{"gpu": "0", "force": true}'),
        *(b'{"gpu": 0}', b'{"gpu": "0", "reason": null}', b'{"gpu": "0", "reason": "a\\nb"}'),
        encode(Order("0", "x" * (MOST_REASON + 1))),
    ],
)
def test_bad_orders(body: bytes) -> None:
    """Refuse anything else."""
    with pytest.raises(BadOrderError):
        decode_order(body)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"[" * 100_000, b'{"uuid": "a", "name": "b", "pci_bus_id": "c"}'])
def test_bad_answers(body: bytes) -> None:
    """Raise ValueError for what another program or version may say."""
    with pytest.raises(ValueError, match=r"."):
        decode_done(body)
