"""The driver: the kernel's part, NVML's answers, and each GPU. NVML is asked by a process of its own, in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs
import trio

from sgpu.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.doctor.host import Host
from sgpu.doctor.libraries import Library
from sgpu.health import polled_troubles
from sgpu.probing import run_probe
from sgpu.report import Asking, GpuReport, Message, NotReady, Orders, Report
from sgpu.settings import Settings
from sgpu.units import part_of

#: Seconds that the driver gets to answer. A driver that nobody holds open takes some of them to wake its GPUs.
DEADLINE: Final = 7.0
#: Seconds that a process which was killed gets to be gone. One that is stuck in the kernel is left to it.
REAP_TIMEOUT: Final = 0.5
_MISMATCH: Final = (
    "the driver was upgraded and its kernel module was not loaded anew, or -host-path has an old copy: reboot the "
    "node (drained), or unload and load the nvidia modules; then restart this pod"
)
_LOG: Final = "see `dmesg | grep -iE 'nvrm|xid'` on the host"
#: In an answer of NVML → what to do about it.
_ADVICE: Final = {
    "Driver Not Loaded": f"load the kernel module: `modprobe nvidia` on the host; if that fails {_LOG}",
    "version mismatch": _MISMATCH,
    "Insufficient Permissions": "the container may not open the device nodes: it has to be privileged",
    "Unknown Error": "the container may not open the device nodes: it has to be privileged, with the host's /dev",
    "not there yet": "see the device nodes below",
    "no libnvidia-ml could be loaded": "it is there and the loader refuses it: install the driver again",
    "no GPU to offer": f"the driver finds no GPU, or none that answers: {_LOG}",
}


@attrs.frozen
class Answer:
    """What NVML said: a report, or why there is none. `asking` is the GPU that the last call was about."""

    report: Report | None = None
    not_ready: str = ""
    trouble: str = ""
    asking: str = ""
    seconds: float = 0.0


async def ask(settings: Settings) -> Answer:
    """Ask NVML once, and wait no longer than the deadline.

    NVML itself may make device nodes that are missing, as it does for `nvidia-smi`, where `nvidia-modprobe` is at hand.
    """
    places = (settings.host_path, settings.dev_directory, settings.sysfs_directory)
    orders = Orders(*places, interval=1.0, once=True, look_only=True)
    said: list[Message] = []
    ended: list[trio.Process] = []
    began = trio.current_time()
    trouble = f"NVML has not answered for {DEADLINE:g} s"
    with trio.move_on_after(DEADLINE):
        trouble = (await run_probe(orders, DEADLINE, ended, said.append)).trouble
    with trio.move_on_after(REAP_TIMEOUT):
        for process in ended:
            await process.wait()  # or the daemon, where it is process 1, has a zombie of ours
    answer = Answer(
        trouble=trouble,
        asking=next((message.uuid for message in reversed(said) if isinstance(message, Asking)), ""),
        seconds=trio.current_time() - began,
    )
    for message in said:
        if isinstance(message, Report):
            return attrs.evolve(answer, report=message, trouble="")
        if isinstance(message, NotReady):
            return attrs.evolve(answer, not_ready=message.reason, trouble="")
    return answer


def check_kernel(host: Host, library: Library | None, answer: Answer) -> Iterator[Finding]:
    """The PCI bus, the kernel module, and whether the library is of its version."""
    gpus = host.pci_gpus()
    if gpus:
        yield ok("PCI bus", f"{len(gpus)} NVIDIA GPU(s): {', '.join(gpus)}")
    elif gpus is not None:
        advice = "this node has no GPU: keep the DaemonSet away from it; in a virtual machine, pass the GPU through"
        yield (warn if answer.report else fail)("PCI bus", "there is no NVIDIA GPU on it", advice)
    version = host.module_version()
    if not version:
        if answer.report:
            yield ok("kernel module", "its version is not visible from here, but NVML answers")
        else:
            words = f"nvidia is not loaded (no {host.proc}/driver/nvidia/version)"
            yield fail("kernel module", words, f"{_ADVICE['Driver Not Loaded']}; on GKE wait for the installer")
    elif library and library.version and library.version != version:
        words = f"nvidia {version} is loaded, and the library is of {library.version} ({library.path})"
        yield fail("kernel module", words, _MISMATCH)
    else:
        same = ", as the library" if library and library.version else ""
        yield ok("kernel module", f"nvidia {version} is loaded{same}")


def check_nvml(host: Host, library: Library | None, answer: Answer) -> Finding:
    """Whether NVML can be initialised, and answers in time."""
    if library is None:
        return skip("NVML", "because there is no library to load")
    if answer.report:
        gpus = len(answer.report.gpus) + len(answer.report.problems)
        words = f"driver {answer.report.driver_version} tells of {gpus} GPU(s), after {answer.seconds:.1f} s"
        version = host.module_version()
        if version and version != answer.report.driver_version:
            return fail("NVML", f"{words}, but the kernel module is {version}", _MISMATCH)
        return ok("NVML", words)
    if answer.not_ready:
        advice = next((advice for words, advice in _ADVICE.items() if words.lower() in answer.not_ready.lower()), _LOG)
        return fail("NVML", answer.not_ready, advice)
    about = f"; it was asked about GPU {answer.asking}" if answer.asking else ""
    if "not answered" in answer.trouble:
        advice = "it hangs: reset the GPU or reboot the node (drained); if it is just slow, start nvidia-persistenced"
        return fail("NVML", f"{answer.trouble}{about}", f"{advice}; {_LOG}")
    return fail("NVML", f"{answer.trouble}{about}", f"install the driver again; {_LOG}")


def check_gpus(settings: Settings, host: Host, answer: Answer) -> Iterator[Finding]:
    """Each GPU that the driver tells of, and those it should tell of."""
    report = answer.report
    if report is None:
        yield skip("GPUs", "because NVML does not answer")
        return
    for gpu in report.gpus:
        yield _gpu(settings, gpu)
    for problem in report.problems:
        yield fail("GPUs", problem, f"the others are offered without it; {_LOG}")
    seen = len(report.gpus) + len(report.problems)
    if (on_bus := host.pci_gpus()) and len(on_bus) > seen:
        words = f"there are {len(on_bus)} on the PCI bus, and the driver tells of {seen}"
        yield warn("GPUs", words, f"one has fallen off the bus, or is not the driver's (vfio-pci, excluded): {_LOG}")


def _gpu(settings: Settings, gpu: GpuReport) -> Finding:
    subject = f"GPU {gpu.uuid}"
    words = f"{gpu.name} at {gpu.pci_bus_id}, {gpu.device_nodes[0]}"
    if troubles := polled_troubles(gpu):
        return fail(subject, f"{words}: {'; '.join(troubles)}", f"all its shares are unhealthy until then; {_LOG}")
    if gpu.memory_total is None or gpu.memory_free is None:
        return ok(subject, f"{words}, the driver does not tell its memory")
    used = gpu.memory_total - gpu.memory_free
    part = used / gpu.memory_total
    words += f", {part_of(used, gpu.memory_total)} used"
    if 0 < settings.memory_watermark < part:
        words += f", which is above -memory-watermark {settings.memory_watermark:g}"
        return warn(subject, words, "its free shares are withheld; end pods that use it, which the daemon's log names")
    return ok(subject, words)
