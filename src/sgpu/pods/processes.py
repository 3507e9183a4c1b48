"""The container of each process that uses a GPU, by the host's /proc and the kubelet's links to containers' logs.

Blocks, for no longer than the kernel takes to look something up: call it from a thread. Knows neither NVML nor trio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

import attrs

from sgpu.lib.limits import cure
from sgpu.node.container import Owners, Process
from sgpu.pods.cgroups import is_in_pod
from sgpu.pods.container import read_links

#: The kernel's number of the first pid namespace (PROC_PID_INIT_INO): the host's, which NVML's process ids are of.
HOST_NAMESPACE: Final = "pid:[4026531836]"
#: Process 1 of a machine, or of a container that is a node. In a pod without hostPID it is sgpu, or a pause program.
INIT_PROGRAMS: Final = frozenset({"systemd", "init"})
#: What the kernel calls the server of NVIDIA's MPS: it keeps 15 characters.
_MPS_SERVER: Final = "nvidia-cuda-mps"
#: Where a process' start is in /proc/<pid>/stat, counted from behind its name: field 22 of all.
_START_FIELD: Final = 19


@attrs.frozen
class Stat:
    """Fields of /proc/<pid>/stat: the name, cut to 15 characters, and clock ticks from the boot to the start."""

    name: str
    start: int

    @property
    def is_mps_server(self) -> bool:
        """Return whether the process uses GPUs on behalf of others."""
        return self.name == _MPS_SERVER


class UnattributableError(Exception):
    """Processes can't be attributed to containers. The message says why not, and what to do."""


@attrs.frozen
class Places:
    """Directories to look in: the kernel's /proc, and the kubelet's links to logs."""

    proc: Path
    container_logs: Path


def find_owners(places: Places, pids: Collection[int], age: float) -> Owners:
    """Return the container of each of these processes, which the driver listed `age` seconds ago.

    Those that have ended are left out, and so are those that began later: their id was another's.

    Raises UnattributableError.
    """
    check_namespace(places.proc)
    try:
        links = read_links(os.listdir(places.container_logs))
    except OSError as error:
        raise UnattributableError(
            f"the kubelet's links to logs in {places.container_logs} can't be listed ({error.strerror}); "
            + cure(error, "mount that directory from the host, or set -container-log-directory")
        ) from error
    listed_at = (time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK")
    if pids and not links.has_any():
        raise UnattributableError(
            f"{places.container_logs} has no links to container logs; mount the host's /var/log/containers, or set "
            "-container-log-directory (cri-dockerd makes links only with the log driver json-file)"
        )
    containers, unknown, mps, processes = {}, set(), set(), {}
    for pid in pids:
        try:
            # In this order: if it is the same process still, it was when the cgroup was read.
            cgroup = _read(f"{places.proc}/{pid}/cgroup")
            stat = read_stat(_read(f"{places.proc}/{pid}/stat"))
        except (OSError, ValueError):  # it has ended, maybe in the middle
            continue
        if stat.start > listed_at:
            continue
        container = links.find(cgroup)
        if container is None and is_in_pod(cgroup):
            unknown.add(pid)
        else:
            containers[pid], processes[pid] = container, Process(pid, stat.start)
        if stat.is_mps_server:
            mps.add(pid)
    return Owners(containers, frozenset(unknown), frozenset(mps), processes)


def _read(path: str) -> str:
    with open(path, errors="replace") as file:  # of hundreds of processes: pathlib takes as long as the kernel
        return file.read()


def _read_name(path: Path) -> str:
    try:
        return _read(str(path)).strip()
    except OSError:
        return ""


def check_namespace(proc: Path) -> None:
    """Raise UnattributableError outside the host's pid namespace, where the same ids are other processes."""
    link = proc / "self/ns/pid"
    try:
        namespace = os.readlink(link)
    except OSError as error:
        raise UnattributableError(
            f"{link} can't be read ({error.strerror}); " + cure(error, "set -proc-directory to the host's /proc")
        ) from error
    if namespace != HOST_NAMESPACE and _read_name(proc / "1/comm") in INIT_PROGRAMS:
        raise UnattributableError(
            f"this node is itself a container, as in kind, k3d or LXC ({link}: {namespace}): the driver's process ids "
            f"are not visible here, and hostPID does not help"
        )
    if namespace != HOST_NAMESPACE:
        raise UnattributableError(
            f"the host's process ids are not seen ({link}: {namespace}); set hostPID: true for the pod"
        )


def read_stat(stat: str) -> Stat:
    """Parse /proc/<pid>/stat. Raises ValueError for anything else."""
    name, bracket, rest = stat.partition("(")[2].rpartition(")")  # the name can have brackets of its own
    fields = rest.split()
    if not bracket or len(fields) <= _START_FIELD:
        raise ValueError(f"not what /proc/<pid>/stat has: {stat[:100]!r}")
    return Stat(name, int(fields[_START_FIELD]))
