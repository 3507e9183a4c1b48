"""Hundreds of random faults, restarts and reloads; after each, the kubelet's view of the GPUs is compared to the stub.

The seed is printed; SGPU_SOAK_SEED gives another, and SGPU_SOAK_STEPS another number of steps.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import attrs
import grpc
import pytest
import trio
from daemon_process import DaemonProcess
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node
from stub_driver import StubDriver, StubGpu
from watching import SHARES, check_updates, down_in, is_alive, started, wait_until

from sgpu.driver.health import FaultRecord
from sgpu.driver.messages import GpuReport, NotReady, Report
from sgpu.driver.monitor import Monitor
from sgpu.driver.nvml import Code
from sgpu.driver.xids import XidPolicy
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

#: As many as find in seconds what nobody thought of; SGPU_SOAK_STEPS makes more of them.
STEPS: Final = 250
#: Steps after which everything that is made once has been made.
WARM_UP: Final = 60
MOST_GPUS: Final = 5
#: Bytes that the daemon's memory may grow by from then on: the allocator's, and no line per step.
MOST_GROWTH: Final = 4_000_000
#: Seconds that a call may take.
DEADLINE: Final = 0.5
#: Fast, so that hundreds of steps take a minute; a call that only seems to hang is a fault like any other.
FLAGS: Final = ("-sample-interval", 0.1, "-driver-timeout", DEADLINE)
#: Seconds after which a fault may be over by itself: the product's 60, less what a test may stall.
UNCERTAIN_AFTER: Final = 50.0
#: Seconds after which an event that was not heard happens again.
REPEAT: Final = 0.5
#: Times in a row that one may be missed, because another process takes over the watch.
MOST_UNHEARD: Final = 4


def reason(*messages: Report | NotReady) -> str:
    """Why the monitor takes GPU-a to be unhealthy after these messages."""

    async def main() -> str:
        node = NodeState(Policy(RESOURCE, SHARES), 1.0)
        monitor = Monitor(node, XidPolicy(), FaultRecord(), Counter())
        for message in messages:
            monitor.report(message) if isinstance(message, Report) else monitor.not_ready(message)
        return node.gpus[0].reason

    return trio.run(main)


def polled(**facts: Any) -> Report:  # noqa: ANN401  # as the fields have it
    """A poll that found GPU-a with these facts."""
    gpu = GpuReport(uuid="GPU-a", name="", pci_bus_id="", device_nodes=(), **facts)
    return Report((gpu,), (), (), "", "")


#: The reasons, or the part of them that is a fact.
AWAY: Final = reason(polled(), NotReady(""))
LOST: Final = reason(polled(), Report((), (), (), "", ""))
HANGS: Final = f"{DEADLINE:g} s"
CRASHES: Final = "SIGABRT"
ACTIONS: Final = {action: reason(polled(recovery_action=action)) for action in (1, 2, 4)}
ROWS: Final = reason(polled(rows_pending=True))
RESET_XIDS: Final = ("XID 79", "XID 48")
TRANSIENT_XIDS: Final = ("XID 94", "XID 63")
REASONS: Final = (AWAY, LOST, HANGS, CRASHES, *ACTIONS.values(), ROWS, *RESET_XIDS, *TRANSIENT_XIDS)


@attrs.define
class Model:
    """The daemon's expected view of one GPU. `stub` is the GPU as it is; `seen` what the last answered poll showed."""

    stub: StubGpu
    present: bool = True
    call: str = ""  # HANGS or CRASHES
    gone: bool = False
    asked: bool = False
    seen: frozenset[str] = frozenset()
    faults: dict[str, float] = attrs.Factory(dict)  # when each last happened

    @property
    def is_gone(self) -> bool:
        return not self.present or self.stub.lost

    @property
    def answers(self) -> bool:
        return not self.is_gone and not self.call

    def poll(self) -> None:
        """Bring it up to date with the stub, as a poll does."""
        if not self.answers:
            self.gone = self.gone or self.is_gone
            return
        action = ACTIONS[self.stub.recovery_action] if self.stub.recovery_action else ""
        rows = ROWS if self.stub.rows_pending else ""
        self.seen = frozenset({action, rows} - {""})
        if self.gone or (self.asked and not self.seen):
            self.faults = {xid: since for xid, since in self.faults.items() if xid in TRANSIENT_XIDS}
        self.gone, self.asked = False, bool(action)

    def reasons(self, *, away: bool) -> frozenset[str]:
        """All reasons why it should be unhealthy. `away`: the driver has no GPU at all."""
        silent = AWAY if away else "" if self.answers else LOST if self.is_gone else self.call
        return frozenset({silent, *self.seen, *self.faults} - {""})

    def uncertain(self) -> frozenset[str]:
        """Those that may be over by now, and what a poll that lost it halfway did not see."""
        over = frozenset(xid for xid, since in self.faults.items() if time.monotonic() - since > UNCERTAIN_AFTER)
        return over | self.seen if self.is_gone else over


