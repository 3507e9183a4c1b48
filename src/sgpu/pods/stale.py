"""Stored answers of Allocate that are no longer right.

The kubelet gives its stored answer to each container that it starts again, also after a reboot, when the GPUs may have
other device nodes (kubernetes#67107). Pure: knows neither trio nor files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sgpu.node.container import StaleAnswer
from sgpu.node.gpu import Gpu, Unit, units
from sgpu.node.shares import Share
from sgpu.pods.checkpoint import Checkpoint
from sgpu.pods.held import Holders


def stale_answers(checkpoint: Checkpoint, held: Holders, gpus: Iterable[Gpu]) -> list[StaleAnswer]:
    """Return the stored answers that have other GPUs or MIG instances than those of the container's shares.

    `held` has, by resource, the holders that count: the checkpoint also has pods that have ended. Left out are
    containers with a share of a unit that these GPUs do not have, or that is simulated.
    """
    known = {unit.uuid: unit for gpu in gpus if gpu.device_nodes for unit in units(gpu)}
    stale = set()
    for entry in checkpoint.entries:
        shares = [share for share in map(Share.parse, entry.ids) if share]
        holders = held.get(entry.resource, {})
        if not shares or not entry.gpu_nodes:
            continue
        if any(share not in holders or share.uuid not in known for share in shares):
            continue
        right = _right_nodes([known[share.uuid] for share in shares])
        if entry.gpu_nodes not in right:
            stale.add(StaleAnswer(str(holders[shares[0]]), tuple(sorted(entry.gpu_nodes)), tuple(sorted(right[0]))))
    return sorted(stale)


def _right_nodes(of_shares: Sequence[Unit]) -> list[frozenset[str]]:
    """Return the nodes that the container should get; which, depends on which of several MIG instances came first."""
    together = frozenset().union(*(_nodes(unit) for unit in of_shares if not unit.instance))
    return [*([together] if together else []), *(_nodes(unit) for unit in of_shares if unit.instance)]


def _nodes(unit: Unit) -> frozenset[str]:
    capabilities = unit.instance.capability_nodes if unit.instance else ()
    return frozenset(f"/dev/{node}" for node in (unit.gpu.device_nodes[0], *capabilities))
