"""One poll, with the stub library loaded into this process."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import attrs
import pytest
from node import Node
from stub_driver import MIB, StubGpu

from sgpu.driver import nvml, poll
from sgpu.driver.messages import GpuReport, Report
from sgpu.driver.nvml import Code
from sgpu.driver.nvml.processes import COMPUTE, NOT_AVAILABLE
from sgpu.driver.poll import NotReadyError
from sgpu.node.figures import Figures, ProcessUse


def read(node: Node, **options: Any) -> Report:  # noqa: ANN401  # as poll() has them
    """One poll, of a library that is opened for it."""
    with nvml.open_library(node.host) as library:
        return poll.poll(library, poll.Places(node.host, node.dev, node.sys), **{"interval": 5, **options})


def test_asked_once(node: Node) -> None:
    """Ask once for what no GPU changes, and in each poll for its memory; a GPU that comes later is asked as well."""
    identities: dict[str, poll.Identity] = {}
    for gpus in (1, 1, 2):
        node.driver.gpus(gpus)
        assert [gpu.name for gpu in read(node, identities=identities).gpus] == ["Tesla T4"] * gpus
    asked = {name: node.driver.calls(f"nvmlDeviceGet{name}") for name in ("Name", "MinorNumber", "PciInfo", "UUID")}
    assert asked == {"Name": 2, "MinorNumber": 2, "PciInfo": 2, "UUID": 4}
    assert node.driver.calls("nvmlDeviceGetMemoryInfo_v2") == 4


def test_facts(node: Node) -> None:
    """Report each fact of each GPU; its device node is by minor number, and its NUMA node is the kernel's."""
    first = attrs.evolve(
        StubGpu(),
        minor=5,
        name="NVIDIA L4",
        bus_id="00000001:3B:00.0",
        total=1024 * MIB,
        used=100 * MIB,
        reserved=24 * MIB,
        utilization=37,
        recovery_action=2,
        rows_pending=1,
        rows_failed=0,
        fabric_state=3,
        fabric_status=7,
        compute=((7, 2 * MIB), (5, NOT_AVAILABLE)),
        graphics=((7, MIB),),
        mps=((9, MIB),),
        samples=((7, 30, 0),),
    )
    second = attrs.evolve(StubGpu(1), recovery_action=0, rows_pending=0, rows_failed=1, utilization=100)
    node.driver.set(gpus=(first, second), driver_version="535.1")
    node.set_numa_node(first.bus_id, 1)
    report = read(node)
    used = (ProcessUse(5, None, 0), ProcessUse(7, 2 * MIB, 30), ProcessUse(9, MIB, None))
    assert report.gpus[0] == GpuReport(
        uuid=first.uuid,
        name="NVIDIA L4",
        pci_bus_id=first.bus_id,
        device_nodes=("nvidia5", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"),
        numa_node=1,
        figures=Figures(1024 * MIB, 900 * MIB, 37, used, 24 * MIB),
        recovery_action=2,
        rows_pending=True,
        rows_failed=False,
        pages_pending=None,
        fabric_state=3,
        fabric_status=7,
    )
    other = report.gpus[1]
    assert (other.uuid, other.name, other.device_nodes[0]) == (second.uuid, "Tesla T4", "nvidia1")
    assert (other.recovery_action, other.rows_pending, other.rows_failed) == (0, False, True)
    assert other.figures == Figures(second.total, second.total - second.reserved, 100, (), second.reserved)
    library = str(node.host / "lib64" / "libnvidia-ml.so.1")
    assert attrs.evolve(report, gpus=()) == Report((), (), (), "535.1", library, order=(first.uuid, second.uuid))


class TestQuestions:
    #: Knows every question.
    GPU = attrs.evolve(StubGpu(), recovery_action=0, pages_pending=0, fabric_state=3)

    @pytest.mark.parametrize(
        ("function", "fields"),
        {
            "nvmlDeviceGetFieldValues": {"recovery_action", "pages_pending"},
            "nvmlDeviceGetRemappedRows": {"rows_pending", "rows_failed"},
            "nvmlDeviceGetGpuFabricInfoV": {"fabric_state", "fabric_status", "pages_pending"},
        }.items(),
    )
    def test_each(self, node: Node, function: str, fields: set[str]) -> None:
        """Go without an answer that the GPU does not support; report a GPU that fails to answer, with the error."""
        node.driver.set(gpus=(self.GPU, StubGpu(1)))
        node.driver.fail(function, Code.NOT_SUPPORTED, self.GPU)
        gpu = read(node).gpus[0]
        facts = {**attrs.asdict(gpu), **attrs.asdict(gpu.figures)}
        assert {field for field, fact in facts.items() if fact is None} == {*fields, "numa_node"}
        assert gpu.error == ""
        node.driver.fail(function, 999, self.GPU)
        failing, other = read(node).gpus
        assert (failing.uuid, failing.name, other.error) == (self.GPU.uuid, self.GPU.name, "")
        assert re.search(rf"{function}.*\b999\b", failing.error)

    def test_retired_pages(self, node: Node) -> None:
        """Ask for them only where no rows are remapped."""
        gpu = attrs.evolve(self.GPU, pages_pending=1)
        node.driver.set(gpus=(gpu, StubGpu(1)))
        node.driver.fail("nvmlDeviceGetRemappedRows", Code.NOT_SUPPORTED, gpu)
        assert [each.pages_pending for each in read(node).gpus] == [True, None]
        function = "nvmlDeviceGetRetiredPagesPendingStatus"
        assert node.driver.calls(function) == node.driver.calls(function, gpu) == 1
        node.driver.fail(function, 999)
        assert [each.error != "" for each in read(node).gpus] == [True, False]

    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.NOT_FOUND, 999])
    @pytest.mark.parametrize(
        ("function", "unknown"),
        {
            "nvmlDeviceGetMemoryInfo": {"memory_total", "memory_free", "memory_reserved"},
            "nvmlDeviceGetUtilizationRates": {"utilization"},
        }.items(),
    )
    def test_figures(self, node: Node, function: str, unknown: set[str], code: int) -> None:
        """A figure that fails is an unknown figure, and no fault of the GPU, unless the error says that it is lost."""
        node.driver.set(gpus=(self.GPU,))
        node.driver.fail(function, code, self.GPU)
        (gpu,) = read(node).gpus
        assert {field for field, figure in attrs.asdict(gpu.figures).items() if figure is None} == unknown
        assert gpu.error == ""
        node.driver.fail(function, Code.GPU_IS_LOST, self.GPU)
        assert read(node).gpus[0].error

    @pytest.mark.parametrize(
        ("code", "is_fault"),
        [
            *((code, False) for code in (Code.INVALID_ARGUMENT, Code.NOT_SUPPORTED, Code.NO_PERMISSION)),
            *((code, False) for code in (Code.FUNCTION_NOT_FOUND, Code.NO_DATA, Code.ARGUMENT_VERSION_MISMATCH)),
            *((code, True) for code in (Code.GPU_IS_LOST, 16, Code.NOT_FOUND, 999)),  # 16: reset required
        ],
    )
    def test_codes(self, node: Node, code: int, is_fault: bool) -> None:
        """Take no answer for a fault of the GPU that says only that it or the driver does not know the question."""
        node.driver.fail("nvmlDeviceGetRemappedRows", code)
        (gpu,) = read(node).gpus
        assert (gpu.error != "") is is_fault

    @pytest.mark.parametrize(
        ("function", "code", "processes"),
        [
            pytest.param(COMPUTE, Code.NOT_SUPPORTED, None, id="no processes"),
            pytest.param(COMPUTE, 999, None, id="processes fail"),
            pytest.param("nvmlDeviceGetProcessUtilization", 999, (ProcessUse(7, MIB, None),), id="utilization fails"),
            pytest.param("nvmlDeviceGetRemappedRows", 999, None, id="the GPU fails"),
        ],
    )
    def test_processes(self, node: Node, function: str, code: int, processes: tuple[ProcessUse, ...] | None) -> None:
        """Report as much of the processes as can be had. It is no fault that they can't, and a faulty GPU has none."""
        node.driver.set(gpus=(attrs.evolve(StubGpu(), compute=((7, MIB),), samples=((7, 30, 0),)),))
        node.driver.fail(function, code)
        (gpu,) = read(node).gpus
        assert gpu.figures.processes == processes
        assert (gpu.error != "") is (function == "nvmlDeviceGetRemappedRows") is (node.driver.calls(COMPUTE) == 0)

    @pytest.mark.parametrize(("interval", "utilization"), [(30, 30), (1, 0)])
    def test_interval(self, node: Node, interval: float, utilization: int) -> None:
        """Count how busy a process was since the last poll, and not before."""
        now = int(time.time() * 1e6)
        samples = ((7, 30, now - 4_000_000), (7, 90, now - 60_000_000))
        node.driver.set(gpus=(attrs.evolve(StubGpu(), compute=((7, MIB),), samples=samples),))
        assert read(node, interval=interval).gpus[0].figures.processes == (ProcessUse(7, MIB, utilization),)

    def test_no_process(self, node: Node) -> None:
        """Nothing is asked about the utilization of none."""
        assert read(node).gpus[0].figures.processes == ()
        assert node.driver.calls("nvmlDeviceGetProcessUtilization") == 0


