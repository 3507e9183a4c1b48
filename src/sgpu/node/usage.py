"""The latest view of how GPUs are used: which container has which share, memory and utilization, by GPU and container.

Changing state, but nothing waits for it: it is read when a choice is to be made. Times are passed in, in monotonic
seconds. Knows neither trio, nor gRPC, nor NVML.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Set
from operator import attrgetter
from typing import Final

import attrs

from sgpu.node.cgroup_limit import ContainerLimit, LimitState
from sgpu.node.container import NO_CONTAINER, Container, OtherUse, StaleAnswer
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.grants import Grants
from sgpu.node.offers import Offer
from sgpu.node.rank import UnitLoad
from sgpu.node.shares import Share

#: Sample intervals after which figures are too old to choose by.
STALE_AFTER: Final = 3


@attrs.frozen
class ContainerUse:
    """One container's shares and use of one GPU: bytes, percent. None: unknown.

    Processes that belong to no pod are together under empty names. `shares` is 0 for a container that uses the GPU
    without having been given a share of it. `memory_limit` is in bytes, None where there is none; `limit_state` says
    whether it is enforced (a LimitState), and `limit_reason` why not. `exceeded` is what an over-user may use; None for
    others, and without a guard.
    """

    namespace: str
    pod: str
    container: str
    shares: int
    memory_used: int | None = None
    utilization: int | None = None
    processes: int = 0
    memory_limit: int | None = None
    limit_state: str = ""
    limit_reason: str = ""
    exceeded: int | None = None


class Usage:
    """The latest figures and holders. `holders` is None while the kubelet does not list them."""

    def __init__(self, interval: float) -> None:
        self.holders: Mapping[Share, Container] | None = None
        #: All containers that have a share, of shares that they have by a claim. `holders` names one of them.
        self.claimants: Mapping[Share, tuple[Container, ...]] = {}
        #: By UUID, the containers to which other plugins gave a unit.
        self.others: Mapping[str, Collection[OtherUse]] = {}
        #: The stored answers of the kubelet that are no longer right; None: unknown.
        self.stale_answers: tuple[StaleAnswer, ...] | None = None
        self.figures: Mapping[str, Figures] = {}
        #: When the figures were taken.
        self.sampled_at = float("-inf")
        self.grants = Grants()
        #: Whether the processes that use GPUs can be attributed to containers.
        self.processes_known = False
        #: Why they can't, where there are any; empty where they can, or nobody has looked yet.
        self.processes_problem = ""
        self._shares: Mapping[str, Counter[Container]] = {}  # how many are held, by UUID; as long as `holders` is
        self._processes: Mapping[str, Mapping[Container, list[ProcessUse]]] = {}  # of the GPUs that report theirs
        self._incomplete: Set[str] = frozenset()  # GPUs with a process of some pod, it is unknown which
        self._interval = interval
        self._limits: Mapping[str, Mapping[Container, ContainerLimit]] = {}
        self._exceeded: Mapping[str, Mapping[Container, int]] = {}
        self._uses: dict[str, tuple[ContainerUse, ...]] = {}  # computed since any of these last changed for the GPU

    def set_figures(self, figures: Mapping[str, Figures], now: float) -> None:
        """Take new figures, by UUID."""
        self.figures, self.sampled_at = figures, now

    def fresh(self, now: float) -> Mapping[str, Figures]:
        """Return the figures, unless they are too old to go by."""
        return {} if now - self.sampled_at > STALE_AFTER * self._interval else self.figures

    def set_holders(self, holders: Mapping[Share, Container] | None) -> None:
        """Take the kubelet's list of which container has which share, or that it no longer gives one (None)."""
        if holders is None:
            self.others, self.stale_answers, self.claimants = {}, None, {}
        else:
            self.grants.reconcile(holders)
        if holders == self.holders:
            return
        self.holders = holders
        shares = defaultdict[str, Counter[Container]](Counter)
        for share, holder in (holders or {}).items():
            shares[share.uuid][holder] += 1
        self._forget_uses(self._shares, shares)
        self._shares = shares

    def set_claimants(self, claimants: Mapping[Share, tuple[Container, ...]]) -> bool:
        """Take all containers that have shares by claims. Returns whether that is new."""
        if claimants == self.claimants:
            return False
        self.claimants = claimants
        self._uses = {}
        return True

    def set_owners(
        self,
        figures: Mapping[str, Figures],
        owners: Mapping[int, Container | None] | None,
        problem: str = "",
        unknown: Collection[int] = (),
    ) -> None:
        """Take the container of each process in these figures, or that they are unknown (None) and why.

        None for one process: it belongs to no pod. `unknown` are processes of some pod, it is unknown which. A process
        that is in neither has ended.
        """
        self.processes_known = owners is not None
        self.processes_problem = problem
        processes = {
            uuid: _by_owner(known.processes, owners)
            for uuid, known in figures.items()
            if owners is not None and known.processes is not None
        }
        incomplete = {
            uuid for uuid, known in figures.items() if any(process.pid in unknown for process in known.processes or ())
        }
        self._forget_uses(self._processes, processes)
        for uuid in incomplete ^ self._incomplete:
            self._uses.pop(uuid, None)
        self._processes, self._incomplete = processes, incomplete

    def set_limits(self, limits: Mapping[str, Mapping[Container, ContainerLimit]]) -> None:
        """Take the memory limits of containers, by UUID."""
        self._forget_uses(self._limits, limits)
        self._limits = limits

    def set_exceeded(self, exceeded: Mapping[str, Mapping[Container, int]]) -> None:
        """Take the bytes that each over-user may use, by UUID."""
        self._forget_uses(self._exceeded, exceeded)
        self._exceeded = exceeded

    def allocated(self, now: float) -> frozenset[Share] | None:
        """Return all shares that a container has or was given moments ago; None if that is unknown."""
        return None if self.holders is None else frozenset(self.holders) | self.grants.shares(now)

    def loads(self, offers: Iterable[Offer], now: float) -> Mapping[str, UnitLoad]:
        """Return how each unit that is offered is used, by UUID."""
        holders = self.holders
        # Only the few that were just handed out are counted here: those held can be thousands, and a kubelet waits.
        granted = Counter(share.uuid for share in self.grants.shares(now) if share not in (holders or ()))
        expected = self.grants.expected_bytes(now)
        fresh = self.fresh(now)
        loads = {}
        for offer in offers:
            uuid = offer.unit.uuid
            known = fresh.get(uuid, Figures())
            free = known.memory_free
            held = sum(self._shares.get(uuid, Counter()).values())
            loads[uuid] = UnitLoad(
                allocated=None if holders is None else held + granted[uuid],
                shares=offer.shares,
                free_memory=None if free is None else max(free - expected.get(uuid, 0), 0),
                utilization=known.utilization,
                others=sum(offer.shares if use.whole else 1 for use in self.others.get(uuid, ())),
                alone=offer.unit.instance is not None,
            )
        return loads

    def uses(self, uuid: str) -> tuple[ContainerUse, ...]:
        """Return what each container has and uses of this GPU, in order."""
        if uuid in self._uses:  # metrics, `status` and the log all ask for it
            return self._uses[uuid]
        # Of a claim that several have, each has what it takes; it counts once in what is allocated.
        claimed = Counter(each for share, has in self.claimants.items() if share.uuid == uuid for each in has)
        shares: Mapping[Container, int] = self._shares.get(uuid, Counter()) | claimed
        processes = self._processes.get(uuid)
        limits = self._limits.get(uuid, {})
        containers = sorted({*shares, *(processes or ())}, key=attrgetter("namespace", "pod", "container"))
        # Where a process may be any pod's, that none of a container is known does not mean that it uses nothing.
        none_known: list[ProcessUse] | None = None if processes is None or uuid in self._incomplete else []
        exceeded = self._exceeded.get(uuid, {})
        self._uses[uuid] = tuple(
            _use(
                container,
                shares.get(container, 0),
                (processes or {}).get(container, none_known),
                limits.get(container),
                exceeded.get(container),
            )
            for container in containers
        )
        return self._uses[uuid]

    def _forget_uses(self, before: Mapping[str, object], now: Mapping[str, object]) -> None:
        """Forget what was computed of the GPUs of which this differs, by UUID."""
        for uuid in [uuid for uuid in self._uses if before.get(uuid) != now.get(uuid)]:
            del self._uses[uuid]

    def pods(self, uuid: str) -> Mapping[str, int | None]:
        """Return the bytes of this GPU's memory by pod (namespace/name) that has a share of it or uses it, most first.

        None: unknown. Processes of no pod are under an empty name.
        """
        memory: dict[str, list[int | None]] = defaultdict(list)
        for use in self.uses(uuid):
            memory[f"{use.namespace}/{use.pod}" if use.pod else ""].append(use.memory_used)
        pods = [(_sum(known), pod) for pod, known in memory.items()]
        return {pod: used for used, pod in sorted(pods, key=lambda pair: (-(pair[0] or 0), pair[1]))}


