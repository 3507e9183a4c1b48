"""The loop that watches pods: a kubelet and a driver that say what the test wants, and a /proc that the test makes."""

from __future__ import annotations

import base64
import errno
import functools
import itertools
import json
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import inotify_simple
import pytest
import trio
from virtual_clock import beside, real, until, virtual

from sgpu.api import v1beta1_pb2
from sgpu.lib.sizes import GIB
from sgpu.node.claims import PreparedClaim
from sgpu.node.container import NO_POD, Container, Owners
from sgpu.node.figures import Figures, ProcessUse
from sgpu.node.gpu import Gpu
from sgpu.node.guard import Sample
from sgpu.node.notices import Reason
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods import watch
from sgpu.pods.checkpoint import FILE
from sgpu.pods.held import Held, OtherDevice
from sgpu.pods.holders import TIMEOUT, PodResourcesError
from sgpu.pods.processes import HOST_NAMESPACE, Places
from sgpu.pods.watch import TOLERATED, WatchOptions, watch_pods, withhold

RESOURCE, OTHER = "example.com/gpu", "example.com/other"
WATERMARK = 0.95
INTERVAL = 5.0
NOWHERE = Places(Path("/nowhere/proc"), Path("/nowhere/containers"))
CONTAINER_ID = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"


def new_node() -> NodeState:
    """Two GPUs of four shares."""
    node = NodeState(Policy(RESOURCE, 4), INTERVAL, clock=lambda: 0.0)
    node.set_gpus(tuple(Gpu(uuid, "Tesla T4", "00000000:3B:00.0", device_nodes=()) for uuid in ("GPU-a", "GPU-b")))
    return node


def percent(used: int) -> Figures:
    """The figures of a GPU that has so much of its memory used."""
    return Figures(memory_total=100 * GIB, memory_free=(100 - used) * GIB, utilization=0)


def using(*pids: int) -> Figures:
    return Figures(100, 50, 10, tuple(ProcessUse(pid, pid * 10, 5) for pid in pids))


def held(words: str) -> dict[Share, Container]:
    """`a0 b1` → share 0 of GPU a and share 1 of GPU b, each held by a pod of that name."""
    return {Share(f"GPU-{word[0]}", int(word[1:])): Container("team", f"pod-{word}", "main") for word in words.split()}


@attrs.define
class FakeKubelet:
    """Answers as a test tells it to, or fails. `calls` has the time and the resources of each call."""

    answer: Mapping[Share, Container] | str = attrs.field(factory=dict)
    others: Mapping[OtherDevice, Container] = attrs.field(factory=dict)
    delay: float = 0.0
    calls: list[tuple[float, list[str]]] = attrs.field(factory=list)

    async def list_holders(self, resources: Collection[str], claims: Collection[PreparedClaim]) -> Held:
        await trio.sleep(self.delay)
        self.calls.append((trio.current_time(), sorted(resources)))
        if isinstance(self.answer, str):
            raise PodResourcesError(self.answer)
        return Held({RESOURCE: self.answer}, self.others)


@attrs.define
class World:
    """A node, and where to look at processes; one round of the loop is an interval."""

    places: Places = NOWHERE
    node: NodeState = attrs.field(factory=new_node)
    plugins: Path = Path("/nowhere/plugins")

    @property
    def options(self) -> WatchOptions:
        return WatchOptions(Path("/pods.sock"), INTERVAL, WATERMARK, self.places, self.plugins)

    async def watch(self, expect: Callable[[float], None] = lambda seconds: None) -> None:
        await watch_pods(self.options, self.node, expect)

    async def round(self, age: float = 0.0, /, **figures: Figures) -> str:
        """The driver reported these some seconds ago. Wait for the next round, and return what is withheld then."""
        new = {f"GPU-{name}": each for name, each in figures.items()}
        self.node.usage.set_figures({**self.node.usage.figures, **new}, trio.current_time() - age)
        await trio.sleep(INTERVAL)
        offers = self.node.offered(RESOURCE)
        return " ".join(f"{offer.unit.uuid[-1]}{number}" for offer in offers for number in sorted(offer.withheld))

    async def fill(self, **used: int) -> str:
        """The same with so many percent of the memory used."""
        return await self.round(**{name: percent(part) for name, part in used.items()})


