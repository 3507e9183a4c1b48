"""Edits to a container that gets shares: environment, device nodes and mounts, for any API.

Pure: knows neither trio, nor purerpc, nor NVML.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import attrs

from sgpu.node.limits import allowed_memory
from sgpu.node.offers import Offer
from sgpu.node.rank import MultiShare, Placement

#: Keeps a framework from taking (nearly) a whole GPU as soon as it starts. A pod's own environment wins.
FRAMEWORK_HINTS: Final = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # https://www.tensorflow.org/guide/gpu#limiting_gpu_memory_growth
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # https://docs.jax.dev/en/latest/gpu_memory_allocation.html
}
#: Bytes of memory that a container may use. With several GPUs there is one more for each, numbered in the order of
#: SGPU_GPU_UUIDS.
MEMORY_VARIABLE: Final = "SGPU_MEMORY_BYTES"
#: Tells NVIDIA's container runtime to do nothing. Where that is the node's default, an image that says `all` would get
#: every GPU of the node; the kubelet's variables override the image's.
IGNORED_BY_NVIDIA_RUNTIME: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}


class AllocationError(Exception):
    """A container can't get these shares. The message says which and why."""


class UnknownShareError(AllocationError):
    """An id names no share of this node."""


class UnhealthyShareError(AllocationError):
    """A share's GPU is not healthy."""


class CordonedShareError(AllocationError):
    """A share's GPU is cordoned."""


class NotDistinctError(AllocationError):
    """Several shares of one GPU for a container, where the operator wants each from a different one."""


@attrs.frozen
class HostPaths:
    """Directories of the libraries and device nodes on the host, and of the libraries in a container."""

    libraries: str
    libraries_in_container: str
    devices: str


@attrs.frozen
class AllocationOptions:
    """The operator's settings for what a container gets."""

    paths: HostPaths
    framework_hints: bool = True
    placement: Placement = Placement.SPREAD
    multi_share: MultiShare = MultiShare.DISTINCT
    limits_fail_open: bool = True


@attrs.frozen
class Mount:
    """A directory of the host in a container, read-only."""

    host_path: str
    container_path: str


@attrs.frozen
class DeviceNode:
    """A device node of the host in a container, which may read, write and make it (`mrw`)."""

    host_path: str
    container_path: str


@attrs.frozen
class ContainerEdits:
    """All that one container gets. `warning` says what it has shares of and can't use; empty if there is nothing."""

    environment: Mapping[str, str]
    device_nodes: tuple[DeviceNode, ...]
    mounts: tuple[Mount, ...]
    warning: str = ""


def container_edits(allocated: Sequence[Offer], options: AllocationOptions) -> ContainerEdits:
    """Return what a container needs that gets one share of each of these offers.

    Raises NotDistinctError.
    """
    allocated, warning = _usable_together(allocated)
    counts = Counter(offer.unit.uuid for offer in allocated)
    offers = {offer.unit.uuid: offer for offer in allocated}
    if (
        options.multi_share is MultiShare.STRICT_DISTINCT
        and len(offers) < len(allocated)
        and not allocated[0].unit.instance
    ):
        raise NotDistinctError(
            f"{len(allocated)} shares from {len(offers)} GPU(s), where -multi-share strict-distinct asks for as many "
            f"GPUs: ask for fewer shares, or wait until more GPUs of the node have a free one"
        )
    environment = {
        "SGPU_SHARES": str(len(allocated)),
        "SGPU_GPU_UUIDS": ",".join(offers),
        **_allowed_memory(offers, counts),
    }
    edits = _edits(offers.values(), options, environment, hints=options.framework_hints)
    return attrs.evolve(edits, warning=warning) if warning else edits


def claim_edits(
    offer: Offer, shares: int, memory: int | None, options: AllocationOptions, *, hints: bool, only: bool
) -> ContainerEdits:
    """Return what a container needs that gets `shares` of a unit, and may use `memory` bytes (None: unknown), by a
    claim.

    A container may get several of a claim's units, each by edits of its own, of which the last would win on a variable.
    So each unit has variables with its name, and the sums are only there where it is the `only` one of the claim.
    """
    uuid = offer.unit.uuid
    known = {"SGPU_SHARES": str(shares), **({} if memory is None else {MEMORY_VARIABLE: str(memory)})}
    suffix = "_" + re.sub(r"[^A-Z0-9]", "_", uuid.upper())
    named = {f"{name}{suffix}": value for name, value in known.items()}
    return _edits([offer], options, named | ({**known, "SGPU_GPU_UUIDS": uuid} if only else {}), hints=hints)


def _edits(
    offers: Collection[Offer], options: AllocationOptions, environment: Mapping[str, str], *, hints: bool
) -> ContainerEdits:
    """Return the edits for these units. A device node comes only once."""
    simulated = any(offer.unit.gpu.simulated for offer in offers)
    instance = next((offer.unit.uuid for offer in offers if offer.unit.instance), "")
    nodes = dict.fromkeys(node for offer in offers for node in offer.unit.device_nodes)
    paths = options.paths
    directory = os.path.join(paths.devices, "")  # once, not for each node: a tenth of the calls of an Allocate
    return ContainerEdits(
        environment={
            **environment,
            **IGNORED_BY_NVIDIA_RUNTIME,
            **({"CUDA_VISIBLE_DEVICES": instance} if instance else {}),
            **({"SGPU_SIMULATED": "1"} if simulated else {}),
            **(FRAMEWORK_HINTS if hints and not simulated else {}),
        },
        device_nodes=tuple(DeviceNode(f"{directory}{node}", f"/dev/{node}") for node in nodes),
        mounts=() if simulated else (Mount(paths.libraries, paths.libraries_in_container),),
    )


def _usable_together(allocated: Sequence[Offer]) -> tuple[Sequence[Offer], str]:
    """Return those that one process can use, and a warning about the others.

    CUDA gives a process GPUs, or one MIG instance. The first decides; to refuse the rest would only fail the pod.
    """
    if not any(offer.unit.instance for offer in allocated):
        return allocated, ""
    first = allocated[0].unit
    used = [
        offer
        for offer in allocated
        if (offer.unit.uuid == first.uuid if first.instance else offer.unit.instance is None)
    ]
    others = dict.fromkeys(str(offer.unit) for offer in allocated if offer not in used)
    if not others:
        return used, ""
    return used, (
        f"a container was given shares of {first} and of {', '.join(others)}: CUDA can use only one MIG instance, so "
        f"it gets the first; ask for no more shares than one instance has free"
    )


def _allowed_memory(offers: Mapping[str, Offer], counts: Mapping[str, int]) -> Mapping[str, str]:
    """Return the memory that the container may use: in all, and of each GPU where it has several.

    Nothing where the driver does not say how much there is.
    """
    parts = [allowed_memory(offer, counts[uuid]) for uuid, offer in offers.items()]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return {}
    each = {f"{MEMORY_VARIABLE}_{number}": str(part) for number, part in enumerate(known)}
    return {MEMORY_VARIABLE: str(sum(known)), **(each if len(known) > 1 else {})}
