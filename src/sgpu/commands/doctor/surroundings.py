"""Checks of the daemon's container: its memory limit and view of processes. Knows no GPU and no kubelet."""

from __future__ import annotations

import resource
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import inotify_simple

from sgpu.commands.doctor.finding import Finding, ok, warn
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.peer import failure
from sgpu.driver.kernelmodule import read_text
from sgpu.lib.inotify import LIMITS
from sgpu.lib.sizes import MIB
from sgpu.pods.processes import Places, UnattributableError, check_namespace, find_owners

#: Bytes. The daemon and the driver's process are 50 to 55 MiB, whether with 2 GPUs or with 16 of 1000 shares; further
#: processes of 11 MiB try out GPUs that hang, and this command takes 45 MiB while it runs.
ENOUGH: Final = 100 * MIB
#: Bytes that the doctor and the driver's process that it starts take.
NEEDED: Final = 45 * MIB
#: Above this, a limit of cgroup v1 is none: it has no other word for that.
_NO_LIMIT: Final = 1 << 60
#: Open files of the daemon: some 30, and one for each connection of the kubelet, of probes and of scrapes.
ENOUGH_FILES: Final = 128
_NOTHING: Final = "nothing to do here; the figures of whole GPUs are right"


def check_memory(host: Host) -> Finding:
    """Check the memory limit of this process's cgroup, which in the daemon's pod is the daemon's."""
    subject = "memory limit"
    limits = [limit for group in _groups(host) if (limit := _limit(group)) is not None]
    killed = sum(_killed(group) for group in _groups(host)[:1])
    limit = min(limits, default=None)
    message = "no limit" if limit is None else f"{limit / MIB:.0f} MiB"
    if killed:
        message += f", and {killed} process(es) were killed for want of it"
        return warn(subject, message, f"raise resources.limits.memory of the container, to {ENOUGH // MIB}Mi or more")
    if limit is not None and limit < ENOUGH:
        message += ", which is too little for many GPUs or a driver that hangs"
        return warn(subject, message, f"set resources.limits.memory of the container to {ENOUGH // MIB}Mi or more")
    return ok(subject, message)


def memory_warning(host: Host) -> str:
    """Say that this command may be killed for want of memory, before it is; empty where there is enough."""
    for group in _groups(host):
        limit, used = _limit(group), _used(group)
        if limit is not None and used is not None and limit - used < NEEDED:
            return (
                f"the doctor needs about {NEEDED // MIB} MiB, and the memory limit of {limit // MIB} MiB leaves "
                f"{max(limit - used, 0) // MIB}: if it is killed, raise resources.limits.memory"
            )
    return ""


def check_processes(places: Places, pids: Collection[int] = ()) -> Finding:
    """Check that processes that NVML lists can be found, and that the pods of these are known."""
    subject = "host's processes"
    try:
        check_namespace(places.proc)
    except UnattributableError as error:
        problem, _, advice = str(error).partition("; ")
        return warn(subject, f"{problem}: GPU memory can't be attributed to pods", advice or _NOTHING)
    if unknown := _unknown(places, pids):
        message = f"{unknown} process(es) of pods use a GPU in a pause container or a sandbox (Kata, gVisor)"
        return warn(subject, f"{message}: what the pods on their GPUs use is unknown", _NOTHING)
    return ok(subject, f"visible in {places.proc}")


def _unknown(places: Places, pids: Collection[int]) -> int:
    try:
        return len(find_owners(places, pids, age=0.0).unknown)
    except UnattributableError:  # another check is about the links
        return 0


def check_open_files() -> Iterator[Finding]:
    """Check for a limit of open files with which much fails, in this command as in the daemon beside it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < ENOUGH_FILES:
        advice = f"raise the container's limit to {ENOUGH_FILES} or more (ulimit -n)"
        yield warn("open files", f"a process may have {limit}, which is too few", advice)


def check_inotify() -> Iterator[Finding]:
    """Check that this user has an inotify instance left, which the daemon needs some of."""
    subject = "inotify"
    try:
        inotify_simple.INotify().close()
    except OSError as error:
        limit = LIMITS.get(error.errno or 0, "its limits")
        yield warn(subject, f"{failure(error)}: the daemon polls directories instead", f"raise {limit} on the node")
    else:
        yield ok(subject, "an instance is free")


def check_container_logs(directory: Path) -> Finding:
    """Check that the links that name each container's pod are there."""
    if directory.is_dir() and any(directory.iterdir()):
        return ok("container logs", f"{directory} names the containers of this node")
    message = (
        f"{directory} {'is empty' if directory.is_dir() else 'is not there'}: processes can't be attributed to pods"
    )
    return warn(
        "container logs",
        message,
        "mount /var/log/containers of the host there, read-only, or set -container-log-directory",
    )


def _groups(host: Host) -> list[Path]:
    """Return the directories of the cgroups (v1 or v2) that limit this process, its own first."""
    groups = []
    for line in read_text(host.proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = host.sysfs / "fs/cgroup" / ("memory" if controllers else "")
        own = root / path.lstrip("/")
        # A container sees its own group as the root, though the path may still be the host's.
        groups += [group for group in (own, *own.parents) if group == root or root in group.parents]
    return groups


def _limit(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = read_text(group / name).strip()
        if text.isdecimal() and int(text) < _NO_LIMIT:
            return int(text)
    return None


def _used(group: Path) -> int | None:
    """Return the memory that the kernel can't simply take back: without the cache of files that are not in use."""
    cache = 0
    for line in read_text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "total_inactive_file" or (name == "inactive_file" and not cache):  # the total of v1 includes it
            cache = int(value)
    for name in ("memory.current", "memory.usage_in_bytes"):
        text = read_text(group / name).strip()
        if text.isdecimal():
            return int(text) - cache
    return None


def _killed(group: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        for line in read_text(group / name).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
