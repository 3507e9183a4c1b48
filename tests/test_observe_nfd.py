"""The feature file: when it is written, renewed and removed."""

from __future__ import annotations

import calendar
import os
import re
import time
from pathlib import Path

import pytest
import trio
from node import Node
from virtual_clock import beside, real, until
from watching import wait_until

from sgpu.observe import nfd

LABELS = {"deepomatic.com/gpu.count": "2"}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfd, "INTERVAL", 0.01)


def read(path: Path) -> dict[str, str]:
    """What Node Feature Discovery reads there."""
    if not path.exists():
        return {}
    first, *lines = path.read_text().splitlines()
    expiry = re.fullmatch(r"# \+expiry-time=(\S+Z)", first)
    assert expiry
    remaining = calendar.timegm(time.strptime(expiry[1], "%Y-%m-%dT%H:%M:%SZ")) - time.time()
    if remaining < 0:
        return {}
    assert nfd.LIFETIME / 2 < remaining <= nfd.LIFETIME
    return dict(line.split("=") for line in lines)


def in_place() -> trio.Event:
    """No other daemon serves."""
    event = trio.Event()
    event.set()
    return event


class TestFile:
    @real
    async def test_life(self, tmp_path: Path) -> None:
        """Written once no other daemon serves, changed with the labels, removed without any, and at the end."""
        path, wanted, placed = tmp_path / nfd.NAME, dict(LABELS), trio.Event()
        async with beside(nfd.keep_feature_file, tmp_path, lambda: dict(wanted), placed):
            await trio.sleep(0.05)
            assert read(path) == {}
            placed.set()
            await until(lambda: read(path) == LABELS)
            wanted["deepomatic.com/gpu.count"] = "3"
            await until(lambda: read(path) == wanted)
            wanted.clear()
            await until(lambda: read(path) == {})
            wanted.update(LABELS)
            await until(lambda: read(path) == LABELS)
        assert os.listdir(tmp_path) == []

    @real
    async def test_renewal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Written again in good time before it expires."""
        assert nfd.RENEWAL + nfd.INTERVAL < nfd.LIFETIME
        monkeypatch.setattr(nfd, "RENEWAL", 0.05)
        async with beside(nfd.keep_feature_file, tmp_path, lambda: LABELS, in_place()):
            await until(lambda: read(tmp_path / nfd.NAME) == LABELS)
            (tmp_path / nfd.NAME).write_text("# +expiry-time=2000-01-01T00:00:00Z\n")
            await until(lambda: read(tmp_path / nfd.NAME) == LABELS)

    @real
    async def test_no_directory(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """One warning says what to mount, and the file is there as soon as the directory is."""
        directory = tmp_path / "features.d"
        async with beside(nfd.keep_feature_file, directory, lambda: LABELS, in_place()):
            await until(lambda: caplog.records)
            directory.mkdir()
            await until(lambda: read(directory / nfd.NAME) == LABELS)
        (warning,) = [record.getMessage() for record in caplog.records]
        assert all(fact in warning for fact in (str(tmp_path), "No such file", "k8s/components/node-labels"))

    @real
    async def test_left_by_another(self, tmp_path: Path) -> None:
        """While no GPU is known, what an earlier daemon wrote stays: labels don't flap at a restart."""
        path = tmp_path / nfd.NAME
        path.touch()
        with trio.move_on_after(0.1):
            await nfd.keep_feature_file(tmp_path, dict, in_place())
        assert os.listdir(tmp_path) == [nfd.NAME]


@pytest.mark.process
def test_daemon(node: Node) -> None:
    """The real daemon describes its node, and takes that back when it stops."""
    directory = node.plugins.parent / "features.d"
    directory.mkdir()
    with node.daemon("-node-labels", "nfd", "-node-labels-directory", str(directory)) as daemon:
        wait_until(lambda: "deepomatic.com/gpu.product" in read(directory / "sgpu"), "labels", timeout=60)
        found = read(directory / "sgpu")
        assert found["deepomatic.com/gpu.product"] == "Tesla-T4"
        assert found["deepomatic.com/gpu.memory"] == "15360"
        assert found["deepomatic.com/gpu.driver-version"] == "550.54.15"
        daemon.terminate()
    assert list(directory.iterdir()) == []
