"""What each XID means, and what becomes of the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.xids import XIDS, XidClass, XidPolicy, describe, parse_numbers

pytestmark = pytest.mark.pure

DOCUMENT = Path(__file__).parents[1] / "docs/xids.md"


def table() -> str:
    """The table of docs/xids.md. To write it anew: `python -c 'import test_xids; print(test_xids.table())'`."""
    lines = ["| XID | meaning | class | what NVIDIA says to do |", "| --: | --- | --- | --- |"]
    lines += [f"| {xid.number} | {xid.meaning} | {xid.xid_class.value} | {xid.action} |" for xid in XIDS.values()]
    return "\n".join(lines)


class TestTable:
    def test_the_document_has_the_same(self) -> None:
        """Line by line, and no other table."""
        documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
        assert documented == table().splitlines()

    def test_it_is_in_order(self) -> None:
        """By number, each once, each under its own, and each with a meaning and an action."""
        assert list(XIDS) == sorted(XIDS) == [xid.number for xid in XIDS.values()]
        assert all(xid.meaning and xid.action for xid in XIDS.values())

    @pytest.mark.parametrize(
        ("xid_class", "numbers"),
        [
            pytest.param(XidClass.APPLICATION, "13,31,43,45,68,109", id="NVIDIA's device plugin ignores"),
            pytest.param(XidClass.APPLICATION, "8,11,25,32,60,69,80", id="the catalogue has the application checked"),
            pytest.param(XidClass.APPLICATION, "14,92,93,106,107,121", id="mere notices"),
            pytest.param(XidClass.TRANSIENT, "63,94", id="memory errors the driver worked round"),
            pytest.param(XidClass.TRANSIENT, "39,72,135", id="copy engines"),
            pytest.param(XidClass.RESET, "48,64,95,140,171,172", id="memory errors it did not"),
            pytest.param(XidClass.RESET, "46,62,79,110,119,120,136,143,151,155,156,158", id="reset or reboot, it says"),
            pytest.param(XidClass.RESET, "74,144,145,146,149,150", id="NVLink errors that can be fatal"),
            pytest.param(XidClass.RESET, "154", id="whatever the recovery action is"),
            pytest.param(XidClass.RESET, "166,167,168,169,170", id="no action named"),
        ],
    )
    def test_classes(self, xid_class: XidClass, numbers: str) -> None:
        """Those that peers and NVIDIA agree on, and those that took a decision."""
        for number in parse_numbers(numbers):
            assert XIDS[number].xid_class is xid_class, number


class TestDescribe:
    def test_a_known_one(self) -> None:
        """As the log names it."""
        xid = describe(79)
        assert (xid.number, xid.meaning, xid.xid_class) == (79, "GPU has fallen off the bus", XidClass.RESET)
        assert xid.action.startswith("reboot the node")

    @pytest.mark.parametrize("number", [-1, 0, 174, 999, 2**64 - 1])
    def test_an_unknown_one_is_critical(self, number: int) -> None:
        """999 is what NVML gives for an XID that it does not know."""
        xid = describe(number)
        assert (xid.number, xid.meaning, xid.xid_class) == (number, "not in NVIDIA's catalogue", XidClass.RESET)
        assert xid.action


class TestPolicy:
    @pytest.mark.parametrize(
        ("ignored", "critical", "number", "xid_class"),
        [
            pytest.param("", "", 13, XidClass.APPLICATION, id="the table: application"),
            pytest.param("", "", 94, XidClass.TRANSIENT, id="the table: transient"),
            pytest.param("", "", 79, XidClass.RESET, id="the table: reset"),
            pytest.param("", "", 5000, XidClass.RESET, id="not in the table"),
            pytest.param("79", "", 79, XidClass.APPLICATION, id="ignored though it needs a reset"),
            pytest.param("5000", "", 5000, XidClass.APPLICATION, id="ignored though unknown"),
            pytest.param("", "13", 13, XidClass.RESET, id="critical though the application's fault"),
            pytest.param("", "94", 94, XidClass.RESET, id="critical though transient"),
            pytest.param("79", "13", 94, XidClass.TRANSIENT, id="others stay as they are"),
        ],
    )
    def test_classify(self, ignored: str, critical: str, number: int, xid_class: XidClass) -> None:
        """The operator's lists go before the table."""
        assert XidPolicy(parse_numbers(ignored), parse_numbers(critical)).classify(number) is xid_class

    def test_not_both(self) -> None:
        """A number in both lists is a mistake, and named."""
        with pytest.raises(ValueError, match=r"both ignored and critical: 13, 31$"):
            XidPolicy(ignored=frozenset({31, 13, 79}), critical=frozenset({13, 31, 48}))


class TestParseNumbers:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            pytest.param("", set(), id="empty"),
            pytest.param("  ", set(), id="blank"),
            pytest.param("13", {13}, id="one"),
            pytest.param("13,31,79", {13, 31, 79}, id="some"),
            pytest.param(" 13 , 31 ", {13, 31}, id="with blanks"),
            pytest.param("13,13", {13}, id="twice"),
            pytest.param("999999999", {999999999}, id="large"),
        ],
    )
    def test_numbers(self, text: str, numbers: set[int]) -> None:
        """Numbers between commas."""
        assert parse_numbers(text) == numbers

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            pytest.param("13,", "''", id="nothing after a comma"),
            pytest.param(",", "''", id="only a comma"),
            pytest.param("13 31", "'13 31'", id="no comma"),
            pytest.param("13,all", "'all'", id="a word"),
            pytest.param("-13", "'-13'", id="negative"),
            pytest.param("0", "'0'", id="zero"),
            pytest.param("013", "'013'", id="leading zero"),
            pytest.param("1_3", "'1_3'", id="underscore"),
            pytest.param("1³", "'1³'", id="another script's digit"),
            pytest.param("1" * 10, "'1111111111'", id="endless"),
        ],
    )
    def test_junk(self, text: str, word: str) -> None:
        """Named in the error."""
        with pytest.raises(ValueError, match=f"^{word} is not the number of an XID$"):
            parse_numbers(text)
