"""The shares handed out moments ago."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.node.grants import SETTLING_TIME, Grants
from sgpu.node.shares import Share

pytestmark = pytest.mark.pure

A0, A1, B0 = Share("GPU-a", 0), Share("GPU-a", 1), Share("GPU-b", 0)


@pytest.fixture
def grants() -> Grants:
    return Grants()


class TestExpectedBytes:
    def test_sum(self, grants: Grants) -> None:
        """Each share is expected to take its part of its GPU's memory; 0 where that is unknown."""
        assert (grants.expected_bytes(0), grants.shares(0)) == ({}, frozenset())
        for share, part in ((A0, 250), (A1, 250), (B0, 0)):
            grants.add(share, part, 10)
        assert grants.expected_bytes(30) == {"GPU-a": 500, "GPU-b": 0}
        assert grants.shares(30) == {A0, A1, B0}

    def test_settled(self, grants: Grants) -> None:
        """A share is forgotten after the settling time, as the figures show its use then."""
        grants.add(A0, 250, 0)
        grants.add(A1, 250, 1)
        assert grants.expected_bytes(SETTLING_TIME - 0.5) == {"GPU-a": 500}
        assert grants.expected_bytes(SETTLING_TIME) == {"GPU-a": 250}
        assert grants.shares(SETTLING_TIME) == {A1}
        assert grants.shares(SETTLING_TIME + 1) == frozenset()

    def test_granted_again(self, grants: Grants) -> None:
        """A share that the next container gets counts once, from then."""
        grants.add(A0, 250, 0)
        grants.add(A0, 250, 50)
        assert grants.expected_bytes(SETTLING_TIME + 49) == {"GPU-a": 250}
        assert grants.expected_bytes(SETTLING_TIME + 50) == {}


class TestReconcile:
    @pytest.mark.parametrize(
        ("lists", "remembered"),
        [
            pytest.param([[]], True, id="not listed yet"),
            pytest.param([[A0], [A0, A1]], True, id="still listed"),
            pytest.param([[A0], []], False, id="no longer listed"),
            pytest.param([[], [A0], [A1]], False, id="listed late, and no longer"),
            pytest.param([[A0], [], [A0]], False, id="back, but not handed out by us"),
        ],
    )
    def test_lists(self, grants: Grants, lists: Sequence[Sequence[Share]], remembered: bool) -> None:
        """A share is forgotten when the kubelet has listed it and no longer does."""
        grants.add(A0, 250, 0)
        for held in lists:
            grants.reconcile(held)
        assert (A0 in grants.shares(1)) is remembered

    def test_granted_again(self, grants: Grants) -> None:
        """A share that is handed out again may be missing from the list again."""
        grants.add(A0, 250, 0)
        grants.reconcile({A0})
        grants.add(A0, 250, 1)
        grants.reconcile(frozenset())
        assert grants.shares(2) == {A0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans())))
def test_any_course(course: list[tuple[int, int, bool]]) -> None:
    """Whatever happens, exactly the shares that are remembered are expected to take memory."""
    grants, now = Grants(), 0.0
    for seconds, number, add in course:
        now += seconds * 5
        share = Share("GPU-a", number)
        if add:
            grants.add(share, 250, now)
            assert share in grants.shares(now)
        else:
            grants.reconcile({share})
        assert grants.expected_bytes(now).get("GPU-a", 0) == 250 * len(grants.shares(now))
