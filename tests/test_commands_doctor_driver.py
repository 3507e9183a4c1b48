"""The doctor on the driver: what each answer of NVML, or none, means, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import real_driver
import trio
from findings import expect, find
from node import Node
from stub_driver import GIB, StubGpu
from trio.testing import MockClock

from sgpu.commands.doctor.driver import DEADLINE, Answer, ask, check_gpus, check_kernel, check_nvml
from sgpu.commands.doctor.finding import Finding
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.libraries import Library
from sgpu.config.settings import Settings
from sgpu.driver.messages import GpuReport, Report
from sgpu.driver.nvml import Code
from sgpu.node.figures import Figures

FIGURES = Figures(memory_total=16 * GIB, memory_free=15 * GIB)
GPU = GpuReport("GPU-1", "Tesla T4", "00000000:3B:00.0", ("nvidia0", "nvidiactl"), figures=FIGURES)
REPORT = Report((GPU,), (), (), "550.54.15", "/x/libnvidia-ml.so.1")
LIBRARY = Library(Path("/x/libnvidia-ml.so.1"), "550.54.15")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine of which the kernel says nothing yet."""
    return Host(proc=tmp_path / "proc", sysfs=tmp_path / "sys")


def load_module(host: Host, version: str = "550.54.15") -> None:
    """Have the kernel's part of the driver loaded."""
    (host.proc / "driver/nvidia").mkdir(parents=True)
    banner = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Mar  5 22:23:56 UTC 2024\n"
    (host.proc / "driver/nvidia/version").write_text(banner)


