"""Units that are too full for more containers."""

from __future__ import annotations

import pytest

from sgpu.node.figures import Figures
from sgpu.node.pressure import under_pressure

pytestmark = pytest.mark.pure


def percent(used: int) -> Figures:
    """Figures of a unit that has this much of its memory used."""
    return Figures(memory_total=100 * 2**27, memory_free=(100 - used) * 2**27)


@pytest.mark.parametrize(
    ("watermark", "used", "expected"),
    [
        *((0.95, "10 95 96", "- - x"), (0.95, "96 95 91 90", "x x x -"), (0.95, "96 90 95 96", "x - - x")),
        *((0.35, "36 31 30", "x x -"), (0.04, "5 3 2", "x x -"), (0.0, "100 0", "- -"), (1.0, "100", "-")),
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
        *({"GPU-a": Figures()}, {"GPU-a": Figures(memory_total=100)}, {"GPU-a": Figures(memory_free=0)}, {}),
        {"GPU-a": Figures(memory_total=0, memory_free=0)},
    ],
)
def test_unknown(figures: dict[str, Figures]) -> None:
    """A unit whose memory is unknown is not under pressure, and does not stay so."""
    assert under_pressure(figures, {"GPU-a"}, 0.95) == frozenset()
