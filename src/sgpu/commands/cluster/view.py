"""The views of the cluster as tables. Pure: answers in, something for rich to print out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isinf
from typing import Final

import attrs
from rich.console import Group, RenderableType
from rich.text import Text

from sgpu.commands.cluster.agents import Answer
from sgpu.commands.cluster.columns import Cell, Columns
from sgpu.commands.cluster.facts import Amount, Place, PodUse, faults, pods, room, total, unknown_room
from sgpu.commands.status.view import BAD, DIM, FINE, NOTE
from sgpu.lib.logs import printable
from sgpu.lib.sizes import GIB
from sgpu.observe.describe import UNKNOWN, ago, cordon, free_shares, percent, size
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

#: Columns of numbers.
NUMBERS: Final = frozenset(
    {"GPUs", "Shares used", "Free", "Withheld", "Memory used", "Util", "Shares", "Used", "May use", "Used %"}
    | {"Free memory", "Free shares", "Fits"}
)


@attrs.frozen
class Options:
    """`wide`: more columns. `amount`: what room is looked for."""

    wide: bool = False
    amount: Amount = attrs.Factory(Amount)


def nodes_view(answers: Sequence[Answer], options: Options) -> RenderableType:
    """Each node with its sums, or the reason why it does not answer."""
    wide = ("Version", "Driver", "GPU model", "Sample", "sgpu pod") if options.wide else ()
    table = _table("Node", "GPUs", "Shares used", "Free", "Memory used", *wide, "Faults")
    for answer in answers:
        snapshot = answer.snapshot
        if snapshot is None:
            blank = [UNKNOWN] * (4 + len(wide))
            table.add_row(printable(answer.node), *blank, Text(printable(answer.problem), BAD))
            continue
        count = sum(1 for _ in faults([answer]))
        more = _wide_node(answer, snapshot) if options.wide else ()
        table.add_row(printable(answer.node), *_sums(snapshot.gpus), *more, Text(str(count), BAD if count else ""))
    return Group(table, "", _summary(answers))


def gpus_view(answers: Sequence[Answer], options: Options) -> RenderableType:
    """Each GPU."""
    wide = ("UUID", "Resource") if options.wide else ()
    table = _table("Node", "GPU", *wide, "Shares used", "Free", "Withheld", "Memory used", "Util", "Health")
    for answer in answers:
        if answer.snapshot is None:
            blank = [UNKNOWN] * (6 + len(wide))
            table.add_row(printable(answer.node), *blank, Text(printable(answer.problem), BAD))
            continue
        for gpu in answer.snapshot.gpus:
            more = (printable(gpu.uuid), printable(gpu.resource) or "not offered") if options.wide else ()
            table.add_row(
                printable(answer.node),
                _gpu(gpu),
                *more,
                _of(gpu.allocated, gpu.shares),
                _free([gpu]),
                Text(str(gpu.withheld), NOTE if gpu.withheld else ""),
                _memory([gpu]),
                percent(gpu.utilization),
                _health(gpu, answer.snapshot.time),
            )
    return Group(table, "", _summary(answers))


def pods_view(answers: Sequence[Answer], options: Options) -> RenderableType:
    """Who has and uses what, those that use most of their part first."""
    wide = ("Container", "UUID") if options.wide else ()
    table = _table("Pod", *wide, "Node", "GPU", "Shares", "Used", "May use", "Used %", "Util")
    for pod in pods(answers):
        use = pod.use
        name = f"{printable(use.namespace)}/{printable(use.pod)}" if use.pod else f"no pod: {use.processes} processes"
        more = (printable(use.container), printable(pod.gpu.uuid)) if options.wide else ()
        table.add_row(
            Text(name, "" if use.pod else NOTE),
            *more,
            printable(pod.node),
            _gpu(pod.gpu),
            str(use.shares) if use.pod else UNKNOWN,
            size(use.memory_used),
            size(pod.part) if use.pod else UNKNOWN,
            _ratio(pod),
            percent(use.utilization),
        )
    found: RenderableType = table if table.rows else "no pod on the nodes that answered has a share, or uses a GPU"
    return Group(found, "", _summary(answers))


def faults_view(answers: Sequence[Answer], _: Options) -> RenderableType:
    """All that is wrong."""
    table = _table("Node", "What", "Fault")
    for fault in faults(answers):
        table.add_row(printable(fault.node), printable(fault.subject), Text(printable(fault.message), BAD))
    found: RenderableType = table if table.rows else Text("no faults", FINE)
    return Group(found, "", _summary(answers))


def room_view(answers: Sequence[Answer], options: Options) -> RenderableType:
    """Where an amount would fit."""
    amount = options.amount
    by_memory = bool(amount.memory)
    wanted = f"{size(amount.memory)} of a GPU's memory and a share" if by_memory else _count(amount.shares, "share")
    table = _table(
        "Node", *(("GPU", "Free memory", "Free shares") if by_memory else ("Free shares",)), "Fits", "Resource"
    )
    for place in room(answers, amount):
        table.add_row(printable(place.node), *_free_there(place), f"{place.times} x", printable(place.resource))
    silent = sum(answer.snapshot is None for answer in answers)
    lines = [table if table.rows else Text(f"no node that answers has room for {wanted}", NOTE), ""]
    if unknown := unknown_room(answers, amount):
        lines.append(Text(f"unknown for {_count(len(unknown), 'GPU')}: nobody reports what is free there", NOTE))
    if silent:
        lines.append(Text(f"unknown for {_count(silent, 'node')} that did not answer", NOTE))
    return Group(Text(f"Room for {wanted}", "bold"), *lines, _summary(answers))


VIEWS: Final[Mapping[str, Callable[[Sequence[Answer], Options], RenderableType]]] = {
    "nodes": nodes_view,
    "gpus": gpus_view,
    "pods": pods_view,
    "faults": faults_view,
    "room": room_view,
}


def _table(*columns: str) -> Columns:
    return Columns(columns, NUMBERS)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _summary(answers: Sequence[Answer]) -> Text:
    gpus = [gpu for answer in answers if answer.snapshot for gpu in answer.snapshot.gpus]
    answered = sum(answer.snapshot is not None for answer in answers)
    down = sum(not gpu.healthy for gpu in gpus)
    used = total(gpu.allocated for gpu in gpus if gpu.resource)
    shares = f"{UNKNOWN if used is None else used} of {_count(sum(gpu.shares for gpu in gpus), 'share')} used"
    line = Text(f"{answered} of {_count(len(answers), 'node')} answered", DIM if answered == len(answers) else NOTE)
    line.append(f"; {_count(len(gpus), 'GPU')}, ", DIM)
    line.append(f"{down} unhealthy", BAD if down else DIM)
    return line.append(f"; {shares}", DIM)


def _sums(gpus: Sequence[GpuSnapshot]) -> tuple[Cell, ...]:
    healthy = sum(gpu.healthy for gpu in gpus)
    count = Text(
        f"{healthy}/{len(gpus)}" if healthy < len(gpus) else str(len(gpus)), BAD if healthy < len(gpus) else ""
    )
    used = total(gpu.allocated for gpu in gpus if gpu.resource)
    return count, _of(used, sum(gpu.shares for gpu in gpus)), _free(gpus), _memory(gpus)


def _free(gpus: Sequence[GpuSnapshot]) -> str:
    free = total(free_shares(gpu) for gpu in gpus if gpu.healthy and gpu.resource)
    return UNKNOWN if free is None else str(free)


def _of(used: int | None, whole: int) -> str:
    return f"{UNKNOWN if used is None else used}/{whole}"


def _memory(gpus: Sequence[GpuSnapshot]) -> str:
    used, whole = total(gpu.memory_used for gpu in gpus), total(gpu.memory_total for gpu in gpus)
    if whole is None:
        return UNKNOWN
    return f"{UNKNOWN if used is None else f'{used / GIB:.1f}'}/{whole / GIB:.1f} GiB"


def _wide_node(answer: Answer, snapshot: Snapshot) -> tuple[str, ...]:
    models = sorted({printable(gpu.name) for gpu in snapshot.gpus})
    sampled = UNKNOWN if snapshot.sampled_at is None else f"{ago(snapshot.time - snapshot.sampled_at)} ago"
    driver = "simulated" if snapshot.simulated else printable(snapshot.driver_version) or UNKNOWN
    pod = f"{printable(answer.namespace)}/{printable(answer.pod)}"
    return printable(snapshot.version), driver, ", ".join(models) or UNKNOWN, sampled, pod


def _health(gpu: GpuSnapshot, now: float) -> Text:
    health = Text("healthy", FINE) if gpu.healthy else Text(f"unhealthy: {printable(gpu.reason)}", BAD)
    return Text("; ").join((health, Text(cordon(gpu, now), NOTE))) if gpu.cordon else health


def _gpu(gpu: GpuSnapshot) -> Text:
    return Text(printable(gpu.name)).append(f" {printable(gpu.pci_bus_id)}", DIM)


def _ratio(pod: PodUse) -> Text:
    ratio = pod.ratio
    if ratio is None or not pod.use.pod:
        return Text(UNKNOWN)
    if isinf(ratio):
        return Text("no share", BAD)
    style = BAD if pod.use.exceeded is not None else NOTE if ratio > 1 else ""
    return Text(f"{100 * ratio:.0f} %", style)


def _free_there(place: Place) -> tuple[Cell, ...]:
    if place.gpu is None:
        return (str(place.free),)
    return _gpu(place.gpu), size(place.free), str(free_shares(place.gpu))
