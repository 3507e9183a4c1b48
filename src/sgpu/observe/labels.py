"""A snapshot → labels of the node, for schedulers and autoscalers. Values only; what is unknown has no label.

Only GPUs and MIG instances that are offered count. A fault changes no label: it is not a reason to describe the node
differently.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from sgpu.lib.sizes import MIB
from sgpu.node.cgroup_limit import LimitState
from sgpu.node.policy import PROFILE, profile_resource
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

#: Not NVIDIA's, whose own program writes labels there.
PREFIX: Final = "deepomatic.com/gpu."
#: The labels of a MIG profile, in NVIDIA's form. By default, this is also the name of its resource with `-mig profile`.
MIG_PREFIX: Final = f"deepomatic.com/mig-{PROFILE}."
#: Characters of a label's value, as `k8s.io/apimachinery/pkg/util/validation` has it.
MOST: Final = 63
_ILLEGAL: Final = re.compile(r"[^A-Za-z0-9_.-]+")
#: In place of a value where GPUs of one node have several.
MIXED: Final = "mixed"


def labels(snapshot: Snapshot) -> Mapping[str, str]:
    """Return the labels of the node; none as long as it offers no GPU."""
    gpus = [gpu for gpu in snapshot.gpus if gpu.shares]  # an instance that was destroyed, but is in use, has none
    if not gpus:
        return {}
    known = {
        # The card's: what is an instance's own, its labels say.
        "product": _common(gpu.name.removesuffix(f" MIG {gpu.mig_profile}") for gpu in gpus),
        "memory": _memory(gpus),
        "count": str(len({gpu.pci_bus_id for gpu in gpus})),
        "shares": str(sum(gpu.shares for gpu in gpus)),
        "sharing": _common("none" if gpu.shares == 1 else "time-slicing" for gpu in gpus),
        "driver-version": snapshot.driver_version,
        "driver-major": snapshot.driver_version.partition(".")[0],
        "memory-limits": _limits(gpus),
    }
    values = {f"{PREFIX}{name}": legal(value) for name, value in known.items()} | _profiles(gpus)
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


def _profiles(gpus: Iterable[GpuSnapshot]) -> dict[str, str]:
    """Return the number of MIG instances of each profile, and the memory that each of them has at least."""
    instances = defaultdict[str, list[GpuSnapshot]](list)
    for gpu in gpus:
        if gpu.mig_profile:
            instances[profile_resource(MIG_PREFIX, gpu.mig_profile)].append(gpu)
    counts = {f"{prefix}count": str(len(found)) for prefix, found in instances.items()}
    return counts | {f"{prefix}memory": _memory(found) for prefix, found in instances.items()}


def _limits(gpus: Iterable[GpuSnapshot]) -> str:
    """Return whether the driver enforces all memory limits; empty where there are none, or an answer is to come."""
    states = {use.limit_state for gpu in gpus for use in gpu.containers if use.memory_limit is not None}
    if not states or LimitState.PENDING.value in states:
        return ""
    return "enforced" if states == {LimitState.ENFORCED.value} else "not-enforced"