class Soak:
    """The node under test, the model of it, and the steps that change both."""

    def __init__(self, node: Node, kubelet: FakeKubelet, daemon: DaemonProcess, chance: random.Random) -> None:
        self.node = node
        self.kubelet = kubelet
        self.daemon = daemon
        self.chance = chance
        self.models = [Model(gpu) for gpu in node.driver.state.gpus]
        self.registrations = 1
        self.version = 550
        self.repeats = 0

    # The stub as the models have it

    def apply(self) -> None:
        calls = {
            f"nvmlDeviceGetMemoryInfo.{model.stub.uuid}": "hang" if model.call == HANGS else "crash"
            for model in self.models
            if model.call
        }
        gpus = [model.stub for model in self.models if model.present]
        self.node.driver.set(gpus=gpus, calls=calls)

    def change(self, model: Model, **facts: object) -> None:
        model.stub = attrs.evolve(model.stub, **facts)  # type: ignore[arg-type]  # as the fields have it
        self.apply()

    # The invariant

    def refusal(self, model: Model) -> frozenset[str]:
        """Why a pod does not get a share of this GPU; empty when it does."""
        try:
            self.kubelet.allocate([f"{model.stub.uuid}::0"])
        except grpc.RpcError as error:
            return frozenset(reason for reason in REASONS if reason in str(error.details()))
        return frozenset()

    def expected(self, model: Model) -> frozenset[str]:
        return model.reasons(away=all(model.is_gone for model in self.models))

    def agrees(self, model: Model) -> bool:
        actual, expected = self.refusal(model), self.expected(model)
        if not expected - model.uncertain() <= actual <= expected:
            return False
        for xid in expected - actual:  # over by itself, in due time
            model.faults.pop(xid, None)
        return True

    def settle(self) -> None:
        """Wait until reasons and lists are as they should be."""
        for model in self.models:
            model.poll()
        self.kubelet.wait_for(lambda: len(self.kubelet.devices(RESOURCE)) == SHARES * len(self.models), message="lists")
        for model in self.models:
            wait_until(partial(self.agrees, model), f"{self.expected(model)} against {model}")
        down = {model.stub.uuid for model in self.models if self.expected(model)}
        self.kubelet.wait_for(lambda: down_in(self.kubelet.devices(RESOURCE)) == down, message=f"{down} down")
        assert len(self.kubelet.registrations) == self.registrations

    # The steps. Each returns whether it could be taken.

    def pick(self, condition: Callable[[Model], object]) -> Model | None:
        fitting = [model for model in self.models if condition(model)]
        return self.chance.choice(fitting) if fitting else None

    def is_quiet(self) -> bool:
        """Return whether every GPU answers: then at most one more process takes over."""
        return all(model.answers for model in self.models)

    def reset_xid(self) -> bool:
        return self.xid(self.chance.choice(RESET_XIDS))

    def transient_xid(self) -> bool:
        return self.xid(self.chance.choice(TRANSIENT_XIDS))

    def xid(self, xid: str) -> bool:
        model = self.pick(lambda model: model.answers)
        if model is None:
            return False
        heard, unheard = False, 0
        while not heard:
            self.node.driver.xid(model.stub, int(xid.removeprefix("XID ")))
            model.faults[xid] = time.monotonic()
            deadline = time.monotonic() + REPEAT
            while not heard and time.monotonic() < deadline:
                heard = xid in self.refusal(model)
            unheard += not heard
            assert unheard < MOST_UNHEARD or not self.is_quiet(), f"{xid} of {model} was not heard"
        self.repeats += unheard
        return True

    def application_xid(self) -> bool:
        model = self.pick(lambda model: model.answers)
        if model:
            self.node.driver.xid(model.stub, self.chance.choice((13, 31, 43, 45, 68, 109)))
        return model is not None

    def lose(self) -> bool:
        model = self.pick(lambda model: model.answers)
        if model:
            self.change(model, lost=True)
        return model is not None

    def find(self) -> bool:
        model = self.pick(lambda model: model.stub.lost)
        if model:
            self.change(model, lost=False)
        return model is not None

    def vanish(self) -> bool:
        model = self.pick(lambda model: model.answers)
        if model:
            model.present = False
            self.apply()
        return model is not None

    def appear(self) -> bool:
        model = self.pick(lambda model: not model.present)
        if model:
            model.present = True
        elif len(self.models) < MOST_GPUS:
            self.models.append(Model(attrs.evolve(StubGpu(len(self.models)), recovery_action=0)))
        else:
            return False
        self.apply()
        return True

    def break_call(self) -> bool:
        model = self.pick(lambda model: model.answers)
        if model is None or any(model.call for model in self.models):
            return False
        model.call = self.chance.choice((HANGS, CRASHES))
        self.apply()
        return True

    def mend_call(self) -> bool:
        model = self.pick(lambda model: model.call)
        if model:
            model.call = ""
            self.apply()
        return model is not None

    def toggle_action(self) -> bool:
        model = self.pick(lambda model: model.answers and model.stub.recovery_action is not None)
        if model:
            self.change(model, recovery_action=0 if model.stub.recovery_action else self.chance.choice((*ACTIONS,)))
        return model is not None

    def toggle_rows(self) -> bool:
        model = self.pick(lambda model: model.answers)
        if model:
            self.change(model, rows_pending=int(not model.stub.rows_pending))
        return model is not None

    def restart_kubelet(self) -> bool:
        self.kubelet.restart()
        return self.registered_again()

    def delete_socket(self) -> bool:
        self.node.socket.unlink()
        return self.registered_again()

    def registered_again(self) -> bool:
        self.registrations += 1
        self.kubelet.wait_registrations(self.registrations)
        return True

    def reload_driver(self) -> bool:
        """Unloaded, and loaded again."""
        if any(model.call for model in self.models) or all(model.is_gone for model in self.models):
            return False
        since = len(self.daemon.lines)
        self.node.driver.set(calls={"nvmlInit": Code.DRIVER_NOT_LOADED, "nvmlDeviceGetCount": 999})
        self.daemon.wait_log("nvmlInit_v2", since=since)
        self.apply()
        return self.driver_is_new()

    def replace_driver(self) -> bool:
        """By another version, at the same path."""
        if not any(model.answers for model in self.models):
            return False
        since = len(self.daemon.lines)
        self.version += 1
        now = self.node.driver.state
        version = f"{self.version}.1"
        self.node.driver = StubDriver(self.node.host, gpus=now.gpus, calls=now.calls, driver_version=version)
        self.daemon.wait_log(version, since=since)
        return self.driver_is_new()

    def driver_is_new(self) -> bool:
        for model in self.models:
            model.gone = True
        return True

    def mend_everything(self) -> None:
        for model in self.models:
            model.call, model.present = "", True
            model.stub = attrs.evolve(
                model.stub,
                lost=False,
                rows_pending=0,
                recovery_action=None if model.stub.recovery_action is None else 0,
            )
        self.apply()


