"""A CDI file for each claim: what the container runtime gives a container that has one of the claim's devices.

https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md. Names are those of the claim and of the
scheduler's shares, so that none is used again and a runtime can't find an old device under a new name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from sgpu.lib.files import write_private_file
from sgpu.node.edits import ContainerEdits

VENDOR: Final = "k8s.gpu.deepomatic.com"
CLASS: Final = "claim"
#: The first version with `hostPath` of device nodes, and with names that begin with a digit.
VERSION: Final = "0.5.0"
_PREFIX: Final = f"{VENDOR}-{CLASS}_"
_SUFFIX: Final = ".json"


def device_id(name: str) -> str:
    """Return the name by which the kubelet asks the container runtime for a device."""
    return f"{VENDOR}/{CLASS}={name}"


def render(devices: Mapping[str, ContainerEdits]) -> dict[str, Any]:
    """Return the content of a claim's file."""
    return {
        "cdiVersion": VERSION,
        "kind": f"{VENDOR}/{CLASS}",
        "devices": [{"name": name, "containerEdits": _edits(each)} for name, each in devices.items()],
    }


def file(directory: Path, claim_uid: str) -> Path:
    """Return the path of a claim's file."""
    return directory / f"{_PREFIX}{claim_uid}{_SUFFIX}"


def write(directory: Path, claim_uid: str, devices: Mapping[str, ContainerEdits]) -> None:
    """Write a claim's file in one step. Runtimes read only names that end in .json or .yaml. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    write_private_file(file(directory, claim_uid), json.dumps(render(devices), indent=1).encode())


def remove(directory: Path, claim_uid: str) -> None:
    """Remove a claim's file, if it is there. Raises OSError."""
    file(directory, claim_uid).unlink(missing_ok=True)


def remove_others(directory: Path, claim_uids: Collection[str]) -> list[str]:
    """Remove the files of all other claims, which were left over. Returns their uids. Raises OSError."""
    found = {path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for path in directory.glob(f"{_PREFIX}*{_SUFFIX}")}
    left = sorted(found - set(claim_uids))
    for uid in left:
        remove(directory, uid)
    for unfinished in directory.glob(f"{_PREFIX}*{_SUFFIX}.new"):
        unfinished.unlink(missing_ok=True)
    return left


def _edits(edits: ContainerEdits) -> dict[str, Any]:
    made: dict[str, Any] = {"env": [f"{name}={value}" for name, value in edits.environment.items()]}
    if edits.device_nodes:
        made["deviceNodes"] = [
            {"path": node.container_path, "hostPath": node.host_path, "permissions": "mrw"}
            for node in edits.device_nodes
        ]
    if edits.mounts:
        options = ["ro", "nosuid", "nodev", "rbind"]
        made["mounts"] = [
            {"hostPath": mount.host_path, "containerPath": mount.container_path, "options": options}
            for mount in edits.mounts
        ]
    return made
