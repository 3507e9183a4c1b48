"""Meaning and class of each XID."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.driver.xids import XIDS, XidClass, XidPolicy, describe, parse_numbers

pytestmark = pytest.mark.pure

DOCUMENT = Path(__file__).parents[1] / "docs/xids.md"


def table() -> str:
    """The table of docs/xids.md, as `python -c 'import test_driver_xids as t; print(t.table())'` prints it."""
    lines = ["| XID | meaning | class | what NVIDIA says to do |", "| --: | --- | --- | --- |"]
    lines += [f"| {xid.number} | {xid.meaning} | {xid.xid_class.value} | {xid.action} |" for xid in XIDS.values()]
    return "\n".join(lines)


def test_document() -> None:
    """Document the table line by line, in order, each XID once."""
    documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    assert documented == table().splitlines()
    assert list(XIDS) == sorted(XIDS) == [xid.number for xid in XIDS.values()]
    assert all(xid.meaning and xid.action for xid in XIDS.values())


@pytest.mark.parametrize(
    ("xid_class", "numbers"),
    [
        pytest.param(XidClass.APPLICATION, "13,31,43,45,68,109", id="NVIDIA's device plugin ignores them"),
        pytest.param(XidClass.APPLICATION, "8,11,25,32,60,69,80", id="the catalogue blames the application"),
        pytest.param(XidClass.APPLICATION, "14,92,93,106,107,121", id="notices"),
        pytest.param(XidClass.TRANSIENT, "63,94", id="memory errors that the driver contained"),
        pytest.param(XidClass.TRANSIENT, "39,72,135", id="copy engines"),
        pytest.param(XidClass.RESET, "48,64,95,140,171,172", id="memory errors that it did not"),
        pytest.param(XidClass.RESET, "46,62,79,110,119,120,136,143,151,155,156,158", id="reset or reboot, NVIDIA says"),
        pytest.param(XidClass.RESET, "74,144,145,146,149,150", id="NVLink errors that can be fatal"),
        pytest.param(XidClass.RESET, "154", id="whatever the recovery action is"),
        pytest.param(XidClass.RESET, "166,167,168,169,170", id="no action named"),
        pytest.param(XidClass.RESET, "174,999,5000,999999999", id="not in the catalogue"),
    ],
)
def test_classes(xid_class: XidClass, numbers: str) -> None:
    """Class the XIDs that peers and NVIDIA agree on, and those that took a decision."""
    for number in parse_numbers(numbers):
        assert describe(number).number == number
        assert describe(number).meaning
        assert describe(number).action
        assert XidPolicy().classify(number) is describe(number).xid_class is xid_class, number


@pytest.mark.parametrize(
    ("ignored", "critical", "number", "xid_class"),
    [
        *(("79", "", 79, XidClass.APPLICATION), ("5000", "", 5000, XidClass.APPLICATION)),
        *(("", "13", 13, XidClass.RESET), ("", "94", 94, XidClass.RESET), ("79", "13", 94, XidClass.TRANSIENT)),
    ],
)
def test_policy(ignored: str, critical: str, number: int, xid_class: XidClass) -> None:
    """Prefer the operator's lists to the table."""
    assert XidPolicy(parse_numbers(ignored), parse_numbers(critical)).classify(number) is xid_class


def test_policy_conflict() -> None:
    """Refuse numbers that are in both lists, and name them."""
    with pytest.raises(ValueError, match=r"^\D*\b13, 31\b\D*$"):
        XidPolicy(ignored=frozenset({31, 13, 79}), critical=frozenset({13, 31, 48}))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", set()), ("  ", set()), (" 13 , 31,79,13", {13, 31, 79}), ("999999999", {999999999})],
)
def test_numbers(text: str, numbers: set[int]) -> None:
    """Parse numbers between commas."""
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["13,", "13 31", "13,all", "-13", "0", "013", "1_3", "1³", "1111111111"])
def test_no_number(text: str) -> None:
    """Refuse what is no number, and quote it."""
    with pytest.raises(ValueError, match=f"'{text.rpartition(',')[2]}'"):
        parse_numbers(text)
