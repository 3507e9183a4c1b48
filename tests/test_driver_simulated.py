"""Simulated GPUs, and the file of their faults."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from virtual_clock import beside

from sgpu.driver import simulated
from sgpu.driver.simulated import Number, read_faults, simulate, simulated_gpus, with_faults
from sgpu.lib.concurrency import wait_until
from sgpu.lib.sizes import GIB
from sgpu.node.gpu import Health
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

pytestmark = pytest.mark.pure

GPUS = simulated_gpus(64, now=1.0)


def test_gpus() -> None:
    """Make healthy GPUs with memory and without device nodes, that say what they are and are told apart."""
    for fact in ("uuid", "name", "pci_bus_id"):
        assert len({getattr(gpu, fact) for gpu in GPUS}) == 64
    for gpu in GPUS:
        assert gpu.simulated
        assert (gpu.health, gpu.memory_bytes, gpu.device_nodes, gpu.since) == (Health.HEALTHY, 16 * 1024**3, (), 1.0)
    assert simulated_gpus(0) == ()


def test_stable_ids() -> None:
    """Give a GPU the same UUID at every start, however many there are, and as long as a real one: kubelets keep it."""
    assert GPUS[0].uuid == "GPU-219469ad-d8dc-5356-80eb-36bfcd1ac270"
    assert simulated_gpus(2) == GPUS[:2]


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        *((b"", {}), (b"  0   two words  \n", {0: "two words"}), (b"0\r\n2 hot\r\n", {0: "", 2: "hot"})),
        *((b"0 first\n0 second\n", {0: "second"}), ("# 0\nx 1\n-1\n1.5\n0x1\n²\n,\n3 yes\n".encode(), {3: "yes"})),
        *((b"\xff\xfe\n3 yes\n", {3: "yes"}), (b"9" * 5000 + b"\n3 yes\n", {3: "yes"})),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_read_faults(tmp_path: Path, content: bytes, faults: dict[int, str]) -> None:
    """Read one fault from each line that starts with a number, with its reason or one that says what it is."""
    path = tmp_path / "faults"
    path.write_bytes(content)
    read = read_faults(path)
    assert read.keys() == faults.keys()
    assert all(read[number] == reason if reason else "simulated" in read[number] for number, reason in faults.items())


@pytest.mark.parametrize("name", [".", "missing/faults", "pipe"], ids=["a directory", "missing", "a pipe"])
def test_no_file(tmp_path: Path, name: str) -> None:
    """Read no fault where there is no file: it may be made later."""
    os.mkfifo(tmp_path / "pipe")
    assert read_faults(tmp_path / name) == {}


def test_with_faults() -> None:
    """Change the health of the GPUs that are named, and nothing else; keep the time while the health is the same."""
    first, second = healthy = simulated_gpus(2, now=1.0)
    faulty = with_faults(healthy, {1: "hot", 2: "no such GPU"}, now=5.0)
    assert faulty == (first, attrs.evolve(second, health=Health.UNHEALTHY, reason="hot"))
    still = with_faults(faulty, {1: "cold"}, now=6.0)
    assert still[1].reason == "cold"
    back = with_faults(still, {}, now=7.0)
    assert back == healthy
    assert [[gpu.since for gpu in gpus] for gpus in (faulty, still, back)] == [[1.0, 5.0], [1.0, 5.0], [1.0, 7.0]]


def replace(path: Path, content: str) -> None:
    """Never leave half of it to see."""
    new = path.with_name("new")
    new.write_text(content)
    new.replace(path)


class TestSimulate:
    def test_faults(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read the file of faults again after each interval, and log each change of a GPU's health once."""
        path = tmp_path / "faults"
        steps = {"": ["", ""], "1 hot": ["", "hot"], "0 dry\n1 cold": ["dry", "cold"], "0 dry": ["dry", ""]}
        node = NodeState(Policy("example.com/gpu", 1), interval=5)

        async def check() -> None:
            with trio.fail_after(600):
                async with beside(simulate, node, 2, str(path)):
                    for content, reasons in steps.items():
                        replace(path, content)
                        await wait_until(partial(shows, reasons), node.changed)
            assert (len(reads) - 1) * simulated.INTERVAL <= trio.current_time()

        def read(path: Path) -> Mapping[Number, str]:
            reads.append(path)
            return read_faults(path)

        def shows(reasons: list[str]) -> bool:
            return [gpu.reason for gpu in node.gpus] == reasons

        reads: list[Path] = []
        monkeypatch.setattr(simulated, "read_faults", read)
        # Faster than time goes by, and it does not jump: a file is read in a thread.
        trio.run(check, clock=trio.testing.MockClock(rate=10))
        first, second = (gpu.uuid for gpu in simulated_gpus(2))
        facts = [f"{second}.*hot", f"{first}.*dry", f"{second}(?!.*unhealthy)"]
        records = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(records) == len(facts)
        assert all(re.search(fact, record.getMessage()) for fact, record in zip(facts, records, strict=True))

    def test_no_file(self) -> None:
        """End where there is no file to follow; the GPUs stay."""
        node = NodeState(Policy("example.com/gpu", 1), interval=5)
        trio.run(simulate, node, 2, "")
        assert [gpu.health for gpu in node.gpus] == [Health.HEALTHY] * 2


class TestInstances:
    GPUS = simulated_gpus(2, now=1.0, profiles="1g.10gb,1g.10gb+me,3g.40gb")

    def test_gpus(self) -> None:
        """Give each GPU the instances that are asked for, with their memory, and with UUIDs that stay the same."""
        instances = [instance for gpu in self.GPUS for instance in gpu.instances]
        assert [instance.profile for instance in instances] == 2 * ["1g.10gb", "1g.10gb+me", "3g.40gb"]
        assert [instance.memory_bytes for instance in self.GPUS[0].instances] == [10 * GIB, 10 * GIB, 40 * GIB]
        assert len({instance.uuid for instance in instances}) == 6
        assert instances[0].uuid == "MIG-0b2eea7b-5754-57e4-b42f-88489ad6d976"
        assert [(gpu.mig_mode, gpu.memory_bytes) for gpu in self.GPUS] == 2 * [(True, 80 * GIB)]
        assert simulated_gpus(1, profiles="7g.141gb")[0].memory_bytes == 141 * GIB

    def test_faults(self, tmp_path: Path) -> None:
        """A number behind a slash is that of an instance."""
        (tmp_path / "faults").write_text("0/1 hot\n1/9 no such instance\n0/x\n/1\n1/\n1 lost")
        first, second = with_faults(self.GPUS, read_faults(tmp_path / "faults"), 2.0)
        assert [(instance.reason, instance.since) for instance in first.instances] == [
            ("", 1.0),
            ("hot", 2.0),
            ("", 1.0),
        ]
        assert (first.reason, second.reason, second.since) == ("", "lost", 2.0)
        again, _ = with_faults((first, second), {(0, 1): "hotter"}, 3.0)
        assert (again.instances[1].reason, again.instances[1].since) == ("hotter", 2.0)
