"""What the driver said, as values that travel between processes: one poll, or one event. Imports nothing of sgpu."""

from __future__ import annotations

import enum
import json
from typing import Any, Final

import attrs

#: The XID of a changed recovery action.
RECOVERY_XID: Final = 154


@attrs.frozen
class Orders:
    """What the driver's process is told when it starts: where to look, and a poll each `interval` seconds.

    Suspects (UUIDs) are left alone. `known` has the UUIDs in the driver's order, as a process before saw them: so
    that the first call about a GPU, which is by its place, has a name. `once`: one answer is enough.
    `look_only`: make no device node that is not there.
    """

    host_path: str
    dev_directory: str
    sysfs_directory: str
    interval: float
    suspects: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    once: bool = False
    look_only: bool = False


@attrs.frozen
class ProcessReport:
    """A process that uses a GPU: bytes of memory, and percent of the time since the last poll. None: not told."""

    pid: int
    memory: int | None
    utilisation: int | None


@attrs.frozen
class GpuReport:
    """One GPU as the driver tells of it. None: it does not say (not supported, or older than the question).

    Memory in bytes, utilisation in percent of the last sample period. `recovery_action` is NVML's field 230: 0 is
    none. `fabric_state` is `nvmlGpuFabricState_t`, and `fabric_status` what NVML says of a fabric that is complete.
    `error` is what NVML answered where a question failed that should not. `processes` are those that use it, by the
    process ids that libnvidia-ml's own process sees.
    """

    uuid: str
    name: str
    pci_bus_id: str
    device_nodes: tuple[str, ...]
    numa_node: int | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    memory_free: int | None = None
    utilisation: int | None = None
    recovery_action: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    pages_pending: bool | None = None
    fabric_state: int | None = None
    fabric_status: int | None = None
    error: str = ""
    processes: tuple[ProcessReport, ...] | None = None


@attrs.frozen
class Report:
    """One poll of the driver. `problems` has a line for each GPU that can't be offered, not even as unhealthy.

    `unasked` are the UUIDs of those that are there and were left alone, because a call about them did not return;
    `nodeless` of those that the driver answers for and that have no device node. `order` has all UUIDs in the
    driver's order, empty where it does not tell.
    """

    gpus: tuple[GpuReport, ...]
    problems: tuple[str, ...]
    unasked: tuple[str, ...]
    driver_version: str
    library: str
    nodeless: tuple[str, ...] = ()
    order: tuple[str, ...] = ()


@attrs.frozen
class NotReady:
    """There is no driver to ask: why not, and what to do. `gone`: whatever is there afterwards was reset."""

    reason: str
    gone: bool = False


class EventKind(enum.Enum):
    """The NVML events that are told of."""

    XID = "XID"
    DOUBLE_BIT_ECC = "double-bit ECC error"
    NON_FATAL_POISON = "non-fatal poison"
    FATAL_POISON = "fatal poison"
    GPU_UNAVAILABLE = "GPU unavailable"
    RECOVERY_ACTION = "recovery action"


@attrs.frozen
class DriverEvent:
    """One NVML event: the GPU, what kind, and for an XID its number."""

    uuid: str
    kind: EventKind
    xid: int = 0

    @property
    def asks_for_poll(self) -> bool:
        """Whether it says only that the driver's recovery action changed, be it to none."""
        return self.kind is EventKind.RECOVERY_ACTION or (self.kind is EventKind.XID and self.xid == RECOVERY_XID)


@attrs.frozen
class Asking:
    """A call of the driver begins that may never return: about this GPU, or about the driver if empty."""

    uuid: str


@attrs.frozen
class Failure:
    """A function of libnvidia-ml answered an error that it should not. Whatever was being asked about, still is."""

    function: str
    code: int


Message = Report | NotReady | DriverEvent | Asking | Failure

_KINDS = {kind.__name__: kind for kind in (Report, NotReady, DriverEvent, Asking, Failure)}


def encode_orders(orders: Orders) -> str:
    """One argument of a command line."""
    return json.dumps(attrs.asdict(orders))


def decode_orders(text: str) -> Orders:
    """What `encode_orders` was given."""
    fields = json.loads(text)
    return Orders(**{**fields, "suspects": tuple(fields["suspects"]), "known": tuple(fields["known"])})


def encode(message: Message) -> bytes:
    """One line."""
    fields = attrs.asdict(message, value_serializer=lambda _, __, value: getattr(value, "value", value))
    return json.dumps({"message": type(message).__name__, **fields}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """What `encode` was given. Raises ValueError for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        kind = _KINDS[fields.pop("message")]
        if kind is Report:
            fields["gpus"] = tuple(map(_gpu, fields["gpus"]))
            for name in ("problems", "unasked", "nodeless", "order"):
                fields[name] = tuple(fields[name])
        if kind is DriverEvent:
            fields["kind"] = EventKind(fields["kind"])
        return kind(**fields)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of the driver's process: {line[:100]!r}") from error


def _gpu(fields: dict[str, Any]) -> GpuReport:
    processes = fields["processes"]
    if processes is not None:
        processes = tuple(ProcessReport(**process) for process in processes)
    return GpuReport(**{**fields, "device_nodes": tuple(fields["device_nodes"]), "processes": processes})
