"""The doctor on device nodes. What stands in for them are links to the kernel's own nodes 1:3, 1:5 and 1:7."""

from __future__ import annotations

from pathlib import Path

import pytest
from findings import expect

from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.nodes import check_links, check_nodes, check_uvm
from sgpu.driver.messages import GpuReport

GPU = GpuReport("GPU-1", "T4", "00000000:3B:00.0", ("nvidia3", "nvidiactl", "nvidia-uvm"))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """All nodes of a GPU with minor number 3, and their links in `char`."""
    directory = tmp_path / "dev"
    (directory / "char").mkdir(parents=True)
    nodes = {"nvidia3": ("/dev/null", "1:3"), "nvidiactl": ("/dev/zero", "1:5"), "nvidia-uvm": ("/dev/full", "1:7")}
    for name, (target, number) in nodes.items():
        (directory / name).symlink_to(target)
        (directory / "char" / number).symlink_to(f"../{name}")
    return directory


def test_nodes(dev: Path) -> None:
    """All nodes that a container gets are named, optional ones where they are there."""
    (dev / "nvidia-uvm-tools").touch()
    (finding,) = check_nodes(dev, [GPU])
    expect(finding, "ok", "nvidiactl", "nvidia-uvm,", "nvidia3", "nvidia-uvm-tools")
    assert "nvidia-modeset" not in finding.message


UNUSABLE = {
    "control node absent": ("nvidiactl", None, "", "-c 255"),
    "UVM node absent": ("nvidia-uvm", None, "", "-u -c 0"),
    "GPU's node absent": ("nvidia3", None, "", "-c 3"),
    "no device": ("nvidiactl", "/dev/shm", "", "-c 255"),
    "another GPU's minor number": ("nvidia3", "/dev/full", "7", "-c 3"),
}


@pytest.mark.parametrize(("name", "target", "fact", "make"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_node(dev: Path, name: str, target: str | None, fact: str, make: str) -> None:
    """A node that is absent, is no device, or belongs to another GPU is a failure about that node alone."""
    (dev / name).unlink()
    if target:
        (dev / name).symlink_to(target)
    (finding,) = check_nodes(dev, [GPU])
    expect(finding, "FAIL", fact, advice=f"`nvidia-modprobe {make}`")
    assert finding.subject.endswith(str(dev / name))


UVM = {
    "same": ("Character devices:\n  1 nvidia-uvm\n\nBlock devices:\n", "ok", "1"),
    "another since it was loaded anew": ("Character devices:\n511 nvidia-uvm\n", "FAIL", "511"),
    "not loaded": ("Character devices:\n  1 mem\nBlock devices:\n  1 nvidia-uvm\n", "FAIL", "/devices"),
    "no number": ("Character devices:\n  x nvidia-uvm\n", "FAIL", "/devices"),
}


@pytest.mark.parametrize(("content", "level", "fact"), UVM.values(), ids=UVM)
def test_uvm(dev: Path, tmp_path: Path, content: str, level: str, fact: str) -> None:
    """The node of nvidia-uvm has the major number that the kernel gave the module."""
    (tmp_path / "devices").write_text(content)
    expect(check_uvm(dev, Host(proc=tmp_path)), level, fact)


def test_links(dev: Path) -> None:
    """Each node without a link by its number is named with that number, for what it costs is silent."""
    expect(check_links(dev), "ok", 3)
    (dev / "char" / "1:3").unlink()
    finding = check_links(dev)
    expect(finding, "warn", "1:3", "nvidia3", "runc", advice="nvidia-ctk system create-dev-char-symlinks")
    assert "1:5" not in finding.message


def test_no_nodes(tmp_path: Path) -> None:
    """Without nodes there is nothing to compare and nothing to link to."""
    expect(check_uvm(tmp_path, Host(proc=tmp_path)), "skip")
    expect(check_links(tmp_path), "skip")
