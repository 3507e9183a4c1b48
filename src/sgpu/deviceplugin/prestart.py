"""PreStartContainer: the kubelet waits with a container until the memory of its pod is limited.

Asked for only where there are limits. The pod's cgroup is there by then, and the container's is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from purerpc import StatusCode

from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods import gate
from sgpu.rpc import RpcError

logger = logging.getLogger(__name__)


async def wait_limited(node: NodeState, resource: str, share_ids: Sequence[str], *, fail_open: bool) -> None:
    """Return once the pod that has these shares is limited on each of their GPUs.

    Where that can't be: log why and return all the same, or raise RpcError unless `fail_open`.
    """
    offered = {offer.unit.uuid for offer in node.offered(resource)}
    shares = [share for share in map(Share.parse, share_ids) if share and share.uuid in offered]
    problem = await gate.wait_limited(node, shares)
    if not problem:
        return
    message = f"no memory limit for the container with {', '.join(share_ids)}: {problem}"
    if not fail_open:
        logger.error("%s; it does not start (-memory-limits-failure closed)", message)
        raise RpcError(StatusCode.FAILED_PRECONDITION, message)
    logger.warning("%s; it starts without one (-memory-limits-failure open)", message)
