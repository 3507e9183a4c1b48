"""HPACK with a memory encodes and decodes what hpack does, whatever came before."""

from __future__ import annotations

from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.rpc.headers import MOST_BLOCKS, Decoder, Encoder

Headers = list[tuple[str, str]]
#: What a connection sends again and again.
USUAL: list[Headers] = [
    [(":status", "200"), ("content-type", "application/grpc+proto")],
    [("grpc-status", "0")],
    [(":method", "POST"), (":path", "/v1beta1.DevicePlugin/Allocate"), ("te", "trailers")],
]
BLOCKS = st.one_of(
    st.sampled_from(USUAL),
    st.lists(st.tuples(st.sampled_from(["a", "b", "grpc-message"]), st.text(max_size=40)), max_size=4),
)
#: Blocks, and now and then another size of the table: so small that entries go, or none at all.
SEQUENCES = st.lists(st.one_of(BLOCKS, BLOCKS, BLOCKS, st.sampled_from([0, 40, 100, 4096])), max_size=30)


def resize(encoder: Any, size: int) -> None:  # noqa: ANN401  # hpack is not typed
    """As a peer asks for it. (hpack forgets to say so where it is asked for the same twice.)"""
    if size != encoder.header_table_size:
        encoder.header_table_size = size


@given(SEQUENCES)
def test_each_decodes_what_the_other_encodes(sequence: list[Headers | int]) -> None:
    """Agree with hpack at the other end, and with each other."""
    for encoder, decoder in ((Encoder(), hpack.Decoder()), (hpack.Encoder(), Decoder()), (Encoder(), Decoder())):
        for block in sequence:
            if isinstance(block, int):
                resize(encoder, block)
                decoder.max_allowed_table_size = 4096
            else:
                assert [tuple(header) for header in decoder.decode(encoder.encode(block))] == block


@given(SEQUENCES)
def test_it_encodes_the_same_bytes(sequence: list[Headers | int]) -> None:
    """Encode as hpack does, byte by byte."""
    ours, plain = Encoder(), hpack.Encoder()
    for block in sequence:
        if isinstance(block, int):
            resize(ours, block)
            resize(plain, block)
        else:
            assert ours.encode(block) == plain.encode(block)


def test_a_block_is_worked_out_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember it from the second time on: the first adds to the table. Give each caller a list of its own."""
    encoder, decoder = Encoder(), Decoder()
    for headers in USUAL * 2:
        decoder.decode(encoder.encode(headers)).clear()
    monkeypatch.delattr(hpack.Encoder, "encode")
    monkeypatch.delattr(hpack.Decoder, "decode")
    for headers in USUAL * 2:
        decoded = decoder.decode(encoder.encode(headers))
        assert decoded == headers
        decoded.clear()


def test_a_peer_does_not_decide_how_much_is_kept() -> None:
    """Keep no more blocks than MOST_BLOCKS, however many it makes of what the table has."""
    encoder, decoder = hpack.Encoder(), Decoder()
    for number in range(1, 10 * MOST_BLOCKS):
        decoder.decode(encoder.encode([("te", "trailers")] * number))
    assert len(decoder._memory.known) <= MOST_BLOCKS
