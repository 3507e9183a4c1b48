"""HPACK with a memory says and hears what hpack does, whatever came before."""

from __future__ import annotations

from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.rpc.headers import MOST_BLOCKS, Decoder, Encoder

Headers = list[tuple[str, str]]
#: What a connection says again and again, and what it says once.
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
SPEECHES = st.lists(st.one_of(BLOCKS, BLOCKS, BLOCKS, st.sampled_from([0, 40, 100, 4096])), max_size=30)


def resize(encoder: Any, size: int) -> None:  # noqa: ANN401  # hpack is not typed
    """As a peer asks for it. (hpack forgets to say so where it is asked for the same twice.)"""
    if size != encoder.header_table_size:
        encoder.header_table_size = size


@given(SPEECHES)
def test_what_is_said_is_heard(speech: list[Headers | int]) -> None:
    """By either from the other, and by hpack from both."""
    for encoder, decoder in ((Encoder(), hpack.Decoder()), (hpack.Encoder(), Decoder()), (Encoder(), Decoder())):
        for said in speech:
            if isinstance(said, int):
                resize(encoder, said)
                decoder.max_allowed_table_size = 4096
            else:
                assert [tuple(header) for header in decoder.decode(encoder.encode(said))] == said


@given(SPEECHES)
def test_it_says_the_same(speech: list[Headers | int]) -> None:
    """Byte by byte."""
    ours, plain = Encoder(), hpack.Encoder()
    for said in speech:
        if isinstance(said, int):
            resize(ours, said)
            resize(plain, said)
        else:
            assert ours.encode(said) == plain.encode(said)


def test_what_is_remembered_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third time on: the first adds to the table, the second is the same as all that follow."""
    encoder, decoder = Encoder(), Decoder()
    for headers in USUAL * 2:
        decoder.decode(encoder.encode(headers))
    monkeypatch.delattr(hpack.Encoder, "encode")
    monkeypatch.delattr(hpack.Decoder, "decode")
    for headers in USUAL:
        assert decoder.decode(encoder.encode(headers)) == headers


def test_what_was_heard_is_the_hearer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """To change it changes nothing for the next."""
    encoder, decoder = Encoder(), Decoder()
    for _ in range(4):
        heard = decoder.decode(encoder.encode(USUAL[0]))
        assert heard == USUAL[0]
        heard.clear()


def test_a_peer_does_not_decide_how_much_is_kept() -> None:
    """However many blocks it makes of what the table has."""
    encoder, decoder = hpack.Encoder(), Decoder()
    for number in range(1, 10 * MOST_BLOCKS):
        decoder.decode(encoder.encode([("te", "trailers")] * number))
    assert len(decoder._memory.known) <= MOST_BLOCKS
