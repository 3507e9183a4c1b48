"""The doctor on the driver: what each answer of NVML, or none, means and asks for."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
from findings import about, told
from node import Node
from stub_driver import GIB, StubDriver

from sgpu.doctor import driver
from sgpu.doctor.driver import Answer, ask, check_gpus, check_kernel, check_nvml
from sgpu.doctor.host import Host
from sgpu.doctor.libraries import Library
from sgpu.nvml import Code
from sgpu.report import GpuReport, Report
from sgpu.settings import Settings

GPU = GpuReport(
    "GPU-1", "Tesla T4", "00000000:3B:00.0", ("nvidia0", "nvidiactl"), memory_total=16 * GIB, memory_free=15 * GIB
)
REPORT = Report((GPU,), (), (), "550.54.15", "/x/libnvidia-ml.so.1")
LIBRARY = Library(Path("/x/libnvidia-ml.so.1"), "550.54.15")
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (root@host)  Thu\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine of which the kernel tells nothing yet."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys").mkdir()
    return Host(proc=tmp_path / "proc", sysfs=tmp_path / "sys")


def load_module(host: Host, version: str = NVRM) -> None:
    """The kernel's part of the driver."""
    (host.proc / "driver/nvidia").mkdir(parents=True)
    (host.proc / "driver/nvidia/version").write_text(version)


