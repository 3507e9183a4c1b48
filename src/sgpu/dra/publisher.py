"""Keeps the node's ResourceSlices published. Knows when to write, and what a server may drop; not what a GPU is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

import attrs
import trio

from sgpu.dra.choice import too_old
from sgpu.dra.plan import Plan, differences, new_faults, plan, unshared, untainted
from sgpu.dra.slices import DRIVER, PATH, UNHEALTHY_TAINT, Object, SliceOptions, slices
from sgpu.kubeapi import ApiServer, ApiServerError, Mirror
from sgpu.lib.concurrency import race, wait_until
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays, jittered
from sgpu.node.policy import OffersRefusedError
from sgpu.node.state import NodeState

logger = logging.getLogger(__name__)

#: Seconds between two updates: a burst of pods changes the order of devices with each of them.
INTERVAL: Final = 10.0
#: Seconds between two updates where a unit has become faulty, so that one that flaps does not keep the server busy.
FAULT_INTERVAL: Final = 1.0
#: Seconds between attempts after a failure, growing from the first to the last, each by chance down to the half.
DELAYS: Final = (1.0, 30.0)
#: Seconds between questions to a server that does not keep what was sent: until somebody turns on a feature gate.
REFUSED_DELAY: Final = 300.0


class SlicesRefusedError(Exception):
    """The API server does not keep what makes a shared GPU. The message says what it dropped, and what to do."""


@attrs.frozen
class Published:
    """What is published: `writes` counts the requests that changed it. `problem` says why it may be out of date."""

    slices: int = 0
    devices: int = 0
    generation: int = 0
    writes: int = 0
    problem: str = ""


async def server_version(api: ApiServer) -> str:
    """Return the version of Kubernetes, as `v1.36.2`. Raises ApiServerError."""
    return str((await api.get("/version")).get("gitVersion", ""))


async def check_server(api: ApiServer, node_name: str) -> bool:
    """Return whether the API server keeps the taints of devices, by asking what it would make of a slice.

    Raises SlicesRefusedError where it does not keep that a device is shared or is of a version that shares wrongly, and
    ApiServerError.
    """
    try:
        version = await server_version(api)
    except ApiServerError as error:
        if error.passing:
            raise
        version = ""  # whoever hides it knows why
    if too_old(version):
        raise SlicesRefusedError(
            f"the API server is Kubernetes {version}, whose scheduler leaves shared GPUs with room unused and crashes "
            f"at `count: 2`; DRA needs 1.36: use -api device-plugin"
        )
    sample = _sample(node_name)
    kept = await api.create(PATH, sample, dry_run=True)
    dropped = list(differences(sample, kept))
    if dropped and not untainted(dropped):
        raise SlicesRefusedError(_dropped(dropped))
    return not dropped


class Publisher:
    """Publishes what the node offers.

    `options` and `used` are asked whenever the slices are made: how to publish, and the part of each unit that claims
    have, by UUID. `owner` of the slices is the Node, so that they go with it.
    """

    def __init__(
        self,
        api: ApiServer,
        node: NodeState,
        options: Callable[[], SliceOptions],
        used: Callable[[], Mapping[str, float]],
    ) -> None:
        self.published = Published(problem="nothing is published yet")
        self._api = api
        self._node = node
        self._options = options
        self._used = used
        self._node_name = options().node_name
        selector = f"spec.driver={DRIVER},spec.nodeName={self._node_name}"
        self._mirror = Mirror(api, PATH, {"fieldSelector": selector})
        self._checked = False
        self._keeps_taints = True
        self._written = float("-inf")
        self._problem = OnChange(logger, logging.ERROR)
        self._left_out = OnChange(logger, logging.WARNING)

    async def run(self) -> NoReturn:
        """Publish as soon as there is a GPU, and keep it so, whatever becomes of the API server and the slices."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mirror.run)
            await wait_until(lambda: self._mirror.synced, self._mirror.changed)
            await wait_until(lambda: bool(self._node.gpus), self._node.changed)
            await self._keep_published()

    async def _keep_published(self) -> NoReturn:
        delays = growing_delays(*DELAYS)
        while True:
            changes = (self._node.changed.next, self._mirror.changed.next)
            try:
                wait = await self._reconcile()
            except (ApiServerError, SlicesRefusedError, OffersRefusedError) as error:
                self._fail(error)
                change = self._mirror.changed.next
                await trio.sleep(max(DELAYS[0], getattr(error, "retry_after", 0.0)))
                delay = REFUSED_DELAY if isinstance(error, SlicesRefusedError) else next(delays)
                with trio.move_on_after(jittered(delay)):
                    await change.wait()  # the server is back, or somebody else has written
                continue
            delays = growing_delays(*DELAYS)
            with trio.move_on_after(wait):
                await race(*(change.wait for change in changes))

    def _fail(self, error: Exception) -> None:
        if isinstance(error, ApiServerError) and error.conflict:
            logger.debug("%s; trying again with what is there now", error)
            return
        self.published = attrs.evolve(self.published, problem=str(error))
        self._problem.report(f"cannot publish the node's GPUs, trying again: {error}")

    async def _reconcile(self) -> float:
        """Write what differs, if it is time to. Returns the seconds after which to look again, at the latest."""
        if not (self._checked and self._mirror.objects):  # one that is created wrong could be used at once
            self._keeps_taints = await check_server(self._api, self._node_name)
            self._checked = True
        wanted = self._wanted()
        todo = plan(wanted, self._mirror.objects)
        if todo:
            gap = FAULT_INTERVAL if new_faults(wanted, self._mirror.objects) else INTERVAL
            early = self._written + gap - trio.current_time()
            if early > 0:
                return early
            await self._write(wanted)
        self._report(wanted)
        return INTERVAL

    def _wanted(self) -> Sequence[Object]:
        options = attrs.evolve(self._options(), taints=self._keeps_taints)
        left_out = "" if self._keeps_taints else "the API server drops taints of devices (gate DRADeviceTaints)"
        self._left_out.update(left_out and f"{left_out}; faulty GPUs are left out of the slices instead")
        return slices(self._node.offers, self._used(), options)

    async def _write(self, wanted: Sequence[Object]) -> None:
        owner = await self._owner() if plan(wanted, self._mirror.objects).create else ()
        todo = plan(wanted, self._mirror.objects, owner)
        sent = {str(thing["metadata"]["name"]): thing for thing in wanted}
        for thing in todo.create:
            await self._keep(sent, await self._api.create(PATH, thing))
        for thing in todo.replace:
            await self._keep(sent, await self._api.replace(f"{PATH}/{thing['metadata']['name']}", thing))
        for name in todo.delete:
            await self._delete(name)
        self._written = trio.current_time()
        _log(todo, wanted)

    async def _keep(self, sent: Mapping[str, Object], kept: Object) -> None:
        """Take a slice as the server has it. Raises SlicesRefusedError where that is not what was sent.

        A shared GPU that turned exclusive would give all of it to the next pod, so such a slice is deleted.
        """
        name = str(kept["metadata"]["name"])
        self._mirror.put(kept)
        self.published = attrs.evolve(self.published, writes=self.published.writes + 1)
        if dropped := list(differences(sent[name], kept)):
            self._checked = False
            if unshared(dropped):
                await self._delete(name)
            raise SlicesRefusedError(_dropped(dropped))

    async def _delete(self, name: str) -> None:
        await self._api.delete(f"{PATH}/{name}")
        self._mirror.remove(name)
        self.published = attrs.evolve(self.published, writes=self.published.writes + 1)

    async def _owner(self) -> Sequence[Object]:
        """Return the owner references of a new slice. The Node is read each time: it can have been made anew."""
        node = await self._api.get(f"/api/v1/nodes/{self._node_name}")
        uid = node["metadata"]["uid"]
        return [{"apiVersion": "v1", "kind": "Node", "name": self._node_name, "uid": uid, "controller": True}]

    def _report(self, wanted: Sequence[Object]) -> None:
        self._problem.clear()
        generations = (int(thing["spec"]["pool"]["generation"]) for thing in self._mirror.objects.values())
        self.published = attrs.evolve(
            self.published,
            slices=len(wanted),
            devices=sum(len(thing["spec"]["devices"]) for thing in wanted),
            generation=max(generations, default=0),
            problem="",
        )