@pytest.mark.parametrize(
    ("bus_id", "kernel", "content", "expected"),
    [
        pytest.param("00000000:3B:00.0", "0000:3b:00.0", "1\n", 1, id="known"),
        pytest.param("00010000:3B:00.0", "10000:3b:00.0", "0\n", 0, id="wide domain"),
        pytest.param("00000000:3B:00.0", "0000:3b:00.0", "-1\n", None, id="unknown"),
        pytest.param("00000000:3B:00.0", "0000:3b:00.0", "", None, id="empty"),
        pytest.param("00000000:3B:00.0", "0000:ff:00.0", "1\n", None, id="no such device"),
        pytest.param("", "0000:3b:00.0", "1\n", None, id="no bus id"),
    ],
)
def test_numa_node(node: Node, bus_id: str, kernel: str, content: str, expected: int | None) -> None:
    """Return the kernel's NUMA node of a PCI device, None where it does not know."""
    directory = node.sys / "bus/pci/devices" / kernel
    directory.mkdir(parents=True)
    (directory / "numa_node").write_text(content)
    assert poll.numa_node(node.sys, bus_id) == expected


class TestProblems:
    @pytest.mark.parametrize("function", ["HandleByIndex", "UUID", "MinorNumber", "PciInfo", "Name"])
    def test_gpu(self, node: Node, function: str) -> None:
        """Leave out a GPU that does not say what it is, and name its index and the cause; report the others."""
        first, second, third = node.driver.gpus(3)
        node.driver.fail(f"nvmlDeviceGet{function}", Code.NOT_SUPPORTED, second)
        report = read(node)
        assert [gpu.uuid for gpu in report.gpus] == [first.uuid, third.uuid]
        (problem,) = report.problems
        assert re.search(rf"GPU 1 .*nvmlDeviceGet{function}.*\b{Code.NOT_SUPPORTED}\b", problem)

    def test_no_device_node(self, node: Node) -> None:
        """Leave out a GPU that has no device node, and say so: its driver answers."""
        first, second = node.driver.gpus(2)
        (node.dev / "nvidia1").unlink()
        report = read(node)
        assert [gpu.uuid for gpu in report.gpus] == [first.uuid]
        assert report.nodeless == (second.uuid,)
        (problem,) = report.problems
        assert re.search(f"GPU 1 .*{node.dev}/nvidia1", problem)

    def test_no_gpu(self, node: Node) -> None:
        """Report none: what to make of that is the caller's to decide."""
        node.driver.set(gpus=())
        report = read(node)
        assert (report.gpus, report.problems, report.order) == ((), (), ())

    @pytest.mark.parametrize("function", ["nvmlDeviceGetCount", "nvmlSystemGetDriverVersion"])
    def test_driver(self, node: Node, function: str) -> None:
        """Raise an error that is about no GPU."""
        node.driver.fail(function, 999)
        with pytest.raises(nvml.NvmlError, match=function):
            read(node)


