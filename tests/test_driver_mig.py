"""MIG instances in one poll, with the stub library loaded into this process, and the kernel's list of capabilities."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from node import Node
from stub_driver import CARDS, GIB, MIB, StubGpu, StubInstance, mig_gpu

from sgpu.driver import nvml, poll
from sgpu.driver.messages import GpuReport, InstanceReport, Report
from sgpu.driver.nvml import Code
from sgpu.node.figures import Figures, ProcessUse


def read(node: Node, **options: Any) -> Report:  # noqa: ANN401  # as poll() has them
    """One poll, of a library that is opened for it."""
    places = poll.Places(node.host, node.dev, node.sys, node.proc)
    with nvml.open_library(node.host) as library:
        return poll.poll(library, places, interval=5, **options)


@pytest.fixture
def gpu(node: Node) -> StubGpu:
    """A card in MIG mode, whose index is not its minor number, and the kernel's list of capabilities."""
    node.make_mig_minors()
    made = mig_gpu(0, minor=2)
    node.driver.set(gpus=(made,))
    return made


def uuids(report: Report) -> list[str]:
    return [instance.uuid for gpu in report.gpus for instance in gpu.instances]


def test_facts(node: Node, gpu: StubGpu) -> None:
    """Report each instance by its own answers, with the capabilities of the parent's minor number.

    What it does with its time is unknown, whatever the driver says.
    """
    first = node.driver.create(gpu, "1g.5gb", used=GIB, reserved=MIB, compute=((7, GIB),), utilization=3)
    second = node.driver.create(gpu, "3g.20gb", compute_instance=1)
    (report,) = read(node).gpus
    assert (report.mig_mode, report.mig_pending, report.memory_refused) == (True, True, False)
    assert report.figures == Figures(40960 * MIB, 40960 * MIB - gpu.reserved, memory_reserved=gpu.reserved)
    assert report.instances == (
        InstanceReport(
            uuid=first.uuid,
            name="NVIDIA A100-SXM4-40GB MIG 1g.5gb",
            profile="1g.5gb",
            gpu_instance=1,
            compute_instance=0,
            memory_bytes=4864 * MIB,
            capability_nodes=("nvidia-caps/nvidia-cap282", "nvidia-caps/nvidia-cap283"),
            figures=Figures(4864 * MIB, 4864 * MIB - GIB - MIB, None, (ProcessUse(7, GIB, None),), MIB),
        ),
        InstanceReport(
            second.uuid,
            "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            "3g.20gb",
            2,
            1,
            19968 * MIB,
            ("nvidia-caps/nvidia-cap291", "nvidia-caps/nvidia-cap293"),
            Figures(19968 * MIB, 19968 * MIB, None, (), 0),
        ),
    )
    assert node.driver.calls("nvmlDeviceGetProcessUtilization") == 0


@pytest.mark.parametrize("card", CARDS)
def test_profiles(node: Node, card: str) -> None:
    """Know every profile of every card by its name, with its memory."""
    node.make_mig_minors()
    _, _, profiles = CARDS[card]
    gpu = mig_gpu(0, card, mig_max=len(profiles))
    node.driver.set(gpus=(gpu,))
    for profile in profiles:
        node.driver.create(gpu, profile)
    (report,) = read(node).gpus
    assert {each.profile: each.memory_bytes for each in report.instances} == {
        profile: memory * MIB for profile, (_, memory, _) in profiles.items()
    }


def test_enumeration(node: Node, gpu: StubGpu) -> None:
    """Skip holes, and ask anew at each poll: a library that stays open finds new instances, and no destroyed ones."""
    first, second, third = (node.driver.create(gpu, "1g.5gb") for _ in range(3))
    with nvml.open_library(node.host) as library:

        def again() -> list[str]:
            places = poll.Places(node.host, node.dev, node.sys, node.proc)
            return uuids(poll.poll(library, places, interval=5))

        assert again() == [first.uuid, second.uuid, third.uuid]
        node.driver.destroy(gpu, second)
        assert again() == [first.uuid, third.uuid]
        fourth = node.driver.create(gpu, "2g.10gb")
        assert fourth.index == second.index
        assert again() == [first.uuid, fourth.uuid, third.uuid]
        node.driver.destroy(gpu)
        assert again() == []


@pytest.mark.parametrize(
    ("facts", "mode", "pending"),
    [
        pytest.param({"mig_mode": None}, False, False, id="not supported"),
        pytest.param({"mig_mode": 0}, False, False, id="off"),
        pytest.param({"mig_mode": 0, "mig_pending": 1}, False, True, id="on after a reset"),
        pytest.param({"mig_mode": 1, "mig_pending": 0}, True, False, id="off after a reset"),
    ],
)
def test_mode(node: Node, facts: dict[str, Any], mode: bool, pending: bool) -> None:
    """Report the mode, and the pending one. A card that is not in MIG mode has its processes and no instances."""
    node.driver.set(gpus=(mig_gpu(**facts),))
    (report,) = read(node).gpus
    assert (report.mig_mode, report.mig_pending, report.instances) == (mode, pending, ())
    assert report.figures.processes == (None if mode else ())


