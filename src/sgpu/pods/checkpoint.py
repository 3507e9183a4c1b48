"""The kubelet's own record of devices, beside its socket. Undocumented, so it is only read, and believed with care."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from google.protobuf.message import DecodeError

from sgpu.api import v1beta1_pb2
from sgpu.lib.files import read_regular_file
from sgpu.node.gpu import MIG_PREFIX
from sgpu.node.shares import Share

FILE: Final = "kubelet_internal_checkpoint"
#: Longest that is read: 110 pods with thousands of ids each stay below.
MAX_BYTES: Final = 64 * 1024 * 1024

#: Of a GPU, and of the capabilities of a MIG instance.
_GPU_NODE: Final = re.compile(r"/dev/nvidia(-caps/nvidia-cap)?[0-9]+")


@attrs.frozen
class Entry:
    """The devices of one resource that one container has.

    `gpu_nodes` are the paths of GPUs and capabilities in the stored answer of Allocate; empty where there is none that
    can be read.
    """

    pod_uid: str
    container: str
    resource: str
    ids: tuple[str, ...]
    gpu_nodes: frozenset[str] = frozenset()


@attrs.frozen
class Checkpoint:
    """By resource, the ids of healthy devices as last listed; and what containers have."""

    healthy: Mapping[str, Sequence[str]]
    entries: tuple[Entry, ...]

    @property
    def held(self) -> Mapping[str, Sequence[str]]:
        """Return the ids that containers have, by resource."""
        held: dict[str, list[str]] = {}
        for entry in self.entries:
            held.setdefault(entry.resource, []).extend(entry.ids)
        return held


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the kubelet's checkpoint. Raises OSError, or ValueError where it is not what a kubelet writes."""
    try:
        content = json.loads(read_regular_file(directory / FILE, MAX_BYTES))
        data = content.get("Data", content)  # up to 1.8 without the checksum around it
        entries = tuple(map(_entry, data.get("PodDeviceEntries") or ()))
        registered = data.get("RegisteredDevices") or {}
        return Checkpoint({resource: tuple(_texts(ids)) for resource, ids in registered.items()}, entries)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a kubelet's: {error}") from error


def strangers(share_ids: Sequence[str]) -> list[str]:
    """Return the ids that sgpu did not make. Those of NVIDIA's plugin for shared GPUs look the same as ours."""
    shares = ((share_id, Share.parse(share_id)) for share_id in share_ids)
    return [share_id for share_id, share in shares if share is None or not share.uuid.startswith(("GPU-", MIG_PREFIX))]


def _entry(fields: Any) -> Entry:  # noqa: ANN401  # as it stands in the file
    uid, container, resource = _texts(
        [fields.get("PodUID", ""), fields.get("ContainerName", ""), fields["ResourceName"]]
    )
    return Entry(uid, container, resource, tuple(_ids(fields["DeviceIDs"])), _gpu_nodes(fields.get("AllocResp")))


def _ids(device_ids: Any) -> Iterator[str]:  # noqa: ANN401  # as it stands in the file
    """Yield the ids: by NUMA node since Kubernetes 1.20, a list before."""
    for ids in device_ids.values() if isinstance(device_ids, dict) else (device_ids,):
        yield from _texts(ids)


def _texts(texts: Any) -> Iterator[str]:  # noqa: ANN401  # as it stands in the file
    """Yield the texts of a list; null is an empty one. Raises TypeError for anything else."""
    for text in texts or ():
        if not isinstance(texts, list) or not isinstance(text, str):
            raise TypeError(f"{texts!r:.100} is no list of texts")
        yield text


def _gpu_nodes(stored: Any) -> frozenset[str]:  # noqa: ANN401  # as it stands in the file
    try:
        answer = v1beta1_pb2.ContainerAllocateResponse.FromString(base64.b64decode(stored))
    except (TypeError, ValueError, DecodeError):  # of another API, or none
        return frozenset()
    return frozenset(device.container_path for device in answer.devices if _GPU_NODE.fullmatch(device.container_path))