def plug(host: Host, *addresses: str, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    """Cards on the PCI bus."""
    for address in addresses:
        device = host.sysfs / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")


# The kernel


@pytest.mark.parametrize("version", [pytest.param(NVRM, id="proprietary"), pytest.param(OPEN, id="open")])
def test_module(host: Host, version: str) -> None:
    """The kernel module's version, from what it says itself."""
    load_module(host, version)
    assert told(about(check_kernel(host, LIBRARY, Answer()), "kernel module"), "ok", "nvidia 550.54.15 is loaded, as")


def test_module_in_sysfs(host: Host) -> None:
    """Or from where a container without its file sees it."""
    (host.sysfs / "module/nvidia").mkdir(parents=True)
    (host.sysfs / "module/nvidia/version").write_text("535.261.03\n")
    unnamed = attrs.evolve(LIBRARY, version="")
    assert told(about(check_kernel(host, unnamed, Answer()), "kernel module"), "ok", "nvidia 535.261.03 is loaded")


def test_module_absent(host: Host) -> None:
    """Not loaded: which is only sure when NVML doesn't answer either."""
    finding = about(check_kernel(host, LIBRARY, Answer()), "kernel module")
    assert told(finding, "FAIL", "nvidia is not loaded", "modprobe nvidia")
    assert told(about(check_kernel(host, LIBRARY, Answer(REPORT)), "kernel module"), "ok", "not visible from here")


def test_module_of_other_version(host: Host) -> None:
    """The library was replaced under a module that stayed."""
    load_module(host)
    finding = about(check_kernel(host, Library(Path("/x"), "570.1"), Answer()), "kernel module")
    assert told(finding, "FAIL", "nvidia 550.54.15 is loaded, and the library is of 570.1 (/x)", "reboot the node")


def test_bus(host: Host) -> None:
    """NVIDIA's display and 3D controllers, and nothing else, count."""
    plug(host, "0000:3b:00.0", "0000:af:00.0")
    plug(host, "0000:3b:00.1", kind="0x040300")
    plug(host, "0000:00:02.0", vendor="0x8086")
    finding = about(check_kernel(host, LIBRARY, Answer()), "PCI bus")
    assert told(finding, "ok", "2 NVIDIA GPU(s): 0000:3b:00.0, 0000:af:00.0")


def test_empty_bus(host: Host) -> None:
    """No GPU at all is the reason for all the rest."""
    plug(host, "0000:00:02.0", vendor="0x8086")
    assert told(about(check_kernel(host, LIBRARY, Answer()), "PCI bus"), "FAIL", "no NVIDIA GPU", "has no GPU")
    assert told(about(check_kernel(host, LIBRARY, Answer(REPORT)), "PCI bus"), "warn", "no NVIDIA GPU")


# NVML


@pytest.mark.parametrize(
    ("answer", "words", "advice"),
    [
        pytest.param(
            Answer(not_ready="not ready: nvmlInit_v2: Driver Not Loaded (NVML error 9)"),
            "Driver Not Loaded",
            "modprobe nvidia",
            id="not loaded",
        ),
        pytest.param(
            Answer(not_ready="not ready: nvmlInit_v2: Driver/library version mismatch (NVML error 18)"),
            "version mismatch",
            "reboot the node",
            id="mismatch",
        ),
        pytest.param(
            Answer(not_ready="not ready: nvmlInit_v2: Insufficient Permissions (NVML error 4)"),
            "Insufficient",
            "privileged",
            id="permissions",
        ),
        pytest.param(Answer(not_ready="nvmlInit_v2: Unknown Error"), "Unknown Error", "the host's /dev", id="unknown"),
        pytest.param(Answer(not_ready="/dev/nvidiactl not there yet"), "nvidiactl", "device nodes below", id="nodes"),
        pytest.param(Answer(not_ready="the NVIDIA driver has no GPU to offer"), "no GPU", "dmesg", id="no GPU"),
        pytest.param(Answer(not_ready="nvmlInit_v2: Timeout"), "Timeout", "dmesg", id="else"),
        pytest.param(
            Answer(trouble="NVML has not answered for 7 s", asking="GPU-1"),
            "not answered for 7 s; it was asked about GPU GPU-1",
            "reset the GPU or reboot",
            id="hang of a GPU",
        ),
        pytest.param(Answer(trouble="took its process down (SIGSEGV)"), "SIGSEGV", "again", id="crash"),
    ],
)
def test_no_answer(host: Host, answer: Answer, words: str, advice: str) -> None:
    """Each has its advice."""
    assert told(check_nvml(host, LIBRARY, answer), "FAIL", words, advice)
    (finding,) = check_gpus(Settings(), host, answer)
    assert told(finding, "skip", "NVML does not answer")


def test_answers(host: Host) -> None:
    """It answers, and is of the kernel module's version."""
    load_module(host)
    assert told(check_nvml(host, LIBRARY, Answer(REPORT, seconds=1.25)), "ok", "driver 550.54.15 tells of 1 GPU(s)")


def test_answers_otherwise(host: Host) -> None:
    """It answers, and is not."""
    load_module(host, NVRM.replace("550.54.15", "535.1"))
    assert told(check_nvml(host, LIBRARY, Answer(REPORT)), "FAIL", "but the kernel module is 535.1", "reboot")


def test_no_library(host: Host) -> None:
    """Nothing to load, nothing to ask."""
    assert told(check_nvml(host, None, Answer()), "skip", "no library to load")


# GPUs


@pytest.mark.parametrize(
    ("gpu", "level", "words"),
    [
        pytest.param(GPU, "ok", "Tesla T4 at 00000000:3B:00.0, nvidia0, 1.0 of 16.0 GiB used", id="well"),
        pytest.param(attrs.evolve(GPU, memory_free=None), "ok", "does not tell its memory", id="unified memory"),
        pytest.param(attrs.evolve(GPU, memory_free=0), "warn", "above -memory-watermark 0.95", id="full"),
        pytest.param(attrs.evolve(GPU, error="GPU is lost"), "FAIL", "fails to answer for it: GPU is lost", id="lost"),
        pytest.param(attrs.evolve(GPU, recovery_action=1), "FAIL", "reset the GPU", id="asks for a reset"),
        pytest.param(attrs.evolve(GPU, fabric_state=1), "FAIL", "NVSwitch fabric has not started", id="fabric"),
    ],
)
def test_gpu(host: Host, gpu: GpuReport, level: str, words: str) -> None:
    """A line for each GPU."""
    (finding,) = check_gpus(Settings(), host, Answer(attrs.evolve(REPORT, gpus=(gpu,))))
    assert finding.subject == "GPU GPU-1"
    assert told(finding, level, words)


def test_full_and_wanted(host: Host) -> None:
    """Without a watermark, a full GPU is none of ours."""
    report = attrs.evolve(REPORT, gpus=(attrs.evolve(GPU, memory_free=0),))
    (finding,) = check_gpus(Settings(memory_watermark=0.0), host, Answer(report))
    assert told(finding, "ok", "16.0 of 16.0 GiB used")


def test_left_out(host: Host) -> None:
    """A GPU that can't even be offered as unhealthy, and one that the driver does not tell of."""
    plug(host, "0000:3b:00.0", "0000:af:00.0", "0000:d8:00.0")
    report = attrs.evolve(REPORT, problems=("GPU 1 is left out: GPU is lost",))
    _, problem, fallen = check_gpus(Settings(), host, Answer(report))
    assert told(problem, "FAIL", "GPU 1 is left out", "dmesg")
    assert told(fallen, "warn", "3 on the PCI bus, and the driver tells of 2", "fallen off the bus")


# Asking


def settings(node: Node) -> Settings:
    """For the doctor on that node."""
    return Settings(host_path=str(node.host), dev_directory=str(node.dev), sysfs_directory=str(node.sys))


def test_ask(node: Node) -> None:
    """The driver is asked once, by a process that is gone afterwards."""
    answer = trio.run(ask, settings(node))
    assert answer.report
    assert [gpu.name for gpu in answer.report.gpus] == ["Tesla T4"]
    assert node.driver.calls("nvmlDeviceGetCount") == 1


@pytest.mark.skipif(Path("/dev/nvidia-uvm").exists(), reason="needs a machine without /dev/nvidia-uvm")
def test_makes_nothing(node: Node) -> None:
    """The daemon has `nvidia-uvm` made where it is not there; the doctor only says so."""
    program = node.host / "bin/nvidia-modprobe"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {node.host}/was-run\n")
    program.chmod(0o755)
    answer = trio.run(ask, attrs.evolve(settings(node), dev_directory="/dev"))
    assert "not there yet; `nvidia-modprobe -u -c 0` on the host makes it" in answer.not_ready
    assert not (node.host / "was-run").exists()


def test_ask_not_ready(node: Node) -> None:
    """Why there is nothing to be had, in NVML's words."""
    node.driver.fail("nvmlInit", Code.LIB_RM_VERSION_MISMATCH)
    assert "mismatch" in trio.run(ask, settings(node)).not_ready


def test_ask_crashing(node: Node) -> None:
    """A library that takes its process down."""
    node.driver.crash("nvmlInit")
    assert "took its process down (SIG" in trio.run(ask, settings(node)).trouble


@pytest.mark.soak
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_ask_hanging(node: Node, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A call that does not return is left behind, and it is known whom it was about."""
    monkeypatch.setattr(driver, "DEADLINE", 3.0)
    (gpu,) = node.driver.state.gpus
    of_gpu = function.startswith("nvmlDeviceGetMem")
    node.driver.hang(function, gpu if of_gpu else None)
    answer = trio.run(ask, settings(node))
    assert "has not answered for 3 s" in answer.trouble
    assert answer.asking == (gpu.uuid if of_gpu else "")


def test_upgraded(node: Node, host: Host) -> None:
    """A library beside a module of another version, as NVML and both files tell it."""
    load_module(host)
    StubDriver(node.host)
    node.driver.set(driver_version="570.1")
    answer = trio.run(ask, settings(node))
    assert told(check_nvml(host, LIBRARY, answer), "FAIL", "driver 570.1")
