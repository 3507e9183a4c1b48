"""Messages between the driver's process and its parent, as lines."""

from __future__ import annotations

import json
import re

import pytest

from sgpu.driver.messages import (
    CallStarted,
    DriverEvent,
    EventKind,
    Report,
    decode,
    decode_limits,
    encode,
    encode_limits,
)
from sgpu.node.cgroup_limit import WantedLimit

pytestmark = pytest.mark.pure

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


def test_limits() -> None:
    """Encode a table of limits as one line."""
    table = (WantedLimit("GPU-a", "/pod\n1", 5), WantedLimit("GPU-b", "/\udcff", None, ours=True))
    line = encode_limits(table)
    assert line.count(b"\n") == 1
    assert decode_limits(line) == table


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