class TestFailures:
    def one(self, node: Node, gpu: StubGpu) -> tuple[StubInstance, StubInstance]:
        return node.driver.create(gpu, "1g.5gb"), node.driver.create(gpu, "2g.10gb")

    def fail(self, node: Node, function: str, instance: StubInstance, code: int) -> None:
        node.driver.set(calls={f"{function}.{instance.uuid}": code})

    @pytest.mark.parametrize("code", [Code.NOT_FOUND, Code.INVALID_ARGUMENT])
    def test_destroyed_meanwhile(self, node: Node, gpu: StubGpu, code: int) -> None:
        """An instance that is destroyed while it is asked about is left out without a word."""
        first, second = self.one(node, gpu)
        self.fail(node, "nvmlDeviceGetGpuInstanceId", first, code)
        report = read(node)
        assert (uuids(report), report.problems) == ([second.uuid], ())

    def test_one_fails(self, node: Node, gpu: StubGpu) -> None:
        """An instance that can't be identified is left out, with the function, and does not stop the others."""
        first, second = self.one(node, gpu)
        self.fail(node, "nvmlDeviceGetName", second, 999)
        report = read(node)
        assert uuids(report) == [first.uuid]
        assert re.search(r"MIG instance 1 .* minor number 2 .*nvmlDeviceGetName.*999", "".join(report.problems))

    def test_figures(self, node: Node, gpu: StubGpu) -> None:
        """A figure that fails is an unknown one."""
        first, _ = self.one(node, gpu)
        self.fail(node, "nvmlDeviceGetMemoryInfo", first, 999)
        (report,) = read(node).gpus
        assert report.instances[0].figures == Figures(processes=())

    @pytest.mark.parametrize("code", [Code.GPU_IS_LOST, 999])
    def test_parent(self, node: Node, gpu: StubGpu, code: int) -> None:
        """A parent that does not say its instances is faulty: unknown ones are not taken for none."""
        self.one(node, gpu)
        node.driver.fail("nvmlDeviceGetMaxMigDeviceCount", code, gpu)
        (report,) = read(node).gpus
        assert f"NVML error {code}" in report.error
        assert report.mig_mode

    def test_lost(self, node: Node, gpu: StubGpu) -> None:
        """An instance whose answer says that the GPU is lost makes the GPU faulty."""
        first, _ = self.one(node, gpu)
        self.fail(node, "nvmlDeviceGetUUID", first, Code.GPU_IS_LOST)
        (report,) = read(node).gpus
        assert "nvmlDeviceGetUUID" in report.error

    def test_permission(self, node: Node, gpu: StubGpu) -> None:
        """Without permission the parent's memory is unknown, which is said; the instances' is not."""
        self.one(node, gpu)
        node.driver.fail("nvmlDeviceGetMemoryInfo", Code.NO_PERMISSION, gpu)
        (report,) = read(node).gpus
        assert (report.figures.memory_total, report.memory_refused, report.error) == (None, True, "")
        assert [each.figures.memory_total for each in report.instances] == [4864 * MIB, 9856 * MIB]

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            pytest.param({"uuid": "MIG-GPU-1/2/0"}, "MIG-GPU-1/2/0 is left out: .*R470", id="the form before R470"),
            pytest.param({"name": "NVIDIA A100"}, "is left out: its name, NVIDIA A100", id="no profile"),
        ],
    )
    def test_left_out(self, node: Node, gpu: StubGpu, facts: dict[str, Any], message: str) -> None:
        """What has no name of its own, or no profile, can't be offered, which is said."""
        node.driver.create(gpu, "1g.5gb", **facts)
        report = read(node)
        assert uuids(report) == []
        assert re.search(message, "".join(report.problems))

    def test_replaced_meanwhile(self, node: Node, gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handle that becomes another instance's while it is asked about is of no use, until the next poll."""
        self.one(node, gpu)
        answers = iter("MIG-a MIG-b MIG-c MIG-c".split())
        monkeypatch.setattr(
            nvml.Library, "uuid", lambda library, handle: gpu.uuid if gpu.uuid not in seen else next(answers)
        )
        seen: set[str] = set()
        assert uuids(read(node, found=lambda uuid, handle: seen.add(uuid))) == ["MIG-c"]


class TestCapabilities:
    def problem(self, node: Node, **options: Any) -> str:  # noqa: ANN401
        (gpu,) = read(node, **options).gpus
        (instance,) = gpu.instances
        return instance.problem

    def test_unlisted(self, node: Node) -> None:
        """Say where the kernel's list is looked for, if it lacks an instance."""
        gpu = mig_gpu()
        node.driver.set(gpus=(gpu,))
        node.driver.create(gpu, "1g.5gb")
        assert f"{node.proc}/driver/nvidia-caps/mig-minors does not list gpu0/gi1 and gpu0/gi1/ci0" in self.problem(
            node
        )

    def test_missing_node(self, node: Node, gpu: StubGpu) -> None:
        """A node that is missing is asked for, and named if that did not make it."""
        node.driver.create(gpu, "1g.5gb")
        node_path = node.dev / "nvidia-caps/nvidia-cap283"
        node_path.unlink()
        asked: list[Path] = []

        def make(files: tuple[Path, ...]) -> str:
            asked.extend(files)
            return "no nvidia-modprobe"

        file = node.proc / "driver/nvidia/capabilities/gpu2/mig/gi1/ci0/access"
        message = f"{node_path} is not there; `nvidia-modprobe -f {file}` on the host makes it (no nvidia-modprobe)"
        assert self.problem(node, make_nodes=make) == message
        assert asked == [file]

        def make_it(_: tuple[Path, ...]) -> str:
            node_path.touch()
            return ""

        assert self.problem(node, make_nodes=make_it) == ""


def test_no_report_without_mig(node: Node) -> None:
    """A GPU that knows no MIG is asked nothing more than its mode."""
    read(node)
    assert node.driver.calls("nvmlDeviceGetMaxMigDeviceCount") == 0
    assert GpuReport("", "", "", ()).instances == ()
