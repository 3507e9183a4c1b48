"""Input that is nearly right, and a limit for what takes it: for the tests named test_fuzz_*.

`tox -e fuzz` runs them with more examples, new ones each time (profile `fuzz` in conftest).
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from hypothesis import strategies as st

#: Seconds of processor time for one example, which no busy machine uses up. They take milliseconds.
CPU_LIMIT: Final = 5.0
#: Characters of a message.
MOST_MESSAGE: Final = 2000
#: Any characters, and those that Python has for bytes that are not UTF-8: names of files have such.
TEXTS: Final = st.text(
    st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF), max_size=20
)
NUMBERS: Final = (
    st.sampled_from((-1, 0, 1, 2**31, 2**63, 2**64 - 1, 10**400, 1e308, -1e308, float("nan"))) | st.integers()
)
JSON: Final = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def limited() -> Iterator[None]:
    """Fail what does not end."""

    def fail(*_: object) -> None:
        pytest.fail(f"still busy after {CPU_LIMIT:g} s of processor time")  # which no `except Exception` takes

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_message(error: Exception) -> None:
    """Assert that what an operator reads is one line, and not as long as the input."""
    assert str(error).isprintable()
    assert len(str(error)) <= MOST_MESSAGE


@st.composite
def mutated(draw: st.DrawFn, *originals: bytes) -> bytes:
    """One of these, with some bytes replaced, removed, put in, or said again."""
    raw = bytearray(draw(st.sampled_from(originals)))
    pieces = st.binary(max_size=8) | st.sampled_from((b"\xff\xff\xff\xff", bytes(8), b"\x7f"))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(raw)))
        end = draw(st.integers(start, min(start + draw(st.sampled_from((1, 4, 8, 1000))), len(raw))))
        raw[start:end] = draw(pieces | st.just(bytes(raw[start:end] * 2)))
    return bytes(raw)


@st.composite
def near(draw: st.DrawFn, *originals: Any) -> Any:  # noqa: ANN401  # whatever JSON has
    """One of these documents, with some of its parts replaced by any JSON, or absent."""
    root = [copy.deepcopy(draw(st.sampled_from(originals)))]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        while isinstance(part := holder[key], (dict, list)) and part and draw(st.integers(0, 4)):
            holder, key = part, draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if holder is root or draw(st.booleans()):
            holder[key] = draw(JSON)
        else:
            del holder[key]
    return root[0]
