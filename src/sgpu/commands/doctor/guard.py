"""Does the memory guard see who uses how much of each GPU, and may it end processes? Ends nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sgpu.commands.doctor.finding import Finding, ok, skip, warn
from sgpu.commands.doctor.host import Host
from sgpu.config.settings import Settings
from sgpu.driver.instances import unit_figures
from sgpu.driver.kernelmodule import read_text
from sgpu.driver.messages import GpuReport
from sgpu.node.gpu import label
from sgpu.pods.processes import UnattributableError, check_namespace

SUBJECT: Final = "memory guard"
#: The number of the capability to signal the processes of others (capabilities(7)).
_KILL: Final = 5


def check_guard(settings: Settings, host: Host, gpus: Sequence[GpuReport] | None, *, listed: bool) -> list[Finding]:
    """Check what the guard needs. `gpus`: None where the driver does not answer; `listed`: who has shares is known."""
    mode = f"-memory-guard {settings.memory_guard}"
    if gpus is None:
        return [skip(SUBJECT, "because the driver lists no GPUs")]
    blind = list(_blind(settings, gpus, listed=listed))
    if settings.memory_guard == "terminate" and (refusal := _refusal(host)):
        advice = "run sgpu as root, privileged, on Linux 5.3 or later"
        blind.append(warn(SUBJECT, f"{mode} cannot end processes: {refusal}", advice))
    return blind or [ok(SUBJECT, f"{mode}: it sees which container may use how much of each GPU, and uses how much")]


def _blind(settings: Settings, gpus: Sequence[GpuReport], *, listed: bool) -> Iterator[Finding]:
    """Yield why it can't know that a container uses too much."""
    if not listed:
        yield warn(SUBJECT, "it acts on nobody, as it is unknown who has shares", "see the line PodResources")
    try:
        check_namespace(Path(settings.proc_directory))
    except UnattributableError as error:
        problem, _, advice = str(error).partition("; ")
        yield warn(SUBJECT, f"it acts on nobody: {problem}", advice or "use -memory-guard off on this node")
    for uuid, figures in (known for gpu in gpus for known in unit_figures(gpu).items()):
        if figures.memory_total is None or figures.memory_free is None or figures.processes is None:
            message = f"{label(uuid)}: the driver reports no memory or no processes, so that nobody is named there"
            yield warn(SUBJECT, message, "no harm to others; where all GPUs are like that, use -memory-guard off")


def _refusal(host: Host) -> str:
    """Say why no process can be ended from here; empty if any can."""
    for line in read_text(host.proc / "self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff" and not int(value, 16) >> _KILL & 1:
            return f"user {os.getuid()} lacks the capability KILL"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"no process can be opened ({error.strerror})"
    return ""
