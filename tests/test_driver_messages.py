"""Messages between the driver's process and its parent, as lines."""

from __future__ import annotations

import json
import re
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.driver.messages import (
    CallStarted,
    DriverEvent,
    EventKind,
    Failure,
    GpuReport,
    LimitReport,
    LimitStarted,
    Message,
    NotReady,
    Report,
    WorkerConfig,
    decode,
    decode_config,
    decode_limits,
    encode,
    encode_config,
    encode_limits,
)
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, WantedLimit
from sgpu.node.figures import Figures, ProcessUse

pytestmark = pytest.mark.pure

MESSAGES = (Report, NotReady, DriverEvent, CallStarted, Failure, LimitStarted, LimitReport)
#: Any character that Python has, those without UTF-8 too: names of files have such.
TEXTS = st.text(st.characters(), max_size=20)
NUMBERS = st.integers(0, 2**64 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def built(kind: type) -> st.SearchStrategy[Any]:
    """Any value of that class: of each of its fields, by the field's type."""
    return st.deferred(
        lambda: st.builds(kind, **{name: OF[hint] for name, hint in typing.get_type_hints(kind).items()})
    )


def some(element: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(element, max_size=3).map(tuple)


OF: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: NUMBERS,
    bool: st.booleans(),
    float: st.floats(0.1, 3600),
    EventKind: st.sampled_from(EventKind),
    LimitState: st.sampled_from(LimitState),
    WantedLimit: built(WantedLimit),
    tuple[LimitAnswer, ...]: some(built(LimitAnswer)),
    Figures: built(Figures),
    int | None: st.none() | NUMBERS,
    bool | None: st.none() | st.booleans(),
    tuple[str, ...]: some(TEXTS),
    tuple[GpuReport, ...]: some(built(GpuReport)),
    tuple[ProcessUse, ...] | None: st.none() | some(built(ProcessUse)),
}


@pytest.mark.parametrize("kind", MESSAGES)
@given(st.data())
def test_round_trip(kind: type, data: st.DataObject) -> None:
    """Encode a message as one line of JSON that names its kind, and decode it, with or without the line's end."""
    message: Message = data.draw(built(kind))
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["message"] == kind.__name__
    assert decode(line) == decode(line[:-1]) == message


@given(built(WorkerConfig))
def test_config(config: WorkerConfig) -> None:
    """Encode a configuration as one argument, without a character that a command line can't take."""
    text = encode_config(config)
    assert text.isascii()
    assert text.isprintable()
    assert decode_config(text) == config


@given(st.lists(built(WantedLimit), max_size=3).map(tuple))
def test_limits(table: tuple[WantedLimit, ...]) -> None:
    """Encode a table of limits as one line."""
    line = encode_limits(table)
    assert line.count(b"\n") == 1
    assert decode_limits(line) == table


NOTHING = encode(Report((), (), (), "", ""))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Segmentation fault\n", id="words"),
        pytest.param(b"\xff\xfe\x00\n", id="not UTF-8"),
        pytest.param(encode(CallStarted("GPU-a"))[:-5], id="cut short"),
        pytest.param(encode(CallStarted("GPU-a"))[:-1] * 2, id="two in one"),
        pytest.param(b"7", id="a number"),
        pytest.param(b'["message"]', id="a list"),
        pytest.param(b"{}", id="no message"),
        pytest.param(b'{"message": "CallStarted"}', id="a field is missing"),
        pytest.param(b'{"message": "CallStarted", "uuid": "", "more": 1}', id="a field too many"),
        pytest.param(b'{"message": "WorkerConfig", "uuid": ""}', id="no such message"),
        pytest.param(b'{"message": ["CallStarted"], "uuid": ""}', id="no word for a message"),
        pytest.param(b'{"message": "DriverEvent", "uuid": "", "kind": "flood", "xid": 0}', id="no such event"),
        pytest.param(b'{"message": "DriverEvent", "uuid": "", "xid": 0}', id="no event"),
        pytest.param(NOTHING.replace(b"[]", b"null"), id="no lists"),
        pytest.param(NOTHING.replace(b"[]", b"[1]", 1), id="a number for a GPU"),
        pytest.param(NOTHING.replace(b"[]", b"[{}]", 1), id="an empty GPU"),
        pytest.param(b'{"message": "CallStarted", "uuid": ' + b"1" * 5000 + b"}", id="an endless number"),
        pytest.param(b"[" * 100_000, id="nested without end"),
    ],
)
def test_no_message(line: bytes) -> None:
    """Raise ValueError, and no other error, for what is no message."""
    with pytest.raises(ValueError, match=r"."):
        decode(line)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(line: bytes) -> None:
    """Take no other bytes for a message."""
    with pytest.raises(ValueError, match=r"."):
        decode(line)


@pytest.mark.parametrize("kind", MESSAGES)
@given(st.data())
def test_any_fields(kind: type, data: st.DataObject) -> None:
    """Decode a message or raise ValueError, whatever the fields hold."""
    fields = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(typing.get_type_hints(kind), JSON)))
    try:
        message = decode(json.dumps({"message": kind.__name__, **fields}).encode())
    except ValueError:
        return
    assert type(message) is kind


def test_error() -> None:
    """Quote the line in the error, as far as a log line can take it."""
    with pytest.raises(ValueError, match=re.escape('{"message": "xxx')) as raised:
        decode(json.dumps({"message": "x" * 1000}).encode())
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("event", "asks"),
    [
        pytest.param(DriverEvent("GPU-a", EventKind.RECOVERY_ACTION), True, id="recovery action"),
        pytest.param(DriverEvent("GPU-a", EventKind.XID, 154), True, id="its XID"),
        pytest.param(DriverEvent("GPU-a", EventKind.XID, 155), False, id="another XID"),
        pytest.param(DriverEvent("GPU-a", EventKind.FATAL_POISON, 154), False, id="that number, and no XID"),
        pytest.param(DriverEvent("GPU-a", EventKind.GPU_UNAVAILABLE), False, id="unavailable"),
    ],
)
def test_asks_for_poll(event: DriverEvent, asks: bool) -> None:
    """Ask for a poll when an event says that the recovery action changed, and not to what."""
    assert event.asks_for_poll is asks
