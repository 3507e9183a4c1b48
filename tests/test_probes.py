"""What the kubelet's probes are answered, from values."""

from __future__ import annotations

import attrs
import pytest

from sgpu.probes import ailing, unready
from sgpu.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot

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
    ("overdue", "words"),
    [
        ({}, ""),
        ({"sampler": 65.2}, "sampler: nothing heard of it for 65 s longer than due"),
        ({"sampler": 65.2, "driver": 61.0}, "driver: nothing heard of it for 61 s longer than due; sampler: "),
    ],
    ids=["none", "one", "two"],
)
def test_ailing(overdue: dict[str, float], words: str) -> None:
    """Each by its name."""
    assert ailing(overdue).startswith(words)
    assert bool(ailing(overdue)) is bool(words)


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(node(gpu(), shared=1), id="one resource"),
        pytest.param(node(gpu(), shared=2), id="two streams, as when a kubelet reconnects"),
        pytest.param(node(gpu(), gpu(WHOLE), shared=1, whole=1), id="two resources"),
        pytest.param(node(gpu(), shared=1, whole=None), id="a resource that no GPU is offered as"),
        pytest.param(node(gpu(), gpu(""), shared=1), id="a GPU that is excluded"),
        pytest.param(node(gpu(healthy=False), shared=1), id="a GPU that is down, which the kubelet knows"),
    ],
)
def test_ready(snapshot: Snapshot) -> None:
    """All that is offered reaches the kubelet."""
    assert unready(snapshot) == ""


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [
        pytest.param(node(shared=None), "no GPU has been seen yet", id="start"),
        pytest.param(node(waiting="no libnvidia-ml"), "waiting for the driver: no libnvidia-ml", id="driver"),
        pytest.param(
            node(gpu(""), shared=None), "all GPUs are excluded by the rules of the -config file", id="excluded"
        ),
        pytest.param(node(gpu(), shared=None), f"{SHARED} is not registered with the kubelet", id="kubelet"),
        pytest.param(node(gpu(), gpu(WHOLE), shared=1, whole=None), f"{WHOLE} is not registered", id="one of two"),
        pytest.param(node(gpu(), shared=0), f"no ListAndWatch stream open for {SHARED}", id="stream"),
    ],
)
def test_not_ready(snapshot: Snapshot, words: str) -> None:
    """With what is missing."""
    assert words in unready(snapshot)


def test_a_driver_that_went_is_not_waited_for() -> None:
    """What was offered stays offered, as unhealthy: the kubelet knows."""
    assert unready(attrs.evolve(node(gpu(healthy=False), shared=1), waiting="gone")) == ""