def plug(host: Host, *addresses: str, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    """Have cards on the PCI bus."""
    for address in addresses:
        device = host.sysfs / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")


# The kernel


KERNEL_MODULES = {
    "same": ("550.54.15", LIBRARY, Answer(), "ok", ["550.54.15"], ""),
    "library's version unknown": ("550.54.15", Library(LIBRARY.path, ""), Answer(), "ok", ["550.54.15"], ""),
    "no library": ("550.54.15", None, Answer(), "ok", ["550.54.15"], ""),
    "another": ("535.1", LIBRARY, Answer(), "FAIL", ["535.1", "550.54.15", "/x/"], "reboot"),
    "not loaded": ("", LIBRARY, Answer(), "FAIL", [], "modprobe nvidia"),
    "not visible, but NVML answers": ("", LIBRARY, Answer(REPORT), "ok", [], ""),
}


@pytest.mark.parametrize(
    ("loaded", "library", "answer", "level", "facts", "advice"), KERNEL_MODULES.values(), ids=KERNEL_MODULES
)
def test_kernel_module(
    host: Host, loaded: str, library: Library | None, answer: Answer, level: str, facts: list[str], advice: str
) -> None:
    """The module is loaded, and of the library's version as far as that is known."""
    if loaded:
        load_module(host, loaded)
    (finding,) = check_kernel(host, library, answer)  # the bus can't be seen, so there is nothing to say of it
    assert finding.subject == "kernel module"
    expect(finding, level, *facts, advice=advice)


def test_bus(host: Host) -> None:
    """NVIDIA's display and 3D controllers count, and nothing else; without any, that is the reason for all the rest."""
    plug(host, "0000:3b:00.1", kind="0x040300")
    plug(host, "0000:00:02.0", vendor="0x8086")
    expect(find(check_kernel(host, LIBRARY, Answer()), "PCI bus"), "FAIL")
    expect(find(check_kernel(host, LIBRARY, Answer(REPORT)), "PCI bus"), "warn")
    plug(host, "0000:3b:00.0", "0000:af:00.0")
    finding = find(check_kernel(host, LIBRARY, Answer()), "PCI bus")
    expect(finding, "ok", "2", "0000:3b:00.0, 0000:af:00.0")
    assert "0000:3b:00.1" not in finding.message
    assert "0000:00:02.0" not in finding.message


# NVML


def settings(node: Node) -> Settings:
    """For the doctor on that node."""
    return Settings(host_path=str(node.host), dev_directory=str(node.dev), sysfs_directory=str(node.sys))


def asked(settings: Settings) -> Answer:
    """Ask the driver, with a clock that stands still: however busy the machine is, it is in time."""
    answer: Answer = trio.run(ask, settings, clock=MockClock())
    return answer


def nvml(node: Node) -> Finding:
    """Ask the driver of a node, and check what it said."""
    answer = asked(settings(node))
    assert not answer.report
    expect(next(iter(check_gpus(Settings(), Host(), answer))), "skip")
    return check_nvml(Host(), LIBRARY, answer)


def children() -> set[str]:
    """Return our processes, zombies as well."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


def _refuse(code: int) -> Callable[[Node], None]:
    return lambda node: node.driver.fail("nvmlInit", code)


def _make_executable(node: Node) -> None:
    """An ELF file of this machine that the loader takes for no library."""
    content = bytearray(node.driver.path.read_bytes())
    content[16] = 2  # ET_EXEC
    node.driver.path.write_bytes(content)


def _make_wsl(node: Node) -> None:
    for path in node.dev.iterdir():
        path.unlink()
    (node.dev / "dxg").touch()


def _make_wsl_without_library(node: Node) -> None:
    _make_wsl(node)
    node.driver.path.unlink()


REFUSALS: dict[str, tuple[Callable[[Node], object], str, str]] = {
    "not loaded": (_refuse(Code.DRIVER_NOT_LOADED), "nvmlInit", "modprobe nvidia"),
    "mismatch": (_refuse(Code.LIB_RM_VERSION_MISMATCH), "nvmlInit", "reboot"),
    "permissions": (_refuse(Code.NO_PERMISSION), "nvmlInit", "privileged"),
    "unknown error": (_refuse(999), "nvmlInit", "/dev"),
    "anything else": (_refuse(Code.TIMEOUT), "nvmlInit", "dmesg"),
    "WSL": (_make_wsl, "WSL", "Linux"),
    "WSL without a library": (_make_wsl_without_library, "WSL", "Linux"),
    "no nodes": (lambda node: (node.dev / "nvidiactl").unlink(), "nvidiactl", "device nodes"),
    "no node of the GPU": (lambda node: (node.dev / "nvidia0").unlink(), "nvidia-modprobe -c 0", "device node"),
    "no GPU": (lambda node: node.driver.gpus(0), "", "GPU"),
    "crash": (lambda node: node.driver.crash("nvmlInit"), "SIGABRT", "install"),
    "loader": (_make_executable, "libnvidia-ml.so.1", "install"),
}


@pytest.mark.parametrize(("have", "fact", "advice"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(node: Node, have: Callable[[Node], object], fact: str, advice: str) -> None:
    """Each answer with which the driver refuses has its own advice, for what its process really says."""
    have(node)
    finding = nvml(node)
    expect(finding, "FAIL", fact, advice=advice)
    assert "nvidia-persistenced" not in finding.advice  # which is for one that hangs


@pytest.mark.soak
@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA driver")
def test_nvidias_library_without_a_driver(node: Node) -> None:
    """NVIDIA's own library refuses with the words that have advice here."""
    answer = asked(attrs.evolve(settings(node), host_path=str(real_driver.real_driver())))
    expect(check_nvml(Host(), LIBRARY, answer), "FAIL", "nvmlInit_v2", "9", advice="modprobe nvidia")


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_hang(node: Node, function: str) -> None:
    """A call that does not return is given up after the deadline, and the GPU that it was about is named."""
    (gpu,) = node.driver.state.gpus
    about = gpu if function.startswith("nvmlDevice") else None
    node.driver.hang(function, about)
    clock, before = MockClock(), children()
    answers: list[Answer] = []

    async def pass_time() -> None:
        while not node.driver.calls(function, about):
            await trio.to_thread.run_sync(time.sleep, 0.01)
        for seconds in (DEADLINE - 0.1, 0.1):
            await trio.to_thread.run_sync(time.sleep, 0.05)
            assert not answers
            clock.jump(seconds)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_time)
            answers.append(await ask(settings(node)))

    trio.run(main, clock=clock)
    (answer,) = answers
    assert answer.in_call == (gpu.uuid if about else "")
    finding = check_nvml(Host(), LIBRARY, answer)
    expect(finding, "FAIL", f"{DEADLINE:g} s", answer.in_call, advice="nvidia-persistenced")
    assert ("GPU-" in finding.message) == bool(about)
    assert children() == before


