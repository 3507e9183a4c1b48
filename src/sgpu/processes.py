"""Whose the processes are that use the GPUs: the host's /proc, and the kubelet's links to the logs of containers.

Blocks, for no longer than the kernel takes to look something up: call it from a thread. Knows neither NVML nor trio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import attrs

from sgpu.attribution import read_links, read_stat
from sgpu.usage import Holder

#: The kernel's number of the first pid namespace (PROC_PID_INIT_INO): the host's, which NVML's process ids are of.
HOST_NAMESPACE: Final = "pid:[4026531836]"


class NotToldError(Exception):
    """Processes can't be told apart by container. The message says why not, and what to do."""


@attrs.frozen
class Places:
    """Where to look: the kernel's /proc, and the kubelet's links to logs."""

    proc: Path
    container_logs: Path


@attrs.frozen
class Owners:
    """Whose each process is that still runs: a container's, or none's (None). `mps` are servers of NVIDIA's MPS."""

    containers: Mapping[int, Holder | None]
    mps: frozenset[int]


def find_owners(places: Places, pids: Collection[int], age: float) -> Owners:
    """Whose these processes are, which the driver told of `age` seconds ago. Those that have ended are left out.

    So are those that began later than that: their id was another's. Raises NotToldError.
    """
    check_namespace(places.proc)
    try:
        links = read_links(os.listdir(places.container_logs))
    except OSError as error:
        raise NotToldError(
            f"the kubelet's links to logs in {places.container_logs} can't be listed ({error.strerror}); "
            "mount that directory from the host, or set -container-log-directory"
        ) from error
    told_at = (time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK")
    containers, mps = {}, set()
    for pid in pids:
        try:
            # In this order: if it is the same process still, it was when the cgroup was read.
            cgroup = _read(f"{places.proc}/{pid}/cgroup")
            stat = read_stat(_read(f"{places.proc}/{pid}/stat"))
        except (OSError, ValueError):  # it has ended, maybe in the middle
            continue
        if stat.start > told_at:
            continue
        containers[pid] = links.find(cgroup)
        if stat.is_mps_server:
            mps.add(pid)
    return Owners(containers, frozenset(mps))


def _read(path: str) -> str:
    with open(path, errors="replace") as file:  # of hundreds of processes: pathlib takes as long as the kernel
        return file.read()


def check_namespace(proc: Path) -> None:
    """Raises NotToldError in any other namespace than the host's, where the same ids are other processes'."""
    link = proc / "self/ns/pid"
    try:
        namespace = os.readlink(link)
    except OSError as error:
        raise NotToldError(
            f"{link} can't be read ({error.strerror}); set -proc-directory to the host's /proc"
        ) from error
    if namespace != HOST_NAMESPACE:
        raise NotToldError(f"the host's process ids are not seen ({link}: {namespace}); set hostPID: true for the pod")
