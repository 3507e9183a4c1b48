"""The driver: the kernel's part, NVML's answers, and each GPU. NVML is asked by a process of its own, in time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.libraries import Library
from sgpu.config.settings import Settings
from sgpu.driver.calls import Calls, Part
from sgpu.driver.health import polled_problems
from sgpu.driver.messages import GpuReport, Message, NotReady, Report, WorkerConfig
from sgpu.driver.nvml import Code
from sgpu.driver.process import Outcome, open_worker, run_worker
from sgpu.driver.wsl import UNSUPPORTED, is_wsl
from sgpu.lib.limits import explain
from sgpu.lib.sizes import part_of

#: Seconds that the driver gets to answer. A driver that nobody holds open takes some of them to wake its GPUs.
DEADLINE: Final = 7.0
#: Seconds that a process which was killed gets to be gone. One that is stuck in the kernel is left to it.
REAP_TIMEOUT: Final = 0.5
_MISMATCH: Final = (
    "the driver was upgraded and its kernel module was not reloaded, or -host-path has an old copy: reboot the "
    "node (drained), or unload and load the nvidia modules; then restart this pod"
)
#: What to do in WSL.
ON_WSL: Final = "use a node with Linux' own NVIDIA driver; to try sgpu without one, set -simulate"
_LOG: Final = "see `dmesg | grep -iE 'nvrm|xid'` on the host"
_LOAD: Final = f"load the kernel module: `modprobe nvidia` on the host; if that fails {_LOG}"
#: NVML's code → what to do about it.
_ADVICE: Final = {
    Code.DRIVER_NOT_LOADED: _LOAD,
    Code.LIB_RM_VERSION_MISMATCH: _MISMATCH,
    Code.NO_PERMISSION: "the container may not open the device nodes: it has to be privileged",
    Code.UNKNOWN: "the container may not open the device nodes: it has to be privileged, with the host's /dev",
}
#: In what sgpu itself says where NVML was not asked → what to do about it.
_OWN_ADVICE: Final = {
    " is not there; ": "each GPU is offered once its device node is there; in a pod, mount the host's /dev",
    "not there yet": "see the device nodes below",
    "no libnvidia-ml could be loaded": "it is there and the loader refuses it: install the driver again",
    "no GPU to offer": f"the driver finds no GPU, or none that answers: {_LOG}",
    UNSUPPORTED: ON_WSL,
}


@attrs.frozen
class Answer:
    """The driver's answer: a report, or why there is none. `in_call` is the GPU of the last call."""

    report: Report | None = None
    not_ready: NotReady | None = None
    problem: str = ""
    in_call: str = ""
    seconds: float = 0.0


async def ask(settings: Settings) -> Answer:
    """Ask NVML once, and wait no longer than the deadline.

    NVML itself may make device nodes that are missing, as it does for `nvidia-smi`, where `nvidia-modprobe` is at hand.
    """
    places = (settings.host_path, settings.dev_directory, settings.sysfs_directory)
    config = WorkerConfig(*places, interval=1.0, proc_directory=settings.proc_directory, once=True, look_only=True)
    said: list[Message] = []
    ended: list[trio.Process] = []
    began = trio.current_time()
    outcome = Outcome(f"NVML has not answered for {DEADLINE:g} s")
    in_call = None
    with trio.move_on_after(DEADLINE):
        try:
            worker = await open_worker(config)
        except OSError as error:
            return Answer(problem=f"the driver's process can't be started: {explain(error)}")
        with closing(Calls(os.dup(worker.calls.descriptor))) as calls:  # run_worker closes its own
            try:
                outcome = await run_worker(config, DEADLINE, ended, said.append, started=worker)
            finally:
                in_call = calls.current(Part.POLL)
    with trio.move_on_after(REAP_TIMEOUT):
        for process in ended:
            await process.wait()  # or the daemon, where it is process 1, has a zombie of ours
    answer = Answer(
        problem=outcome.problem,
        in_call=in_call.uuid if in_call else "",
        seconds=trio.current_time() - began,
    )
    for message in said:
        if isinstance(message, Report):
            return attrs.evolve(answer, report=message, problem="")
        if isinstance(message, NotReady):
            return attrs.evolve(answer, not_ready=message, problem="")
    return answer


def check_wsl(dev: Path) -> Iterator[Finding]:
    """Check that the node is not WSL: there, all that follows is wrong, and nothing of it is the cause."""
    if is_wsl(dev):
        yield fail("WSL", UNSUPPORTED, ON_WSL)


