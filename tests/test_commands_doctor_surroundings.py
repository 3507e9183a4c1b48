"""The doctor on the container that it runs in: memory, the host's processes, the containers' logs."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import inotify_simple
import pytest
from findings import expect
from node import Node

from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.surroundings import (
    ENOUGH,
    ENOUGH_FILES,
    NEEDED,
    check_container_logs,
    check_inotify,
    check_memory,
    check_open_files,
    check_processes,
    memory_warning,
)
from sgpu.lib.sizes import MIB
from sgpu.pods.processes import HOST_NAMESPACE, Places

MEMORY = {
    "v2 in a container": ("0::/", {"memory.max": 128 * MIB}, "ok", ["128 MiB"]),
    "v2 just enough": ("0::/", {"memory.max": ENOUGH}, "ok", ["100 MiB"]),
    "v2 of a parent": ("0::/a/b", {"memory.max": 128 * MIB, "a/memory.max": 64 * MIB}, "warn", ["64 MiB"]),
    "v2 unlimited": ("0::/", {"memory.max": "max"}, "ok", []),
    "v1 in a container": ("4:memory:/x\n0::/", {"memory/memory.limit_in_bytes": 10 * MIB}, "warn", ["10 MiB"]),
    "v1 unlimited": ("4:cpu:/y\n3:cpuset,memory:/x", {"memory/x/memory.limit_in_bytes": (1 << 63) - 4096}, "ok", []),
    "another controller": ("4:cpu:/", {"memory.max": MIB, "memory/memory.limit_in_bytes": MIB}, "ok", []),
    "v2 killed": ("0::/a", {"a/memory.events": "oom 3\noom_kill 77", "memory.events": "oom_kill 5"}, "warn", ["77"]),
    "v1 killed": ("4:memory:/", {"memory/memory.oom_control": "under_oom 0\noom_kill 77"}, "warn", ["77"]),
}


@pytest.mark.parametrize(("cgroup", "files", "level", "facts"), MEMORY.values(), ids=MEMORY)
def test_memory(tmp_path: Path, cgroup: str, files: dict[str, object], level: str, facts: list[str]) -> None:
    """The smallest limit above this process counts, and who was killed in its own cgroup, of either version."""
    below = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in {"proc/self/cgroup": cgroup, **below}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    finding = check_memory(Host(proc=tmp_path / "proc", sysfs=tmp_path / "sys"))
    expect(finding, level, *facts, advice="100Mi" if level == "warn" else "")
    assert ("MiB" in finding.message) == any("MiB" in fact for fact in facts)


NAMESPACES = {
    "none": (None, "warn", "-proc-directory"),
    "a node's that is a container": ("pid:[4026532282]", "warn", "nothing"),
    "a container's": ("pid:[4026532281]", "warn", "hostPID"),
    "the host's": (HOST_NAMESPACE, "ok", ""),
}


@pytest.mark.parametrize(("namespace", "level", "advice"), NAMESPACES.values(), ids=NAMESPACES)
def test_processes(tmp_path: Path, namespace: str | None, level: str, advice: str) -> None:
    """Processes are attributed to pods only from within the host's namespace; the cure goes with the reason."""
    if namespace:
        (tmp_path / "self/ns").mkdir(parents=True)
        (tmp_path / "self/ns/pid").symlink_to(namespace)
        if advice == "nothing":
            (tmp_path / "1").mkdir()
            (tmp_path / "1/comm").write_text("systemd\n")
    expect(check_processes(Places(tmp_path, tmp_path)), level, advice=advice)


def test_processes_of_unknown_pods(node: Node) -> None:
    """One in a pod's pause container is of no container that can be named: its pod's figures are unknown."""
    node.start_process(7, "team/one/main")
    node.start_process(8)
    places = Places(node.proc, node.logs)
    expect(check_processes(places, [7, 8]), "ok")
    pod = "/kubepods/burstable/pod1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a00"
    (node.proc / "8/cgroup").write_text(f"0::{pod}/{'a' * 64}\n")
    expect(check_processes(places, [7, 8]), "warn", "1 process")
    (node.logs / next(iter(os.listdir(node.logs)))).unlink()  # which the check of the links is about
    expect(check_processes(places, [7, 8]), "ok")


@pytest.mark.parametrize(("limit", "warned"), [(ENOUGH_FILES - 1, True), (ENOUGH_FILES, False)])
def test_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, warned: bool) -> None:
    """A limit with which descriptors run out is named before all that fails because of it."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert [finding.level.value for finding in check_open_files()] == ["warn"] * warned


def test_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the node's instances are used up, the limit is named."""
    expect(next(check_inotify()), "ok")

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    expect(next(check_inotify()), "warn", advice="fs.inotify.max_user_instances")


def test_container_logs(tmp_path: Path) -> None:
    """The directory is there, and has a link to each container's log."""
    directory = tmp_path / "containers"
    absent = check_container_logs(directory)
    directory.mkdir()
    empty = check_container_logs(directory)
    for finding in absent, empty:
        expect(finding, "warn", directory, advice="-container-log-directory")
    assert absent.message != empty.message
    (directory / "a_default_b-0123.log").touch()
    expect(check_container_logs(directory), "ok", directory)


@pytest.mark.parametrize(
    ("limit", "used", "cache", "warned"),
    [
        pytest.param(64 * MIB, 64 * MIB - NEEDED + 1, 0, True, id="too little is left"),
        pytest.param(64 * MIB, 64 * MIB - NEEDED, 0, False, id="enough is left"),
        pytest.param(64 * MIB, 64 * MIB, NEEDED, False, id="the kernel can drop cached files"),
        pytest.param("max", 64 * MIB, 0, False, id="no limit"),
    ],
)
def test_memory_for_the_doctor(tmp_path: Path, limit: object, used: int, cache: int, warned: bool) -> None:
    """Say what the doctor needs before it is killed for want of it."""
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": limit, "sys/fs/cgroup/memory.current": used}
    files["sys/fs/cgroup/memory.stat"] = f"anon 1\ninactive_file {cache}"
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    warning = memory_warning(Host(proc=tmp_path / "proc", sysfs=tmp_path / "sys"))
    assert ("64 MiB" in warning) is warned
