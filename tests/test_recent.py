"""The shares handed out moments ago."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.device import Device
from sgpu.recent import SETTLING_TIME, Recent

pytestmark = pytest.mark.pure


def gpu(uuid: str = "GPU-a", shares: int = 4, memory: int | None = 1000) -> Device:
    return Device(
        uuid=uuid,
        name="Tesla T4",
        pci_bus_id="00000000:00:04.0",
        shares=shares,
        device_nodes=(),
        memory_bytes=memory,
    )


def given_at(*times: float) -> Recent:
    """One share of the same GPU after the other."""
    recent = Recent()
    for number, time in enumerate(times):
        recent.give(gpu(), f"GPU-a::{number}", time)
    return recent


class TestExpectedBytes:
    def test_none(self) -> None:
        """Nothing is expected before anything is handed out."""
        assert Recent().expected_bytes(0) == {}
        assert Recent().share_ids(0) == set()

    def test_sum(self) -> None:
        """Each share is expected to take its part of its GPU's memory."""
        recent = given_at(10, 20)
        recent.give(gpu("GPU-b", shares=3), "GPU-b::0", 20)
        assert recent.expected_bytes(30) == {"GPU-a": 500, "GPU-b": 333}
        assert recent.share_ids(30) == {"GPU-a::0", "GPU-a::1", "GPU-b::0"}

    def test_unknown_memory(self) -> None:
        """A GPU that does not tell its memory has none to expect; that the share was given is known all the same."""
        recent = Recent()
        recent.give(gpu(memory=None), "GPU-a::0", 0)
        assert recent.expected_bytes(1) == {"GPU-a": 0}
        assert recent.share_ids(1) == {"GPU-a::0"}

    def test_settled(self) -> None:
        """After the settling time, what a share takes is in the samples."""
        recent = given_at(0, 1)
        assert recent.expected_bytes(SETTLING_TIME - 0.5) == {"GPU-a": 500}
        assert recent.expected_bytes(SETTLING_TIME) == {"GPU-a": 250}
        assert recent.share_ids(SETTLING_TIME) == {"GPU-a::1"}
        assert recent.expected_bytes(SETTLING_TIME + 1) == {}
        assert recent.share_ids(SETTLING_TIME + 1) == set()

    def test_given_again(self) -> None:
        """A share that the next container gets counts once, from then."""
        recent = given_at(0)
        recent.give(gpu(), "GPU-a::0", 50)
        assert recent.expected_bytes(50) == {"GPU-a": 250}
        assert recent.expected_bytes(SETTLING_TIME + 49) == {"GPU-a": 250}
        assert recent.expected_bytes(SETTLING_TIME + 50) == {}


class TestSeen:
    @pytest.mark.parametrize(
        ("lists", "remembered"),
        [
            pytest.param([[]], True, id="not on it yet"),
            pytest.param([["GPU-a::0"]], True, id="on it"),
            pytest.param([["GPU-a::0"], ["GPU-a::0", "GPU-a::1"]], True, id="still on it"),
            pytest.param([["GPU-a::0"], []], False, id="no longer on it"),
            pytest.param([[], ["GPU-a::0"], ["GPU-a::1"]], False, id="on it late, and no longer"),
            pytest.param([["GPU-a::0"], [], ["GPU-a::0"]], False, id="back, but not by us"),
        ],
    )
    def test_lists(self, lists: Sequence[Sequence[str]], remembered: bool) -> None:
        """A share is forgotten when it was on the kubelet's list and no longer is."""
        recent = given_at(0)
        for allocated in lists:
            recent.seen(frozenset(allocated))
        assert recent.share_ids(1) == ({"GPU-a::0"} if remembered else set())

    def test_given_again(self) -> None:
        """Given again, a share is waited for anew."""
        recent = given_at(0)
        recent.seen({"GPU-a::0"})
        recent.give(gpu(), "GPU-a::0", 1)
        recent.seen(frozenset())
        assert recent.share_ids(2) == {"GPU-a::0"}

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans())))
    def test_any_course(self, course: list[tuple[int, int, bool]]) -> None:
        """Whatever comes, no GPU is expected to fill up by more than the shares that are remembered for it."""
        recent = Recent()
        now = 0.0
        for seconds, number, give in course:
            now += seconds * 5
            if give:
                recent.give(gpu(), f"GPU-a::{number}", now)
                assert f"GPU-a::{number}" in recent.share_ids(now)
            else:
                recent.seen({f"GPU-a::{number}"})
            assert recent.expected_bytes(now).get("GPU-a", 0) == 250 * len(recent.share_ids(now))