def check_kernel(host: Host, library: Library | None, answer: Answer) -> Iterator[Finding]:
    """Check the PCI bus, the kernel module, and that the library has its version."""
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
            message = f"nvidia is not loaded (no {host.proc}/driver/nvidia/version)"
            yield fail("kernel module", message, f"{_LOAD}; on GKE wait for the installer")
    elif library and library.version and library.version != version:
        message = f"nvidia {version} is loaded, and the library is of {library.version} ({library.path})"
        yield fail("kernel module", message, _MISMATCH)
    else:
        same = ", as the library" if library and library.version else ""
        yield ok("kernel module", f"nvidia {version} is loaded{same}")


def check_nvml(host: Host, library: Library | None, answer: Answer) -> Finding:
    """Check that NVML can be initialized, and answers in time."""
    if library is None:
        return skip("NVML", "because there is no library to load")
    if answer.report:
        message = (
            f"driver {answer.report.driver_version} lists {_listed(answer.report)} GPU(s), after {answer.seconds:.1f} s"
        )
        version = host.module_version()
        if version and version != answer.report.driver_version:
            return fail("NVML", f"{message}, but the kernel module is {version}", _MISMATCH)
        return ok("NVML", message)
    if answer.not_ready:
        return fail("NVML", answer.not_ready.reason, _advice(answer.not_ready))
    about = f"; it was asked about GPU {answer.in_call}" if answer.in_call else ""
    if "not answered" in answer.problem:
        advice = "it hangs: reset the GPU or reboot the node (drained); if it is just slow, start nvidia-persistenced"
        return fail("NVML", f"{answer.problem}{about}", f"{advice}; {_LOG}")
    return fail("NVML", f"{answer.problem}{about}", f"install the driver again; {_LOG}")


def _advice(message: NotReady) -> str:
    if message.code is not None:
        return _ADVICE.get(message.code, _LOG)
    return next((advice for words, advice in _OWN_ADVICE.items() if words in message.reason), _LOG)


def check_gpus(settings: Settings, host: Host, answer: Answer) -> Iterator[Finding]:
    """Check each GPU that the driver lists, and look for those that it does not."""
    report = answer.report
    if report is None:
        yield skip("GPUs", "because NVML does not answer")
        return
    for gpu in report.gpus:
        yield _gpu(settings, gpu)
    for uuid in report.eventless:
        message = "its events are not received, as the GPU or its driver supports none"
        yield warn(
            f"GPU {uuid}", message, "polls still find faults that last, but no XID; a newer driver may have events"
        )
    for problem in report.problems:
        yield fail("GPUs", problem, f"the others are offered without it; {_LOG}")
    seen = _listed(report)
    if (on_bus := host.pci_gpus()) and len(on_bus) > seen:
        message = f"there are {len(on_bus)} on the PCI bus, and the driver lists {seen}"
        yield warn("GPUs", message, f"one has fallen off the bus, or is not the driver's (vfio-pci, excluded): {_LOG}")


def _listed(report: Report) -> int:
    """Return how many GPUs the driver lists, whether or not they can be offered."""
    return len(report.gpus) + sum(problem.startswith("GPU ") for problem in report.problems)


def _gpu(settings: Settings, gpu: GpuReport) -> Finding:
    subject = f"GPU {gpu.uuid}"
    message = f"{gpu.name} at {gpu.pci_bus_id}, {gpu.device_nodes[0]}"
    if problems := polled_problems(gpu):
        return fail(subject, f"{message}: {'; '.join(problems)}", f"all its shares are unhealthy until then; {_LOG}")
    if gpu.mig_mode:  # its memory is that of its instances
        return ok(subject, f"{message}, in MIG mode")
    if gpu.figures.memory_total is None or gpu.figures.memory_free is None:
        return _unknown_memory(settings, subject, message)
    used = gpu.figures.memory_total - gpu.figures.memory_free
    part = used / gpu.figures.memory_total
    message += f", {part_of(used, gpu.figures.memory_total)} used"
    if 0 < settings.memory_watermark < part:
        message += f", which is above -memory-watermark {settings.memory_watermark:g}"
        return warn(
            subject, message, "its free shares are withheld; end pods that use it, which the daemon's log names"
        )
    return ok(subject, message)


def _unknown_memory(settings: Settings, subject: str, message: str) -> Finding:
    if not settings.memory_watermark:
        return ok(subject, f"{message}, memory unknown")
    message += ", memory unknown: its free shares are not withheld when it is full, and pods get no hint"
    advice = (
        "a GPU that uses the machine's memory has none of its own (-memory-watermark 0 ends this line); for others: "
    )
    return warn(subject, message, advice + _LOG)
