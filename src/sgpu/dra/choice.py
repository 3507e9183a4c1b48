"""With `-api auto`: facts about the cluster and the node → whether it offers its GPUs by DRA, and why. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import attrs

from sgpu.lib.logs import few

#: The first version with all that it takes turned on; and the first that is no good at all with shared devices.
FROM: Final = (1, 36)
BY_GATES: Final = (1, 35)
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)")


@attrs.frozen
class Facts:
    """What was found. Texts are empty where there is nothing to say.

    `claims`: how many are prepared since the node was booted; None: they are in a file that this sgpu can't read.
    `prepared_before`: there were some, in whatever boot. `holders`: the pods that have a share by a device plugin;
    None: unknown. `problem`: why something is unknown, and `passing` that it may be known soon. `refused`: what the API
    server does not keep of a shared device.
    """

    claims: int | None = 0
    prepared_before: bool = False
    holders: Sequence[str] | None = ()
    server: str = ""
    kubelet: str = ""
    refused: str = ""
    problem: str = ""
    passing: bool = False


class Choice(NamedTuple):
    """`dra` or a device plugin, and why. `settled`: no fact that is still to come would change it."""

    dra: bool
    reason: str
    settled: bool = True


def choose(facts: Facts) -> Choice:
    """Return the way that this node offers its GPUs, which never changes under pods.

    Claims count for more than shares by a device plugin: a pod that has one can't end without DRA.
    """
    if facts.claims is None:
        return Choice(True, "claims were prepared here by another version of sgpu")
    if facts.claims:
        return Choice(True, f"{facts.claims} claim(s) are prepared on this node")
    if facts.holders:
        reason = f"{few(facts.holders)} got shares by it; to change the node to DRA, drain it and restart sgpu there"
        return Choice(False, reason)
    if facts.problem:
        # A pod that has a share by a device plugin must be excluded first.
        if facts.passing and facts.prepared_before and facts.holders is not None:
            # Pods with claims may come back, and no others can come meanwhile.
            return Choice(True, f"claims were prepared on this node before, and now {facts.problem}", settled=False)
        return Choice(False, facts.problem, settled=not facts.passing)
    for what, version in (("the API server", facts.server), ("the kubelet", facts.kubelet)):
        if problem := unfit(version):
            return Choice(False, f"{what} is {problem}")
    if facts.refused:
        return Choice(False, facts.refused)
    reason = f"the API server ({facts.server}) and the kubelet ({facts.kubelet}) can, and no pod has a share otherwise"
    return Choice(True, reason)


def unfit(version: str) -> str:
    """Return what is wrong with a version for DRA with shared devices; empty: nothing."""
    number = _number(version)
    if number is None:
        return f"of an unknown version ({version!r})"
    if number >= FROM:
        return ""
    if too_old(version):
        return f"Kubernetes {version}, which can't share devices rightly; DRA needs 1.36"
    return f"Kubernetes {version}, where DRA needs feature gates that can't be seen from here: -api dra if they are on"


def too_old(version: str) -> bool:
    """Return whether a scheduler of this version goes wrong with shared devices. An unknown one may be right."""
    number = _number(version)
    return number is not None and number < BY_GATES


def _number(version: str) -> tuple[int, int] | None:
    found = _VERSION.match(version)
    return (int(found[1]), int(found[2])) if found else None
