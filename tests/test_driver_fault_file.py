"""The faults of the GPUs, on disk."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from virtual_clock import beside

from sgpu.driver import fault_file
from sgpu.driver.health import Clearance, Fault, FaultRecord
from sgpu.driver.monitor import Monitor
from sgpu.driver.xids import XidPolicy
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState

BOOT = "e2a8e0c5-3c5d-4e38-9a0e-2f1a5c1d0b7e"
RECORD = FaultRecord("550.54.15", {"GPU-a": (Fault("it broke", 1_700_000_000.25, Clearance.RESET),)})
#: The same as written by every version of sgpu: never change it without another `VERSION`.
CONTENT = {
    "version": 1,
    "boot_id": BOOT,
    "driver_version": "550.54.15",
    "faults": {"GPU-a": [{"reason": "it broke", "since": 1_700_000_000.25, "cure": "reset"}]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file goes: a directory that is not there yet."""
    return tmp_path / "run" / "sgpu" / "state.json"


def aside(path: Path) -> Path:
    return path.with_name("state.json.unusable")


def write(path: Path, content: object) -> bytes:
    """Write bytes as they are, and anything else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return raw


def with_fault(**changes: Any) -> dict[str, Any]:  # noqa: ANN401  # whatever JSON has
    return CONTENT | {"faults": {"GPU-a": [{"reason": "it broke", "since": 1.5, "cure": "reset"} | changes]}}


class TestSave:
    def test_format(self, path: Path) -> None:
        """Write JSON in a format that stays, into a directory that is made, and leave nothing else there."""
        fault_file.save(path, BOOT, FaultRecord())
        fault_file.save(path, BOOT, RECORD)
        assert json.loads(path.read_text()) == CONTENT
        assert list(path.parent.iterdir()) == [path]

    def test_one_step(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Show a reader the old file until the new one is complete, and raise what goes wrong before."""
        fault_file.save(path, BOOT, RECORD)
        complete = []

        def fail(source: Path, target: Path) -> None:
            complete.append(fault_file.load(source, BOOT))
            raise OSError(28, "No space left on device", target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=str(path)):
            fault_file.save(path, BOOT, FaultRecord("560.1"))
        assert complete == [FaultRecord("560.1")]
        assert fault_file.load(path, BOOT) == RECORD


class TestLoad:
    def test_no_file(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Know nothing, and say nothing, at the first start in a boot."""
        assert fault_file.load(path, BOOT) == FaultRecord()
        assert caplog.messages == []

    @pytest.mark.parametrize(("saved", "now"), [(BOOT, "another"), ("", BOOT), (BOOT, "")])
    def test_another_boot(self, path: Path, caplog: pytest.LogCaptureFixture, saved: str, now: str) -> None:
        """Forget all without a word."""
        fault_file.save(path, saved, RECORD)
        assert fault_file.load(path, now) == FaultRecord()
        assert caplog.messages == []
        assert path.exists()

    def test_unknown_boot(self, path: Path) -> None:
        """Take it for one boot where the kernel never says which it is."""
        fault_file.save(path, "", RECORD)
        assert fault_file.load(path, "") == RECORD

    @pytest.mark.parametrize(
        "content",
        [
            *(b"\0" * 100, json.dumps(CONTENT).encode()[:-20], b"\xff\xfe{}", b"[" * 100_000),
            *(b'{"version": ' + b"1" * 5000 + b"}", [], CONTENT | {"version": 2}),
            *(
                pytest.param({key: value for key, value in CONTENT.items() if key != absent}, id=f"no {absent}")
                for absent in ("boot_id", "driver_version", "faults")
            ),
            *(CONTENT | {"faults": []}, CONTENT | {"faults": {"GPU-a": "XID"}}, with_fault(since="yesterday")),
            *(with_fault(since=float("inf")), with_fault(since=10**400), with_fault(cure="prayer")),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_unusable(self, path: Path, caplog: pytest.LogCaptureFixture, content: object) -> None:
        """Know nothing, set the file aside as it was in place of an earlier one, and warn once with its path."""
        write(aside(path), b"an earlier one")
        before = write(path, content)
        assert fault_file.load(path, BOOT) == FaultRecord()
        assert not path.exists()
        assert aside(path).read_bytes() == before
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert str(path) in record.getMessage()

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
    def test_directory(self, path: Path, make: Callable[[Path], None]) -> None:
        """Set aside what is no file, as a directory that Kubernetes makes for a hostPath: then a save works."""
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        assert fault_file.load(path, BOOT) == FaultRecord()
        assert not aside(path).is_file()
        assert os.path.lexists(aside(path))
        fault_file.save(path, BOOT, RECORD)
        assert fault_file.load(path, BOOT) == RECORD

    def test_stuck(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Warn, and no more, where it can't even be set aside."""
        write(path, b"?")
        aside(path).mkdir()
        assert fault_file.load(path, BOOT) == FaultRecord()
        assert len(caplog.records) == 2
        assert str(aside(path)) in caplog.messages[1]


class TestSaveChanges:
    def saved(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, *outcomes: OSError | None
    ) -> list[tuple[Path, str, FaultRecord]]:
        """Return what is saved if the record changes during each save but the last. `outcomes` are the saves'."""
        monitor = Monitor(NodeState(Policy("example.com/gpu", 1), 5), XidPolicy(), RECORD, Counter())
        saved: list[tuple[Path, str, FaultRecord]] = []

        def change() -> None:
            if len(saved) == len(outcomes):
                done.set()
            else:
                monitor.record = FaultRecord(str(len(saved)))
                monitor.record_changed.notify()

        def save(path: Path, boot_id: str, record: FaultRecord) -> None:
            saved.append((path, boot_id, record))
            trio.from_thread.run_sync(change)
            if outcome := outcomes[len(saved) - 1]:
                raise outcome

        async def run() -> None:
            with trio.fail_after(60):
                async with beside(fault_file.save_changes, path, BOOT, monitor):
                    await done.wait()
                    await trio.testing.wait_all_tasks_blocked(0.01)  # nothing is saved for no reason

        done = trio.Event()
        monkeypatch.setattr(fault_file, "save", save)
        trio.run(run)
        return saved

    def test_each(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Save the record at once, and again whenever it changes, be it while it is saved."""
        records = [RECORD, FaultRecord("1"), FaultRecord("2")]
        assert self.saved(path, monkeypatch, None, None, None) == [(path, BOOT, record) for record in records]
        assert caplog.records == []

    def test_failure(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Go on where the file can't be written, and warn of that once until it can be again."""
        full = OSError(28, "No space left on device")
        assert len(self.saved(path, monkeypatch, full, full, None, full)) == 4
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
        assert all(str(path) in message and str(full) in message for message in caplog.messages)


class TestBootId:
    def test_kernel(self) -> None:
        """Read the kernel's, which stays the same."""
        assert fault_file.read_boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip() != ""

    def test_unknown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Return nothing where the kernel does not say."""
        monkeypatch.setattr(fault_file, "BOOT_ID", tmp_path / "missing")
        assert fault_file.read_boot_id() == ""
