"""NVML's facts as devices, with the stub library loaded into this process."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
from node import Node
from stub_driver import MIB, StubGpu

from sgpu import discovery
from sgpu.device import Device, Health
from sgpu.discovery import Discovery, NotReadyError
from sgpu.nvml import Code


def discover(node: Node, shares: int = 100) -> Discovery:
    return discovery.discover(discovery.Places(node.host, node.dev, node.sys), shares)


def test_a_gpu_becomes_a_device_with_all_its_facts(node: Node) -> None:
    """Minor number, not index; NUMA node from the kernel."""
    gpu = attrs.evolve(StubGpu(), minor=5, name="NVIDIA L4", bus_id="0001:3B:00.0".rjust(16, "0"), total=1024 * MIB)
    node.driver.set(gpus=(gpu,), driver_version="535.1")
    node.set_numa_node(gpu.bus_id, 1)
    found = discover(node, shares=7)
    assert found == Discovery(
        devices=(
            Device(
                uuid=gpu.uuid,
                name="NVIDIA L4",
                pci_bus_id=gpu.bus_id,
                shares=7,
                device_nodes=("nvidia5", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"),
                memory_bytes=1024 * MIB,
                numa_node=1,
                health=Health.HEALTHY,
            ),
        ),
        problems=(),
        driver_version="535.1",
        library=node.host / "lib64" / "libnvidia-ml.so.1",
    )


@pytest.mark.parametrize(
    ("bus_id", "kernel", "content", "expected"),
    [
        ("00000000:3B:00.0", "0000:3b:00.0", "1\n", 1),
        ("00010000:3B:00.0", "10000:3b:00.0", "0\n", 0),
        ("00000000:3B:00.0", "0000:3b:00.0", "-1\n", None),
        ("00000000:3B:00.0", "0000:3b:00.0", "", None),
        ("00000000:3B:00.0", "0000:ff:00.0", "1\n", None),
        ("", "0000:3b:00.0", "1\n", None),
    ],
    ids=["known", "wide domain", "not known", "empty", "no such device", "no bus id"],
)
def test_numa_node(node: Node, bus_id: str, kernel: str, content: str, expected: int | None) -> None:
    """As the kernel says, None where it does not know."""
    directory = node.sys / "bus/pci/devices" / kernel
    directory.mkdir(parents=True)
    (directory / "numa_node").write_text(content)
    assert discovery.numa_node(node.sys, bus_id) == expected


def break_minor(node: Node) -> None:
    node.driver.fail("nvmlDeviceGetMinorNumber", Code.NOT_SUPPORTED, StubGpu(1))


def break_uuid(node: Node) -> None:
    node.driver.fail("nvmlDeviceGetUUID", Code.GPU_IS_LOST, StubGpu(1))


def break_memory(node: Node) -> None:
    node.driver.fail("nvmlDeviceGetMemoryInfo", 999, StubGpu(1))


def remove_node(node: Node) -> None:
    (node.dev / "nvidia1").unlink()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (break_minor, "nvmlDeviceGetMinorNumber: Not Supported"),
        (break_uuid, "nvmlDeviceGetUUID: GPU is lost"),
        (break_memory, "nvmlDeviceGetMemoryInfo_v2: Unknown Error"),
        (remove_node, "nvidia1 is not there"),
    ],
    ids=["minor", "uuid", "memory", "node"],
)
def test_one_gpu_in_trouble_does_not_take_the_others_with_it(
    node: Node, trouble: Callable[[Node], None], words: str
) -> None:
    """It is left out, and said so by number."""
    first, _, third = node.driver.gpus(3)
    trouble(node)
    found = discover(node)
    assert [device.uuid for device in found.devices] == [first.uuid, third.uuid]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("GPU 1 is left out: ")
    assert words in found.problems[0]


def test_all_gpus_in_trouble_is_not_ready_with_each_reason(node: Node) -> None:
    """So that the one log line says why."""
    lost = node.driver.gpus(2)
    for gpu in lost:
        node.driver.change(gpu, lost=True)
    with pytest.raises(NotReadyError, match=r"no GPU to offer; GPU 0 is left out: .*; GPU 1 is left out: .*lost"):
        discover(node)


@pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND], ids=["not supported", "no function"])
def test_memory_that_is_not_told_is_none(node: Node, code: int) -> None:
    """Unified memory, and drivers older than the question."""
    node.driver.fail("nvmlDeviceGetMemoryInfo", code)
    (device,) = discover(node).devices
    assert device.memory_bytes is None


def test_the_library_is_shut_down_each_time(node: Node) -> None:
    """Nothing stays open between attempts."""
    for _ in range(3):
        discover(node)
    assert node.driver.calls("nvmlInit") == node.driver.calls("nvmlShutdown") == 3


def test_both_missing_nodes_are_named(node: Node) -> None:
    """With what to do about the one that nothing has asked for yet."""
    (node.dev / "nvidiactl").unlink()
    (node.dev / "nvidia-uvm").unlink()
    with pytest.raises(NotReadyError, match=r"nvidiactl and .*nvidia-uvm not there yet; `nvidia-modprobe -u -c 0`"):
        discover(node)
