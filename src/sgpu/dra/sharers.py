"""Pods that name a claim which is prepared already: the kubelet does not ask again, and lists their containers only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final, NoReturn

import trio

from sgpu.dra.claims import ClaimError, read_claim
from sgpu.dra.driver import claim_path
from sgpu.dra.prepared import PreparedClaims
from sgpu.kubeapi import ApiServer, ApiServerError
from sgpu.lib.logs import OnChange, few
from sgpu.node.claims import PreparedClaim
from sgpu.node.container import Container
from sgpu.node.shares import Share
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Seconds between attempts to read a claim.
RETRY: Final = 5.0


async def follow_pods(api: ApiServer, node: NodeState, claims: PreparedClaims, pool: str) -> NoReturn:
    """Learn the uids of pods that have a claim after others: memory limits find a pod's cgroup by its uid."""
    problem = OnChange(logger, logging.WARNING)
    asked: dict[str, frozenset[str]] = {}  # names of pods for which a claim was read, by its uid
    while True:
        changed, failure = node.changed.next, ""
        for claim in node.claims.values():
            names = unknown_pods(claim, node.usage.claimants)
            if names <= asked.get(claim.uid, frozenset()):
                continue
            try:
                thing = await api.get(claim_path(claim.namespace, claim.name))
                await claims.set_pods(claim.uid, read_claim(thing, claim.uid, pool).pods)
                asked[claim.uid] = names
            except (ApiServerError, ClaimError, OSError) as error:
                failure = (
                    f"pods {few(names)} use claim {claim}, which was prepared for others, and have no memory limit: "
                    f"{error}; trying again"
                )
        problem.update(failure)
        asked = {uid: names for uid, names in asked.items() if uid in node.claims}
        with trio.move_on_after(RETRY if failure else float("inf")):
            await changed.wait()


def unknown_pods(claim: PreparedClaim, claimants: Mapping[Share, Iterable[Container]]) -> frozenset[str]:
    """Return the names of pods that have a claim, by the kubelet's list, and that it was not prepared for."""
    shares = (share for unit in claim.units for share in unit.shares)
    listed = {container.pod for share in shares for container in claimants.get(share, ())}
    return frozenset(listed - {pod.name for pod in claim.pods})