def seeded() -> random.Random:
    """Return the source of chance, and print its seed: SGPU_SOAK_SEED repeats a run."""
    seed = int(os.environ.get("SGPU_SOAK_SEED") or random.randrange(1 << 32))
    print(f"SGPU_SOAK_SEED={seed}")
    return random.Random(seed)


#: How often each step is taken, relatively.
WEIGHTS: Final = {
    Soak.reset_xid: 12,
    Soak.transient_xid: 5,
    Soak.application_xid: 6,
    Soak.lose: 8,
    Soak.find: 12,
    Soak.vanish: 4,
    Soak.appear: 5,
    Soak.break_call: 2,
    Soak.mend_call: 6,
    Soak.toggle_action: 16,
    Soak.toggle_rows: 16,
    Soak.restart_kubelet: 3,
    Soak.delete_socket: 2,
    Soak.reload_driver: 2,
    Soak.replace_driver: 1,
}


@pytest.mark.soak
def test_random_steps(node: Node) -> None:
    """Show the kubelet what the driver says after each of hundreds of random steps, and leak nothing."""
    chance = seeded()
    node.driver.set(gpus=[attrs.evolve(StubGpu(number), recovery_action=0 if number else None) for number in range(3)])
    began = time.monotonic()
    with FakeKubelet(node.plugins) as kubelet, started(node, *FLAGS) as daemon:
        kubelet.wait_devices(3 * SHARES)
        soak = Soak(node, kubelet, daemon, chance)
        before, memory = take_steps(soak, WEIGHTS, STEPS, WARM_UP)
        soak.mend_everything()
        soak.settle()
        wait_until(lambda: len([pid for pid in daemon.children() if is_alive(pid)]) == 1, "one child is left")
        print(f"{before} at first, {footprint(daemon)} at last, {(daemon.rss_bytes() - memory) / 1e6:.1f} MB more")
        wait_until(lambda: all(now <= then for now, then in zip(footprint(daemon), before, strict=True)), "as before")
        grown = daemon.rss_bytes() - memory
        assert grown < MOST_GROWTH
        check_updates(kubelet)
        assert "Traceback" not in daemon.logs
        daemon.terminate()
    print(f"{time.monotonic() - began:.0f} s; {soak.repeats} events had to be repeated")


def take_steps(soak: Any, weights: Mapping[Any, int], steps: int, warm_up: int) -> tuple[tuple[int, int, int], int]:  # noqa: ANN401
    """Take so many steps, unless SGPU_SOAK_STEPS says how many, and return the daemon's footprint after the first."""
    taken, total = 0, max(warm_up, int(os.environ.get("SGPU_SOAK_STEPS") or steps))
    while taken < total:
        (step,) = soak.chance.choices(list(weights), list(weights.values()))
        if step(soak):
            taken += 1
            soak.settle()
        if taken == warm_up:
            before = footprint(soak.daemon), soak.daemon.rss_bytes()
    return before


def footprint(daemon: DaemonProcess) -> tuple[int, int, int]:
    """Descriptors, threads, and children, be they only not reaped yet."""
    return (daemon.fd_count(), daemon.thread_count(), len(daemon.children()))
