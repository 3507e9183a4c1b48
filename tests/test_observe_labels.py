"""Labels of a node, from snapshots of it."""

from __future__ import annotations

import re
from typing import Any

import attrs
import pytest
from fake_status import GPU, SNAPSHOT
from hypothesis import given
from hypothesis import strategies as st

from sgpu.node.usage import ContainerUse
from sgpu.observe.labels import labels, legal

pytestmark = pytest.mark.pure

OTHER = attrs.evolve(GPU, uuid="GPU-b", pci_bus_id="00000000:5E:00.0")
LIMITED = ContainerUse("team", "web", "main", shares=1, memory_limit=1, limit_state="enforced")
REFUSED = attrs.evolve(LIMITED, limit_state="refused")
PENDING = attrs.evolve(LIMITED, limit_state="pending")


def values(*gpus: Any, **changes: Any) -> dict[str, str]:  # noqa: ANN401
    """The labels' values by name without the prefix."""
    made = labels(attrs.evolve(SNAPSHOT, gpus=gpus, **changes))
    return {name.removeprefix("deepomatic.com/gpu."): value for name, value in made.items()}


def test_equal_gpus() -> None:
    """All that is known, in our own namespace. A fault changes nothing."""
    expected = {
        "product": "Tesla-T4",
        "memory": "15360",
        "count": "2",
        "shares": "200",
        "sharing": "time-slicing",
        "driver-version": "550.54",
        "driver-major": "550",
    }
    assert values(GPU, attrs.evolve(OTHER, healthy=False, reason="XID 79")) == expected
    assert all(name.startswith("deepomatic.com/gpu.") for name in labels(attrs.evolve(SNAPSHOT, gpus=(GPU,))))


def test_different_gpus() -> None:
    """What differs is `mixed`; the memory is what each of them has at least."""
    found = values(GPU, attrs.evolve(OTHER, name="A100", shares=1, memory_total=80 << 30))
    assert {name: found[name] for name in ("product", "memory", "shares", "sharing")} == {
        "product": "mixed",
        "memory": "15360",
        "shares": "101",
        "sharing": "mixed",
    }


@pytest.mark.parametrize(
    ("containers", "expected"),
    [((), None), ((LIMITED,), "enforced"), ((LIMITED, REFUSED), "not-enforced"), ((REFUSED, PENDING), None)],
    ids=["none", "all", "not all", "not known yet"],
)
def test_limits(containers: tuple[ContainerUse, ...], expected: str | None) -> None:
    """Enforced only where the driver said so of all of them."""
    assert values(attrs.evolve(GPU, containers=containers)).get("memory-limits") == expected


def test_unknown() -> None:
    """No label for what is unknown, and none for GPUs that are not offered."""
    unknown = values(GPU, attrs.evolve(OTHER, memory_total=None), driver_version="")
    assert unknown.keys() == {"product", "count", "shares", "sharing"}
    assert values(attrs.evolve(GPU, shares=0)) == {} == values()
    assert values(attrs.evolve(GPU, shares=1), attrs.evolve(OTHER, shares=0))["sharing"] == "none"


def test_mig() -> None:
    """The instances of each profile that are still there, with what they have at least, beside their cards' product."""
    small = attrs.evolve(GPU, name="A100 MIG 1g.5gb", parent="GPU-a", mig_profile="1g.5gb", memory_total=4864 << 20)
    media = attrs.evolve(small, name="A100 MIG 1g.5gb+me", mig_profile="1g.5gb+me", memory_total=None)
    found = values(small, attrs.evolve(small, memory_total=5 << 30), attrs.evolve(small, shares=0), media)
    assert (found["product"], found["count"]) == ("A100", "1")
    assert {name: value for name, value in found.items() if "mig" in name} == {
        "deepomatic.com/mig-1g.5gb.count": "2",
        "deepomatic.com/mig-1g.5gb.memory": "4864",
        "deepomatic.com/mig-1g.5gb.me.count": "1",
    }


@given(st.text(max_size=90))
def test_any_name(name: str) -> None:
    """Kubernetes takes the value, or there is none."""
    value = legal(name)
    assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", value)
    assert values(attrs.evolve(GPU, name=name)).get("product", "") == value
