"""Messages between the driver's process and its parent: values, and their form as lines."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from typing import Any, Final

import attrs

from sgpu.node.cgroup_limit import LimitAnswer, LimitState, WantedLimit
from sgpu.node.figures import Figures, ProcessUse

#: The XID of a changed recovery action.
RECOVERY_XID: Final = 154


@attrs.frozen
class WorkerConfig:
    """Configuration of the driver's process: where to look, and the seconds between polls.

    `suspects` are the UUIDs of GPUs to leave alone. `known` has the UUIDs in the driver's order, as the process before
    saw them: so the first call about a GPU, which is by index, has a name. `once`: end after one answer. `look_only`:
    make no missing device nodes.
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
class GpuReport:
    """One GPU in a poll. None: the driver does not say (not supported, or the driver is older than the question).

    `recovery_action` is NVML's field 230: 0 is none. `fabric_state` is `nvmlGpuFabricState_t`, and `fabric_status` what
    NVML says of a fabric that is complete. `error` is what NVML answered where a call failed that should not.
    """

    uuid: str
    name: str
    pci_bus_id: str
    device_nodes: tuple[str, ...]
    numa_node: int | None = None
    figures: Figures = attrs.Factory(Figures)
    recovery_action: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    pages_pending: bool | None = None
    fabric_state: int | None = None
    fabric_status: int | None = None
    error: str = ""


@attrs.frozen
class Report:
    """One poll of the driver. `problems` has a line for each GPU that can't be offered, not even as unhealthy.

    `skipped` are the UUIDs of those that are there and were left alone, because a call about them did not return;
    `nodeless` of those that the driver answers for and that have no device node. `order` has all UUIDs in the
    driver's order, empty where it is unknown. `eventless` are the UUIDs of GPUs without events.
    """

    gpus: tuple[GpuReport, ...]
    problems: tuple[str, ...]
    skipped: tuple[str, ...]
    driver_version: str
    library: str
    nodeless: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    eventless: tuple[str, ...] = ()


@attrs.frozen
class NotReady:
    """There is no driver to ask: why not, and what to do. `gone`: whatever is there afterwards was reset.

    `code` is NVML's, where it is NVML that says so.
    """

    reason: str
    gone: bool = False
    code: int | None = None


class EventKind(enum.Enum):
    """The NVML events that the worker reports."""

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
        """Return whether the event only asks for a poll: the driver's recovery action changed, be it to none."""
        return self.kind is EventKind.RECOVERY_ACTION or (self.kind is EventKind.XID and self.xid == RECOVERY_XID)


@attrs.frozen
class CallStarted:
    """A call of libnvidia-ml begins that may never return: about this GPU, or about the driver if empty."""

    uuid: str


@attrs.frozen
class Failure:
    """A function of libnvidia-ml answered an error that it should not. Whatever was being asked about, still is."""

    function: str
    code: int


@attrs.frozen
class LimitStarted:
    """A call about a memory limit of this GPU begins that may never return. It runs beside the polls."""

    uuid: str


@attrs.frozen
class LimitReport:
    """What became of limits: those that are new in the table, or all of it."""

    answers: tuple[LimitAnswer, ...]


Message = Report | NotReady | DriverEvent | CallStarted | Failure | LimitStarted | LimitReport

_KINDS = {
    kind.__name__: kind for kind in (Report, NotReady, DriverEvent, CallStarted, Failure, LimitStarted, LimitReport)
}


def encode_config(config: WorkerConfig) -> str:
    """Return the configuration as one argument of a command line."""
    return json.dumps(attrs.asdict(config))


def decode_config(text: str) -> WorkerConfig:
    """Return what `encode_config` was given."""
    fields = json.loads(text)
    return WorkerConfig(**{**fields, "suspects": tuple(fields["suspects"]), "known": tuple(fields["known"])})


def encode_limits(table: Iterable[WantedLimit]) -> bytes:
    """Return the limits as one line for the process' standard input."""
    return json.dumps([attrs.astuple(wanted) for wanted in table]).encode() + b"\n"


def decode_limits(line: bytes) -> tuple[WantedLimit, ...]:
    """Return what `encode_limits` was given. The parent is trusted: it started the process."""
    return tuple(WantedLimit(*fields) for fields in json.loads(line))


def encode(message: Message) -> bytes:
    """Return the message as one line."""
    fields = attrs.asdict(message, value_serializer=lambda _, __, value: getattr(value, "value", value))
    return json.dumps({"message": type(message).__name__, **fields}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return what `encode` was given. Raises ValueError for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        kind = _KINDS[fields.pop("message")]
        if kind is Report:
            fields["gpus"] = tuple(map(_gpu, fields["gpus"]))
            for name in ("problems", "skipped", "nodeless", "order", "eventless"):
                fields[name] = tuple(fields[name])
        if kind is LimitReport:
            fields["answers"] = tuple(map(_answer, fields["answers"]))
        if kind is DriverEvent:
            fields["kind"] = EventKind(fields["kind"])
        return kind(**fields)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of the driver's process: {line[:100]!r}") from error


def _answer(fields: dict[str, Any]) -> LimitAnswer:
    return LimitAnswer(**{**fields, "wanted": WantedLimit(**fields["wanted"]), "state": LimitState(fields["state"])})


def _gpu(fields: dict[str, Any]) -> GpuReport:
    figures = fields["figures"]
    if figures["processes"] is not None:
        figures["processes"] = tuple(ProcessUse(**process) for process in figures["processes"])
    return GpuReport(**{**fields, "device_nodes": tuple(fields["device_nodes"]), "figures": Figures(**figures)})
