"""The doctor on the container that it runs in: memory, the host's processes, the containers' logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from findings import expect

from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.surroundings import (
    ENOUGH,
    NEEDED,
    check_container_logs,
    check_memory,
    check_processes,
    memory_warning,
)
from sgpu.lib.sizes import MIB
from sgpu.pods.processes import HOST_NAMESPACE

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
    "a container's": ("pid:[4026532281]", "warn", "hostPID"),
    "the host's": (HOST_NAMESPACE, "ok", ""),
}


@pytest.mark.parametrize(("namespace", "level", "advice"), NAMESPACES.values(), ids=NAMESPACES)
def test_processes(tmp_path: Path, namespace: str | None, level: str, advice: str) -> None:
    """Processes are attributed to pods only from within the host's namespace; the cure goes with the reason."""
    if namespace:
        (tmp_path / "self/ns").mkdir(parents=True)
        (tmp_path / "self/ns/pid").symlink_to(namespace)
    expect(check_processes(tmp_path), level, advice=advice)


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
