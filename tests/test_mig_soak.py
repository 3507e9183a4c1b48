"""Hundreds of random changes of MIG, faults, restarts and allocations; the kubelet always has what is there.

No share is ever given of an instance that is not there. The seed is printed; SGPU_SOAK_SEED gives another, and
SGPU_SOAK_STEPS another number of steps.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Final

import attrs
import grpc
import pytest
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import RESOURCE, Node
from stub_driver import CARDS, StubGpu, StubInstance, mig_gpu
from test_soak import footprint, seeded, take_steps
from watching import wait_until

STEPS: Final = 250
#: Steps after which everything that is made once has been made.
WARM_UP: Final = 125
#: Bytes that the daemon's memory may grow by from then on.
MOST_GROWTH: Final = 6_000_000
#: Shares of a whole card.
SHARES: Final = 10
FLAGS: Final = ("-gpu-duplication-factor", SHARES, "-sample-interval", 0.1, "-memory-watermark", 0)
#: Instances at a time on a card.
MOST: Final = 4
#: A transient one would be over by itself after a minute.
RESET_XIDS, IGNORED_XID = (79, 48), 13


@attrs.define
class Soak:
    """The node under test, and what should be so: who has which share, and which instances are faulty."""

    node: Node
    kubelet: FakeKubelet
    pods: FakePodResources
    daemon: DaemonProcess
    chance: random.Random
    held: dict[str, str] = attrs.Factory(dict)  # the pod of each share
    faulty: set[str] = attrs.Factory(set)
    destroyed: list[str] = attrs.Factory(list)
    registrations: int = 1
    given: int = 0
    refused: int = 0

    # What is there

    @property
    def cards(self) -> tuple[StubGpu, ...]:
        return self.node.driver.state.gpus

    @property
    def instances(self) -> list[tuple[StubGpu, StubInstance]]:
        return [(gpu, instance) for gpu in self.cards for instance in gpu.instances]

    def expected(self) -> dict[str, str]:
        """Each share that the kubelet should have, with its health."""
        devices = {}
        for gpu in self.cards:
            units = [(each.uuid, max(SHARES * each.total // gpu.total, 1)) for each in gpu.instances]
            for uuid, count in units if gpu.mig_mode else [(gpu.uuid, SHARES)]:
                down = gpu.lost or gpu.rows_pending or uuid in self.faulty
                word = "Unhealthy" if down else "Healthy"
                devices.update({f"{uuid}::{number}": word for number in range(count)})
        return {**dict.fromkeys(self.held, "Unhealthy"), **devices}

    def settle(self) -> None:
        """Wait until the kubelet has that, and nothing else."""
        expected = self.expected()
        try:
            self.kubelet.wait_for(lambda: self.kubelet.devices(RESOURCE) == expected)
        except AssertionError:
            assert self.kubelet.devices(RESOURCE) == expected, "\n".join(self.daemon.logs.splitlines()[-20:])
        assert len(self.kubelet.registrations) == self.registrations

    # The steps. Each returns whether it could be taken.

    def pick(self, condition: Callable[[StubGpu], object]) -> StubGpu | None:
        fitting = [gpu for gpu in self.cards if condition(gpu)]
        return self.chance.choice(fitting) if fitting else None

    def create(self) -> bool:
        gpu = self.pick(lambda gpu: gpu.mig_mode and not gpu.lost and len(gpu.instances) < MOST)
        if gpu:
            _, _, profiles = next(card for card in CARDS.values() if card[0] == gpu.name)
            compute = self.chance.randrange(3)
            self.node.driver.create(gpu, self.chance.choice(list(profiles)), compute_instance=compute)
        return gpu is not None

    def destroy(self) -> bool:
        gpu = self.pick(lambda gpu: gpu.instances and not gpu.lost)
        if gpu:
            self.forget(gpu, [self.chance.choice(gpu.instances)])
        return gpu is not None

    def replace(self) -> bool:
        """Destroy all of a card, and make others that have the same places, in one go.

        None that had an XID: a poll can come before the event of the change, and then the XID may be the new one's.
        """
        uuids = {each.uuid: {instance.uuid for instance in each.instances} for each in self.cards}
        gpu = self.pick(lambda gpu: gpu.instances and not gpu.lost and not self.faulty & uuids[gpu.uuid])
        if gpu:
            self.forget(gpu, gpu.instances)
            for _ in range(self.chance.randint(1, MOST)):
                self.node.driver.create(gpu, "1g.10gb")
        return gpu is not None

    def forget(self, gpu: StubGpu, instances: list[StubInstance] | tuple[StubInstance, ...]) -> None:
        self.node.driver.destroy(gpu, *instances)
        self.destroyed += [instance.uuid for instance in instances]
        self.faulty -= {instance.uuid for instance in instances}

    def toggle_mode(self) -> bool:
        gpu = self.pick(lambda gpu: gpu.mig_mode is not None and not gpu.instances and not gpu.lost)
        if gpu:
            self.node.driver.change(gpu, mig_mode=1 - (gpu.mig_mode or 0), mig_pending=1 - (gpu.mig_mode or 0))
        return gpu is not None

    def xid(self) -> bool:
        """A fault that stays while the driver says nothing of a recovery: of one instance, which was healthy.

        Else nothing would show that the daemon has seen it before the next step.
        """
        well = [(gpu, each) for gpu, each in self.instances if not gpu.lost and not gpu.rows_pending]
        choice = [(gpu, each) for gpu, each in well if each.uuid not in self.faulty]
        if not choice:
            return False
        gpu, instance = self.chance.choice(choice)
        self.node.driver.xid(gpu, self.chance.choice(RESET_XIDS), instance)
        self.faulty.add(instance.uuid)
        return True

    def ignored_xid(self) -> bool:
        if self.instances:
            self.node.driver.xid(*self.chance.choice(self.instances)[:1], IGNORED_XID)
        return bool(self.instances)

    def toggle_rows(self) -> bool:
        gpu = self.pick(lambda gpu: not gpu.lost)
        if gpu:
            self.node.driver.change(gpu, rows_pending=0 if gpu.rows_pending else 1)
        return gpu is not None

    def lose(self) -> bool:
        gpu = self.pick(lambda gpu: not gpu.lost) if not any(gpu.lost for gpu in self.cards) else None
        if gpu:
            self.node.driver.change(gpu, lost=True)
            wait_until(lambda: not self.is_listed(gpu), f"{gpu.uuid} is gone")  # its shares may be unhealthy before
        return gpu is not None

    def is_listed(self, gpu: StubGpu) -> bool:
        """Whether the driver lists a card, by the last that the daemon said of it."""
        said = re.findall(rf"GPU {gpu.uuid} \(.*\) is (.*)", self.daemon.logs)
        return not said or said[-1].startswith("healthy") or "no longer lists it" not in said[-1]

    def find(self) -> bool:
        """A card that is back was reset, and with it what was wrong with its instances."""
        gpu = self.pick(lambda gpu: gpu.lost)
        if gpu:
            self.node.driver.change(gpu, lost=False)
            wait_until(lambda: self.is_listed(gpu), f"{gpu.uuid} is back")
            self.faulty -= {instance.uuid for instance in gpu.instances}
        return gpu is not None

    def allocate(self) -> bool:
        free = [share for share, word in self.expected().items() if word == "Healthy" and share not in self.held]
        if not free:
            return False
        share = self.chance.choice(free)
        (answer,) = self.kubelet.allocate([share]).container_responses
        uuid = share.partition("::")[0]
        assert answer.envs["SGPU_GPU_UUIDS"] == uuid
        assert answer.envs.get("CUDA_VISIBLE_DEVICES", uuid) == uuid
        pod = f"pod-{self.given}"
        self.pods.assign("team", pod, "main", [share])
        self.pods.wait_heeded()
        self.held[share] = pod
        self.given += 1
        return True

    def release(self) -> bool:
        if self.held:
            share = self.chance.choice(list(self.held))
            self.pods.release(self.held.pop(share), "team")
        return bool(self.held)

    def allocate_destroyed(self) -> bool:
        if not self.destroyed:
            return False
        with pytest.raises(grpc.RpcError):
            self.kubelet.allocate([f"{self.chance.choice(self.destroyed)}::0"])
        self.refused += 1
        return True

    def restart_kubelet(self) -> bool:
        self.kubelet.restart()
        self.registrations += 1
        self.kubelet.wait_registrations(self.registrations)
        return True


#: How often each step is taken, relatively.
WEIGHTS: Final = {
    Soak.create: 30,
    Soak.destroy: 16,
    Soak.replace: 8,
    Soak.toggle_mode: 4,
    Soak.xid: 12,
    Soak.ignored_xid: 4,
    Soak.toggle_rows: 6,
    Soak.lose: 2,
    Soak.find: 6,
    Soak.allocate: 10,
    Soak.release: 8,
    Soak.allocate_destroyed: 6,
    Soak.restart_kubelet: 1,
}


@pytest.mark.soak
def test_random_steps(node: Node) -> None:
    """Show the kubelet what is there after each of hundreds of random steps, and leak nothing."""
    chance = seeded()
    node.make_mig_minors()
    # Those that never say what they recommend keep a fault until they are reset. One card has no MIG.
    silent = [mig_gpu(0, recovery_action=None), mig_gpu(1, mig_mode=0, recovery_action=None)]
    node.driver.set(gpus=(*silent, StubGpu(2)))
    began = time.monotonic()
    with (
        FakePodResources(node.pods) as pods,
        FakeKubelet(node.plugins) as kubelet,
        node.daemon(*FLAGS) as daemon,
    ):
        kubelet.wait_registrations(1)
        soak = Soak(node, kubelet, pods, daemon, chance)
        before, memory = take_steps(soak, WEIGHTS, STEPS, WARM_UP)
        for gpu in node.driver.state.gpus:
            node.driver.change(gpu, lost=False)
        soak.faulty.clear()
        for gpu in node.driver.state.gpus:
            soak.forget(gpu, gpu.instances)
        soak.settle()
        grown = daemon.rss_bytes() - memory
        print(f"{before} at first, {footprint(daemon)} at last, {grown / 1e6:.1f} MB more")
        assert grown < MOST_GROWTH
        assert "Traceback" not in daemon.logs
        daemon.terminate()
    print(
        f"{time.monotonic() - began:.0f} s; {soak.given} shares given, {soak.refused} refused, "
        f"{len(soak.destroyed)} instances destroyed"
    )
