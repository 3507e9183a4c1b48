"""Messages between the driver's process and its parent, as lines."""

from __future__ import annotations

import json
import re

import pytest

from sgpu.driver.messages import (
    DriverEvent,
    EventKind,
    NotReady,
    Report,
    decode,
    decode_limits,
    encode,
    encode_limits,
)
from sgpu.node.cgroup_limit import Target, WantedLimit

pytestmark = pytest.mark.pure

NOTHING = encode(Report((), (), (), "", ""))
LIMIT = b'{"message": "LimitReport", "answers": [{"wanted": %s, "state": "pending"}]}'


@pytest.mark.parametrize(
    "line",
    [
        *(b"Segmentation fault\n", encode(NotReady("no"))[:-5], b'["message"]', b"{}"),
        *(b'{"message": "NotReady", "reason": "", "more": 1}', b'{"message": ["NotReady"], "reason": ""}'),
        *(b'{"message": "DriverEvent", "uuid": "", "kind": "flood", "xid": 0}', NOTHING.replace(b"[]", b"null")),
        *(NOTHING.replace(b"[]", b"[{}]", 1), b"[" * 100_000),
        *(LIMIT % b'["GPU-a", "/x", 5]', LIMIT % b'"abcd"', LIMIT % b'["GPU-a", "/x", "5", false]'),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_no_message(line: bytes) -> None:
    """Raise ValueError, and no other error, for what is no message."""
    with pytest.raises(ValueError, match=r"."):
        decode(line)


def test_limits() -> None:
    """Encode a change of the table of limits as one line."""
    new = [WantedLimit("GPU-a", "/pod\n1", 5), WantedLimit("GPU-b", "/\udcff", None, ours=True)]
    gone = [Target("GPU-a", "/pod\n2")]
    line = encode_limits(new, gone)
    assert line.count(b"\n") == 1
    assert decode_limits(line) == (new, gone)


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
