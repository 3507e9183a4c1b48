"""HPACK with a memory: the calls of a connection say the same few header blocks again and again.

As long as the table of headers that both sides keep is the same, a block means the same. To look it up instead of
working it out takes a tenth off an Allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, Generic, TypeVar

import hpack

#: Blocks that are remembered. A peer chooses what it says, and not how much of it we keep.
MOST_BLOCKS: Final = 16


Key = TypeVar("Key", bound=Hashable)
Meaning = TypeVar("Meaning")


class _Memory(Generic[Key, Meaning]):
    """The meaning of header blocks, for one state of hpack's table."""

    def __init__(self, table: Any) -> None:  # noqa: ANN401  # hpack is not typed
        self._table = table
        self._newest: object = None
        self._length = 0
        self.known: dict[Key, Meaning] = {}

    def recall(self, key: Key, work_out: Callable[[], Meaning]) -> Meaning:
        """Return the meaning, computed if it is not remembered."""
        self._forget_if_changed()
        if (meaning := self.known.get(key)) is None:
            resized = self._table.resized  # which the next block that is said begins with, and no other
            meaning = work_out()
            if not self._forget_if_changed() and not resized and len(self.known) < MOST_BLOCKS:
                self.known[key] = meaning
        return meaning

    def _forget_if_changed(self) -> bool:
        # An entry that is added is another object, and comes first; those that go are the last.
        entries = self._table.dynamic_entries
        newest, length = entries[0] if entries else None, len(entries)
        changed = newest is not self._newest or length != self._length or self._table.resized
        if changed:
            self._newest, self._length = newest, length
            self.known.clear()
        return bool(changed)


class Encoder(hpack.Encoder):  # type: ignore[misc]  # hpack is not typed
    def __init__(self) -> None:
        super().__init__()
        self._memory: _Memory[tuple[tuple[str, str], ...], bytes] = _Memory(self.header_table)

    def encode(self, headers: Iterable[tuple[str, str]], huffman: bool = True) -> bytes:
        said = tuple(headers)
        return self._memory.recall(said, lambda: super(Encoder, self).encode(said, huffman))


class Decoder(hpack.Decoder):  # type: ignore[misc]  # hpack is not typed
    def __init__(self) -> None:
        super().__init__()
        self._memory: _Memory[tuple[bytes, bool], list[tuple[object, object]]] = _Memory(self.header_table)

    def decode(self, data: bytes, raw: bool = False) -> list[tuple[object, object]]:
        block = bytes(data)
        return list(self._memory.recall((block, raw), lambda: super(Decoder, self).decode(block, raw)))
