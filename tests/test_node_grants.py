"""The shares handed out moments ago."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

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
            *(([[]], True), ([[A0], [A0, A1]], True), ([[A0], []], False), ([[], [A0], [A1]], False)),
            ([[A0], [], [A0]], False),
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
