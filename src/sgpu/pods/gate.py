"""The wait for memory limits: until the pod that has some shares is held to them, or it is known why it can't be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from sgpu.node.cgroup_limit import ContainerLimit, LimitState, Target
from sgpu.node.offers import Offer
from sgpu.node.shares import Share
from sgpu.node.state import NodeState

#: Seconds. The kubelet gives up after 30 with a device plugin, and after 45 with DRA.
TIMEOUT: Final = 10.0


async def wait_limited(node: NodeState, shares: Sequence[Share]) -> str:
    """Wait until the driver has answered for all of them. Returns why one is not enforced; empty if all are.

    Shares of units without limits don't count.
    """
    limited = {offer.unit.uuid for each in node.offers.values() for offer in each if _has_limit(offer)}
    shares = [share for share in shares if share.uuid in limited]
    enforcement = node.enforcement
    enforcement.look.notify()
    with trio.move_on_after(TIMEOUT):
        while True:
            answered = enforcement.answered.next
            known = [limit for share in shares for limit in _limits(node, share)]
            if not all(known) and enforcement.problem:
                return enforcement.problem
            if all(limit and limit.state is not LimitState.PENDING for limit in known):
                reasons = [limit.reason for limit in known if limit and limit.state is not LimitState.ENFORCED]
                return reasons[0] or "its cgroup is gone" if reasons else ""
            await answered.wait()
    if not all(known):
        return f"no pod with these shares and a cgroup was found within {TIMEOUT:g} s"
    return f"the driver has not answered within {TIMEOUT:g} s"


def _has_limit(offer: Offer) -> bool:
    return bool(offer.limit_factor and offer.unit.memory_bytes)


def _limits(node: NodeState, share: Share) -> list[ContainerLimit | None]:
    """Return the limit of each pod that has a share; None for one that is not known yet."""
    directories = node.enforcement.wanted.pods.get(share, ())
    return [node.enforcement.state(Target(share.uuid, directory)) for directory in directories] or [None]