def _sample(node_name: str) -> Object:
    """Return a slice that is never stored, with each field that a server could drop."""
    range_ = {"min": "1", "step": "1"}
    device = {
        "name": "sample",
        "allowMultipleAllocations": True,
        "capacity": {"shares": {"value": "2", "requestPolicy": {"default": "1", "validRange": range_}}},
        "taints": [{"key": UNHEALTHY_TAINT, "effect": "NoSchedule"}],
    }
    pool = {"name": node_name, "generation": 1, "resourceSliceCount": 1}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"generateName": f"sample-{DRIVER}-"},
        "spec": {"driver": DRIVER, "nodeName": node_name, "pool": pool, "devices": [device]},
    }


def _dropped(paths: Sequence[str]) -> str:
    what = (
        f"the API server does not keep {', '.join(paths[:3])}{' and more' if len(paths) > 3 else ''} of a ResourceSlice"
    )
    if unshared(paths):
        return (
            f"{what}, so that each GPU would go to one pod alone; turn on the feature gate DRAConsumableCapacity "
            "(on from Kubernetes 1.36 on), or use -api device-plugin"
        )
    return f"{what}; something between sgpu and the API server changes it (an admission webhook?)"


def _log(todo: Plan, wanted: Sequence[Object]) -> None:
    created = f"{len(todo.create)} created, {len(todo.replace)} replaced, {len(todo.delete)} deleted"
    devices = sum(len(thing["spec"]["devices"]) for thing in wanted)
    logger.info("published %d device(s) in %d ResourceSlice(s): %s", devices, len(wanted), created)
