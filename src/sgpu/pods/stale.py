"""Stored answers of Allocate that are no longer right.

The kubelet gives its stored answer to each container that it starts again, also after a reboot, when the GPUs may have
other device nodes (kubernetes#67107). Pure: knows neither trio nor files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sgpu.node.container import StaleAnswer
from sgpu.node.gpu import Gpu
from sgpu.node.shares import Share
from sgpu.pods.checkpoint import Checkpoint
from sgpu.pods.held import Holders

#: What the operator can do.
ADVICE: Final = "delete these pods: new ones get new answers"


def stale_answers(checkpoint: Checkpoint, held: Holders, gpus: Iterable[Gpu]) -> list[StaleAnswer]:
    """Return the stored answers that have other GPUs than those of the container's shares.

    `held` has, by resource, the holders that count: the checkpoint also has pods that have ended. Left out are
    containers with a share of a GPU that is not among `gpus`, or is simulated.
    """
    paths = {gpu.uuid: f"/dev/{gpu.device_nodes[0]}" for gpu in gpus if gpu.device_nodes}
    stale = set()
    for entry in checkpoint.entries:
        shares = [share for share in map(Share.parse, entry.ids) if share]
        holders = held.get(entry.resource, {})
        if not shares or not entry.gpu_nodes:
            continue
        if any(share not in holders or share.uuid not in paths for share in shares):
            continue
        right = {paths[share.uuid] for share in shares}
        if entry.gpu_nodes != right:
            stale.add(StaleAnswer(str(holders[shares[0]]), tuple(sorted(entry.gpu_nodes)), tuple(sorted(right))))
    return sorted(stale)
