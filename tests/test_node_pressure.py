"""Units that are too full for more containers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.node.figures import Figures
from sgpu.node.pressure import RELEASE, under_pressure

pytestmark = pytest.mark.pure


def percent(used: int) -> Figures:
    """Figures of a unit that has this much of its memory used."""
    return Figures(memory_total=100 * 2**27, memory_free=(100 - used) * 2**27)


@pytest.mark.parametrize(
    ("watermark", "used", "expected"),
    [
        pytest.param(0.95, "10 95 96", "- - x", id="above it"),
        pytest.param(0.95, "96 95 91 90", "x x x -", id="until 5 points below"),
        pytest.param(0.95, "96 90 95 96", "x - - x", id="again"),
        pytest.param(0.35, "36 31 30", "x x -", id="another watermark"),
        pytest.param(0.04, "5 3 2", "x x -", id="a watermark under 5 points"),
        pytest.param(0.0, "100 0", "- -", id="switched off"),
        pytest.param(1.0, "100", "-", id="a watermark that can't be exceeded"),
    ],
)
def test_course(watermark: float, used: str, expected: str) -> None:
    """A unit is under pressure from when use exceeds the watermark until it is 5 points below."""
    pressed: frozenset[str] = frozenset()
    course = []
    for step in used.split():
        pressed = under_pressure({"GPU-a": percent(int(step))}, pressed, watermark)
        course.append("x" if pressed else "-")
    assert " ".join(course) == expected


def test_each_by_itself() -> None:
    """Each unit has its own state."""
    figures = {"GPU-a": percent(99), "GPU-b": percent(92), "GPU-c": percent(92), "GPU-d": percent(1)}
    assert under_pressure(figures, {"GPU-b", "GPU-d"}, 0.95) == {"GPU-a", "GPU-b"}


@pytest.mark.parametrize(
    "figures",
    [
        pytest.param({"GPU-a": Figures()}, id="unknown"),
        pytest.param({"GPU-a": Figures(memory_total=100)}, id="free memory unknown"),
        pytest.param({"GPU-a": Figures(memory_free=0)}, id="total memory unknown"),
        pytest.param({}, id="gone"),
        pytest.param({"GPU-a": Figures(memory_total=0, memory_free=0)}, id="no memory of its own"),
    ],
)
def test_unknown(figures: dict[str, Figures]) -> None:
    """A unit whose memory is unknown is not under pressure, and does not stay so."""
    assert under_pressure(figures, {"GPU-a"}, 0.95) == frozenset()


def test_switched_off() -> None:
    """Switching it off releases what was under pressure."""
    assert under_pressure({"GPU-a": percent(99)}, {"GPU-a"}, 0) == frozenset()


@settings(deadline=None)
@given(used=st.lists(st.integers(0, 100)), watermark=st.integers(10, 99))
def test_no_flutter(used: list[int], watermark: int) -> None:
    """Between two changes, use moves by more than the release's 5 points."""
    pressed: frozenset[str] = frozenset()
    turns = []
    for step in used:
        before, pressed = pressed, under_pressure({"GPU-a": percent(step)}, pressed, watermark / 100)
        if before != pressed:
            turns.append(step)
    assert all(abs(earlier - later) > RELEASE * 100 for earlier, later in pairwise(turns))
