"""`nvidia-modprobe` under the host path is asked for the node nvidia-uvm, and what came of it is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from node import Node

from sgpu import discovery, nvml, uvm
from sgpu.discovery import NotReadyError
from sgpu.uvm import UvmNodes


def modprobe(host_path: Path, script: str, directory: str = "bin") -> Path:
    """A program in place of nvidia-modprobe: a real one needs a driver in the kernel."""
    program = host_path / directory / uvm.NAME
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("directory", ["bin", "usr/bin"])
def test_it_is_asked_as_it_wants_to_be(tmp_path: Path, directory: str) -> None:
    """Where GKE and `stage` have it, and where a distribution has it; what it prints goes nowhere."""
    program = modprobe(tmp_path, f'echo words; echo "$*" > {tmp_path}/asked', directory)
    assert UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask() == f"{program} was run, and did not"
    assert (tmp_path / "asked").read_text() == "-u -c 0\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param("exit 1", "could not, exit code 1: most often because the module is not loaded", id="silent"),
        pytest.param("echo 'no\n way' >&2; exit 3", "could not, exit code 3: no way", id="with words"),
        pytest.param("exec sleep 60", "did not end within 0.2 s", id="hangs"),
    ],
)
def test_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    """In its own words where it has any, and without waiting for ever."""
    monkeypatch.setattr(uvm, "TIMEOUT", 0.2 if "sleep" in script else 30)
    program = modprobe(tmp_path, script)
    assert UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask() == f"{program} {words}"


def test_it_is_no_program(tmp_path: Path) -> None:
    """As where the host path is mounted noexec."""
    program = modprobe(tmp_path, "")
    program.chmod(0o644)
    assert UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask() == f"{program} can't be run: Permission denied"


def test_there_is_none(tmp_path: Path) -> None:
    """It says where it should be."""
    words = UvmNodes(tmp_path, uvm.DEV_DIRECTORY).ask()
    assert words == f"sgpu can't ask for it: no nvidia-modprobe under {tmp_path}"


def test_nodes_elsewhere(tmp_path: Path) -> None:
    """It is not run where it would make nodes that nobody looks at."""
    modprobe(tmp_path, f"touch {tmp_path}/asked")
    assert "in /dev only" in UvmNodes(tmp_path, tmp_path / "dev").ask()
    assert not (tmp_path / "asked").exists()


def test_not_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a minute; the words stay the same in between."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    nodes = UvmNodes(tmp_path, uvm.DEV_DIRECTORY)
    assert "no nvidia-modprobe" in nodes.ask()
    modprobe(tmp_path, "exit 0")
    now += uvm.PAUSE - 1
    assert "no nvidia-modprobe" in nodes.ask()
    now += 1
    assert "was run" in nodes.ask()


class TestDiscovery:
    """What the poll makes of it."""

    @staticmethod
    def read(node: Node, ask: UvmNodes) -> None:
        places = discovery.Places(node.host, node.dev, node.sys)
        with nvml.open_library(node.host) as library:
            discovery.read(library, places, interval=5.0, ask_for_uvm=ask.ask)

    def test_it_is_made(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """The GPUs are offered at once."""
        monkeypatch.setattr(uvm, "DEV_DIRECTORY", node.dev)
        (node.dev / "nvidia-uvm").unlink()
        modprobe(node.host, f"touch {node.dev}/nvidia-uvm")
        self.read(node, UvmNodes(node.host, node.dev))

    def test_it_is_not_made(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """What to do is said, and why sgpu could not."""
        monkeypatch.setattr(uvm, "DEV_DIRECTORY", node.dev)
        (node.dev / "nvidia-uvm").unlink()
        modprobe(node.host, "exit 1")
        with pytest.raises(NotReadyError, match=r"`nvidia-modprobe -u -c 0` on the host makes it \(.*exit code 1"):
            self.read(node, UvmNodes(node.host, node.dev))

    def test_it_is_there(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody is asked, and not for another node either."""
        monkeypatch.setattr(uvm, "DEV_DIRECTORY", node.dev)
        (node.dev / "nvidiactl").unlink()
        modprobe(node.host, f"touch {node.dev}/asked")
        with pytest.raises(NotReadyError, match=r"nvidiactl not there yet$"):
            self.read(node, UvmNodes(node.host, node.dev))
        assert not (node.dev / "asked").exists()