def _by_owner(
    processes: Iterable[ProcessUse], owners: Mapping[int, Container | None]
) -> Mapping[Container, list[ProcessUse]]:
    found = defaultdict(list)
    for process in processes:
        if process.pid in owners:
            found[owners[process.pid] or NO_CONTAINER].append(process)
    return found


def _use(
    container: Container,
    shares: int,
    processes: Collection[ProcessUse] | None,
    limit: ContainerLimit | None,
    exceeded: int | None,
) -> ContainerUse:
    memory = utilization = None
    if processes is not None:
        memory = _sum(process.memory for process in processes)
        utilization = _sum(process.utilization for process in processes)
    if limit and limit.state is LimitState.ENFORCED and limit.used is not None:
        memory = limit.used  # as the driver counts it for the limit; that needs no process ids
    return ContainerUse(
        namespace=container.namespace,
        pod=container.pod,
        container=container.container,
        shares=shares,
        memory_used=memory,
        utilization=None if utilization is None else min(utilization, 100),  # each is rounded by itself
        processes=len(processes or ()),
        memory_limit=limit.hard if limit else None,
        limit_state=limit.state.value if limit else "",
        limit_reason=limit.reason if limit else "",
        exceeded=exceeded,
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    """Return None where one of them is unknown: a part would be taken for all."""
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
