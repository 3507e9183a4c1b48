"""Shares that the kubelet's checkpoint has and its list lacks, with a /proc and links that the test makes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sgpu.node.container import Container
from sgpu.node.shares import Share
from sgpu.pods.checkpoint import FILE
from sgpu.pods.held import Held, OtherDevice
from sgpu.pods.processes import Places
from sgpu.pods.unlisted import Unlisted

RESOURCE = "example.com/gpu"
UID = "1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a00"
STATIC = UID.replace("-", "")
LISTED = {Share("GPU-a", 0): Container("team", "listed", "main")}


class FakeNode:
    """The kubelet's directory, /proc and links."""

    def __init__(self, root: Path) -> None:
        self.plugins, self.proc, self.logs = root / "plugins", root / "proc", root / "containers"
        for directory in (self.plugins, self.proc, self.logs):
            directory.mkdir()
        (self.proc / "self").mkdir()
        self.unlisted = Unlisted(self.plugins, Places(self.proc, self.logs))

    def hand_out(self, *ids: str, uid: str = UID, resource: str = RESOURCE) -> None:
        entry = {"PodUID": uid, "ContainerName": "init", "ResourceName": resource, "DeviceIDs": {"-1": list(ids)}}
        (self.plugins / FILE).write_text(json.dumps({"Data": {"PodDeviceEntries": [entry]}}))

    def start(self, cgroup: str, pid: int = 7) -> None:
        (self.proc / str(pid)).mkdir()
        (self.proc / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")

    def name(self, namespace: str, pod: str, uid: str = UID) -> None:
        (self.logs / f"{pod}.log").symlink_to(f"/var/log/pods/{namespace}_{pod}_{uid}/init/0.log")

    def found(self) -> dict[str, dict[Share, Container]]:
        may_find = self.unlisted.may_find(Held({RESOURCE: LISTED}))
        found = self.find()
        assert may_find or not (found.shares[RESOURCE] or found.others)
        return {resource: dict(held) for resource, held in found.shares.items() if held}

    def find(self) -> Held:
        return self.unlisted.find(Held({RESOURCE: LISTED}))


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    """A pod with an init container that runs and has two shares, one of which is listed for another."""
    node = FakeNode(tmp_path)
    node.hand_out("GPU-a::0", "GPU-a::1", "nvidia0-_-1")
    node.start(f"/kubepods/burstable/pod{UID}/{'a' * 64}")
    node.name("team", "trainer")
    return node


INIT = {RESOURCE: {Share("GPU-a", 1): Container("team", "trainer", "init")}}


def test_found(node: FakeNode) -> None:
    """Return what is not listed, with the pod's name; ids that are no share's are left out."""
    assert node.found() == INIT


@pytest.mark.parametrize(
    ("cgroup", "uid"),
    [
        (f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-{'a' * 64}.scope", UID),
        (f"/../../kubepods-pod{UID.replace('-', '_')}.slice", UID),
        (f"/kubepods/pod{STATIC}", STATIC),
    ],
    ids=["systemd", "relative", "static"],
)
def test_cgroups(tmp_path: Path, cgroup: str, uid: str) -> None:
    """Recognize the pod whatever made its cgroup."""
    node = FakeNode(tmp_path)
    node.hand_out("GPU-a::1", uid=uid)
    node.start(cgroup)
    assert node.found()[RESOURCE].keys() == {Share("GPU-a", 1)}


def test_finished(node: FakeNode) -> None:
    """A pod without a process has nothing any more: the kubelet does not write that down."""
    (node.proc / "7/cgroup").write_text("0::/system.slice\n")
    assert node.found() == {}


def test_without_a_name(node: FakeNode) -> None:
    """A pod whose links are not there yet is named by its uid."""
    (node.logs / "trainer.log").unlink()
    (node.logs / "odd.log").touch()
    ((_, container),) = node.found()[RESOURCE].items()
    assert str(container) == f"uid {UID}"
    shutil.rmtree(node.logs)  # not mounted
    assert node.found() == {RESOURCE: {Share("GPU-a", 1): container}}


def test_other_resources(node: FakeNode) -> None:
    """Another plugin's are not ours, and may be a GPU of ours."""
    node.hand_out("GPU-a::1", "fpga-7", resource="example.com/other")
    found = node.find()
    assert found.shares == {RESOURCE: {}}
    assert found.others == {OtherDevice("example.com/other", "GPU-a::1"): Container("team", "trainer", "init")}


def test_changes(node: FakeNode) -> None:
    """Read it again when it is outdated, and then alone; without one, nothing is unlisted."""
    assert node.found() == INIT
    node.hand_out("GPU-b::3")
    assert node.found() == INIT
    node.unlisted.outdated = True
    assert node.found()[RESOURCE].keys() == {Share("GPU-b", 3)}
    (node.plugins / FILE).unlink()
    node.unlisted.outdated = True
    assert node.found() == {}


@pytest.mark.parametrize("content", ["{", '{"Data": 1}'])
def test_unusable(node: FakeNode, content: str) -> None:
    """Raise, each time."""
    (node.plugins / FILE).write_text(content)
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011  # json's, or ours
            node.found()


def test_no_proc(node: FakeNode) -> None:
    """Raise OSError where processes can't be seen at all."""
    node.proc.rename(node.proc.with_name("gone"))
    with pytest.raises(OSError, match="proc"):
        node.found()
    assert os.listdir(node.plugins) == [FILE]
