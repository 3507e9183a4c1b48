"""A snapshot → labels of the node, for schedulers and autoscalers. Values only; what is unknown has no label.

Only GPUs that are offered count. A fault changes no label: it is not a reason to describe the node differently.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from sgpu.lib.sizes import MIB
from sgpu.node.cgroup_limit import LimitState
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

#: Not NVIDIA's, whose own program writes labels there.
PREFIX: Final = "deepomatic.com/gpu."
#: Characters of a label's value, as `k8s.io/apimachinery/pkg/util/validation` has it.
MOST: Final = 63
_ILLEGAL: Final = re.compile(r"[^A-Za-z0-9_.-]+")
#: In place of a value where GPUs of one node have several.
MIXED: Final = "mixed"


def labels(snapshot: Snapshot) -> Mapping[str, str]:
    """Return the labels of the node; none as long as it offers no GPU."""
    gpus = [gpu for gpu in snapshot.gpus if gpu.resource]
    if not gpus:
        return {}
    known = {
        "product": _common(gpu.name for gpu in gpus),
        "memory": _memory(gpus),
        "count": str(len({gpu.pci_bus_id for gpu in gpus})),
        "shares": str(sum(gpu.shares for gpu in gpus)),
        "sharing": _common("none" if gpu.shares == 1 else "time-slicing" for gpu in gpus),
        "driver-version": snapshot.driver_version,
        "driver-major": snapshot.driver_version.partition(".")[0],
        "memory-limits": _limits(gpus),
    }
    values = {f"{PREFIX}{name}": legal(value) for name, value in known.items()}
    return {name: value for name, value in values.items() if value}


def legal(text: str) -> str:
    """Return the text as a label can have it: `Tesla T4` as `Tesla-T4`. Empty: nothing of it is legal."""
    return _ILLEGAL.sub("-", text).strip("-_.")[:MOST].rstrip("-_.")


def _common(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else MIXED


def _memory(gpus: Collection[GpuSnapshot]) -> str:
    """Return the MiB of the smallest GPU, so that `Gt` in a node affinity holds for whichever a pod gets."""
    sizes = [gpu.memory_total for gpu in gpus]
    known = [size for size in sizes if size is not None]
    return str(min(known) // MIB) if len(known) == len(sizes) else ""


def _limits(gpus: Iterable[GpuSnapshot]) -> str:
    """Return whether the driver enforces all memory limits; empty where there are none, or an answer is to come."""
    states = {use.limit_state for gpu in gpus for use in gpu.containers if use.memory_limit is not None}
    if not states or LimitState.PENDING.value in states:
        return ""
    return "enforced" if states == {LimitState.ENFORCED.value} else "not-enforced"
