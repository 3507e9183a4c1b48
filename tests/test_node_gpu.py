"""GPUs and units as values."""

from __future__ import annotations

import attrs
import pytest

from sgpu.node.gpu import Gpu, Health, Unit, units

pytestmark = pytest.mark.pure

GPU = Gpu("GPU-a", "Tesla T4", "00000000:3B:00.0", ("nvidia0", "nvidiactl"), memory_bytes=1000)


def test_health_words() -> None:
    """Health is spelled as the kubelet spells it."""
    assert [health.value for health in Health] == ["Healthy", "Unhealthy"]


@pytest.mark.parametrize("health", Health)
def test_units(health: Health) -> None:
    """A GPU is one unit, with the UUID, name, device nodes, memory and health of the GPU."""
    gpu = attrs.evolve(GPU, health=health)
    assert units(gpu) == (Unit(gpu, "GPU-a", "Tesla T4", ("nvidia0", "nvidiactl"), 1000),)
    assert units(gpu)[0].health is health


def test_equal() -> None:
    """The time of the last change of health does not make a GPU differ; the reason does."""
    assert attrs.evolve(GPU, since=5.0) == GPU
    assert attrs.evolve(GPU, reason="XID 79") != GPU
