"""The driver's answers as a report, with the stub library loaded into this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection
from typing import Any

import attrs
import pytest
from node import Node
from stub_driver import MIB, StubDriver, StubGpu

from sgpu import discovery, nvml
from sgpu.discovery import NotReadyError
from sgpu.nvml import Code
from sgpu.nvml.processes import COMPUTE, NOT_AVAILABLE, OTHERS
from sgpu.report import GpuReport, ProcessReport, Report


def places(node: Node) -> discovery.Places:
    return discovery.Places(node.host, node.dev, node.sys)


def read(node: Node, **options: Any) -> Report:  # noqa: ANN401  # as read() has them
    """One poll, of a library that is opened for it."""
    with nvml.open_library(node.host) as library:
        return discovery.read(library, places(node), **{"interval": 5, **options})


def test_a_gpu_is_reported_with_all_its_facts(node: Node) -> None:
    """Minor number, not index; NUMA node from the kernel; all that this GPU is asked and knows."""
    gpu = attrs.evolve(
        StubGpu(),
        minor=5,
        name="NVIDIA L4",
        bus_id="0001:3B:00.0".rjust(16, "0"),
        total=1024 * MIB,
        used=100 * MIB,
        reserved=24 * MIB,
        utilisation=37,
        recovery_action=0,
        rows_pending=0,
        pages_pending=0,
        fabric_state=3,
        compute=((7, 2 * MIB), (5, NOT_AVAILABLE)),
        graphics=((7, MIB),),
        samples=((7, 30, 0),),
    )
    node.driver.set(gpus=(gpu,), driver_version="535.1")
    node.set_numa_node(gpu.bus_id, 1)
    assert read(node) == Report(
        gpus=(
            GpuReport(
                uuid=gpu.uuid,
                name="NVIDIA L4",
                pci_bus_id=gpu.bus_id,
                device_nodes=("nvidia5", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"),
                numa_node=1,
                memory_total=1024 * MIB,
                memory_used=100 * MIB,
                memory_free=900 * MIB,
                utilisation=37,
                recovery_action=0,
                rows_pending=False,
                rows_failed=False,
                pages_pending=False,
                fabric_state=3,
                fabric_status=0,
                processes=(ProcessReport(5, None, 0), ProcessReport(7, 2 * MIB, 30)),
            ),
        ),
        problems=(),
        unasked=(),
        driver_version="535.1",
        library=str(node.host / "lib64" / "libnvidia-ml.so.1"),
        order=(gpu.uuid,),
    )


@pytest.mark.parametrize(
    ("facts", "field", "expected"),
    [
        pytest.param({"recovery_action": 2}, "recovery_action", 2, id="recovery action"),
        pytest.param({"rows_pending": 1}, "rows_pending", True, id="rows pending"),
        pytest.param({"rows_failed": 1}, "rows_failed", True, id="rows failed"),
        pytest.param({"pages_pending": 1}, "pages_pending", True, id="pages pending"),
        pytest.param({"fabric_state": 2}, "fabric_state", 2, id="fabric in progress"),
        pytest.param({"utilisation": 100}, "utilisation", 100, id="busy"),
    ],
)
def test_how_it_is(node: Node, facts: dict[str, int], field: str, expected: object) -> None:
    """Each fact is in its own place, of its own GPU."""
    _, second = node.driver.gpus(2)
    node.driver.change(second, **facts)
    first, changed = read(node).gpus
    assert getattr(changed, field) == expected
    assert getattr(first, field) != expected


UNTOLD = [
    pytest.param("nvmlDeviceGetMemoryInfo", ("memory_total", "memory_used", "memory_free"), id="memory"),
    pytest.param("nvmlDeviceGetUtilizationRates", ("utilisation",), id="utilisation"),
    pytest.param("nvmlDeviceGetFieldValues", ("recovery_action",), id="recovery action"),
    pytest.param("nvmlDeviceGetRemappedRows", ("rows_pending", "rows_failed"), id="remapped rows"),
    pytest.param("nvmlDeviceGetRetiredPagesPendingStatus", ("pages_pending",), id="retired pages"),
    pytest.param("nvmlDeviceGetGpuFabricInfoV", ("fabric_state", "fabric_status"), id="fabric"),
]
#: One that knows every question.
TELLING = attrs.evolve(StubGpu(), recovery_action=0, pages_pending=0, fabric_state=3)


@pytest.mark.parametrize(
    "code",
    [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, Code.INVALID_ARGUMENT],
    ids=["not supported", "no function", "not in this form"],
)
@pytest.mark.parametrize(("function", "fields"), UNTOLD)
def test_what_is_not_told_is_none(node: Node, function: str, fields: tuple[str, ...], code: int) -> None:
    """Of a GPU or driver that does not know the question: no fault, and the other answers are there."""
    node.driver.set(gpus=(TELLING,))
    (before,) = read(node).gpus
    node.driver.fail(function, code)
    (gpu,) = read(node).gpus
    facts = attrs.asdict(before)
    assert [facts[field] for field in fields] != [None] * len(fields)
    assert attrs.asdict(gpu) == {**facts, **dict.fromkeys(fields)}


@pytest.mark.parametrize(("function", "fields"), UNTOLD)
def test_older_drivers(node: Node, function: str, fields: tuple[str, ...]) -> None:
    """Whose library lacks the function. Memory they have under another name, which counts what is reserved as used."""
    versions = {"nvmlDeviceGetMemoryInfo": "nvmlDeviceGetMemoryInfo_v2"}
    driver = StubDriver(node.host, without=[versions.get(function, function)])
    driver.set(gpus=(TELLING,))
    (gpu,) = read(node).gpus
    assert gpu.error == ""
    if function in versions:
        assert gpu.memory_used == TELLING.reserved
    else:
        assert [getattr(gpu, field) for field in fields] == [None] * len(fields)


@pytest.mark.parametrize("code", [999, Code.GPU_IS_LOST, 16], ids=["unknown", "lost", "reset required"])
@pytest.mark.parametrize(("function", "fields"), UNTOLD)
def test_a_question_that_fails(node: Node, function: str, fields: tuple[str, ...], code: int) -> None:
    """The GPU is reported with what the driver answered: it is known, and not to be trusted."""
    node.driver.set(gpus=(TELLING, StubGpu(1)))
    node.driver.fail(function, code, TELLING)
    failing, other = read(node).gpus
    assert failing.uuid == TELLING.uuid
    assert failing.name == TELLING.name
    assert function in failing.error
    assert f"(NVML error {code})" in failing.error
    assert other.error == ""


class TestProcesses:
    GPU = attrs.evolve(StubGpu(), compute=((7, MIB),), samples=((7, 30, 0),))

    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999, Code.GPU_IS_LOST])
    @pytest.mark.parametrize("function", [COMPUTE, *OTHERS])
    def test_not_told(self, node: Node, function: str, code: int) -> None:
        """None, or those of the other lists; and whatever goes wrong there is no fault of the GPU."""
        node.driver.set(gpus=(self.GPU,))
        node.driver.fail(function, code)
        (gpu,) = read(node).gpus
        told = function in OTHERS and code in nvml.NO_ANSWER
        assert gpu.processes == ((ProcessReport(7, MIB, 30),) if told else None)
        assert gpu.error == ""

    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999])
    def test_only_utilisation_is_not_told(self, node: Node, code: int) -> None:
        """Then it is not known of any of them."""
        node.driver.set(gpus=(self.GPU,))
        node.driver.fail("nvmlDeviceGetProcessUtilization", code)
        (gpu,) = read(node).gpus
        assert gpu.processes == (ProcessReport(7, MIB, None),)

    def test_of_the_last_interval(self, node: Node) -> None:
        """How busy a process was before does not count."""
        now = int(time.time() * 1e6)
        samples = ((7, 30, now - 4_000_000), (7, 90, now - 60_000_000))
        node.driver.set(gpus=(attrs.evolve(self.GPU, samples=samples),))
        (gpu,) = read(node, interval=30).gpus
        assert gpu.processes == (ProcessReport(7, MIB, 30),)
        (gpu,) = read(node, interval=1).gpus
        assert gpu.processes == (ProcessReport(7, MIB, 0),)

    def test_a_gpu_in_trouble(self, node: Node) -> None:
        """Is not asked for more."""
        node.driver.set(gpus=(self.GPU,))
        node.driver.fail("nvmlDeviceGetRemappedRows", Code.GPU_IS_LOST)
        (gpu,) = read(node).gpus
        assert gpu.processes is None
        assert node.driver.calls(COMPUTE) == 0


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


def break_name(node: Node) -> None:
    node.driver.fail("nvmlDeviceGetName", 999, StubGpu(1))


def break_handle(node: Node) -> None:
    node.driver.change(StubGpu(1), lost=True)


def remove_node(node: Node) -> None:
    (node.dev / "nvidia1").unlink()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (break_minor, "nvmlDeviceGetMinorNumber: Not Supported"),
        (break_uuid, "nvmlDeviceGetUUID: GPU is lost"),
        (break_name, "nvmlDeviceGetName: Unknown Error"),
        (break_handle, "nvmlDeviceGetHandleByIndex_v2: GPU is lost"),
        (remove_node, "nvidia1 is not there"),
    ],
    ids=["minor", "uuid", "name", "handle", "node"],
)
def test_one_gpu_in_trouble_does_not_take_the_others_with_it(
    node: Node, trouble: Callable[[Node], None], words: str
) -> None:
    """It is left out, and said so by number."""
    first, _, third = node.driver.gpus(3)
    trouble(node)
    report = read(node)
    assert [gpu.uuid for gpu in report.gpus] == [first.uuid, third.uuid]
    assert len(report.problems) == 1
    assert report.problems[0].startswith("GPU 1 is left out: ")
    assert words in report.problems[0]


def test_all_gpus_in_trouble(node: Node) -> None:
    """A report of none, with each reason."""
    for gpu in node.driver.gpus(2):
        node.driver.change(gpu, lost=True)
    report = read(node)
    assert report.gpus == ()
    assert [problem[:20] for problem in report.problems] == ["GPU 0 is left out: n", "GPU 1 is left out: n"]


def test_no_gpu(node: Node) -> None:
    """A report of none: what to make of that is the caller's."""
    node.driver.set(gpus=())
    report = read(node)
    assert (report.gpus, report.problems, report.unasked) == ((), (), ())


