"""PreStartContainer: the kubelet waits with a container until the memory of its pod is limited.

Asked for only where there are limits. The pod's cgroup is there by then, and the container's is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio
from purerpc import StatusCode

from sgpu.node.cgroup_limit import ContainerLimit, LimitState, Target
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.rpc import RpcError

logger = logging.getLogger(__name__)

#: Seconds. The kubelet gives up after 30.
TIMEOUT: Final = 10.0


async def wait_limited(node: NodeState, resource: str, share_ids: Sequence[str], *, fail_open: bool) -> None:
    """Return once the pod that has these shares is limited on each of their GPUs.

    Where that can't be: log why and return all the same, or raise RpcError unless `fail_open`.
    """
    limited = {offer.unit.uuid for offer in node.offered(resource) if offer.limit_factor and offer.unit.memory_bytes}
    shares = [share for share in map(Share.parse, share_ids) if share and share.uuid in limited]
    problem = await _wait_decided(node, shares)
    if not problem:
        return
    message = f"no memory limit for the container with {', '.join(share_ids)}: {problem}"
    if not fail_open:
        logger.error("%s; it does not start (-memory-limits-failure closed)", message)
        raise RpcError(StatusCode.FAILED_PRECONDITION, message)
    logger.warning("%s; it starts without one (-memory-limits-failure open)", message)


async def _wait_decided(node: NodeState, shares: Sequence[Share]) -> str:
    """Wait until the driver has answered for all of them. Returns why one is not enforced; empty if all are."""
    enforcement = node.enforcement
    enforcement.look.notify()
    with trio.move_on_after(TIMEOUT):
        while True:
            answered = enforcement.answered.next
            known = [_limit(node, share) for share in shares]
            if not all(known) and enforcement.problem:
                return enforcement.problem
            if all(limit and limit.state is not LimitState.PENDING for limit in known):
                reasons = [limit.reason for limit in known if limit and limit.state is not LimitState.ENFORCED]
                return reasons[0] or "its cgroup is gone" if reasons else ""
            await answered.wait()
    if not all(known):
        return f"no pod with these shares and a cgroup was found within {TIMEOUT:g} s"
    return f"the driver has not answered within {TIMEOUT:g} s"


def _limit(node: NodeState, share: Share) -> ContainerLimit | None:
    directory = node.enforcement.wanted.pods.get(share)
    return node.enforcement.state(Target(share.uuid, directory)) if directory else None
