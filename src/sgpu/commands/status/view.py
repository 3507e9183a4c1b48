"""A snapshot as a table for people. Pure: a snapshot, a time and a width in, something for rich to print out.

Knows neither where the snapshot is from nor what it is printed on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import attrs
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sgpu.lib.logs import printable
from sgpu.lib.sizes import GIB
from sgpu.node.cgroup_limit import LimitState
from sgpu.node.usage import ContainerUse
from sgpu.observe.describe import UNKNOWN, ago, by_memory, cordon, free_shares, front_end, notes, percent, size
from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot, Snapshot

#: Columns that the table takes with a UUID in it. With fewer, what would stand side by side stands below each other.
TABLE: Final = 78
#: Columns of a bar, in the table and by itself.
BAR: Final = 15
#: Columns of a sentence in the table where they are not counted.
SENTENCE: Final = 60
#: Columns that a bar at the beginning of a line leaves for the figures after it.
BESIDE_BAR: Final = 25
INDENT: Final = 2

FINE, BAD, NOTE, DIM = "green", "bold red", "yellow", "dim"


@attrs.frozen
class View:
    """Options of the view: columns there are (None: as many as it takes, so that names are never split); only
    characters of ASCII.
    """

    width: int | None
    ascii_only: bool


def render(snapshot: Snapshot, now: float, view: View) -> RenderableType:
    """Return the whole page. `now` is in seconds since the epoch."""
    parts: list[RenderableType] = [_head(snapshot, now), *map(_resource, snapshot.resources)]
    if chosen := front_end(snapshot):
        parts.append(Text(chosen, style=DIM))
    parts += [Text(f"! {note}", style=NOTE) for note in notes(snapshot, now)]
    if snapshot.gpus:
        if view.width is not None and view.width < TABLE:
            parts += _stack(snapshot, now, view, view.width)
        else:
            parts += ["", _table(snapshot, now, view)]
    return Group(*parts)


def _head(snapshot: Snapshot, now: float) -> Text:
    head = Text(f"sgpu {printable(snapshot.version)}", style="bold")
    if snapshot.simulated:
        return head.append(", simulated GPUs, no driver", style="not bold")
    version = printable(snapshot.driver_version) or "not there yet"
    sampled = UNKNOWN if snapshot.sampled_at is None else f"{ago(now - snapshot.sampled_at)} ago"
    return head.append(f", driver {version}, last sample {sampled}", style="not bold")


def _resource(resource: ResourceSnapshot) -> Text:
    line = Text(f"{printable(resource.name)}: ")
    if not resource.registered:
        return line.append("not registered with the kubelet (the daemon's log says why)", style=BAD)
    if not resource.streams:
        return line.append("registered, but the kubelet does not watch its devices", style=NOTE)
    if resource.unpublished:
        return line.append(f"not published: {printable(resource.unpublished)}", style=BAD)
    return line.append("registered with the kubelet", style=FINE)


def _table(snapshot: Snapshot, now: float, view: View) -> Table:
    """GPUs and below each the containers that use it, with what they take in the same columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True)
    names = [_user(use).cell_len + INDENT for gpu in snapshot.gpus for use in gpu.containers]
    widest = max([*names, SENTENCE]) if view.width is None else None
    table.add_column("GPU, pod and container", overflow="fold", max_width=widest)
    table.add_column("Memory", no_wrap=True)
    table.add_column("Util", no_wrap=True, justify="right")
    table.add_column("Shares", no_wrap=True)
    digits = max(len(str(number)) for gpu in snapshot.gpus for number, *_ in _shares(gpu))
    for gpu in snapshot.gpus:
        shares = Text("\n").join(Text(f"{number:>{digits}} {word}", style) for number, word, style in _shares(gpu))
        memory = Text("\n").join((Text(_memory(gpu)), _bar(gpu, BAR, view)))
        table.add_row(Text("\n").join(_about(gpu, now, snapshot.resources)), memory, percent(gpu.utilization), shares)
        for use in by_memory(gpu.containers):
            table.add_row(
                Padding(_user(use), (0, 0, 0, INDENT)),
                _container_memory(use),
                percent(use.utilization),
                Text(f"{use.shares:>{digits}}" if use.pod else "", style="" if use.shares else NOTE),
            )
        if gpu is not snapshot.gpus[-1]:
            table.add_row()
    return table


