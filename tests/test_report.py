"""What the driver said, as lines between processes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.report import (
    Asking,
    DriverEvent,
    EventKind,
    Failure,
    GpuReport,
    Message,
    NotReady,
    Orders,
    ProcessReport,
    Report,
    decode,
    decode_orders,
    encode,
    encode_orders,
)

pytestmark = pytest.mark.pure

#: Any character that Python has, those without UTF-8 too: names of files have such.
TEXTS = st.text(st.characters(), max_size=20)
NUMBERS = st.none() | st.integers(0, 2**64 - 1)
FLAGS = st.none() | st.booleans()
PROCESSES = st.builds(ProcessReport, pid=st.integers(0, 2**32 - 1), memory=NUMBERS, utilisation=NUMBERS)
GPUS = st.builds(
    GpuReport,
    uuid=TEXTS,
    name=TEXTS,
    pci_bus_id=TEXTS,
    device_nodes=st.lists(TEXTS, max_size=4).map(tuple),
    numa_node=NUMBERS,
    memory_total=NUMBERS,
    memory_used=NUMBERS,
    memory_free=NUMBERS,
    utilisation=NUMBERS,
    recovery_action=NUMBERS,
    rows_pending=FLAGS,
    rows_failed=FLAGS,
    pages_pending=FLAGS,
    fabric_state=NUMBERS,
    fabric_status=NUMBERS,
    error=TEXTS,
    processes=st.none() | st.lists(PROCESSES, max_size=3).map(tuple),
)
REPORTS = st.builds(
    Report,
    gpus=st.lists(GPUS, max_size=3).map(tuple),
    problems=st.lists(TEXTS, max_size=3).map(tuple),
    unasked=st.lists(TEXTS, max_size=3).map(tuple),
    driver_version=TEXTS,
    library=TEXTS,
)
EVENTS = st.builds(DriverEvent, uuid=TEXTS, kind=st.sampled_from(EventKind), xid=st.integers(0, 2**64 - 1))
MESSAGES = st.one_of(
    REPORTS,
    EVENTS,
    st.builds(NotReady, TEXTS, st.booleans()),
    st.builds(Asking, TEXTS),
    st.builds(Failure, TEXTS, st.integers(0, 999)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


class TestMessages:
    @given(MESSAGES)
    def test_round_trip(self, message: Message) -> None:
        """Every message is one line, and comes out as it went in."""
        line = encode(message)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert decode(line) == message

    @given(MESSAGES)
    def test_without_the_line_end(self, message: Message) -> None:
        """Who splits lines need not keep their ends."""
        assert decode(encode(message)[:-1]) == message

    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(Report((), (), (), "550.1", "/lib/libnvidia-ml.so.1"), id="report"),
            pytest.param(NotReady("no driver\nat all", gone=True), id="not ready"),
            pytest.param(DriverEvent("GPU-a", EventKind.XID, 79), id="event"),
            pytest.param(Asking(""), id="asking"),
            pytest.param(Failure("nvmlDeviceGetName", 999), id="failure"),
        ],
    )
    def test_it_says_what_it_is(self, message: Message) -> None:
        """For whoever reads the pipe with a tool."""
        assert json.loads(encode(message))["message"] == type(message).__name__

    @pytest.mark.parametrize(
        "line",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"\n", id="empty line"),
            pytest.param(b"Segmentation fault\n", id="words"),
            pytest.param(b"\xff\xfe\x00\n", id="not UTF-8"),
            pytest.param(encode(Asking("GPU-a"))[:-5], id="cut short"),
            pytest.param(encode(Asking("GPU-a"))[:-1] * 2, id="two in one"),
            pytest.param(b"null", id="null"),
            pytest.param(b"7", id="a number"),
            pytest.param(b'"Asking"', id="a word"),
            pytest.param(b"[]", id="an empty list"),
            pytest.param(b'["message"]', id="a list"),
            pytest.param(b"{}", id="no message"),
            pytest.param(b'{"message": "Asking"}', id="a field is missing"),
            pytest.param(b'{"message": "Asking", "uuid": "", "more": 1}', id="a field too many"),
            pytest.param(b'{"message": "Orders", "uuid": ""}', id="no such message"),
            pytest.param(b'{"message": ["Asking"], "uuid": ""}', id="no word for a message"),
            pytest.param(b'{"message": "DriverEvent", "uuid": "", "kind": "flood", "xid": 0}', id="no such event"),
            pytest.param(b'{"message": "DriverEvent", "uuid": "", "xid": 0}', id="no event"),
            pytest.param(encode(Report((), (), (), "", "")).replace(b"[]", b"null"), id="no lists"),
            pytest.param(encode(Report((), (), (), "", "")).replace(b"[]", b"[1]", 1), id="a number for a GPU"),
            pytest.param(encode(Report((), (), (), "", "")).replace(b"[]", b"[{}]", 1), id="an empty GPU"),
            pytest.param(b'{"message": "Asking", "uuid": ' + b"1" * 5000 + b"", id="an endless number"),
            pytest.param(b"[" * 100_000, id="nested without end"),
        ],
    )
    def test_anything_else(self, line: bytes) -> None:
        """Is a ValueError and no other."""
        with pytest.raises(ValueError, match=r"."):
            decode(line)

    @given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_whatever_it_is(self, line: bytes) -> None:
        """No bytes have it raise anything else, or be taken for a message."""
        with pytest.raises(ValueError, match=r"."):
            decode(line)

    @pytest.mark.parametrize("kind", ["Report", "NotReady", "DriverEvent", "Asking", "Failure"])
    @given(fields=st.dictionaries(st.sampled_from(["uuid", "kind", "xid", "reason", "gpus", "problems"]), JSON))
    def test_the_right_words_in_the_wrong_places(self, kind: str, fields: dict[str, object]) -> None:
        """A message or a ValueError, whatever the fields hold."""
        try:
            message = decode(json.dumps({"message": kind, **fields}).encode())
        except ValueError:
            return
        assert type(message).__name__ == kind

    def test_the_error_has_the_line(self) -> None:
        """As far as a log line can take it."""
        with pytest.raises(ValueError, match=r"^not a message of the driver's process: ") as raised:
            decode(json.dumps({"message": "x" * 1000}).encode())
        assert len(str(raised.value)) < 200


class TestOrders:
    @given(
        st.builds(
            Orders,
            host_path=TEXTS,
            dev_directory=TEXTS,
            sysfs_directory=TEXTS,
            interval=st.floats(0.1, 3600),
            suspects=st.lists(TEXTS, max_size=3).map(tuple),
            known=st.lists(TEXTS, max_size=3).map(tuple),
            once=st.booleans(),
        )
    )
    def test_round_trip(self, orders: Orders) -> None:
        """One argument, without a character that a command line can't take."""
        text = encode_orders(orders)
        assert text.isascii()
        assert text.isprintable()
        assert decode_orders(text) == orders


class TestEvents:
    @pytest.mark.parametrize(
        ("event", "asks"),
        [
            pytest.param(DriverEvent("GPU-a", EventKind.RECOVERY_ACTION), True, id="recovery action"),
            pytest.param(DriverEvent("GPU-a", EventKind.XID, 154), True, id="XID 154"),
            pytest.param(DriverEvent("GPU-a", EventKind.XID, 79), False, id="another XID"),
            pytest.param(DriverEvent("GPU-a", EventKind.FATAL_POISON, 154), False, id="154 that is no XID"),
            pytest.param(DriverEvent("GPU-a", EventKind.GPU_UNAVAILABLE), False, id="unavailable"),
        ],
    )
    def test_asks_for_poll(self, event: DriverEvent, asks: bool) -> None:
        """What says only that the recovery action changed, not to what."""
        assert event.asks_for_poll is asks
