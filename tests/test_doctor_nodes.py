"""The doctor on device nodes. What stands in for them are links to the kernel's own nodes 1:3, 1:5 and 1:7."""

from __future__ import annotations

from pathlib import Path

import pytest
from findings import about, told

from sgpu.doctor.host import Host
from sgpu.doctor.nodes import check_links, check_nodes, check_uvm
from sgpu.report import GpuReport

GPU = GpuReport("GPU-1", "T4", "00000000:3B:00.0", ("nvidia3", "nvidiactl", "nvidia-uvm"))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """All nodes of a GPU with minor number 3, links in `char` as well."""
    directory = tmp_path / "dev"
    (directory / "char").mkdir(parents=True)
    nodes = {"nvidia3": ("/dev/null", "1:3"), "nvidiactl": ("/dev/zero", "1:5"), "nvidia-uvm": ("/dev/full", "1:7")}
    for name, (target, number) in nodes.items():
        (directory / name).symlink_to(target)
        (directory / "char" / number).symlink_to(f"../{name}")
    return directory


def devices(tmp_path: Path, content: str) -> Host:
    """A machine on which the kernel gave these major numbers."""
    (tmp_path / "devices").write_text(content)
    return Host(proc=tmp_path)


def test_nodes(dev: Path) -> None:
    """All there: they are named, with what containers get beside."""
    (dev / "nvidia-uvm-tools").touch()
    (finding,) = check_nodes(dev, [GPU])
    assert told(finding, "ok", "nvidiactl, nvidia-uvm, nvidia3, nvidia-uvm-tools in ")


@pytest.mark.parametrize("name", ["nvidiactl", "nvidia-uvm", "nvidia3"])
def test_absent(dev: Path, name: str) -> None:
    """One that is missing."""
    (dev / name).unlink()
    (finding,) = check_nodes(dev, [GPU])
    assert told(finding, "FAIL", "it is not there", "nvidia-modprobe -u -c 0")
    assert finding.subject == f"device node {dev / name}"


def test_no_device(dev: Path) -> None:
    """A file in its place."""
    (dev / "nvidiactl").unlink()
    (dev / "nvidiactl").touch()
    (finding,) = check_nodes(dev, [GPU])
    assert told(finding, "FAIL", "not a character device", "remove it")


def test_other_minor(dev: Path) -> None:
    """A node that leads to another GPU than its name says."""
    (dev / "nvidia3").unlink()
    (dev / "nvidia3").symlink_to("/dev/full")
    (finding,) = check_nodes(dev, [GPU])
    assert told(finding, "FAIL", "it leads to minor 7", "remove it")


@pytest.mark.parametrize(
    ("content", "level", "words"),
    [
        pytest.param("Character devices:\n  1 nvidia-uvm\n\nBlock devices:\n", "ok", "major number 1", id="right"),
        pytest.param("Character devices:\n511 nvidia-uvm\n", "FAIL", "the module has 511", id="loaded anew"),
        pytest.param("Character devices:\n  1 mem\nBlock devices:\n  1 nvidia-uvm\n", "FAIL", "not loaded", id="no"),
    ],
)
def test_uvm(dev: Path, tmp_path: Path, content: str, level: str, words: str) -> None:
    """The module of unified memory has a number of its own at each load."""
    assert told(check_uvm(dev, devices(tmp_path, content)), level, words)


def test_uvm_absent(tmp_path: Path) -> None:
    """Without a node there is nothing to compare; another line has said so."""
    assert told(check_uvm(tmp_path, devices(tmp_path, "")), "skip", "its device node is not there")


def test_links(dev: Path) -> None:
    """A link for each node."""
    assert told(check_links(dev), "ok", "each of 3 device nodes")


def test_link_missing(dev: Path) -> None:
    """A node without one is named, with its number."""
    (dev / "char" / "1:3").unlink()
    finding = check_links(dev)
    assert told(finding, "warn", "no link for 1:3 (nvidia3): ", "nvidia-ctk system create-dev-char-symlinks")
    assert told(finding, "warn", "Failed to initialize NVML: Unknown Error", "pods that lost it")


def test_no_nodes(tmp_path: Path) -> None:
    """Without nodes there is nothing to link to."""
    assert told(check_links(tmp_path), "skip", "no device nodes")


def test_about() -> None:
    """The helper finds one, and only one."""
    with pytest.raises(ValueError, match="unpack"):
        about([], "nothing")
