"""A snapshot in words and figures, for `status`, the web page and the cluster's view. Pure.

Knows neither where a snapshot is from nor how it is laid out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from sgpu.lib.logs import printable
from sgpu.lib.sizes import GIB, MIB
from sgpu.node.cgroup_limit import LimitState
from sgpu.node.container import STALE_ADVICE
from sgpu.node.usage import ContainerUse
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

UNKNOWN: Final = "-"
DAY: Final = 86400


def front_end(snapshot: Snapshot) -> str:
    """Return how GPUs are offered and why, where sgpu chose it; else nothing."""
    if not snapshot.api_reason:
        return ""
    name = {"dra": "dynamic resource allocation (DRA)"}.get(snapshot.api, "a device plugin")
    return f"offered by {name}: {printable(snapshot.api_reason)}"


def notes(snapshot: Snapshot, now: float) -> Iterator[str]:
    """Yield the problems of the node as a whole, and what to do."""
    if snapshot.waiting:
        yield f"waiting: {printable(snapshot.waiting)}"
    elif not snapshot.gpus:
        yield "the driver lists no GPU"
    if snapshot.sampled_at is not None and now - snapshot.sampled_at > snapshot.stale_after:
        yield f"the driver last answered {ago(now - snapshot.sampled_at)} ago; memory and utilization are from then"
    if not snapshot.holders_known:
        yield (
            "which pod has which share is unknown: the kubelet does not list it on -pod-resources-socket "
            "(Kubernetes 1.20 and later; its directory must be mounted into the daemon's pod)"
        )
    if snapshot.stale_answers:
        pods = ", ".join(printable(str(stale)) for stale in snapshot.stale_answers)
        yield f"containers that start again get the wrong GPU in {pods}; {STALE_ADVICE}"
    if snapshot.processes_problem:
        yield f"GPU memory and utilization by pod are unknown: {printable(snapshot.processes_problem)}"
    for uuid in snapshot.cordoned_elsewhere:
        yield f"GPU {printable(uuid)} is cordoned and not in this node; if it stays away, `sgpu uncordon` it"
    uses = [use for gpu in snapshot.gpus for use in gpu.containers if use.memory_limit is not None]
    reasons = Counter(use.limit_reason for use in uses if use.limit_state != LimitState.ENFORCED.value)
    for reason, count in reasons.items():
        yield f"memory limits marked ! are not enforced ({count}): {printable(reason)}"


def cordon(gpu: GpuSnapshot, now: float) -> str:
    """Return that a GPU is cordoned, since when and why, and how far that is; empty: it is not."""
    if gpu.cordon is None:
        return ""
    reason = f" ({printable(gpu.cordon.reason)})" if gpu.cordon.reason else ""
    return f"cordoned for {ago(now - gpu.cordon.since)}{reason}: {progress(gpu)}"


def progress(gpu: GpuSnapshot) -> str:
    """Return how far it is until a cordoned GPU is released."""
    if gpu.cordon and gpu.cordon.released:
        return "released for a reset"
    if gpu.cordon and gpu.cordon.problem:
        return f"not released: {printable(gpu.cordon.problem)}"
    if gpu.allocated is None:
        return "who has shares of it is unknown"
    if gpu.allocated:
        return f"{gpu.allocated} share{'s' * (gpu.allocated != 1)} in use"
    return "being released"


def ago(seconds: float) -> str:
    """Return a span of time in one unit, rounded down. A negative one (the clock was set back) counts as 0."""
    for size, unit in ((DAY, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(int(seconds), 0)} s"


def size(amount: int | None) -> str:
    """Return bytes as text, as in `300 MiB`."""
    if amount is None:
        return UNKNOWN
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


def percent(part: int | None) -> str:
    """Return a percentage as text."""
    return UNKNOWN if part is None else f"{part} %"


def free_shares(gpu: GpuSnapshot) -> int | None:
    """Return the shares that are neither held by a pod nor withheld, of an unhealthy GPU too; None: unknown."""
    return None if gpu.allocated is None else max(gpu.shares - gpu.allocated - gpu.withheld, 0)


def by_memory(uses: tuple[ContainerUse, ...]) -> list[ContainerUse]:
    """Sort by memory used, most first; processes of no pod come last."""
    return sorted(uses, key=lambda use: (not use.pod, -(use.memory_used or 0), use.namespace, use.pod, use.container))