class TestSkip:
    def test_alone(self, node: Node) -> None:
        """Name the GPUs to skip that are there, and make no call about them but for their UUID."""
        first, second, third = node.driver.gpus(3)
        report = read(node, skip=(third.uuid, first.uuid, "GPU-gone"))
        assert report.skipped == (first.uuid, third.uuid)
        assert [gpu.uuid for gpu in report.gpus] == [second.uuid]
        for gpu in (first, third):
            calls = {call.split()[0] for call in node.driver.call_log() if call.endswith(gpu.uuid)}
            assert calls == {"nvmlDeviceGetUUID"}

    def test_unknown(self, node: Node) -> None:
        """Report a problem with one that gives no UUID: it might be any."""
        gpu, _ = node.driver.gpus(2)
        node.driver.change(gpu, lost=True)
        report = read(node, skip=(gpu.uuid,))
        assert (len(report.gpus), len(report.problems), report.skipped) == (1, 1, ())


class TestCallStarted:
    def started(self, node: Node, **options: Any) -> list[tuple[str, list[str]]]:  # noqa: ANN401  # as poll() has them
        """Return the announced GPUs, and the calls that followed each."""
        started: list[tuple[str, int]] = []
        read(node, call_started=lambda uuid: started.append((uuid, len(node.driver.call_log()))), **options)
        calls = node.driver.call_log()
        ends = [start for _, start in started[1:]] + [len(calls)]
        return [(uuid, calls[start:end]) for (uuid, start), end in zip(started, ends, strict=True)]

    def test_unknown_order(self, node: Node) -> None:
        """Say before the first call about each GPU that it begins, and again before those about none."""
        first, skipped, last = node.driver.gpus(3)
        started = self.started(node, skip=(skipped.uuid,))
        assert [uuid for uuid, calls in started if calls] == ["", "", first.uuid, "", "", last.uuid, ""]
        for uuid, calls in started:
            about = {call.partition(" ")[2] for call in calls if not call.startswith("nvmlDeviceGetUUID")}
            assert about <= {uuid, ""}, (uuid, calls)

    def test_known_order(self, node: Node) -> None:
        """Name a GPU for its first call, which is by index; do not even make that one for a GPU to skip."""
        first, skipped, last = gpus = node.driver.gpus(3)
        started = self.started(node, known=[gpu.uuid for gpu in gpus], skip=(skipped.uuid,))
        assert [uuid for uuid, _ in itertools.groupby(uuid for uuid, _ in started)] == ["", first.uuid, last.uuid, ""]
        assert not any(skipped.uuid in call for _, calls in started for call in calls)
        handles = [uuid for uuid, calls in started for call in calls if call.startswith("nvmlDeviceGetHandleByIndex")]
        assert handles == [first.uuid, last.uuid]

    def test_order_that_no_longer_holds(self, node: Node) -> None:
        """Take no index for known when there are more or fewer GPUs than there were."""
        first, second = node.driver.gpus(2)
        started = self.started(node, known=[second.uuid, first.uuid, "GPU-gone"])
        assert [uuid for uuid, calls in started if calls] == ["", "", first.uuid, "", second.uuid, ""]


