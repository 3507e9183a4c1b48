"""The daemon's state at one moment, as values, for metrics, probes and `status`.

Times are seconds since the epoch, memory is in bytes, utilization in percent. None: unknown.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import attrs

from sgpu.node.container import StaleAnswer
from sgpu.node.usage import ContainerUse

Value = TypeVar("Value", bound=attrs.AttrsInstance)


@attrs.frozen
class CordonSnapshot:
    """A cordon: why, and since when. `released`: no process of sgpu has the GPU open, so that it can be reset.

    `problem` says why it can't be released, although no container has a share of it any more.
    """

    reason: str
    since: float
    released: bool = False
    problem: str = ""


@attrs.frozen
class GpuSnapshot:
    """One GPU or MIG instance, whether or not it is healthy. `resource` is empty for one that is not offered.
    `memory_claimed` is what claims take of its memory; None where there are no claims, but a device plugin.

    `since`: when it became healthy or unhealthy, as far as the daemon has seen. `reason` is empty when it is healthy.
    `parent` is the UUID of an instance's GPU, and `mig_profile` its size; both are empty for a GPU. `mig_mode`: it is a
    GPU in MIG mode, which has no instance to show in its place. `cordon` is that of its GPU; None: it is not cordoned.
    """

    uuid: str
    name: str
    pci_bus_id: str
    resource: str
    healthy: bool
    reason: str
    since: float
    memory_total: int | None
    memory_used: int | None
    memory_free: int | None
    utilization: int | None
    shares: int
    allocated: int | None
    withheld: int
    containers: tuple[ContainerUse, ...] = ()
    parent: str = ""
    mig_profile: str = ""
    mig_mode: bool = False
    memory_claimed: int | None = None
    cordon: CordonSnapshot | None = None


@attrs.frozen
class ResourceSnapshot:
    """One resource. `registered`: the kubelet took the last registration. `streams`: ListAndWatch streams open.

    `unpublished`: why the scheduler does not know it; empty if it does, None where the kubelet tells it.
    """

    name: str
    registered: bool
    streams: int
    unpublished: str | None = None


@attrs.frozen
class Snapshot:
    """The whole node.

    `waiting` says why there is no GPU, empty if there is one or was. `sampled_at`: when the driver last answered; None
    if never. `holders_known`: the kubelet lists which container has which share. `processes_problem`: why processes
    can't be attributed to containers, empty if they can or there are none. `simulated`: there is no driver, and no
    process uses the GPUs. `standby`: another daemon serves the kubelet, and this one waits to take over.
    `stale_answers`: pods that would get other GPUs than theirs if they started again.
    `stale_after`: seconds after which a sample is old: several were missed, not only delayed by a slow call.
    `cordoned_elsewhere` are UUIDs of cordoned GPUs that this node does not have now.
    `api`: the way that GPUs are offered, as `-api` names it, empty before that is decided; `api_reason`: why, with
    `-api auto`.
    """

    version: str
    time: float
    driver_version: str
    waiting: str
    sampled_at: float | None
    holders_known: bool
    processes_problem: str
    resources: tuple[ResourceSnapshot, ...]
    gpus: tuple[GpuSnapshot, ...]
    simulated: bool = False
    stale_answers: tuple[StaleAnswer, ...] | None = None
    standby: bool = False
    stale_after: float = 25.0
    cordoned_elsewhere: tuple[str, ...] = ()
    api: str = ""
    api_reason: str = ""


def publish(snapshot: Snapshot) -> Snapshot:
    """Return what anyone who reaches the metrics may know: stale answers name device nodes, and metrics count them."""
    return attrs.evolve(snapshot, stale_answers=None)


def encode(snapshot: Snapshot) -> bytes:
    """Return the snapshot as JSON."""
    return json.dumps(attrs.asdict(snapshot)).encode()


def decode(text: bytes) -> Snapshot:
    """Return what `encode` was given, by a daemon of any version: fields that are not known here are left out.

    Raises ValueError for anything else.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        resources = tuple(_make(ResourceSnapshot, resource) for resource in fields.pop("resources"))
        gpus = tuple(map(_gpu, fields.pop("gpus")))
        stale = fields.pop("stale_answers", None)
        answers = None if stale is None else tuple(_stale_answer(**each) for each in stale)
        elsewhere = tuple(map(str, fields.pop("cordoned_elsewhere", ())))
        made = {"resources": resources, "gpus": gpus, "stale_answers": answers, "cordoned_elsewhere": elsewhere}
        return _make(Snapshot, {**fields, **made})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not what a daemon of this version says: {error}") from error


def program(body: bytes) -> str:
    """Return which program and version gave an answer that is no snapshot, as far as that can be read."""
    try:
        return f"sgpu {json.loads(body)['version']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "another program or version"


def _make(kind: type[Value], fields: dict[str, Any]) -> Value:
    known = attrs.fields_dict(kind)
    return kind(**{name: value for name, value in fields.items() if name in known})


def _gpu(fields: dict[str, Any]) -> GpuSnapshot:
    containers = tuple(_make(ContainerUse, use) for use in fields["containers"])
    cordon = fields.get("cordon")
    made = {"containers": containers, "cordon": None if cordon is None else _make(CordonSnapshot, cordon)}
    return _make(GpuSnapshot, {**fields, **made})


def _stale_answer(pod: str, stored: list[str], right: list[str]) -> StaleAnswer:
    return StaleAnswer(pod, tuple(stored), tuple(right))