@pytest.mark.parametrize("function", ["nvmlDeviceGetCount", "nvmlSystemGetDriverVersion"])
def test_a_driver_that_fails(node: Node, function: str) -> None:
    """Is the caller's to see to: it is about no GPU."""
    node.driver.fail(function, 999)
    with pytest.raises(nvml.NvmlError, match=function):
        read(node)


class TestSkip:
    @pytest.mark.parametrize("skipped", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
    def test_those_are_left_alone(self, node: Node, skipped: Collection[int]) -> None:
        """They are named, and no call about them is made but for their UUID."""
        gpus = node.driver.gpus(3)
        uuids = [gpus[number].uuid for number in skipped]
        report = read(node, skip=uuids)
        assert list(report.unasked) == uuids
        assert [gpu.uuid for gpu in report.gpus] == [gpu.uuid for gpu in gpus if gpu.uuid not in uuids]
        for gpu in gpus:
            asked = {call.split()[0] for call in node.driver.call_log() if call.endswith(gpu.uuid)}
            assert (asked == {"nvmlDeviceGetUUID"}) is (gpu.uuid in uuids)

    def test_one_that_is_not_there(self, node: Node) -> None:
        """Is not said to be."""
        assert read(node, skip=("GPU-x",)).unasked == ()

    def test_it_is_there_but_in_trouble(self, node: Node) -> None:
        """Then it is a problem: that much could be asked."""
        gpu, other = node.driver.gpus(2)
        node.driver.change(gpu, lost=True)
        report = read(node, skip=(gpu.uuid,))
        assert [reported.uuid for reported in report.gpus] == [other.uuid]
        assert (len(report.problems), report.unasked) == (1, ())


class TestAsking:
    def told(self, node: Node, **options: Any) -> list[tuple[str, list[str]]]:  # noqa: ANN401  # as read() has them
        """Whom the calls were said to be about, and which were then made."""
        begun: list[tuple[str, int]] = []
        read(node, asking=lambda uuid: begun.append((uuid, len(node.driver.call_log()))), **options)
        calls = node.driver.call_log()
        ends = [start for _, start in begun[1:]] + [len(calls)]
        return [(uuid, calls[start:end]) for (uuid, start), end in zip(begun, ends, strict=True)]

    def test_whom_the_calls_are_about(self, node: Node) -> None:
        """Told before the first call about each GPU, and again before those that are about none."""
        first, skipped, last = node.driver.gpus(3)
        told = self.told(node, skip=(skipped.uuid,))
        assert [uuid for uuid, calls in told if calls] == ["", "", first.uuid, "", "", last.uuid, ""]
        for uuid, calls in told:
            about = {call.partition(" ")[2] for call in calls if not call.startswith("nvmlDeviceGetUUID")}
            assert about <= {uuid, ""}, (uuid, calls)

    def test_by_its_place_too(self, node: Node) -> None:
        """The first calls about a GPU are about it already, where it is known which has that place."""
        first, skipped, last = gpus = node.driver.gpus(3)
        told = self.told(node, known=[gpu.uuid for gpu in gpus], skip=(skipped.uuid,))
        assert [uuid for uuid, _ in itertools.groupby(uuid for uuid, _ in told)] == ["", first.uuid, last.uuid, ""]
        assert not any(skipped.uuid in call for _, calls in told for call in calls)
        handles = [uuid for uuid, calls in told for call in calls if call.startswith("nvmlDeviceGetHandleByIndex")]
        assert handles == [first.uuid, last.uuid]

    def test_a_place_that_may_be_anothers(self, node: Node) -> None:
        """When there are more or fewer than there were, none is taken for known."""
        first, second = node.driver.gpus(2)
        told = self.told(node, known=[second.uuid, first.uuid, "GPU-gone"])
        assert [uuid for uuid, calls in told if calls] == ["", "", first.uuid, "", second.uuid, ""]


def test_each_is_found_before_it_is_asked(node: Node) -> None:
    """With its handle, so that events can be registered for; but for those that are left alone."""
    first, skipped, last = node.driver.gpus(3)
    found: list[tuple[str, int]] = []
    read(
        node,
        skip=(skipped.uuid,),
        found=lambda uuid, handle: found.append((uuid, node.driver.calls("nvmlDeviceGetName"))),
    )
    assert found == [(first.uuid, 0), (last.uuid, 1)]


class TestOrder:
    def test_all_of_them(self, node: Node) -> None:
        """Also those that are left alone, and those that are in trouble."""
        gpus = node.driver.gpus(4)
        node.driver.fail("nvmlDeviceGetName", 999, gpus[2])
        (node.dev / "nvidia3").unlink()
        report = read(node, skip=(gpus[1].uuid,))
        assert report.order == tuple(gpu.uuid for gpu in gpus)
        assert report.nodeless == (gpus[3].uuid,)

    @pytest.mark.parametrize("known", [True, False])
    def test_one_that_gives_no_handle(self, node: Node, known: bool) -> None:
        """Has the name that its place had, if that is known."""
        first, second = node.driver.gpus(2)
        node.driver.change(second, lost=True)
        report = read(node, known=(first.uuid, second.uuid) if known else ())
        assert report.order == (first.uuid, second.uuid if known else "")


def test_the_library_is_shut_down_each_time(node: Node) -> None:
    """Nothing stays open between attempts."""
    for _ in range(3):
        read(node)
    assert node.driver.calls("nvmlInit") == node.driver.calls("nvmlShutdown") == 3


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        pytest.param(["nvidiactl"], r"/nvidiactl not there yet$", id="nvidiactl"),
        pytest.param(["nvidia-uvm"], r"/nvidia-uvm not there yet; `nvidia-modprobe -u -c 0` on the host", id="uvm"),
        pytest.param(
            ["nvidiactl", "nvidia-uvm"],
            r"/nvidiactl and .*/nvidia-uvm not there yet; `nvidia-modprobe -u -c 0` on the host",
            id="both",
        ),
    ],
)
def test_missing_nodes_are_named(node: Node, missing: list[str], words: str) -> None:
    """All at once, with what to do about the one that nothing has asked for yet."""
    for name in missing:
        (node.dev / name).unlink()
    with pytest.raises(NotReadyError, match=words):
        read(node)


def test_optional_nodes(node: Node) -> None:
    """Those that are there, in the same order each time."""
    (node.dev / "nvidia-uvm-tools").unlink()
    node.make_nodes("nvidia-modeset")
    (gpu,) = read(node).gpus
    assert gpu.device_nodes == ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset")
