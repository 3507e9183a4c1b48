"""The cgroups of pods and containers as they come and go, in the layouts of kubelets and runtimes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import inotify_simple
import pytest
import trio
from daemon_process import short_directory
from virtual_clock import beside, real

from sgpu.lib.concurrency import wait_until
from sgpu.pods.cgroup_tree import CgroupTree, open_tree

UID = "0c1d2e3f-4a5b-6c7d-8e9f-001122334455"
UNDERSCORES = UID.replace("-", "_")
PLAIN = UID.replace("-", "")
ID = "ab" * 32


@pytest.fixture(params=["directories", "cgroup v2"])
def root(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tree of plain directories, and a real one where this machine lets us mount it."""
    with short_directory() as path:
        if request.param == "directories":
            yield path
            return
        if subprocess.run(["mount", "-t", "cgroup2", "none", str(path)], capture_output=True).returncode:
            pytest.skip("needs the right to mount cgroup2")
        try:
            below = path / f"sgpu-test-{os.getpid()}"
            below.mkdir()
            yield below
        finally:
            for directory in sorted(below.rglob("*/"), reverse=True):
                directory.rmdir()
            below.rmdir()
            subprocess.run(["umount", str(path)], check=True)


def remove(directory: Path) -> None:
    """As a runtime does: files of the kernel's own go with their directory."""
    for below in sorted(directory.rglob("*/"), reverse=True):
        below.rmdir()
    directory.rmdir()


def seen(tree: CgroupTree) -> dict[str, dict[str, str]]:
    """Directories of containers by id, by pod."""
    return {pod.directory: dict(pod.containers) for pod in tree.pods()}


def watches() -> Counter[str]:
    """The kernel's count of watches, by the descriptor of the inotify instance."""
    found = Counter[str]()
    for path in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # the descriptor that lists the others
            found[path.name] = path.read_text().count("inotify wd:")
    return found


LAYOUTS = {
    "cgroupfs, guaranteed": (f"kubepods/pod{UID}", ID),
    "cgroupfs, burstable": (f"kubepods/burstable/pod{UID}", ID),
    "systemd, containerd": (
        f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORES}.slice",
        f"cri-containerd-{ID}.scope",
    ),
    "systemd, guaranteed, CRI-O": (f"kubepods.slice/kubepods-pod{UNDERSCORES}.slice", f"crio-{ID}.scope"),
    "Docker": (f"kubepods/burstable/pod{UID}", ID),
    "systemd, Docker": (
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORES}.slice",
        f"docker-{ID}.scope",
    ),
    "kind, cgroupfs": (f"docker/{ID[::-1]}/kubelet/kubepods/burstable/pod{UID}", ID),
    "kind, systemd": (
        "docker-x.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
        f"kubelet-kubepods-burstable-pod{UNDERSCORES}.slice",
        f"cri-containerd-{ID}.scope",
    ),
    "static pod": (f"kubepods/besteffort/pod{PLAIN}", ID),
}


@pytest.mark.parametrize(("pod", "leaf"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(root: Path, pod: str, leaf: str) -> None:
    """Find the pod and its containers, and nothing else beside them."""
    (root / pod / leaf / "container").mkdir(parents=True)
    (root / pod / f"crio-conmon-{ID[::-1]}.scope").mkdir()
    (root / "system.slice/x.service").mkdir(parents=True)
    tree = CgroupTree(root, None)
    tree.scan()
    (found,) = tree.pods()
    assert (found.uid, found.directory) == (PLAIN, str(root / pod))
    assert found.containers[ID] == str(root / pod / leaf)


@asynccontextmanager
async def followed(root: Path) -> AsyncIterator[CgroupTree]:
    with open_tree(root) as tree:
        tree.scan()
        async with beside(tree.watch):
            yield tree


@real
async def test_followed(root: Path) -> None:
    """A pod, a container and a class are there as soon as they are made, and gone when they are removed."""
    (root / "kubepods").mkdir()
    async with followed(root) as tree:
        pod = root / "kubepods/burstable" / f"pod{UID}"
        (pod / ID).mkdir(parents=True)
        await wait_until(lambda: seen(tree) == {str(pod): {ID: str(pod / ID)}}, tree.changed)
        (pod / ID).rmdir()
        await wait_until(lambda: seen(tree) == {str(pod): {}}, tree.changed)
        pod.rmdir()
        await wait_until(lambda: seen(tree) == {}, tree.changed)


@pytest.mark.parametrize("removed", [".", ".."], ids=["pod", "class"])
@real
async def test_made_anew(root: Path, removed: str) -> None:
    """A cgroup that is removed and made again at once, as a static pod's, is followed like the first one."""
    pod = root / "kubepods/burstable" / f"pod{UID}"
    pod.mkdir(parents=True)
    async with followed(root) as tree:
        changed = tree.changed.next
        remove((pod / removed).resolve())
        pod.mkdir(parents=True)
        await changed.wait()
        (pod / ID).mkdir()
        await wait_until(lambda: seen(tree) == {str(pod): {ID: str(pod / ID)}}, tree.changed)


@pytest.mark.soak
@real
async def test_thousand(root: Path) -> None:
    """A thousand containers made and removed as fast as it goes: none is missed, and no watch is left."""
    (root / "kubepods").mkdir()
    choice = random.Random(7)
    before = watches()
    async with followed(root) as tree:
        there: dict[str, dict[str, str]] = {}
        for number in range(1000):
            pod = root / "kubepods" / f"pod{number:08x}{UID[8:]}"
            leaf = pod / f"{number:064x}"
            leaf.mkdir(parents=True)
            there[str(pod)] = {leaf.name: str(leaf)}
            if choice.random() < 0.9:
                gone = choice.choice(list(there))
                remove(Path(gone))
                del there[gone]
            if number % 10 == 0:
                await trio.lowlevel.checkpoint()
        await wait_until(lambda: seen(tree) == there, tree.changed)
        (new,) = (watches() - before).values()
        assert new == len(there) + 1


@real
async def test_beside(root: Path, tmp_path: Path) -> None:
    """A change in a directory beside the tree wakes as well; one that is not there is left out."""
    async with followed(root) as tree:
        tree.watch_beside([tmp_path, tmp_path / "missing"])
        changed = tree.changed.next
        (tmp_path / "checkpoint").touch()
        await changed.wait()


def test_without_inotify(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no inotify left, a scan sees what came and went."""

    def refuse(**_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    with open_tree(root) as tree:
        assert not tree.follows()
        (root / f"kubepods/pod{UID}").mkdir(parents=True)
        tree.scan()
        assert (len(tree.pods()), tree.follows()) == (1, False)
        remove(root / "kubepods")
        tree.scan()
        assert not tree.pods()
