"""Device nodes: are they there, are they the right ones, and do containers keep them. Knows nothing of NVML."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.host import Host
from sgpu.driver.messages import GpuReport
from sgpu.driver.poll import OPTIONAL_NODES, REQUIRED_NODES, UVM_NODE, how_to_make


def check_nodes(dev: Path, gpus: Sequence[GpuReport]) -> Iterator[Finding]:
    """Check the device nodes that containers get, and that each GPU's node has its minor number."""
    names = (*REQUIRED_NODES, *(gpu.device_nodes[0] for gpu in gpus))
    problems = [finding for name in names if (finding := _problem(dev, name))]
    yield from problems
    if not problems:
        optional = [name for name in OPTIONAL_NODES if (dev / name).exists()]
        yield ok("device nodes", f"{', '.join((*names, *optional))} in {dev}")


def _problem(dev: Path, name: str) -> Finding | None:
    path = dev / name
    subject = f"device node {path}"
    make = how_to_make(dev, name)
    try:
        status = path.stat()
    except OSError:
        message = "it is not there, so that no GPU can be offered"
        return fail(subject, message, f"{make}; in a pod, mount the host's /dev")
    if not stat.S_ISCHR(status.st_mode):
        return fail(subject, "it is not a character device", f"remove it, then {make}")
    number = name.removeprefix("nvidia")
    if number.isdecimal() and os.minor(status.st_rdev) != int(number):
        message = f"it has minor number {os.minor(status.st_rdev)}, which is another GPU's"
        return fail(subject, message, f"remove it, then {make}")
    return None


def check_uvm(dev: Path, host: Host) -> Finding:
    """Check that the node nvidia-uvm has the major number of its module, which changes at each load."""
    subject, path = "nvidia-uvm", dev / "nvidia-uvm"
    try:
        major = os.major(path.stat().st_rdev)
    except OSError:
        return skip(subject, "because its device node is not there")
    actual = host.major("nvidia-uvm")
    if actual is None:
        message = f"{path} is there, but the module is not loaded (not in {host.proc}/devices): CUDA fails in every pod"
        return fail(subject, message, "`modprobe nvidia-uvm` on the host, or `nvidia-modprobe -u -c 0`")
    if actual != major:
        message = f"{path} has major number {major}, the module has {actual} since it was reloaded: CUDA fails"
        return fail(subject, message, f"remove it, then {how_to_make(dev, UVM_NODE)}; start pods that use a GPU again")
    return ok(subject, f"loaded, major number {major}")


def check_links(dev: Path) -> Finding:
    """Check the links in /dev/char, by which runc 1.1.3 to 1.1.6 (any with systemd < 240) names devices to systemd.

    Where a link is missing, they leave the device out, and systemd takes it from the container at its next reload.
    """
    subject = f"{dev}/char"
    nodes = [path for path in sorted(dev.glob("nvidia*")) if path.is_char_device()]
    if not nodes:
        return skip(subject, "because there are no device nodes")
    missing = []
    for node in nodes:
        number = node.stat().st_rdev
        link = dev / "char" / f"{os.major(number)}:{os.minor(number)}"
        if not link.exists():
            missing.append(f"{link.name} ({node.name})")
    if not missing:
        return ok(subject, f"a link for each of {len(nodes)} device nodes")
    return warn(
        subject,
        f"no link for {', '.join(missing)}: where systemd manages cgroups, and runc is 1.1.3 to 1.1.6 or systemd older "
        "than 240, containers lose their GPU at `systemctl daemon-reload` (Failed to initialize NVML: Unknown Error)",
        "`nvidia-ctk system create-dev-char-symlinks --create-all` on the host at each boot, or a newer runc; "
        "pods that lost it have to be started again",
    )
