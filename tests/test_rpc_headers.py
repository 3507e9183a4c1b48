"""Blocks of headers: what hpack makes of them, whatever came before; which fields there may be; and our own blocks."""

from __future__ import annotations

from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.rpc.headers import MOST_BLOCKS, NO_TABLE, Decoder, MalformedError, encode

Headers = list[tuple[str, str]]
REQUEST: Headers = [(":method", "POST"), (":scheme", "http"), (":path", "/v1beta1.DevicePlugin/Allocate")]
#: What a connection sends again and again.
USUAL: list[Headers] = [
    [(":status", "200"), ("content-type", "application/grpc+proto")],
    [("grpc-status", "0")],
    [*REQUEST, ("te", "trailers")],
]
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"]), max_size=200)
BLOCKS = st.one_of(
    st.sampled_from(USUAL),
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), TEXT), max_size=4, unique_by=lambda f: f[0]),
)
#: Blocks, and now and then another size of the table: so small that entries go, or none at all.
SEQUENCES = st.lists(st.one_of(BLOCKS, BLOCKS, BLOCKS, st.sampled_from([0, 40, 100, 4096])), max_size=30)


def resize(encoder: Any, size: int) -> None:  # noqa: ANN401  # hpack is not typed
    """As a peer does. (hpack forgets to say so where it is asked for the same twice.)"""
    if size != encoder.header_table_size:
        encoder.header_table_size = size


@given(SEQUENCES)
def test_it_decodes_what_hpack_encodes(sequence: list[Headers | int]) -> None:
    """Return the same fields, whatever came before."""
    encoder, decoder = hpack.Encoder(), Decoder()
    for block in sequence:
        if isinstance(block, int):
            resize(encoder, block)
        else:
            assert decoder.decode(encoder.encode(block)) == dict(block)


@given(st.lists(BLOCKS, max_size=5))
def test_hpack_decodes_what_it_encodes(blocks: list[Headers]) -> None:
    """Say the fields so that they leave no trace, also to a peer that has forbidden a table."""
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    first = NO_TABLE
    for block in blocks:
        assert [tuple(field) for field in decoder.decode(first + encode(*block))] == block
        first = b""
    assert not decoder.header_table.dynamic_entries


def test_a_block_is_worked_out_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember it from the second time on: the first adds to the table."""
    encoder, decoder = hpack.Encoder(), Decoder()
    blocks = [encoder.encode(fields) for fields in USUAL * 3][len(USUAL) :]
    encoder, decoder = hpack.Encoder(), Decoder()
    for fields in USUAL * 2:
        decoder.decode(encoder.encode(fields))
    monkeypatch.delattr(hpack.Decoder, "decode")
    for block, fields in zip(blocks, USUAL * 2, strict=True):
        assert decoder.decode(block) == dict(fields)


def test_a_peer_does_not_decide_how_much_is_kept() -> None:
    """Keep no more blocks than MOST_BLOCKS, however many it makes of what the table has."""
    encoder, decoder = hpack.Encoder(), Decoder()
    for number in range(1, 10 * MOST_BLOCKS):
        decoder.decode(encoder.encode([("te", "trailers")] * number))
    assert len(decoder._known) <= MOST_BLOCKS


@pytest.mark.parametrize(
    "fields",
    [
        *([*REQUEST, field] for field in [("X", "a"), ("a b", "a"), ("", "a"), ("x\xff", "a"), ("a:b", "a")]),
        *([*REQUEST, ("x", value)] for value in [" a", "a\t", "a\nb", "a\rb", "a\0b"]),
        *([*REQUEST, field] for field in [("connection", "close"), ("upgrade", "h2c"), ("te", "gzip")]),
        *([*REQUEST, field] for field in [(":path", "/"), (":status", "200"), (":protocol", "x")]),
        *(REQUEST[:index] + REQUEST[index + 1 :] for index in range(3)),
        [*REQUEST[:2], (":path", "")],
        [("x", "a"), *REQUEST],
        [(":authority", "a"), (":status", "200"), (":method", "GET")],
    ],
    ids=str,
)
def test_fields_that_no_peer_may_send(fields: Headers) -> None:
    """Refuse them (RFC 9113, 8.2 and 8.3)."""
    with pytest.raises(MalformedError):
        Decoder().decode(encode(*fields))


def test_values_of_a_field_that_comes_twice_are_joined() -> None:
    """As RFC 9110, 5.3 has it."""
    assert Decoder().decode(encode(("a", "1"), ("b", "2"), ("a", "3"))) == {"a": "1, 3", "b": "2"}
