"""Header blocks of HTTP/2 → fields, by hpack and the rules of RFC 9113, 8.2 and 8.3; and fields → blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from operator import is_not
from typing import Final

import hpack

#: Bytes of a header block, as it comes and as hpack counts its fields. A kubelet's has 200.
MAX_HEADER_BYTES: Final = 16 * 1024
#: Blocks that are remembered. A peer chooses what it says, and not how much of it we keep.
MOST_BLOCKS: Final = 16
#: Begins the first block that is sent: what we say leaves no trace in the table of headers that both sides keep.
NO_TABLE: Final = b"\x20"
#: How a block begins that resizes that table.
_RESIZES: Final = frozenset(bytes([byte]) for byte in range(0x20, 0x40))

_NAME: Final = re.compile(r"[!-9;-@\[-~]+")  # visible ASCII without capitals and colons
_VALUE: Final = re.compile(r"(?![ \t])[^\0\r\n]*(?<![ \t])")
_REQUEST: Final = frozenset({":method", ":scheme", ":path"})
_PSEUDO: Final = _REQUEST | {":authority", ":status"}
#: Fields about a connection of HTTP/1.
_FORBIDDEN: Final = frozenset({"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"})


class MalformedError(Exception):
    """The fields are none that a request, a response or their trailers may have."""


class Decoder:
    """hpack's, with a memory: the calls of a connection say the same few blocks again and again.

    As long as the table of headers is the same, a block means the same. To look it up saves a third of a call.
    """

    def __init__(self) -> None:
        self._hpack = hpack.Decoder(MAX_HEADER_BYTES)
        self._known: dict[bytes, Mapping[str, str]] = {}

    def decode(self, block: bytes) -> Mapping[str, str]:
        """Return the fields by name. Raises MalformedError or hpack's, after which nothing can be decoded."""
        if (fields := self._known.get(block)) is None:
            entries = self._hpack.header_table.dynamic_entries
            before = [*entries]  # held, so that another entry is another object
            fields = _checked(self._hpack.decode(block))
            if len(entries) != len(before) or any(map(is_not, entries, before)):
                self._known.clear()
            elif len(self._known) < MOST_BLOCKS and block[:1] not in _RESIZES:  # which resizes the table
                self._known[block] = fields
        return fields


def _checked(said: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """Return the fields by name; the values of one that comes more than once are joined."""
    fields: dict[str, str] = {}
    regular = False
    for name, value in said:
        if name.startswith(":"):
            fits = name in _PSEUDO and name not in fields and not regular
        else:
            regular = True
            fits = bool(_NAME.fullmatch(name)) and name not in _FORBIDDEN and (name != "te" or value == "trailers")
        if not (fits and _VALUE.fullmatch(value)):
            raise MalformedError(f"no peer may send {name!r}: {value!r} there")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    pseudo = {name for name in fields if name.startswith(":")} - {":authority"}
    if pseudo and pseudo != {":status"} and not (pseudo == _REQUEST and fields[":path"]):
        raise MalformedError(f"{sorted(pseudo)} are the fields of neither a request nor a response")
    return fields


def encode(*fields: tuple[str, str]) -> bytes:
    """Return a block. Uncompressed, so that one is the same on each connection: these sockets never leave the node."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: str) -> bytes:
    raw = text.encode()
    length, rest = bytearray(), len(raw) - 127  # RFC 7541, 5.1: seven bits, then seven at a time
    while rest >= 128:
        length.append(rest & 127 | 128)
        rest >>= 7
    return (bytes([127, *length, rest]) if rest >= 0 else bytes([len(raw)])) + raw