def test_found(node: Node) -> None:
    """Hand over each GPU with its handle before it is asked, so that no event is missed; not those to skip."""
    first, skipped, last = node.driver.gpus(3)
    found: list[tuple[str, int]] = []
    read(
        node,
        skip=(skipped.uuid,),
        found=lambda uuid, handle: found.append((uuid, node.driver.calls("nvmlDeviceGetName"))),
    )
    assert found == [(first.uuid, 0), (last.uuid, 1)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_order(node: Node, known: bool) -> None:
    """List all GPUs in the driver's order; one that gives no UUID has the one that was there before."""
    gpus = node.driver.gpus(5)
    node.driver.fail("nvmlDeviceGetName", 999, gpus[2])
    (node.dev / "nvidia3").unlink()
    node.driver.change(gpus[4], lost=True)
    uuids = [gpu.uuid for gpu in gpus]
    report = read(node, skip=(gpus[1].uuid,), known=uuids if known else ())
    assert report.order == (*uuids[:4], uuids[4] if known else "")


class TestSharedNodes:
    @pytest.mark.parametrize(
        "missing", [["nvidiactl"], ["nvidia-uvm"], ["nvidiactl", "nvidia-uvm"]], ids=["ctl", "uvm", "both"]
    )
    def test_missing(self, node: Node, missing: list[str]) -> None:
        """Name the nodes that are missing; ask for nvidia-uvm, and say what came of that and what makes it."""
        asked = iter(["it failed"])
        for name in missing:
            (node.dev / name).unlink()
        with pytest.raises(NotReadyError) as caught:
            read(node, ask_for_uvm=lambda: next(asked))
        error = str(caught.value)
        assert set(re.findall(rf"{node.dev}/([\w-]+)", error)) == set(missing)
        uvm = "nvidia-uvm" in missing
        assert ("it failed" in error, "nvidia-modprobe -u -c 0" in error, list(asked) == []) == (uvm, uvm, uvm)

    def test_made(self, node: Node) -> None:
        """Go on where asking for nvidia-uvm made it; say how to make the one that is missing, and no other."""

        def ask() -> str:
            node.make_nodes("nvidia-uvm")
            return ""

        (node.dev / "nvidia-uvm").unlink()
        assert len(read(node, ask_for_uvm=ask).gpus) == 1
        for name in ("nvidia-uvm", "nvidiactl"):
            (node.dev / name).unlink()
        with pytest.raises(NotReadyError) as caught:
            read(node, ask_for_uvm=ask)
        assert "nvidia-modprobe -c 255" in str(caught.value)
        assert "-u" not in str(caught.value)

    def test_driver_container(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the GPU operator's driver container has them, name the setting, and nothing that makes others."""
        monkeypatch.setattr(poll, "CONTAINER_DEV", node.dev.with_name("container"))
        (node.dev / "nvidiactl").unlink()
        poll.CONTAINER_DEV.mkdir()
        (poll.CONTAINER_DEV / "nvidiactl").touch()
        with pytest.raises(NotReadyError) as caught:
            read(node)
        assert str(poll.CONTAINER_DEV) in str(caught.value)
        assert "-dev-directory" in str(caught.value)
        assert "nvidia-modprobe" not in str(caught.value)

    def test_optional(self, node: Node) -> None:
        """Report those that are there, in the same order each time."""
        (node.dev / "nvidia-uvm-tools").unlink()
        node.make_nodes("nvidia-modeset")
        assert read(node).gpus[0].device_nodes == ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset")


def test_one_uuid_twice(node: Node) -> None:
    """The second GPU is a problem that names it, and the first is reported."""
    node.driver.set(gpus=(StubGpu(), attrs.evolve(StubGpu(1), uuid=StubGpu().uuid)))
    report = read(node)
    assert [gpu.uuid for gpu in report.gpus] == [StubGpu().uuid]
    (problem,) = report.problems
    assert StubGpu().uuid in problem


def test_order_has_changed(node: Node) -> None:
    """A GPU that had another place is no second one, also where the one at its old place does not answer."""
    first, second = node.driver.gpus(2)
    node.driver.fail("nvmlDeviceGetHandleByIndex_v2", 999, first)
    report = read(node, known=(second.uuid, first.uuid))
    assert [gpu.uuid for gpu in report.gpus] == [second.uuid]


def test_a_clock_at_the_epoch(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node that has not set it yet."""
    monkeypatch.setattr(time, "time", lambda: 30.0)
    assert read(node, interval=60).gpus[0].figures.processes == ()
