"""HAMi's configuration: of its devices (device-config.yaml), and of single nodes (config.json). Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sgpu.commands.import_config.imported import Imported, UnreadableError, is_gpu, notes, quote, resource, shares

#: HAMi's own where nothing is said.
SPLIT_COUNT: Final = 10
RESOURCE: Final = "nvidia.com/gpu"
_MEMORY: Final = (
    "a share stands for an equal part of the memory, and a container asks for more shares; "
    "memory-limits: fair has the driver enforce it (R615 or later)"
)
_CORES: Final = "sgpu does not limit processors of a GPU"
_VIRTUAL: Final = "sgpu gives out no more memory than there is"
_MIG: Final = "MIG is configured by settings of sgpu's own"
_LIBRARY: Final = "sgpu preloads no library"
#: By path: why it does not carry over. None: it does.
DEVICES: Final[Mapping[str, str | None]] = {
    "nvidia.deviceSplitCount": None,
    "nvidia.resourceCountName": None,
    "nvidia.resourceMemoryName": _MEMORY,
    "nvidia.resourceMemoryPercentageName": _MEMORY,
    "nvidia.defaultMemory": _MEMORY,
    "nvidia.defaultMem": _MEMORY,
    "nvidia.preConfiguredDeviceMemory": _MEMORY,
    "nvidia.memoryFactor": _MEMORY,
    "nvidia.deviceMemoryScaling": _VIRTUAL,
    "nvidia.resourceCoreName": _CORES,
    "nvidia.deviceCoreScaling": _CORES,
    "nvidia.defaultCores": _CORES,
    "nvidia.disableCoreLimit": _CORES,
    "nvidia.gpuCorePolicy": _CORES,
    "nvidia.resourcePriorityName": _CORES,
    "nvidia.defaultGPUNum": "a container without a share gets no GPU",
    "nvidia.enableNumaTopology": "sgpu reports NUMA nodes to the kubelet's topology manager",
    "nvidia.libCudaLogLevel": _LIBRARY,
    "nvidia.runtimeClassName": "sgpu needs no runtime class",
    "nvidia.overwriteEnv": "containers with shares get NVIDIA_VISIBLE_DEVICES=void; those without are left alone",
    "nvidia.migProfileAllowlist": _MIG,
    "nvidia.knownMigGeometries": _MIG,
    "nvidia.migstrategy": _MIG,
    "nvidia": "unknown here",
}
NODE: Final[Mapping[str, str | None]] = {
    "name": None,
    "devicesplitcount": None,
    "filterdevices.uuid": None,
    "filterdevices.index": "name the GPUs by uuid, as `nvidia-smi -L` prints it, in rules with exclude: true",
    "devicememoryscaling": _VIRTUAL,
    "devicecorescaling": _CORES,
    "preconfigureddevicememory": _MEMORY,
    "libcudaloglevel": _LIBRARY,
    "operatingmode": "shares are time-sliced",
    "migstrategy": _MIG,
}
#: Values that mean what sgpu does anyway.
SAME: Final[Mapping[str, tuple[object, ...]]] = {
    **{f"nvidia.{name}": (0,) for name in ("defaultMemory", "defaultMem", "defaultCores", "preConfiguredDeviceMemory")},
    **{
        f"nvidia.{name}": (1,) for name in ("deviceMemoryScaling", "deviceCoreScaling", "defaultGPUNum", "memoryFactor")
    },
    **{f"nvidia.{name}": (False,) for name in ("overwriteEnv", "disableCoreLimit", "enableNumaTopology")},
    "nvidia.migstrategy": ("none",),
    "migstrategy": ("none",),
    "devicememoryscaling": (1,),
    "devicecorescaling": (1,),
    "preconfigureddevicememory": (0,),
}


def of_devices(content: Mapping[str, Any]) -> Imported:
    """Return what device-config.yaml says of NVIDIA's GPUs. Raises UnreadableError."""
    nvidia = content["nvidia"]
    settings = {
        "gpu-duplication-factor": shares(nvidia.get("deviceSplitCount", SPLIT_COUNT), "nvidia.deviceSplitCount"),
        "resource-name": resource(nvidia.get("resourceCountName", RESOURCE), "nvidia.resourceCountName"),
    }
    said = list(notes({"nvidia": nvidia}, DEVICES, SAME))
    said += [f"{quote(name)}: devices of another vendor" for name in content if name != "nvidia"]
    return Imported("HAMi's configuration of devices", settings, (), said)


def of_node(node: Mapping[str, Any]) -> Imported:
    """Return what config.json says of one node, over the configuration of devices. Raises UnreadableError."""
    settings = {}
    if node.get("devicesplitcount") is not None:
        settings["gpu-duplication-factor"] = shares(node["devicesplitcount"], "devicesplitcount")
    filtered = node.get("filterdevices") or {}
    uuids = filtered.get("uuid") or () if isinstance(filtered, Mapping) else None
    if not isinstance(uuids, (list, tuple)) or not all(map(is_gpu, uuids)):
        raise UnreadableError("filterdevices.uuid is not a list of UUIDs, as `nvidia-smi -L` prints them")
    rules = [{"uuid": uuid, "exclude": True} for uuid in dict.fromkeys(uuids)]
    return Imported(
        f"HAMi's configuration of node {quote(node.get('name'))}", settings, rules, list(notes(node, NODE, SAME))
    )