@pytest.mark.skipif(Path("/dev/nvidia-uvm").exists(), reason="needs a machine without /dev/nvidia-uvm")
def test_makes_nothing(node: Node) -> None:
    """The daemon has `nvidia-uvm` made where it is missing; the doctor only says so."""
    program = node.host / "bin/nvidia-modprobe"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {node.host}/was-run\n")
    program.chmod(0o755)
    answer = asked(attrs.evolve(settings(node), dev_directory="/dev"))
    assert answer.not_ready
    assert "nvidia-uvm" in answer.not_ready.reason
    assert not (node.host / "was-run").exists()


@pytest.mark.parametrize(("module", "level"), [("550.54.15", "ok"), ("535.1", "FAIL"), ("", "ok")])
def test_report(host: Host, module: str, level: str) -> None:
    """NVML answers, for a driver of the kernel module's version; GPUs with a problem count."""
    if module:
        load_module(host, module)
    report = attrs.evolve(REPORT, problems=("GPU 1 is left out",))
    finding = check_nvml(host, LIBRARY, Answer(report, seconds=1.25))
    expect(finding, level, "550.54.15", "2 GPU", "1.2 s", module if level == "FAIL" else "")
    expect(check_nvml(host, None, Answer()), "skip")


# GPUs


GPUS = {
    "well": (GPU, "ok", ["Tesla T4", "00000000:3B:00.0", "nvidia0", "1.0 of 16.0 GiB"]),
    "free memory unknown": (attrs.evolve(GPU, figures=Figures(memory_total=GIB)), "warn", ["Tesla T4", "withheld"]),
    "memory unknown": (attrs.evolve(GPU, figures=Figures(memory_free=GIB)), "warn", ["Tesla T4", "withheld"]),
    "in MIG mode": (attrs.evolve(GPU, figures=Figures(), mig_mode=True), "ok", ["Tesla T4", "in MIG mode"]),
    "ill": (attrs.evolve(GPU, error="GPU is lost"), "FAIL", ["Tesla T4", "GPU is lost"]),
}


@pytest.mark.parametrize(("gpu", "level", "facts"), GPUS.values(), ids=GPUS)
def test_gpu(host: Host, gpu: GpuReport, level: str, facts: list[str]) -> None:
    """A GPU is well, or has the problems that make the daemon's shares unhealthy."""
    (finding,) = check_gpus(Settings(), host, Answer(attrs.evolve(REPORT, gpus=(gpu,))))
    assert finding.subject == "GPU GPU-1"
    expect(finding, level, *facts)


@pytest.mark.parametrize(
    ("watermark", "level"), [(0.49, "warn"), (0.5, "ok"), (0.0, "ok")], ids=["above", "at the watermark", "none"]
)
def test_watermark(host: Host, watermark: float, level: str) -> None:
    """A GPU that is fuller than the watermark has its free shares withheld."""
    half = attrs.evolve(GPU, figures=Figures(memory_total=16 * GIB, memory_free=8 * GIB))
    answer = Answer(attrs.evolve(REPORT, gpus=(half,)))
    (finding,) = check_gpus(Settings(memory_watermark=watermark), host, answer)
    expect(finding, level, "8.0 of 16.0 GiB", "-memory-watermark 0.49" if level == "warn" else "")
    if not watermark:  # then memory need not be known
        unknown = attrs.evolve(REPORT, gpus=(attrs.evolve(GPU, figures=Figures()),))
        expect(next(iter(check_gpus(Settings(memory_watermark=0.0), host, Answer(unknown)))), "ok", "unknown")


def test_missing_gpus(host: Host) -> None:
    """A GPU that can't even be offered as unhealthy is a failure; one that the driver does not know is on the bus."""
    answer = Answer(attrs.evolve(REPORT, problems=("GPU 1 is left out: GPU is lost",)))
    plug(host, "0000:3b:00.0", "0000:af:00.0")
    _, problem = check_gpus(Settings(), host, answer)
    expect(problem, "FAIL", "GPU 1", "GPU is lost", advice="dmesg")
    plug(host, "0000:d8:00.0")
    *_, fallen = check_gpus(Settings(), host, answer)
    expect(fallen, "warn", 3, 2)


def test_gpu_without_events(node: Node) -> None:
    """Warn that its XIDs are not seen, as the real worker reports it."""
    node.driver.fail("nvmlDeviceRegisterEvents", Code.NOT_SUPPORTED)
    findings = list(check_gpus(settings(node), Host(), asked(settings(node))))
    assert findings[-1].subject == f"GPU {StubGpu().uuid}"
    expect(findings[-1], "warn", "events", advice="polls")
