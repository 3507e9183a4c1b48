"""The answers to the kubelet's probes, from values."""

from __future__ import annotations

import attrs
import pytest

from sgpu.observe.probes import stuck, unready
from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot

pytestmark = pytest.mark.pure

SHARED, WHOLE = "example.com/shared", "example.com/whole"


def gpu(resource: str = SHARED, *, healthy: bool = True) -> GpuSnapshot:
    return GpuSnapshot("GPU-a", "Tesla T4", "", resource, healthy, "", 0.0, None, None, None, None, 4, None, 0)


def node(*gpus: GpuSnapshot, waiting: str = "", **streams: int | None) -> Snapshot:
    """These GPUs, and resources with so many streams; None: not registered."""
    resources = tuple(
        ResourceSnapshot(f"example.com/{name}", count is not None, count or 0) for name, count in streams.items()
    )
    return Snapshot("0.1.0", 0.0, "", waiting, None, False, "", resources, gpus)


@pytest.mark.parametrize(
    ("expired", "facts"),
    [({}, []), ({"pods": 65.2}, ["pods", "65 s"]), ({"pods": 65.2, "driver": 61.0}, ["driver", "61 s", "pods"])],
    ids=["none", "one", "two"],
)
def test_stuck(expired: dict[str, float], facts: list[str]) -> None:
    """Name the loops that are stuck and how late they are, in order; say nothing where none is."""
    answer = stuck(expired)
    positions = [answer.index(fact) for fact in facts]
    assert positions == sorted(positions)
    assert bool(answer) is bool(facts)


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(node(gpu(), shared=1), id="one resource"),
        pytest.param(node(gpu(), shared=2), id="two streams, as when a kubelet reconnects"),
        pytest.param(node(gpu(), gpu(WHOLE), shared=1, whole=1), id="two resources"),
        pytest.param(node(gpu(), shared=1, whole=None), id="a resource without GPUs"),
        pytest.param(node(gpu(), gpu(""), shared=1), id="a GPU that is excluded"),
        pytest.param(node(gpu(healthy=False), shared=1), id="an unhealthy GPU, which the kubelet knows"),
        pytest.param(node(gpu(healthy=False), waiting="gone", shared=1), id="a driver that went, which it knows, too"),
        pytest.param(attrs.evolve(node(gpu(), shared=None), standby=True), id="a standby that lacks only the place"),
    ],
)
def test_ready(snapshot: Snapshot) -> None:
    """Be ready when all that is offered reaches the kubelet."""
    assert unready(snapshot) == ""


@pytest.mark.parametrize(
    ("snapshot", "fact"),
    [
        pytest.param(node(shared=None), "GPU", id="start"),
        pytest.param(node(waiting="no libnvidia-ml"), "no libnvidia-ml", id="driver"),
        pytest.param(node(gpu(""), shared=None), "-config", id="excluded"),
        pytest.param(attrs.evolve(node(waiting="no driver"), standby=True), "no driver", id="driver of a standby"),
        pytest.param(node(gpu(), shared=None), f"{SHARED} is not registered", id="kubelet"),
        pytest.param(node(gpu(), gpu(WHOLE), shared=1, whole=None), f"{WHOLE} is not registered", id="one of two"),
        pytest.param(node(gpu(), shared=0), "ListAndWatch", id="stream"),
        pytest.param(
            attrs.evolve(node(gpu()), resources=(ResourceSnapshot(SHARED, True, 1, "no API server"),)),
            "the scheduler does not know example.com/shared: no API server",
            id="API server",
        ),
    ],
)
def test_unready(snapshot: Snapshot, fact: str) -> None:
    """Say what is missing."""
    assert fact in unready(snapshot)