def _stack(snapshot: Snapshot, now: float, view: View, width: int) -> Iterator[RenderableType]:
    """Yield the same facts below each other, for a narrow terminal."""
    for gpu in snapshot.gpus:
        yield ""
        yield from _about(gpu, now, snapshot.resources)
        memory = (_bar(gpu, max(width - BESIDE_BAR, 5), view), Text(_memory(gpu)))
        yield Text("memory  ").append_text(Text("  ").join(filter(None, memory)))
        yield Text(f"util    {percent(gpu.utilization)}")
        shares = [Text(f"{number} {word}", style) for number, word, style in _shares(gpu)]
        yield Text("shares  ").append_text(Text(", ").join(shares))
        for use in by_memory(gpu.containers):
            yield Padding(_user(use), (0, 0, 0, INDENT))
            figures = _container_memory(use).append(f", {percent(use.utilization)}")
            if use.pod:
                label = f"{use.shares} share{'s' * (use.shares != 1)}"
                figures.append(", ").append(label, style="" if use.shares else NOTE)
            yield Padding(figures, (0, 0, 0, 2 * INDENT))


def _about(gpu: GpuSnapshot, now: float, resources: tuple[ResourceSnapshot, ...]) -> list[Text]:
    """Return the GPU's name, an instance's GPU, its resource unless all have the same, and its health."""
    name = Text(printable(gpu.name), style="bold").append(f"  {printable(gpu.pci_bus_id)}", style="not bold dim")
    since = ago(now - gpu.since)
    if gpu.healthy:
        health = Text(f"healthy for {since}", style=FINE)
    else:
        health = Text("unhealthy", style=BAD).append(
            f" for {since}, since {_moment(gpu.since, now)}: {printable(gpu.reason)}", style="not bold"
        )
    offered = Text(f"as {printable(gpu.resource)}" if gpu.resource else "not offered", style=DIM)
    alike = {gpu.resource} == {resource.name for resource in resources}
    parent = Text(f"of {printable(gpu.parent)}", style=DIM)
    empty = Text("in MIG mode, without instances", style=NOTE)
    cordoned = cordon(gpu, now)
    claimed = () if gpu.memory_claimed is None else (Text(f"claims for {gpu.memory_claimed / GIB:.1f} GiB", style=DIM),)
    return [
        name,
        Text(printable(gpu.uuid)),
        *((parent,) if gpu.parent else ()),
        *((empty,) if gpu.mig_mode else ()),
        *(() if alike else (offered,)),
        health,
        *((Text(cordoned, style=NOTE),) if cordoned else ()),
        *claimed,
    ]


def _moment(moment: float, now: float) -> str:
    """Return the time, with the date unless it is today's."""
    then, today = time.gmtime(moment), time.gmtime(now)
    return time.strftime("%H:%M:%SZ" if then[:3] == today[:3] else "%Y-%m-%d %H:%MZ", then)


def _shares(gpu: GpuSnapshot) -> list[tuple[int, str, str]]:
    """Return the counts of shares, each with its label and style."""
    free = free_shares(gpu)
    if gpu.allocated is None or free is None:
        return [(gpu.shares, "in all", ""), (gpu.withheld, "withheld", NOTE if gpu.withheld else "")]
    return [
        (gpu.allocated, "used", ""),
        # The kubelet gives none of an unhealthy GPU's away.
        (free, "free" if gpu.healthy else "down", "" if gpu.healthy else BAD),
        (gpu.withheld, "withheld", NOTE if gpu.withheld else ""),
    ]


def _user(use: ContainerUse) -> Text:
    if not use.pod:
        return Text(f"no pod: {use.processes} process{'es' * (use.processes != 1)}", style=NOTE)
    name = f"{printable(use.namespace)}/{printable(use.pod)}"
    return Text(name).append(f" {printable(use.container)}", style=DIM)


def _container_memory(use: ContainerUse) -> Text:
    """Return what a container uses and may use: of an over-user its part, else its limit, marked unless enforced."""
    used = size(use.memory_used)
    if use.exceeded is not None:
        return Text().append(f"{used} > {size(use.exceeded)}", style=BAD)
    if use.memory_limit is None:
        return Text(used)
    text = Text(f"{used} / {size(use.memory_limit)}")
    return text if use.limit_state == LimitState.ENFORCED.value else text.append(" !", style=BAD)


def _memory(gpu: GpuSnapshot) -> str:
    if gpu.memory_total is None:
        return UNKNOWN
    used = UNKNOWN if gpu.memory_used is None else f"{gpu.memory_used / GIB:.1f}"
    return f"{used}/{gpu.memory_total / GIB:.1f} GiB"


def _bar(gpu: GpuSnapshot, width: int, view: View) -> Text:
    if not gpu.memory_total or gpu.memory_used is None:
        return Text()
    filled = min(round(width * gpu.memory_used / gpu.memory_total), width)
    full, empty = "#." if view.ascii_only else "█░"
    bar = Text(full * filled, style=NOTE if gpu.withheld else FINE)
    return bar.append(empty * (width - filled), style=DIM)
