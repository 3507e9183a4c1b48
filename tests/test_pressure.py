"""Which GPUs are too full to take on more, and what is withheld then."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.device import Device
from sgpu.pressure import RELEASE, MemorySample, under_pressure, withheld

pytestmark = pytest.mark.pure


def percent(used: int) -> MemorySample:
    """A sample with this much of the memory used."""
    return MemorySample(used=used * 2**27, total=100 * 2**27)


def gpu(uuid: str, shares: int = 3) -> Device:
    return Device(uuid=uuid, name="Tesla T4", pci_bus_id="00000000:00:04.0", shares=shares, device_nodes=())


class TestUnderPressure:
    @pytest.mark.parametrize(
        ("watermark", "used", "expected"),
        [
            pytest.param(0.95, "10 95", "- -", id="up to it"),
            pytest.param(0.95, "95 96", "- x", id="above it"),
            pytest.param(0.95, "96 95 91", "x x x", id="until it has come down"),
            pytest.param(0.95, "96 90", "x -", id="5 points below"),
            pytest.param(0.95, "96 90 95 96", "x - - x", id="again"),
            pytest.param(0.95, "91 94", "- -", id="between the two, coming from below"),
            pytest.param(0.35, "36 31 30", "x x -", id="another watermark"),
            pytest.param(0.04, "5 3 2", "x x -", id="a watermark under 5 points"),
            pytest.param(0.0, "100 0", "- -", id="switched off"),
            pytest.param(1.0, "100", "-", id="a watermark that can't be exceeded"),
        ],
    )
    def test_course(self, watermark: float, used: str, expected: str) -> None:
        """Under pressure from when use exceeds the watermark until it is 5 points below."""
        pressed: frozenset[str] = frozenset()
        course = []
        for step in used.split():
            pressed = under_pressure({"GPU-a": percent(int(step))}, pressed, watermark)
            course.append("x" if pressed else "-")
        assert " ".join(course) == expected

    def test_each_by_itself(self) -> None:
        """Each GPU has its own state."""
        samples = {"GPU-a": percent(99), "GPU-b": percent(92), "GPU-c": percent(92), "GPU-d": percent(1)}
        assert under_pressure(samples, {"GPU-b", "GPU-d"}, 0.95) == {"GPU-a", "GPU-b"}

    @pytest.mark.parametrize(
        "samples",
        [
            pytest.param({"GPU-a": None}, id="not supported"),
            pytest.param({}, id="gone"),
            pytest.param({"GPU-a": MemorySample(used=0, total=0)}, id="no memory of its own"),
        ],
    )
    def test_unknown(self, samples: dict[str, MemorySample | None]) -> None:
        """A GPU whose memory is not known is not under pressure, nor stays it."""
        assert under_pressure(samples, {"GPU-a"}, 0.95) == set()

    def test_switched_off_under_way(self) -> None:
        """Switching it off releases what was under pressure."""
        assert under_pressure({"GPU-a": percent(99)}, {"GPU-a"}, 0) == set()

    @given(used=st.lists(st.integers(0, 100)), watermark=st.integers(6, 99))
    def test_no_flutter(self, used: list[int], watermark: int) -> None:
        """Between two changes, use has moved by more than the release's 5 points."""
        pressed: frozenset[str] = frozenset()
        turns = []
        for step in used:
            before, pressed = pressed, under_pressure({"GPU-a": percent(step)}, pressed, watermark / 100)
            if before != pressed:
                turns.append(step)
        assert all(abs(earlier - later) > RELEASE * 100 for earlier, later in pairwise(turns))


class TestWithheld:
    @pytest.mark.parametrize(
        ("allocated", "pressed", "expected"),
        [
            pytest.param([], [], {}, id="no pressure"),
            pytest.param([], ["GPU-a"], {"GPU-a": {0, 1, 2}}, id="none allocated"),
            pytest.param(["GPU-a::1"], ["GPU-a"], {"GPU-a": {0, 2}}, id="one allocated"),
            pytest.param(["GPU-b::1"], ["GPU-a"], {"GPU-a": {0, 1, 2}}, id="one of another GPU"),
            pytest.param(["GPU-a::0", "GPU-a::1", "GPU-a::2"], ["GPU-a"], {"GPU-a": set()}, id="all allocated"),
            pytest.param(["GPU-a::01", "x", "GPU-a::9"], ["GPU-a"], {"GPU-a": {0, 1, 2}}, id="none of its shares"),
            pytest.param([], ["GPU-b", "GPU-x"], {"GPU-b": {0, 1}}, id="a GPU that is gone"),
        ],
    )
    def test_withheld(self, allocated: list[str], pressed: list[str], expected: dict[str, set[int]]) -> None:
        """The free shares of GPUs under pressure, never an allocated one."""
        devices = [gpu("GPU-a"), gpu("GPU-b", shares=2)]
        assert withheld(devices, frozenset(allocated), frozenset(pressed)) == expected

    @given(allocated=st.sets(st.builds("GPU-{}::{}".format, st.sampled_from("ab"), st.integers(0, 5))))
    def test_never_allocated(self, allocated: set[str]) -> None:
        """Each share of a GPU under pressure is either allocated or withheld."""
        device = gpu("GPU-a", shares=6)
        numbers = withheld([device], allocated, {"GPU-a"})["GPU-a"]
        kept = {share_id for share_id in device.share_ids() if share_id in allocated}
        assert {f"GPU-a::{number}" for number in numbers} == {*device.share_ids()} - kept
