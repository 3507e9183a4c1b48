"""The doctor on the container that it runs in: memory, the host's processes, the containers' logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from findings import told

from sgpu.doctor.host import Host
from sgpu.doctor.surroundings import check_container_logs, check_memory, check_processes
from sgpu.processes import HOST_NAMESPACE


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine whose kernel says nothing yet."""
    (tmp_path / "proc/self").mkdir(parents=True)
    return Host(proc=tmp_path / "proc", sysfs=tmp_path / "sys")


def group(host: Host, cgroup: str, path: str, **files: str) -> None:
    """Put this process into a cgroup, with files (`_` for the dot)."""
    (host.proc / "self/cgroup").write_text(cgroup)
    directory = host.sysfs / "fs/cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("_", ".", 1)).write_text(content)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("cgroup", "path", "files", "level", "words"),
    [
        pytest.param("0::/\n", "", {"memory_max": f"{128 * MIB}\n"}, "ok", "128 MiB", id="v2 in a container"),
        pytest.param("0::/a/b\n", "a", {"memory_max": f"{64 * MIB}\n"}, "warn", "64 MiB", id="v2 of a parent"),
        pytest.param("0::/\n", "", {"memory_max": "max\n"}, "ok", "there is none", id="v2 unlimited"),
        pytest.param(
            "4:memory:/kubepods/x\n0::/\n",
            "memory",
            {"memory_limit_in_bytes": f"{10 * MIB}\n"},
            "warn",
            "10 MiB, which is too little",
            id="v1 in a container",
        ),
        pytest.param(
            "4:cpu:/y\n3:memory:/x\n",
            "memory/x",
            {"memory_limit_in_bytes": "9223372036854771712\n"},
            "ok",
            "there is none",
            id="v1 unlimited",
        ),
        pytest.param("4:cpu:/\n", "cpu", {}, "ok", "there is none", id="no memory cgroup"),
        pytest.param(
            "0::/\n",
            "",
            {"memory_max": f"{128 * MIB}\n", "memory_events": "oom 3\noom_kill 2\n"},
            "warn",
            "128 MiB, and 2 process(es) were killed",
            id="v2 killed",
        ),
        pytest.param(
            "4:memory:/\n",
            "memory",
            {"memory_oom_control": "under_oom 0\noom_kill 1\n"},
            "warn",
            "1 process",
            id="v1 killed",
        ),
    ],
)
def test_memory(host: Host, cgroup: str, path: str, files: dict[str, str], level: str, words: str) -> None:
    """The smallest limit that holds here, of either version of cgroups."""
    group(host, cgroup, path, **files)
    assert told(check_memory(host), level, words)


def test_own_memory() -> None:
    """This very process is in some cgroup."""
    assert check_memory(Host()).words


def test_processes(host: Host) -> None:
    """As the daemon looks for them: by whether this process is in the host's namespace."""
    assert told(check_processes(host.proc), "warn", "can't be told by pod", "set -proc-directory")
    (host.proc / "self/ns").mkdir()
    namespace = host.proc / "self/ns/pid"
    namespace.symlink_to("pid:[4026532281]")
    assert told(check_processes(host.proc), "warn", "process ids are not seen", "set hostPID: true for the pod")
    namespace.unlink()
    namespace.symlink_to(HOST_NAMESPACE)
    assert told(check_processes(host.proc), "ok", "visible")


def test_container_logs(tmp_path: Path) -> None:
    """The directory with a link to each container's log."""
    directory = tmp_path / "containers"
    assert told(check_container_logs(directory), "warn", "is not there", "mount /var/log/containers")
    directory.mkdir()
    assert told(check_container_logs(directory), "warn", "is empty", "mount /var/log/containers")
    (directory / "a_default_b-0123.log").touch()
    assert told(check_container_logs(directory), "ok", "names the containers")
