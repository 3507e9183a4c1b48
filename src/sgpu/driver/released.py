"""The GPUs that the driver's process leaves alone, so that they can be reset: how it finds the others without a handle
of these, and whether it has one open all the same.

NVML's documentation says that taking a handle initializes a GPU, and that a search by UUID may initialize others. So
the others are taken by their PCI addresses, as the kernel lists them. Runs in the driver's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from sgpu.driver import nvml
from sgpu.driver.messages import ReleasedGpu, Report
from sgpu.driver.nvml import Code, Library, NvmlError
from sgpu.node.policy import parse_bus_id

#: The GPUs that the kernel's driver has, below a sysfs.
KERNEL_DRIVER: Final = "bus/pci/drivers/nvidia"
OPEN_FILES: Final = Path("/proc/self/fd")


class MustAttachError(Exception):
    """Opened without attaching GPUs, the library does not answer for the others: it has to be opened as always."""


class Released:
    """Some GPUs to leave alone, often none."""

    def __init__(self, gpus: Collection[ReleasedGpu], sysfs: Path) -> None:
        self._gpus = gpus
        self._sysfs = sysfs
        #: The library is opened as always. By its documentation that opens no GPU either, but there is a flag not to.
        self._attach = not gpus
        self._checked = False
        self._problem = ""

    @contextmanager
    def open(self, host_path: Path, failed: Callable[[str, int], None]) -> Iterator[Library]:
        """Open the library so that it attaches no GPU by itself, where some are to be left alone."""
        try:
            with nvml.open_library(host_path, failed, attach=self._attach) as library:
                yield library
        except NvmlError as error:
            if self._attach or self._checked or error.code == Code.DRIVER_NOT_LOADED:
                raise
            self._attach = True
            raise MustAttachError from error

    def others(self) -> tuple[str, ...] | None:
        """Return the PCI addresses of all other GPUs, in order.

        None: ask about all, because none is to be left alone, or because they can't be told apart.
        """
        self._problem = ""
        if not self._gpus:
            return None
        directory = self._sysfs / KERNEL_DRIVER
        found = [name for name in _names(directory) if parse_bus_id(name)]
        if not found:
            self._problem = f"{directory} lists no GPU, so that sgpu can't open the others alone: see -sysfs-directory"
            return None
        released = {parse_bus_id(gpu.pci_bus_id) for gpu in self._gpus}
        return tuple(sorted((name for name in found if parse_bus_id(name) not in released), key=parse_bus_id))

    def checked(self, report: Report) -> Report:
        """Return the report of a poll with what became of these GPUs.

        Raises MustAttachError: what the library's functions answer after the flag is not documented, and faults that it
        causes must not count as the GPUs' own.
        """
        first, self._checked = not self._checked, True
        if first and not self._attach and (report.problems or any(gpu.error for gpu in report.gpus)):
            self._attach = True
            raise MustAttachError
        if not self._gpus or self._problem:
            return attrs.evolve(report, held=self._problem)
        opened = set(_open_nodes())
        held = ", ".join(gpu.pci_bus_id for gpu in self._gpus if gpu.device_node in opened)
        problem = (
            f"the driver's library opens {held} by itself: stop sgpu on this node for the time of the reset, as "
            f"docs/cordon.md says; running pods keep their GPUs"
        )
        return attrs.evolve(report, released=tuple(gpu.pci_bus_id for gpu in self._gpus), held=problem if held else "")


def _open_nodes() -> Iterator[str]:
    """Yield the names of the files that this process has open."""
    for descriptor in _names(OPEN_FILES):
        try:
            yield os.path.basename(os.readlink(OPEN_FILES / descriptor)).removesuffix(" (deleted)")
        except OSError:  # closed meanwhile
            continue


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
