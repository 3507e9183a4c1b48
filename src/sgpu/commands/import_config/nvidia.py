"""The configuration of NVIDIA's device plugin, version v1, as its API in Go has it. Values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from sgpu.commands.import_config.imported import Imported, UnreadableError, is_gpu, notes, quote, resource, shares

RESOURCE: Final = "nvidia.com/gpu"
#: What `renameByDefault` adds to the name of a resource.
SHARED: Final = ".shared"
MIG: Final = "nvidia.com/mig-"
_SEVERAL: Final = "a container with several shares gets several GPUs, see multi-share"
_MIG: Final = "MIG is configured by settings of sgpu's own"
_DEVICES: Final = "sgpu adds device nodes and libraries itself, without NVIDIA's runtime"
#: By path: why it does not carry over. None: it does.
KNOWN: Final[Mapping[str, str | None]] = {
    "version": None,
    "sharing": None,  # said by `_entries`
    "sharing.timeSlicing.failRequestsGreaterThanOne": _SEVERAL,
    "sharing.mps.failRequestsGreaterThanOne": _SEVERAL,
    "flags.migStrategy": _MIG,
    "flags.failOnInitError": "sgpu waits for a driver",
    "flags.nvidiaDriverRoot": "`sgpu stage -host-root` copies the driver's files to -host-path",
    "flags.nvidiaDevRoot": "see -dev-directory",
    "flags.gdsEnabled": "GPUDirect Storage is not mounted",
    "flags.mofedEnabled": "InfiniBand devices are not mounted",
    "flags.plugin": _DEVICES,
    "flags.gfd": "-node-labels nfd has sgpu's labels",
    "flags": "unknown here",
    "resources": "a rule under gpus, with name and resource, does it",
    "imex": "IMEX channels are not mounted",
}
#: Values that mean what sgpu does anyway.
SAME: Final[Mapping[str, tuple[object, ...]]] = {
    "flags.migStrategy": ("none",),
    "flags.failOnInitError": (False,),
    "flags.nvidiaDriverRoot": ("/",),
    "flags.gdsEnabled": (False,),
    "flags.mofedEnabled": (False,),
    "flags.plugin.passDeviceSpecs": (True,),
    "flags.plugin.deviceIDStrategy": ("uuid",),
    "sharing.timeSlicing.failRequestsGreaterThanOne": (False,),
    "sharing.mps.failRequestsGreaterThanOne": (False,),
    "imex.required": (False,),
}


def of_plugin(content: Mapping[str, Any]) -> Imported:
    """Return what the plugin's configuration says. Raises UnreadableError."""
    said: list[str] = []
    settings: dict[str, Any] = {"gpu-duplication-factor": 1, "resource-name": RESOURCE}
    rules: list[dict[str, Any]] = []
    for path, method, entry in _entries(content):
        name = resource(_qualified(entry.get("name")), f"{path}.name")
        count = shares(entry.get("replicas"), f"{path}.replicas")
        if name.startswith(MIG):
            said.append(f"{path}: {count} replicas of {name}: {_MIG}")
            continue
        if name != RESOURCE:
            said.append(
                f"{path}: {count} replicas of {name}: a rule under gpus, with name, shares and resource, does it"
            )
            continue
        settings["resource-name"] = _renamed(name, method, entry, path)
        _select(entry.get("devices", "all"), count, path, settings, rules, said)
    if _sharing(content).get("mps"):
        said.append("sharing.mps: sgpu's shares are time-sliced; it starts no MPS server")
    said.extend(notes(content, KNOWN, SAME))
    return Imported("a configuration of NVIDIA's device plugin", settings, rules, said)


def _sharing(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get("sharing") or {}
    if not isinstance(found, Mapping):
        raise UnreadableError("sharing is not a mapping")
    return found


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the path of each resource that is shared, how, and what is said of it."""
    for key in ("timeSlicing", "mps"):
        method = _sharing(content).get(key) or {}
        entries = method.get("resources") or () if isinstance(method, Mapping) else None
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
            raise UnreadableError(f"sharing.{key}.resources is not a list of mappings")
        for number, entry in enumerate(entries):
            yield f"sharing.{key}.resources[{number}]", method, entry


def _qualified(name: object) -> object:
    """Return the name with NVIDIA's domain, which may be left out there."""
    return f"nvidia.com/{name}" if isinstance(name, str) and "/" not in name else name


def _renamed(name: str, method: Mapping[str, Any], entry: Mapping[str, Any], path: str) -> str:
    if entry.get("rename"):
        return resource(_qualified(entry["rename"]), f"{path}.rename")
    return name + SHARED if method.get("renameByDefault") is True else name


def _select(
    devices: object, count: int, path: str, settings: dict[str, Any], rules: list[dict[str, Any]], said: list[str]
) -> None:
    """Have the devices shared: all of them, or those that are listed."""
    if devices == "all":
        settings["gpu-duplication-factor"] = count
    elif not isinstance(devices, list):
        settings["gpu-duplication-factor"] = count
        said.append(f"{path}.devices: {quote(devices)}: all GPUs are shared; a rule under gpus selects some")
    else:
        for device in devices:
            if is_gpu(device) and not any(rule["uuid"] == device for rule in rules):
                rules.append({"uuid": device, "shares": count})
            else:
                said.append(
                    f"{path}.devices: {quote(device)}: name each GPU once, by its UUID, as `nvidia-smi -L` prints it"
                )
