"""Keeps the limits that are wanted up to date, as pods and their containers come and go.

Knows neither NVML nor gRPC: what is wanted goes to `node.enforcement`, from where the driver's side takes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import NoReturn

import attrs
import trio

from sgpu.lib.concurrency import race
from sgpu.lib.files import content_identity
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.cgroup_limit import Target
from sgpu.node.claims import promised
from sgpu.node.limits import PodCgroups, WantedLimits, merged, pod_limits
from sgpu.node.offers import Offer
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods.cgroup_tree import CgroupTree, open_tree
from sgpu.pods.cgroups import plain_uid
from sgpu.pods.checkpoint import FILE, Checkpoint, read_checkpoint
from sgpu.pods.container import Containers, read_links

logger = logging.getLogger(__name__)


@attrs.frozen
class LimitOptions:
    """Directories to look in: cgroups, the kubelet's checkpoint, and its links to logs; and seconds between looks that
    nothing asks for.
    """

    cgroups: Path
    plugins: Path
    container_logs: Path
    interval: float


async def limit_containers(options: LimitOptions, node: NodeState) -> NoReturn:
    """Say which cgroups should be limited to what, for as long as some offer has limits, and then that none should."""
    while True:
        changed = node.changed.next
        if not node.gpus:  # it is not known yet what is limited
            await changed.wait()
            continue
        if not _limited(node):
            node.enforcement.want(WantedLimits())
            await changed.wait()
            continue
        with open_tree(options.cgroups) as tree:
            tree.watch_beside((options.plugins, options.container_logs))
            await run_in_thread(tree.scan)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tree.watch)
                await _Limiter(options, node, tree).follow()
                nursery.cancel_scope.cancel()


def _limited(node: NodeState) -> list[Offer]:
    return [offer for each in node.offers.values() for offer in each if offer.limit_factor]


def _gone(targets: Iterable[Target]) -> list[Target]:
    return [target for target in targets if not os.path.isdir(target.cgroup)]


def _allocated(checkpoint: Checkpoint, resources: Set[str]) -> dict[str, Mapping[str, list[Share]]]:
    """Return the shares of these resources that containers have, by the container's name, by the pod's uid."""
    shares: dict[str, dict[str, list[Share]]] = {}
    for entry in checkpoint.entries:
        parsed = list(filter(None, map(Share.parse, entry.ids)))
        if parsed and entry.resource in resources:
            shares.setdefault(plain_uid(entry.pod_uid), {}).setdefault(entry.container, []).extend(parsed)
    return dict(shares)


class _Limiter:
    """What was read, until it changes."""

    def __init__(self, options: LimitOptions, node: NodeState, tree: CgroupTree) -> None:
        self._options = options
        self._node = node
        self._tree = tree
        self._seen: tuple[int, ...] | None = None
        self._checkpoint = Checkpoint({}, ())
        self._allocated: dict[str, Mapping[str, list[Share]]] = {}  # what it has, by container, by the pod's uid
        self._allocated_of: tuple[object, ...] = ()  # what that was made of
        self._links: list[str] = []
        self._containers = Containers({}, {})
        self._pods: Set[str] = frozenset()  # uids of those that were there before
        self._shares: dict[str, Mapping[str, list[Share]]] = {}  # by container, by the pod's uid
        self._rules: tuple[object, ...] = ()  # what the limits of all pods depend on
        self._limits: dict[str, tuple[object, WantedLimits]] = {}  # and what each was made of, by the pod's directory
        self._problem = OnChange(logger, logging.WARNING)

    async def follow(self) -> None:
        """Update what is wanted after each change, until no offer has limits any more."""
        enforcement = self._node.enforcement
        outdated = True  # what was read of files
        while offers := _limited(self._node):
            # Taken before anything is read: what changes meanwhile is looked at in the next turn.
            cgroups = self._tree.changed.next
            others = (self._tree.changed_beside.next, self._node.changed.next, enforcement.look.next)
            problem = await self._read(outdated)
            self._problem.update(problem)
            enforcement.set_problem(problem)
            if not problem:  # else what was wanted stays
                pods = self._tree.pods()
                self._note_shares(pods)
                self._note_strangers(pods)
                enforcement.want(self._wanted(offers))
                if outdated:  # else soon
                    await self._forget_gone(pods)
            with trio.move_on_after(self._options.interval):
                await race(cgroups.wait, *(event.wait for event in others))
            # A container of a pod that is known does not wait for files, which take a thread.
            alone = cgroups.is_set() and not any(event.is_set() for event in others)
            outdated = bool(problem) or not alone or not self._tree.follows_beside()
            if not self._tree.follows():  # the first pod's cgroup may just have been made
                await run_in_thread(self._tree.scan)

    def _wanted(self, offers: list[Offer]) -> WantedLimits:
        """Return the limits of all pods, made anew only for those of which something has changed."""
        amounts = promised(self._node.claims.values())
        before = self._limits if self._rules == (offers, amounts) else {}
        self._rules, self._limits = (offers, amounts), {}
        for pod in self._tree.pods():
            facts = (pod, self._shares.get(pod.uid, {}), self._containers.named(pod.containers))
            known, limits = before.get(pod.directory, (None, WantedLimits()))
            if known != facts:
                limits = pod_limits(offers, *facts, amounts)
            self._limits[pod.directory] = facts, limits
        return merged(limits for _, limits in self._limits.values())

    async def _forget_gone(self, pods: Iterable[PodCgroups]) -> None:
        """Forget the limits of cgroups that were removed."""
        known = {directory for pod in pods for directory in (pod.directory, *pod.containers.values())}
        unseen = [target for target in self._node.enforcement.recorded() if target.cgroup not in known]
        if unseen:
            self._node.enforcement.forget(await run_in_thread(_gone, unseen))

    async def _read(self, files: bool) -> str:
        """Read what changed, `files` only if asked to. Returns what is missing for limits, and what to do."""
        options = self._options
        if not (options.cgroups / "cgroup.controllers").exists():
            return (
                f"memory limits need cgroup v2, and {options.cgroups} has none: mount the host's /sys/fs/cgroup there, "
                f"or set -cgroup-directory"
            )
        if not self._tree.has_kubelet():
            return (
                f"no memory limits: the kubelet has no cgroup below {options.cgroups}; mount the host's /sys/fs/cgroup "
                f"there, or set -cgroup-directory"
            )
        try:
            if files:
                await run_in_thread(self._read_files, abandon_on_cancel=True)
        except (OSError, ValueError) as error:
            return f"no memory limits for new pods: cannot read the kubelet's checkpoint: {error}"
        return ""

    def _read_files(self) -> None:
        seen = content_identity(self._options.plugins / FILE)
        if seen != self._seen:
            self._checkpoint = read_checkpoint(self._options.plugins) if seen else Checkpoint({}, ())
            self._seen = seen
        try:
            links = os.listdir(self._options.container_logs)
        except OSError:  # not mounted: which container a cgroup is of stays unknown
            links = []
        if links != self._links:
            self._links, self._containers = links, read_links(links)

    def _note_shares(self, pods: Iterable[PodCgroups]) -> None:
        """Take the shares of pods, which are known as long as the pod's cgroup is there: a checkpoint can get lost."""
        made_of = (self._seen, set(self._node.offers))
        if made_of != self._allocated_of:
            self._allocated_of, self._allocated = made_of, _allocated(self._checkpoint, self._node.offers.keys())
        shares = dict(self._allocated)
        for uid, claimed in self._claimed().items():
            shares[uid] = {**shares.get(uid, {}), **claimed}
        there = {pod.uid for pod in pods}
        self._shares = {uid: each for uid, each in {**self._shares, **shares}.items() if uid in there}

    def _note_strangers(self, pods: Iterable[PodCgroups]) -> None:
        """Have the kubelet asked about new pods without shares: they may name a claim that was prepared for others."""
        there = {pod.uid for pod in pods}
        if self._node.claims and not there <= self._pods | self._shares.keys():
            self._node.pods_appeared.notify()
        self._pods = there

    def _claimed(self) -> Mapping[str, dict[str, list[Share]]]:
        """Return the shares of claims by container, by the pod's uid; all of a pod's also under no container's name.

        That holds for containers that the kubelet has not listed yet.
        """
        claimants = self._node.usage.claimants
        claimed: dict[str, dict[str, list[Share]]] = {}
        for claim in self._node.claims.values():
            shares = [share for unit in claim.units for share in unit.shares]
            for pod in claim.pods:
                of_pod = claimed.setdefault(plain_uid(pod.uid), {})
                of_pod.setdefault("", []).extend(shares)
                for share in shares:
                    for holder in claimants.get(share, ()):
                        if (holder.namespace, holder.pod) == (claim.namespace, pod.name):
                            of_pod.setdefault(holder.container, []).append(share)
        return claimed
