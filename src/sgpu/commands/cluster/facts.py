"""Answers of daemons → what the views show: sums, faults, pods by use, room. Pure: knows no layout."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import Final

import attrs

from sgpu.commands.cluster.agents import Answer
from sgpu.lib.sizes import GIB, MIB
from sgpu.node.usage import ContainerUse
from sgpu.observe.describe import ago, free_shares, notes
from sgpu.observe.snapshot import GpuSnapshot, Snapshot

_UNITS: Final = {"Mi": MIB, "Gi": GIB}
_AMOUNT: Final = re.compile(r"(?P<number>[0-9]{1,9}(\.[0-9]{1,3})?)((?P<unit>[MG]i)B?)?")


@attrs.frozen
class Fault:
    """Something to look after: on which node, of which part of it, and what."""

    node: str
    subject: str
    message: str


@attrs.frozen
class PodUse:
    """What one container has and uses of one GPU. `part`: the bytes that it may use; None: unknown."""

    node: str
    gpu: GpuSnapshot
    use: ContainerUse

    @property
    def part(self) -> int | None:
        """Its limit, else its fair part of the memory."""
        if self.use.memory_limit is not None:
            return self.use.memory_limit
        if self.gpu.memory_total is None or not self.gpu.shares:
            return None
        return self.gpu.memory_total * self.use.shares // self.gpu.shares

    @property
    def ratio(self) -> float | None:
        """Memory used over its part; infinite for use without a share, None if unknown."""
        if self.part is None or self.use.memory_used is None:
            return None
        if not self.part:
            return inf if self.use.memory_used else 0.0
        return self.use.memory_used / self.part


@attrs.frozen
class Amount:
    """What room is looked for: shares of one container, or bytes of one GPU's memory."""

    shares: int = 1
    memory: int = 0


@attrs.frozen
class Place:
    """Where an amount fits, and how many times. `gpu` is None where it is shares, which may be of several GPUs."""

    node: str
    resource: str
    gpu: GpuSnapshot | None
    free: int
    times: int


def parse_amount(text: str) -> Amount:
    """Return the amount of `4` (shares), `20GiB` or `500Mi`. Raises ValueError."""
    found = _AMOUNT.fullmatch(text)
    if found is None or not float(found["number"]):
        raise ValueError(text)
    if found["unit"]:
        return Amount(memory=int(float(found["number"]) * _UNITS[found["unit"]]))
    return Amount(shares=int(found["number"]))


def by_node(answers: Iterable[Answer]) -> list[Answer]:
    """Return one answer for each node, by name: the serving daemon's, where another one stands by or is starting."""
    nodes: dict[str, Answer] = {}
    for answer in answers:
        other = nodes.get(answer.node)
        if other is None or _rank(answer) < _rank(other):
            nodes[answer.node] = answer
    return [nodes[name] for name in sorted(nodes, key=natural)]


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts node2 before node10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def in_namespace(answers: Iterable[Answer], namespace: str) -> list[Answer]:
    """Return the answers with the containers of this namespace only, and the GPUs that these have or use."""
    return [attrs.evolve(a, snapshot=a.snapshot and _only(a.snapshot, namespace)) for a in answers]


def faults(answers: Iterable[Answer]) -> Iterator[Fault]:
    """Yield all that is wrong, by node."""
    for answer in answers:
        if answer.snapshot is None:
            yield Fault(answer.node, "sgpu", answer.problem)
            continue
        for subject, message in _faults(answer.snapshot):
            yield Fault(answer.node, subject, message)


def pods(answers: Iterable[Answer]) -> list[PodUse]:
    """Return all containers' uses: those that use most of their part first, unknown ones and those of no pod last."""
    uses = [PodUse(a.node, gpu, use) for a in answers for gpu in _gpus(a) for use in gpu.containers]
    return sorted(uses, key=_by_ratio)


def room(answers: Iterable[Answer], amount: Amount) -> list[Place]:
    """Return where the amount fits, the emptiest first. Of unhealthy GPUs nothing is given away."""
    find = _memory_room if amount.memory else _share_room
    places = [place for answer in answers for place in find(answer, amount)]
    return sorted(places, key=lambda place: (-place.times, -place.free, natural(place.node)))


def unknown_room(answers: Sequence[Answer], amount: Amount) -> list[GpuSnapshot]:
    """Return the healthy GPUs of which nobody knows what is free."""
    offered = [gpu for answer in answers for gpu in _gpus(answer) if gpu.healthy and gpu.resource]
    return [gpu for gpu in offered if free_shares(gpu) is None or (amount.memory and gpu.memory_free is None)]


def total(amounts: Iterable[int | None]) -> int | None:
    """Return the sum; None where one of them is unknown: a part would be taken for all."""
    known = list(amounts)
    return None if None in known else sum(amount for amount in known if amount is not None)


def _rank(answer: Answer) -> int:
    return 2 if answer.snapshot is None else int(answer.snapshot.standby)


def _gpus(answer: Answer) -> Sequence[GpuSnapshot]:
    return answer.snapshot.gpus if answer.snapshot else ()


def _only(snapshot: Snapshot, namespace: str) -> Snapshot:
    gpus = (
        attrs.evolve(gpu, containers=tuple(use for use in gpu.containers if use.namespace == namespace))
        for gpu in snapshot.gpus
    )
    return attrs.evolve(snapshot, gpus=tuple(gpu for gpu in gpus if gpu.containers))


def _faults(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for gpu in snapshot.gpus:
        if not gpu.healthy:
            yield f"{gpu.name} {gpu.pci_bus_id}", f"unhealthy for {ago(snapshot.time - gpu.since)}: {gpu.reason}"
    if snapshot.standby:
        yield "sgpu", "stands by, and no daemon that serves answers on this node"
    for resource in snapshot.resources if not snapshot.standby else ():
        if not resource.registered:
            yield resource.name, "not registered with the kubelet (the daemon's log says why)"
        elif not resource.streams:
            yield resource.name, "registered, but the kubelet does not watch its devices"
    # By the node's clock: the laptop's may be another.
    yield from (("sgpu", note) for note in notes(snapshot, snapshot.time))


def _by_ratio(pod: PodUse) -> tuple[object, ...]:
    known = pod.ratio is not None
    return not pod.use.pod, not known, -(pod.ratio or 0), natural(pod.node), pod.use.namespace, pod.use.pod


def _share_room(answer: Answer, amount: Amount) -> Iterator[Place]:
    free: dict[str, int] = defaultdict(int)
    for gpu in _gpus(answer):
        if gpu.healthy and gpu.resource:
            free[gpu.resource] += free_shares(gpu) or 0
    for resource, shares in free.items():
        if shares >= amount.shares:
            yield Place(answer.node, resource, None, shares, shares // amount.shares)


def _memory_room(answer: Answer, amount: Amount) -> Iterator[Place]:
    for gpu in _gpus(answer):
        shares, free = free_shares(gpu), gpu.memory_free
        if gpu.healthy and gpu.resource and shares and free is not None and free >= amount.memory:
            yield Place(answer.node, gpu.resource, gpu, free, min(free // amount.memory, shares))
