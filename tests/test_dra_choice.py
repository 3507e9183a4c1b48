"""What `-api auto` makes of facts."""

from __future__ import annotations

import pytest
from attrs import evolve

from sgpu.dra.choice import Facts, choose, too_old

pytestmark = pytest.mark.pure

NEW = Facts(server="v1.36.2", kubelet="v1.36.0-gke.1")
AWAY = Facts(problem="no answer", passing=True)


@pytest.mark.parametrize(
    ("facts", "dra", "fact"),
    [
        pytest.param(NEW, True, "v1.36.0-gke.1", id="new"),
        pytest.param(Facts(server="v1.40.0", kubelet="v1.37.1+k3s1"), True, "v1.40.0", id="newer"),
        pytest.param(evolve(NEW, kubelet="v1.35.4"), False, "the kubelet is Kubernetes v1.35.4", id="gates"),
        pytest.param(evolve(NEW, server="v1.34.9"), False, "can't share devices rightly", id="too old"),
        pytest.param(evolve(NEW, kubelet=""), False, "unknown version", id="no version"),
        pytest.param(evolve(NEW, refused="drops it"), False, "drops it", id="not kept"),
        pytest.param(evolve(NEW, holders=("team/a",)), False, "team/a", id="shares by a device plugin"),
        pytest.param(Facts(problem="403"), False, "403", id="no rights"),
        # Pods are never left behind.
        pytest.param(evolve(AWAY, claims=2, holders=("team/a",)), True, "2 claim", id="claims"),
        pytest.param(evolve(AWAY, claims=None), True, "another version of sgpu", id="claims of another version"),
    ],
)
def test_settled(facts: Facts, dra: bool, fact: str) -> None:
    """With the reason, which names what is in the way."""
    choice = choose(facts)
    assert (choice.dra, choice.settled) == (dra, True)
    assert fact in choice.reason


@pytest.mark.parametrize(
    ("facts", "dra"),
    [
        pytest.param(AWAY, False, id="never before"),
        pytest.param(evolve(AWAY, prepared_before=True), True, id="claims before the reboot"),
        pytest.param(evolve(AWAY, prepared_before=True, holders=None), False, id="holders are unknown"),
    ],
)
def test_not_settled(facts: Facts, dra: bool) -> None:
    """While the API server is away, what the node was before counts."""
    choice = choose(facts)
    assert (choice.dra, choice.settled) == (dra, False)
    assert "no answer" in choice.reason


def test_too_old() -> None:
    """What is not known is not held against a server."""
    assert too_old("v1.34.2")
    assert not any(map(too_old, ("v1.35.0", "v1.36.2", "")))
