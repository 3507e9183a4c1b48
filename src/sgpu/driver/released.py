"""The GPUs that the driver's process leaves alone, so that they can be reset: it can't open their device nodes.

NVML opens the node of each GPU as it is initialized, and passes over a GPU whose node it can't open. (Its flag
NO_ATTACH is no way to leave one out: with it, NVML has no GPU at all.) Runs in the driver's process.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import attrs

from sgpu.driver.messages import ReleasedGpu, Report

#: Where NVML looks for device nodes, wherever sgpu does.
DEV: Final = Path("/dev")
OPEN_FILES: Final = Path("/proc/self/fd")


class Released:
    """Some GPUs to leave alone, often none. Make it before the process has threads, and before NVML is initialized."""

    def __init__(self, gpus: Collection[ReleasedGpu], dev_directory: Path) -> None:
        self._gpus = gpus
        self._problem = ""
        if gpus:
            from sgpu.lib.mounts import deny_devices  # imports ctypes, which few need

            nodes = [directory / gpu.device_node for directory in {DEV, dev_directory} for gpu in gpus]
            try:
                deny_devices(filter(Path.exists, nodes))
            except OSError as error:
                self._problem = f"sgpu can't hide them from the driver's library ({error}): it has to run privileged"

    def checked(self, report: Report) -> Report:
        """Return the report of a poll with what became of these GPUs."""
        opened = set(_open_nodes()) if self._gpus and not self._problem else set()
        if held := ", ".join(gpu.pci_bus_id for gpu in self._gpus if gpu.device_node in opened):
            self._problem = (
                f"the driver's library opens {held} all the same: stop sgpu on this node for the time of the reset, as "
                f"docs/cordon.md says; running pods keep their GPUs"
            )
        if self._problem:
            return attrs.evolve(report, held=self._problem)
        return attrs.evolve(report, released=tuple(gpu.pci_bus_id for gpu in self._gpus))


def _open_nodes() -> Iterator[str]:
    """Yield the names of the files that this process has open."""
    for descriptor in os.listdir(OPEN_FILES):
        try:
            yield os.path.basename(os.readlink(OPEN_FILES / descriptor)).removesuffix(" (deleted)")
        except OSError:  # closed meanwhile
            continue