def watched(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test on a clock that jumps, and the loop beside it, half an interval apart."""

    @functools.wraps(test)
    async def run(*args: Any, world: World, **kwargs: Any) -> None:  # noqa: ANN401
        async with beside(world.watch):
            await trio.sleep(INTERVAL / 2)
            await test(*args, world=world, **kwargs)

    return virtual(run)


@pytest.fixture(autouse=True)
def kubelet(monkeypatch: pytest.MonkeyPatch) -> FakeKubelet:
    fake = FakeKubelet()
    monkeypatch.setattr(watch, "open_lister", lambda socket: nullcontext(fake))
    return fake


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return what the loop has logged, at any level."""
    with caplog.at_level(logging.DEBUG, "sgpu"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("sgpu.pods")]


Messages = Callable[[], list[str]]


@pytest.fixture
def world() -> World:
    return World()


async def run_sync(function: Callable[..., object], *args: object, abandon_on_cancel: bool) -> object:
    """In place of a thread, which a virtual clock outruns."""
    return function(*args)


class TestLoop:
    @watched
    async def test_interval(self, world: World, kubelet: FakeKubelet) -> None:
        """List holders at once, and from then on once an interval."""
        await trio.sleep(10 * INTERVAL)
        times = [time - kubelet.calls[0][0] for time, _ in kubelet.calls]
        assert times == pytest.approx([INTERVAL * number for number in range(11)])

    @watched
    async def test_resources(self, world: World, kubelet: FakeKubelet) -> None:
        """Ask for all resources of the policy, and for those that it had before: containers may still have shares."""
        world.node.set_policy(Policy(OTHER, 4))
        await trio.sleep(2 * INTERVAL)
        assert [resources for _, resources in kubelet.calls] == [[RESOURCE], [RESOURCE, OTHER], [RESOURCE, OTHER]]

    @pytest.mark.parametrize("delay", [0.0, TIMEOUT], ids=["at once", "late"])
    @virtual
    async def test_watchdog(self, world: World, kubelet: FakeKubelet, delay: float) -> None:
        """Say each time when the loop will be heard of again at the latest, however long the kubelet takes."""
        kubelet.delay = delay
        said: list[tuple[float, float]] = []
        with trio.move_on_after(20 * INTERVAL):
            await world.watch(lambda seconds: said.append((trio.current_time(), seconds)))
        assert len(said) > 5
        for (time, seconds), (later, _) in itertools.pairwise(said):
            assert later <= time + seconds <= time + TIMEOUT + INTERVAL

    @pytest.mark.parametrize("after", [0.5, INTERVAL], ids=["while listing", "while sleeping"])
    @virtual
    async def test_cancellation(self, world: World, kubelet: FakeKubelet, after: float) -> None:
        """Can be cancelled at each of its waits."""
        kubelet.delay = 1
        with trio.move_on_after(after) as scope:
            await world.watch()
        assert scope.cancelled_caught

    @watched
    async def test_full_gpu(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Withhold the free shares of a full GPU, also those that come free later, until it has memory again.

        Log each GPU when it becomes full, with its memory and its pods, and when it no longer is, and not in between.
        """
        kubelet.answer = held("a1 a3 b0")
        assert await world.fill(b=10, a=10) == ""
        assert messages() == []
        assert await world.fill(b=96, a=97) == "a0 a2 b1 b2 b3"
        kubelet.answer = held("a1 b0")
        assert await world.fill(a=94) == "a0 a2 a3 b1 b2 b3"
        assert len(messages()) == 2
        assert await world.fill(b=90, a=90) == ""
        assert ["GPU-a" in message for message in messages()] == [True, False, True, False]
        assert all(fact in messages()[0] for fact in ("97.0", "100.0", "team/pod-a1, team/pod-a3"))

    @watched
    async def test_without_the_kubelet(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Withhold nothing while nobody says which shares are in use; log the reason once; start when it says so."""
        kubelet.answer = "/pods.sock: nobody there"
        world.node.set_holders(None)
        for _ in range(TOLERATED + 2):
            assert await world.fill(a=99) == ""
        (message,) = messages()
        assert "/pods.sock: nobody there" in message
        kubelet.answer = held("a0")
        assert await world.fill(a=99) == "a1 a2 a3"

    @watched
    async def test_the_kubelet_restarts(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Leave all as it is for the first failures in a row; then withhold nothing. Log it each time it happens."""
        for times in (0, 1, 2):
            kubelet.answer = held("a0")
            assert await world.fill(a=99, b=10) == "a1 a2 a3"
            kubelet.answer = "nobody there"
            for _ in range(TOLERATED - 1):
                assert await world.fill(a=10, b=99) == "a1 a2 a3"
            if times:  # the first time, it answers again in time
                assert await world.fill(a=99) == ""
                assert await world.fill(a=99) == ""
            assert sum("nobody there" in message for message in messages()) == times


POD_0, POD_1 = Container("team", "pod-a0", "main"), Container("team", "pod-a1", "main")


@pytest.mark.parametrize(
    ("shares", "processes", "users"),
    [
        ("a0 a1", None, "team/pod-a0, team/pod-a1"),
        ("a0 a1", [], "team/pod-a0, team/pod-a1"),
        ("a0 a1", [(POD_0, 2), (POD_1, 90)], "team/pod-a1 (90.0 GiB), team/pod-a0 (2.0 GiB)"),
        ("a0 a1", [(POD_1, 90)], " team/pod-a1 (90.0 GiB)"),
        ("a0 a1", [(POD_1, None)], " team/pod-a1;"),
        ("a0", [(Container("x", "y", "z"), 90), (None, 3)], f"x/y (90.0 GiB), {NO_POD} (3.0 GiB)"),
        ("", None, "no pod"),
    ],
    ids=["unknown", "none", "both", "one of them", "memory unknown", "without a share", "nobody"],
)
def test_users(
    messages: Messages, shares: str, processes: list[tuple[Container | None, int | None]] | None, users: str
) -> None:
    """Name the pods that use most of a full GPU first, with what they use, as far as it is known."""
    node = new_node()
    node.set_holders({RESOURCE: held(shares)})
    figures = {"GPU-a": percent(96)}
    if processes is not None:
        uses = [ProcessUse(pid, used and used * GIB, 0) for pid, (_, used) in enumerate(processes)]
        figures = {"GPU-a": attrs.evolve(percent(96), processes=tuple(uses))}
    node.usage.set_figures(figures, now=0)
    node.usage.set_owners(figures, {pid: owner for pid, (owner, _) in enumerate(processes or ())})
    withhold(WATERMARK, node)
    (message,) = messages()
    assert users in message
    (notice,) = node.notices.take()  # to the pod that uses most, which gets to know nothing of others
    assert (notice.reason, notice.uuid) == (Reason.MEMORY_FULL, "GPU-a")
    assert notice.pod == (users.strip().partition(" (")[0] if " (" in users else "")
    assert "/" not in notice.message


class TestCheckpoint:
    """Holders and answers that only the kubelet's checkpoint has."""

    @pytest.fixture
    def world(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
        uid = "1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a00"
        world = World(Places(tmp_path / "proc", tmp_path / "containers"), plugins=tmp_path)
        (tmp_path / "proc/7").mkdir(parents=True)
        (tmp_path / "proc/7/cgroup").write_text(f"0::/kubepods/pod{uid}/{CONTAINER_ID}\n")
        world.places.container_logs.mkdir()
        (world.places.container_logs / "x").symlink_to(f"/var/log/pods/team_one_{uid}/init/0.log")
        entry = {"PodUID": uid, "ContainerName": "init", "ResourceName": RESOURCE, "DeviceIDs": {"-1": ["GPU-b::3"]}}
        (tmp_path / FILE).write_text(json.dumps({"Data": {"PodDeviceEntries": [entry]}}))
        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
        return world

    @watched
    async def test_init_containers(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """They hold their shares as others do: a full GPU keeps them, and the log names the pod once."""
        kubelet.answer = held("a0")
        await world.round(b=percent(99))
        await world.round(b=percent(99))
        holders = world.node.usage.holders
        assert holders
        assert holders[Share("GPU-b", 3)] == Container("team", "one", "init")
        (offer,) = [offer for offer in world.node.offered(RESOURCE) if offer.unit.uuid == "GPU-b"]
        assert offer.withheld == {0, 1, 2}
        assert len([message for message in messages() if "team/one" in message and "just started" in message]) == 1

    @watched
    async def test_stale_answers(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Name once the pods that would get another GPU, and again when there are others."""
        kubelet.answer = held("a0")
        answer = v1beta1_pb2.ContainerAllocateResponse(devices=[v1beta1_pb2.DeviceSpec(container_path="/dev/nvidia1")])
        content = json.loads((world.plugins / FILE).read_text())
        content["Data"]["PodDeviceEntries"][0]["AllocResp"] = base64.b64encode(answer.SerializeToString()).decode()
        (world.plugins / FILE).write_text(json.dumps(content))
        for node in ("nvidia1", "nvidia0", "nvidia0", "nvidia2"):
            world.node.set_gpus(tuple(attrs.evolve(gpu, device_nodes=(node,)) for gpu in world.node.gpus))
            await world.round()
        stale = [message for message in messages() if "/dev/nvidia1" in message]
        assert ["/dev/nvidia0" in message for message in stale] == [True, False]
        assert ["/dev/nvidia2" in message for message in stale] == [False, True]
        assert all("team/one" in message for message in stale)
        assert [answer.right for answer in world.node.usage.stale_answers or ()] == [("/dev/nvidia2",)]
        notices = world.node.notices.take()
        assert [(each.reason, each.pod) for each in notices] == [(Reason.ANSWER_STALE, "team/one")] * 2
        assert "/dev/nvidia1 instead of /dev/nvidia2" in notices[1].message

    @watched
    async def test_unusable(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Go by the kubelet's list alone, and say so once."""
        kubelet.answer = held("a0")
        (world.plugins / FILE).write_text("{")
        await world.round()
        await world.round()
        assert world.node.usage.holders == held("a0")
        assert world.node.usage.stale_answers is None
        assert len([message for message in messages() if "checkpoint" in message]) == 1


@pytest.mark.parametrize("refused", [False, True], ids=["inotify", "without inotify"])
@real
async def test_allocations_are_noticed_at_once(
    tmp_path: Path, kubelet: FakeKubelet, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """List again when the kubelet replaces its checkpoint, in a directory that comes later and is replaced, too.

    The interval is longer than the test may take. Where nothing changes, list no more often.
    """
    if refused:
        monkeypatch.setattr(inotify_simple, "INotify", functools.partial(_refuse, errno.EMFILE))
    monkeypatch.setattr(watch, "SHORTEST_PAUSE", 0.0)
    options = attrs.evolve(World(plugins=tmp_path / "plugins").options, interval=1000.0)

    async def wait_calls(count: int) -> None:
        await until(lambda: len(kubelet.calls) >= count)

    def allocate() -> None:
        (options.plugin_directory / "new").write_text("{}")
        (options.plugin_directory / "new").rename(options.plugin_directory / FILE)

    async with beside(watch_pods, options, new_node()):
        await wait_calls(1)
        options.plugin_directory.mkdir()
        for count in (2, 3, 4):
            allocate()
            await wait_calls(count)
        options.plugin_directory.rename(tmp_path / "old")
        options.plugin_directory.mkdir()
        await wait_calls(5)
        allocate()
        await wait_calls(6)
        await trio.sleep(0.2)
    assert len(kubelet.calls) == 6


def _refuse(number: int, *_: object, **__: object) -> None:
    raise OSError(number, os.strerror(number))


class TestOtherPlugins:
    UUID = "GPU-bf428e1d-f221-55de-a77f-a61755a4d727"

    @watched
    async def test_counted(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Placement counts a GPU that another plugin gave out, as long as it is; the log names each resource once."""
        world.node.set_gpus((attrs.evolve(world.node.gpus[0], uuid=self.UUID), world.node.gpus[1]))
        whole = OtherDevice("nvidia.com/gpu", self.UUID)
        replicas = OtherDevice("nvidia.com/gpu.shared", f"{self.UUID}::1")
        pod, other = Container("team", "whole", "main"), Container("team", "part", "main")
        for others, count in (({replicas: other}, 1), ({whole: pod, replicas: other}, 5), ({}, 0), ({whole: pod}, 4)):
            kubelet.others = others
            await world.round()
            given = {uuid: load.others for uuid, load in world.node.loads(RESOURCE).items()}
            assert given == {self.UUID: count, "GPU-b": 0}
        part, first, again = messages()
        assert all(fact in part for fact in (self.UUID, "nvidia.com/gpu.shared", "team/part"))
        assert first == again
        assert all(fact in first for fact in (self.UUID, "nvidia.com/gpu,", "team/whole"))
        kubelet.answer = "nobody there"
        for _ in range(TOLERATED):
            await world.round()
        assert world.node.loads(RESOURCE)[self.UUID].others == 0


class TestAttribution:
    @pytest.fixture
    def world(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
        """One process of a pod (7), one of the host (8), and an MPS server (9)."""
        places = Places(tmp_path / "proc", tmp_path / "containers")
        (places.proc / "self/ns").mkdir(parents=True)
        (places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
        pod = f"/kubepods/pod1/{CONTAINER_ID}"
        for pid, name, path in ((7, "python", pod), (8, "X", "/"), (9, "nvidia-cuda-mps", "/")):
            (places.proc / str(pid)).mkdir()
            (places.proc / str(pid) / "cgroup").write_text(f"0::{path}\n")
            (places.proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {'1 ' * 18} 1 0\n")
        places.container_logs.mkdir()
        (places.container_logs / f"one_team_main-{CONTAINER_ID}.log").touch()
        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
        return World(places)

    @watched
    async def test_each_process(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Attribute processes to pods and to none, leave out those that have ended, and follow the driver's list."""
        kubelet.answer = held("a0")
        usage = world.node.usage
        await world.round(a=using(6, 7, 8), b=using())
        shown = [(use.pod, use.shares, use.memory_used, use.processes) for use in usage.uses("GPU-a")]
        assert shown == [("", 0, 80, 1), ("one", 0, 70, 1), ("pod-a0", 1, 0, 0)]
        assert usage.uses("GPU-b") == ()
        kubelet.answer = {}
        await world.round(a=using())
        assert usage.uses("GPU-a") == ()
        assert usage.processes_known
        assert messages() == []

    @watched
    async def test_without_the_kubelet(self, world: World, kubelet: FakeKubelet) -> None:
        """Attribute them without PodResources, too."""
        kubelet.answer = "nobody there"
        await world.round(a=using(7))
        assert [(use.pod, use.memory_used) for use in world.node.usage.uses("GPU-a")] == [("one", 70)]

    @watched
    async def test_impossible(self, world: World, kubelet: FakeKubelet, messages: Messages) -> None:
        """Log why they can't be attributed, once each time, and forget what was known; the shares stay known."""
        kubelet.answer = held("a0")
        usage = world.node.usage
        link = world.places.proc / "self/ns/pid"
        for times in (1, 2):
            await world.round(a=using(7))
            assert (usage.processes_known, usage.processes_problem) == (True, "")
            link.unlink()
            link.symlink_to("pid:[4026532281]")
            await world.round(a=using(7))
            await world.round(a=using(7))
            assert not usage.processes_known
            assert [(use.pod, use.shares, use.memory_used) for use in usage.uses("GPU-a")] == [("pod-a0", 1, None)]
            assert "4026532281" in usage.processes_problem
            assert len(messages()) == times
            assert usage.processes_problem in messages()[-1]
            link.unlink()
            link.symlink_to(HOST_NAMESPACE)

    @pytest.mark.parametrize(
        ("figures", "age"), [(percent(1), 0.0), (using(7), 100 * INTERVAL)], ids=["never", "long ago"]
    )
    @watched
    async def test_the_driver_lists_none(self, world: World, figures: Figures, age: float) -> None:
        """Look for nobody where the driver lists no processes, or listed them too long ago."""
        world.node.usage.set_owners({}, {}, "before")
        await world.round(age, a=figures)
        assert (world.node.usage.processes_known, world.node.usage.processes_problem) == (False, "")

    @watched
    async def test_age(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Say how long ago the driver listed them: an id can be another process' by now."""
        asked: list[object] = []

        def find_owners(_: Places, pids: set[int], age: float) -> Owners:
            asked.append((pids, age))
            return Owners({}, frozenset(), frozenset(), {})

        monkeypatch.setattr("sgpu.pods.processes.find_owners", find_owners)
        await world.round(3.0, a=using(7, 8), b=using(9))
        assert asked == [({7, 8, 9}, pytest.approx(3.0 + INTERVAL / 2))]

    @virtual
    async def test_samples(self, world: World, kubelet: FakeKubelet) -> None:
        """Hand on each sample with its processes, and None where they or the holders are unknown."""
        samples: list[Sample | None] = []
        async with beside(partial(watch_pods, world.options, world.node, look=samples.append)):
            await trio.sleep(INTERVAL / 2)
            await world.round(a=using(7))
            kubelet.answer = "nobody there"
            await world.round(a=using(7))
            kubelet.answer = {}
            await world.round(100 * INTERVAL, a=using(7))
        seen = [sample and (sample.time, list(sample.owners.processes)) for sample in samples]
        assert seen == [None, (INTERVAL / 2, [7]), None, None]

    @watched
    async def test_mps(self, world: World, messages: Messages) -> None:
        """Log an MPS server once for each GPU that it uses, and again when it comes back."""
        for pid in (9, 9, 7, 9):
            await world.round(a=using(pid), b=using(7))
        assert ["GPU-a" in message and "MPS" in message for message in messages()] == [True, True]


def test_a_disk_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the look-up of processes behind when the daemon stops."""
    started, over, done = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        started.set()
        over.wait(10)
        done.set()

    async def main() -> None:
        world = World()
        world.node.usage.set_figures({"GPU-a": using(7)}, trio.current_time())
        async with beside(world.watch):
            await trio.to_thread.run_sync(started.wait)

    monkeypatch.setattr("sgpu.pods.processes.find_owners", hang)
    try:
        trio.run(main)
        assert not done.is_set()
    finally:
        over.set()
