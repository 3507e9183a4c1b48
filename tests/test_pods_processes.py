"""The containers of processes, by a /proc and links to logs that the test makes."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import attrs
import pytest

from sgpu.node.container import Container
from sgpu.pods.processes import HOST_NAMESPACE, Places, Stat, UnattributableError, find_owners, read_stat

TICKS = os.sysconf("SC_CLK_TCK")
ID = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
POD = f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n"
HOST = "0::/system.slice/gdm.service\n"
OWNER = Container("team", "trainer", "main")


@attrs.frozen
class FakeHost:
    """A host whose processes and links to logs are files."""

    places: Places

    def start(self, pid: int, cgroup: str, age: float = 60, name: str = "python3") -> None:
        """A process that has run for `age` seconds."""
        directory = self.places.proc / str(pid)
        directory.mkdir()
        start = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * TICKS)
        (directory / "cgroup").write_text(cgroup)
        (directory / "stat").write_text(f"{pid} ({name}) S {'1 ' * 18}{start} 0 0\n")

    def owners(self, *pids: int, age: float = 5) -> dict[int, Container | None]:
        return dict(find_owners(self.places, pids, age).containers)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """One container, with one process (7)."""
    host = FakeHost(Places(tmp_path / "proc", tmp_path / "containers"))
    (host.places.proc / "self/ns").mkdir(parents=True)
    (host.places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
    host.places.container_logs.mkdir()
    name = f"{OWNER.pod}_{OWNER.namespace}_{OWNER.container}-{ID}.log"
    (host.places.container_logs / name).symlink_to("/var/log/pods/nowhere/0.log")
    host.start(7, POD)
    return host


def test_each(host: FakeHost) -> None:
    """Return the container of each process that still runs; None for one of the host, or of an unknown container."""
    host.start(8, HOST)
    host.start(9, POD.replace(ID, ID[::-1]))
    assert host.owners(6, 7, 8, 9) == {7: OWNER, 8: None, 9: None}


@pytest.mark.parametrize("name", ["cgroup", "stat", ""], ids=["no cgroup", "no stat", "an empty stat"])
def test_ends_meanwhile(host: FakeHost, name: str) -> None:
    """Leave out a process that ends while its files are read."""
    directory = host.places.proc / "7"
    (directory / name).unlink() if name else (directory / "stat").write_text("")
    assert host.owners(7) == {}


@pytest.mark.parametrize(
    ("began", "listed", "known"),
    [
        pytest.param(60, 5, True, id="before"),
        pytest.param(60, 0, True, id="just listed"),
        pytest.param(10, 30, False, id="after"),
        pytest.param(0, 5, False, id="just begun"),
    ],
)
def test_reused_id(host: FakeHost, began: float, listed: float, known: bool) -> None:
    """Leave out a process that began after the driver listed its id: it listed another."""
    host.start(8, POD, age=began)
    assert host.owners(8, age=listed) == ({8: OWNER} if known else {})


def test_bytes_that_are_no_text(host: FakeHost) -> None:
    """Take whatever a process calls itself."""
    stat = host.places.proc / "7/stat"
    stat.write_bytes(stat.read_bytes().replace(b"python3", b"\xff\xfe) ("))
    assert host.owners(7) == {7: OWNER}


def test_mps(host: FakeHost) -> None:
    """Return which processes are servers of MPS."""
    host.start(8, HOST, name="nvidia-cuda-mps")
    assert find_owners(host.places, (7, 8), 5).mps == {8}


@pytest.mark.parametrize(
    ("namespace", "fact", "cure"),
    [
        pytest.param("pid:[4026532281]", "4026532281", "hostPID: true", id="a pod's"),
        pytest.param(None, "No such file", "-proc-directory", id="no /proc"),
    ],
)
def test_namespace(host: FakeHost, namespace: str | None, fact: str, cure: str) -> None:
    """Refuse outside the host's pid namespace, where the same ids are other processes."""
    link = host.places.proc / "self/ns/pid"
    link.unlink()
    if namespace:
        link.symlink_to(namespace)
    with pytest.raises(UnattributableError) as refused:
        host.owners(7)
    assert all(words in str(refused.value) for words in (str(link), fact, cure))


def test_no_links(host: FakeHost) -> None:
    """Refuse without the kubelet's links, by which alone pods have names."""
    places = attrs.evolve(host.places, container_logs=host.places.proc / "nowhere")
    with pytest.raises(UnattributableError, match=r"/nowhere .*No such file or directory.*-container-log-directory"):
        find_owners(places, (7,), 5)


def test_this_machine(tmp_path: Path) -> None:
    """Find this process in the real /proc where that is the host's, and refuse elsewhere."""
    (tmp_path / f"pod_ns_c-{'0' * 64}.log").touch()
    places = Places(Path("/proc"), tmp_path)
    if os.readlink("/proc/self/ns/pid") == HOST_NAMESPACE:
        assert find_owners(places, (os.getpid(),), 0).containers == {os.getpid(): None}
    else:
        with pytest.raises(UnattributableError, match="hostPID"):
            find_owners(places, (os.getpid(),), 0)


class TestStat:
    REST = "S 1 16052 16052 0 -1 4194560 10 20 30 40 1 2 3 4 20 0 1 0 {start} 2924544 183 18446744073709551615 1 1 0 0"

    @pytest.mark.parametrize("name", ["python3", "", "a b", "x) S 1 (y", "))"])
    def test_each(self, name: str) -> None:
        """Read the name, which can have any character, and the start."""
        assert read_stat(f"16052 ({name}) {self.REST.format(start=123456)}\n") == Stat(name, 123456)

    @pytest.mark.parametrize(
        "stat", ["", "16052", "16052 (python3", f"16052 (python3) {'1 ' * 19}", f"1 (x) {REST.format(start='x')}"]
    )
    def test_anything_else(self, stat: str) -> None:
        """Raise ValueError."""
        with pytest.raises(ValueError, match=r"."):
            read_stat(stat)


def test_processes_of_some_pod(host: FakeHost) -> None:
    """One in a pod's pause container or sandbox is neither a container's nor nobody's."""
    host.start(9, "0::/kubepods/pod1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a00/sandbox\n")
    owners = find_owners(host.places, (7, 9), 5)
    assert owners.containers == {7: OWNER}
    assert owners.unknown == {9}


def test_no_links_at_all(host: FakeHost) -> None:
    """Say so, rather than that nobody uses anything."""
    for link in host.places.container_logs.iterdir():
        link.unlink()
    with pytest.raises(UnattributableError, match=re.escape(str(host.places.container_logs))):
        host.owners(7)
    assert host.owners() == {}


@pytest.mark.parametrize(("init", "host_pid_helps"), [("systemd", False), ("init", False), ("pause", True)])
def test_a_node_that_is_a_container(host: FakeHost, init: str, host_pid_helps: bool) -> None:
    """Advise hostPID only where it helps."""
    link = host.places.proc / "self/ns/pid"
    link.unlink()
    link.symlink_to("pid:[4026532000]")
    (host.places.proc / "1").mkdir()
    (host.places.proc / "1/comm").write_text(f"{init}\n")
    with pytest.raises(UnattributableError) as refused:
        host.owners(7)
    assert ("hostPID: true" in str(refused.value)) is host_pid_helps
