"""MIG: which GPUs are in that mode, what instances they have, and whether containers can open them.

Knows no driver: GPUs come as values.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from sgpu.commands.doctor import configured
from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import Host
from sgpu.driver.messages import GpuReport, InstanceReport
from sgpu.node.gpu import units
from sgpu.node.policy import Mig, OffersRefusedError, Policy, assign

#: The kernel's name of the driver of capabilities.
CAPABILITIES: Final = "nvidia-caps"


def check_mig(policy: Policy, dev: Path, host: Host, gpus: Sequence[GpuReport] | None) -> Iterator[Finding]:
    """Check the GPUs in MIG mode; None where the GPUs are unknown."""
    if gpus is None:
        yield skip("MIG", "because the GPUs are not known")
        return
    for gpu in gpus:
        if gpu.mig_mode is not gpu.mig_pending:
            mode = "on" if gpu.mig_pending else "off"
            advice = f"reset the GPU (`nvidia-smi -i {gpu.pci_bus_id} --gpu-reset`, drained), or reboot the node"
            yield warn(f"MIG on GPU {gpu.uuid}", f"MIG mode will be {mode} after its next reset", advice)
    in_mode = [gpu for gpu in gpus if gpu.mig_mode]
    if not in_mode:
        yield ok("MIG", "no GPU is in MIG mode")
    for gpu in in_mode:
        yield from _gpu(policy, gpu)
        for instance in gpu.instances:
            yield from _instance(dev, host, instance)
    yield from _mixed(policy, in_mode)


def _gpu(policy: Policy, gpu: GpuReport) -> Iterator[Finding]:
    subject = f"MIG on GPU {gpu.uuid}"
    if policy.mig is Mig.OFF:
        yield warn(subject, "it is in MIG mode and left out, because of -mig off", "set -mig shared or -mig profile")
    elif not gpu.instances and not gpu.error:
        advice = "create some, as in `nvidia-smi mig -cgi 1g.5gb -C` (see -lgip for its profiles), or turn MIG mode off"
        yield fail(subject, "it is in MIG mode and has no instances, so nothing of it is offered", advice)
    elif gpu.instances:
        yield ok(subject, _layout(gpu.instances))
    if gpu.memory_refused:
        message = "the driver does not tell this process the memory of the card (insufficient permissions)"
        advice = "the container has to be privileged; until then shares are counted by slices instead of memory"
        yield warn(subject, message, advice)


def _layout(instances: Iterable[InstanceReport]) -> str:
    counts = Counter(instance.profile for instance in instances)
    return ", ".join(f"{count} x {profile}" for profile, count in counts.items())


def _instance(dev: Path, host: Host, instance: InstanceReport) -> Iterator[Finding]:
    """Check that a container can open it."""
    subject = f"MIG instance {instance.uuid}"
    if instance.problem:
        problem, _, advice = instance.problem.partition("; ")
        advice = advice or "the daemon's pod needs the host's /proc/driver/nvidia-caps"
        yield fail(subject, f"{problem}, so its shares are unhealthy", advice)
        return
    major = host.major(CAPABILITIES)
    for node in instance.capability_nodes:
        status = (dev / node).stat()
        again = f"remove {dev / CAPABILITIES}; `nvidia-modprobe -f` or `nvidia-smi` on the host makes it anew"
        if not stat.S_ISCHR(status.st_mode):
            yield fail(subject, f"{dev / node} is not a character device", again)
        elif major is not None and os.major(status.st_rdev) != major:
            message = (
                f"{dev / node} has major number {os.major(status.st_rdev)}, the driver has {major} since its reload"
            )
            yield fail(subject, message, again)


def _mixed(policy: Policy, gpus: Sequence[GpuReport]) -> Iterator[Finding]:
    """Say where one resource has instances of several profiles: pods can't choose among them."""
    profiles = defaultdict[str, set[str]](set)
    try:
        for resource, unit, _ in assign(policy, [unit for gpu in configured.gpus(gpus) for unit in units(gpu)]):
            profiles[resource].add(unit.instance.profile if unit.instance else unit.name)
    except OffersRefusedError:
        return  # another check says so
    for resource, names in profiles.items():
        if len(names) > 1:
            message = f"{resource} has shares of {', '.join(sorted(names))}: a pod gets any of them"
            yield warn("MIG layouts", message, "where pods need a size, set -mig profile, or `mig-profile` rules")
