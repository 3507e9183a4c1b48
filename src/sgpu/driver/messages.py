"""Messages between the driver's process and its parent: values, and their form as lines."""

from __future__ import annotations

import enum
import json
import typing
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Final

import attrs

from sgpu.node.cgroup_limit import LimitAnswer, Target, WantedLimit
from sgpu.node.figures import Figures

#: The XID of a changed recovery action.
RECOVERY_XID: Final = 154


@attrs.frozen
class ReleasedGpu:
    """A GPU to leave alone, so that it can be reset: its PCI bus id, and its own device node, relative to /dev."""

    pci_bus_id: str
    device_node: str


@attrs.frozen
class WorkerConfig:
    """Configuration of the driver's process: where to look, and the seconds between polls.

    `suspects` are the UUIDs of GPUs to ask nothing, and `released` are GPUs not even to open. `known` has the UUIDs in
    the driver's order, as the process before saw them: so the first call about a GPU, which is by index, has a name.
    `once`: end after one answer. `look_only`: make no missing device nodes.
    """

    host_path: str
    dev_directory: str
    sysfs_directory: str
    interval: float
    proc_directory: str = "/proc"
    suspects: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    released: tuple[ReleasedGpu, ...] = ()
    once: bool = False
    look_only: bool = False


@attrs.frozen
class InstanceReport:
    """One MIG instance in a poll. `problem` says why no container can open it; empty where one can.

    `memory_bytes` are those of its profile. `capability_nodes` are its device nodes, relative to /dev.
    """

    uuid: str
    name: str
    profile: str
    gpu_instance: int
    compute_instance: int
    memory_bytes: int
    capability_nodes: tuple[str, ...]
    figures: Figures = attrs.Factory(Figures)
    problem: str = ""


@attrs.frozen
class GpuReport:
    """One GPU in a poll. None: the driver does not say (not supported, or the driver is older than the question).

    `recovery_action` is NVML's field 230: 0 is none. `fabric_state` is `nvmlGpuFabricState_t`, and `fabric_status` what
    NVML says of a fabric that is complete. `error` is what NVML answered where a call failed that should not.

    `mig_mode`: MIG is on, so that only the `instances` can be used; `mig_pending`: it will be after the next reset.
    `memory_refused`: the driver does not say the memory to this process for want of permission.
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
    mig_mode: bool = False
    mig_pending: bool = False
    memory_refused: bool = False
    instances: tuple[InstanceReport, ...] = ()


@attrs.frozen
class Report:
    """One poll of the driver. `problems` has a line for each GPU that can't be offered, not even as unhealthy, and one
    where events can't be listened to.

    `skipped` are the UUIDs of those that are there and were left alone, because a call about them did not return;
    `nodeless` of those that the driver answers for and that have no device node. `order` has all UUIDs in the
    driver's order, empty where it is unknown. `eventless` are the UUIDs of GPUs without events. `released` are the PCI
    bus ids of GPUs that the process was told to leave alone, and did; `held` says why one may be open all the same.
    """

    gpus: tuple[GpuReport, ...]
    problems: tuple[str, ...]
    skipped: tuple[str, ...]
    driver_version: str
    library: str
    nodeless: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    eventless: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    held: str = ""


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
    MIG_CONFIG_CHANGE = "MIG configuration change"


@attrs.frozen
class DriverEvent:
    """One NVML event: the GPU, what kind, for an XID its number, and the MIG instance where it is about one."""

    uuid: str
    kind: EventKind
    xid: int = 0
    gpu_instance: int | None = None
    compute_instance: int | None = None

    @property
    def asks_for_poll(self) -> bool:
        """Return whether the event only asks for a poll: the driver's recovery action or MIG instances changed."""
        changed = self.kind in (EventKind.RECOVERY_ACTION, EventKind.MIG_CONFIG_CHANGE)
        return changed or (self.kind is EventKind.XID and self.xid == RECOVERY_XID)


@attrs.frozen
class Failure:
    """A function of libnvidia-ml answered an error that it should not. Whatever was being asked about, still is."""

    function: str
    code: int


@attrs.frozen
class LimitReport:
    """What became of limits: those that are new in the table, or all of it."""

    answers: tuple[LimitAnswer, ...]


Message = Report | NotReady | DriverEvent | Failure | LimitReport

_KINDS = {kind.__name__: kind for kind in (Report, NotReady, DriverEvent, Failure, LimitReport)}


def encode_config(config: WorkerConfig) -> str:
    """Return the configuration as one argument of a command line."""
    return json.dumps(attrs.asdict(config))


def decode_config(text: str) -> WorkerConfig:
    """Return what `encode_config` was given."""
    config: WorkerConfig = _reader(WorkerConfig)(json.loads(text))
    return config


def encode_limits(new: Iterable[WantedLimit], gone: Iterable[Target]) -> bytes:
    """Return what changes in the table of limits as one line for the process' standard input."""
    return json.dumps([list(new), list(gone)]).encode() + b"\n"


def decode_limits(line: bytes) -> tuple[list[WantedLimit], list[Target]]:
    """Return what `encode_limits` was given. The parent is trusted: it started the process."""
    new, gone = json.loads(line)
    return [WantedLimit(*fields) for fields in new], [Target(*fields) for fields in gone]


def encode(message: Message) -> bytes:
    """Return the message as one line."""
    return json.dumps({"message": type(message).__name__, **_fields(message)}, default=_fields).encode() + b"\n"


def _fields(value: Any) -> Any:  # noqa: ANN401  # what JSON has no form for
    if isinstance(value, enum.Enum):
        return value.value
    return {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}


def decode(line: bytes) -> Message:
    """Return what `encode` was given. Raises ValueError for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        message: Message = _reader(_KINDS[fields.pop("message")])(fields)
        return message
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of the driver's process: {line[:100]!r}") from error


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:  # noqa: ANN401  # a type, as a field is annotated with it
    """Return the function that makes a value of this type of what JSON has for it.

    It raises ValueError, KeyError, TypeError or AttributeError where that is of another type.
    """
    inner = typing.get_args(kind)
    if attrs.has(kind):
        readers = {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}
        return lambda fields: kind(**{name: readers[name](value) for name, value in fields.items()})
    if hasattr(kind, "_make"):  # a named tuple
        read_fields, read_list = [_reader(hint) for hint in typing.get_type_hints(kind).values()], _reader(list)
        return lambda items: kind(*(read(item) for read, item in zip(read_fields, read_list(items), strict=True)))
    if typing.get_origin(kind) is tuple:
        read_item, read_list = _reader(inner[0]), _reader(list)
        return lambda items: tuple(map(read_item, read_list(items)))
    if inner:  # or None
        read = _reader(inner[0])
        return lambda value: None if value is None else read(value)
    if kind is float or issubclass(kind, enum.Enum):
        return kind  # type: ignore[no-any-return]
    return partial(_checked, kind)


def _checked(kind: type, value: object) -> object:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
