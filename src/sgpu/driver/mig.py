"""The MIG instances of a GPU, in one poll: NVML's answers, and the capability files that containers need of the kernel.

Blocks as long as the driver does. Knows neither gRPC nor the kubelet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

from sgpu.driver.kernelmodule import read_text
from sgpu.driver.messages import InstanceReport
from sgpu.driver.nvml import GPU_LOST, Code, Handle, Library, NvmlError
from sgpu.node.figures import Figures

#: The minor number of each capability, below /proc. The major number is that of nvidia-caps in /proc/devices.
MINORS: Final = Path("driver/nvidia-caps/mig-minors")
#: Where the kernel has a file for each capability of the instances that there are, below /proc.
CAPABILITIES: Final = Path("driver/nvidia/capabilities")
#: "gpu0/gi2/access 21", "gpu0/gi2/ci0/access 22"; the GPU is counted by its minor number.
_MINOR: Final = re.compile(r"^(gpu\d+/gi\d+(?:/ci\d+)?)/access (\d+)$", re.MULTILINE)
#: "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 MIG 1c.3g.71gb".
_PROFILE: Final = re.compile(r" MIG (\S+)$")
#: What NVML answers about an instance that was destroyed a moment ago.
_DESTROYED: Final = frozenset({Code.NOT_FOUND, Code.INVALID_ARGUMENT})
#: How drivers before R470 name an instance: by the GPU, and its place there.
_BY_PLACE: Final = "MIG-GPU-"


class _LeftOutError(Exception):
    """An instance can't be offered. The message says why."""


@attrs.frozen
class Capabilities:
    """The device nodes of capabilities. `make` makes those of capability files, and says what came of it."""

    proc: Path
    dev: Path
    make: Callable[[tuple[Path, ...]], str]

    def minors(self) -> Mapping[str, int]:
        """Return the minor numbers by name, as `gpu0/gi2/ci0`; none where the kernel does not list them."""
        return {name: int(minor) for name, minor in _MINOR.findall(read_text(self.proc / MINORS))}

    def nodes(self, minors: Mapping[str, int], gpu: int, instance: int, compute: int) -> tuple[tuple[str, ...], str]:
        """Return the nodes of an instance, relative to /dev, and what is wrong with them; empty if nothing is."""
        names = (f"gpu{gpu}/gi{instance}", f"gpu{gpu}/gi{instance}/ci{compute}")
        if unknown := [name for name in names if name not in minors]:
            return (), f"{self.proc / MINORS} does not list {' and '.join(unknown)}: see -proc-directory"
        nodes = {name: f"nvidia-caps/nvidia-cap{minors[name]}" for name in names}
        missing = self._missing(nodes)
        if not missing:
            return tuple(nodes.values()), ""
        files = tuple(self.proc / CAPABILITIES / name.replace("/", "/mig/", 1) / "access" for name in missing)
        outcome = self.make(files)
        missing = self._missing(nodes)
        command = " ".join(("nvidia-modprobe", *(f"-f {file}" for file in files)))
        problem = (
            f"{' and '.join(str(self.dev / node) for node in missing.values())} is not there; `{command}` on the host "
            f"makes it{outcome and f' ({outcome})'}"
        )
        return tuple(nodes.values()), problem if missing else ""

    def _missing(self, nodes: Mapping[str, str]) -> dict[str, str]:
        return {name: node for name, node in nodes.items() if not (self.dev / node).exists()}


def find_instances(
    library: Library,
    gpu: Handle,
    minor: int,
    capabilities: Capabilities,
    measure: Callable[[Handle], Figures],
) -> tuple[tuple[InstanceReport, ...], tuple[str, ...]]:
    """Return the instances of a GPU in MIG mode, and a line for each that can't be offered.

    `minor` is the GPU's minor number. Raises NvmlError where the GPU does not answer.
    """
    found: dict[str, InstanceReport] = {}
    problems = []
    minors = capabilities.minors()
    for index in range(library.mig_count(gpu)):
        try:
            handle = library.mig_handle(gpu, index)
            instance = None if handle is None else _instance(library, handle, minor, capabilities, minors, measure)
            if instance:
                found[instance.uuid] = instance
        except _LeftOutError as error:
            problems.append(f"MIG instance {error}")
        except NvmlError as error:
            if error.code in GPU_LOST:
                raise
            if error.code not in _DESTROYED:
                problems.append(f"MIG instance {index} of the GPU with minor number {minor} is left out: {error}")
    return tuple(found.values()), tuple(problems)


def _instance(
    library: Library,
    handle: Handle,
    minor: int,
    capabilities: Capabilities,
    minors: Mapping[str, int],
    measure: Callable[[Handle], Figures],
) -> InstanceReport | None:
    """Return one instance; None where another one got its handle meanwhile. Raises _LeftOutError or NvmlError."""
    uuid, name = library.uuid(handle), library.name(handle)
    if uuid.startswith(_BY_PLACE):
        raise _LeftOutError(
            f"{uuid} is left out: this driver names instances by their place, so that one that is created later gets "
            f"the name of another; drivers from R470 on have UUIDs for them"
        )
    profile = _PROFILE.search(name)
    if profile is None:
        raise _LeftOutError(f"{uuid} is left out: its name, {name}, does not say its profile")
    instance, compute = library.gpu_instance(handle), library.compute_instance(handle)
    nodes, problem = capabilities.nodes(minors, minor, instance, compute)
    figures, memory = measure(handle), library.mig_memory(handle)
    if library.uuid(handle) != uuid:
        return None
    return InstanceReport(uuid, name, profile[1], instance, compute, memory, nodes, figures, problem)
