"""The GPUs that the driver's process leaves alone, so that they can be reset: it can't open their device nodes.

NVML opens the node of each GPU as it is initialized, and passes over a GPU whose node it can't open. (Its flag
NO_ATTACH is no way to leave one out: with it, NVML has no GPU at all.) Runs in the driver's process.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import attrs

from sgpu.driver.kernelmodule import read_text
from sgpu.driver.messages import ReleasedGpu, Report
from sgpu.driver.poll import Places
from sgpu.node.policy import parse_bus_id

#: Where NVML looks for device nodes, wherever sgpu does.
DEV: Final = Path("/dev")
OPEN_FILES: Final = Path("/proc/self/fd")
#: Where the kernel's driver has a directory for each of its GPUs, by PCI address, below a /proc.
KERNEL_GPUS: Final = Path("driver/nvidia/gpus")
_MINOR: Final = re.compile(r"^Device Minor:\s*(\d+)$", re.MULTILINE)


class Released:
    """Some GPUs to leave alone, often none. Make it before the process has threads."""

    def __init__(self, gpus: Collection[ReleasedGpu], places: Places) -> None:
        self._gpus = gpus
        self._places = places
        self._directories = dict.fromkeys((DEV, places.dev_directory))
        self._hidden: set[str] = set()  # names of nodes
        self._problem = ""  # why this process can't hide anything
        self._failed = ""  # why it could not the last time
        if gpus:
            from sgpu.lib import mounts  # imports ctypes, which few need

            self._deny = mounts.deny_device
            try:
                mounts.separate()
            except OSError as error:
                self._problem = _explain(error)

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._gpus)

    def hide(self) -> None:
        """Hide them from NVML, which is to be initialized next: their nodes may be new, or others than before."""
        self._failed = ""
        if self._problem:
            return
        for path in self._visible():
            try:
                self._deny(path)
                self._hidden.add(path.name)
            except OSError as error:
                self._failed = _explain(error)

    def checked(self, report: Report) -> Report:
        """Return the report of a poll with what became of these GPUs."""
        if not self._gpus:
            return report
        listed = {parse_bus_id(gpu.pci_bus_id) for gpu in report.gpus}
        try:
            opened = _open_nodes()
        except OSError as error:
            return attrs.evolve(report, held=f"which files the driver's process has open can't be seen: {error}")
        still_open = [gpu for gpu in self._gpus if parse_bus_id(gpu.pci_bus_id) in listed or self._node(gpu) in opened]
        if problem := self._problem or self._failed or (_say_open(still_open) if still_open else ""):
            return attrs.evolve(report, held=problem)
        return attrs.evolve(report, released=tuple(gpu.pci_bus_id for gpu in self._gpus))

    def missed_one(self) -> bool:
        """Return whether a node is there that was not when NVML was initialized, which has to be done again then."""
        return not self._problem and any(self._visible())

    def hides_another(self) -> bool:
        """Return whether a hidden node belongs to none of these GPUs any more: only another process can open it."""
        return bool(self._hidden - set(map(self._node, self._gpus)))

    def _visible(self) -> Iterator[Path]:
        """Yield the nodes that are there and not hidden."""
        for gpu in self._gpus:
            for directory in self._directories if (node := self._node(gpu)) else ():
                if _can_open(path := directory / node):
                    yield path

    def _node(self, gpu: ReleasedGpu) -> str:
        """Return the name of a GPU's device node; empty where it has none. A card can have another one than before."""
        directory = self._places.proc_directory / KERNEL_GPUS
        try:
            names = os.listdir(directory)
        except OSError:  # of a driver that has no such directory, or a /proc of another place
            return gpu.device_node
        address = parse_bus_id(gpu.pci_bus_id)
        for name in names:
            if address and parse_bus_id(name) == address:
                minor = _MINOR.search(read_text(directory / name / "information"))
                return f"nvidia{minor[1]}" if minor else ""
        return ""  # it is not there


def _can_open(node: Path) -> bool:
    """Return whether this is a device node that is not hidden."""
    try:
        return node.is_char_device() and not os.statvfs(node).f_flag & os.ST_NODEV
    except OSError:  # gone meanwhile
        return False


def _explain(error: OSError) -> str:
    cure = "; sgpu has to run privileged" if error.errno == errno.EPERM else ""
    return f"sgpu can't hide cordoned GPUs from the driver's library: {error}{cure}"


def _say_open(gpus: Collection[ReleasedGpu]) -> str:
    return (
        f"the driver's library opens {', '.join(gpu.pci_bus_id for gpu in gpus)} all the same: stop sgpu on this node "
        f"for the time of the reset, as docs/cordon.md says; running pods keep their GPUs"
    )


def _open_nodes() -> frozenset[str]:
    """Return the names of the files that this process has open. Raises OSError."""
    found = set()
    for descriptor in os.listdir(OPEN_FILES):
        try:
            found.add(os.path.basename(os.readlink(OPEN_FILES / descriptor)).removesuffix(" (deleted)"))
        except OSError:  # closed meanwhile
            continue
    return frozenset(found - {""})  # of `/`; a card that is gone has no node either
