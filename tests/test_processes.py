"""Whose the processes are, by a /proc and links to logs that the test makes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import attrs
import pytest

from sgpu.processes import HOST_NAMESPACE, NotToldError, Places, find_owners
from sgpu.usage import Holder

TICKS = os.sysconf("SC_CLK_TCK")
ID = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
POD = f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n"
HOST = "0::/system.slice/gdm.service\n"
OWNER = Holder("team", "trainer", "main")


@attrs.frozen
class FakeHost:
    """A host whose processes and links to logs are files."""

    places: Places

    def start(self, pid: int, cgroup: str, age: float = 60, name: str = "python3") -> None:
        """A process that runs since `age` seconds."""
        directory = self.places.proc / str(pid)
        directory.mkdir()
        start = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * TICKS)
        (directory / "cgroup").write_text(cgroup)
        (directory / "stat").write_text(f"{pid} ({name}) S {'1 ' * 18}{start} 0 0\n")

    def owners(self, *pids: int, age: float = 5) -> dict[int, Holder | None]:
        return dict(find_owners(self.places, pids, age).containers)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """One container, and no processes."""
    host = FakeHost(Places(tmp_path / "proc", tmp_path / "containers"))
    (host.places.proc / "self/ns").mkdir(parents=True)
    (host.places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
    host.places.container_logs.mkdir()
    name = f"{OWNER.pod}_{OWNER.namespace}_{OWNER.container}-{ID}.log"
    (host.places.container_logs / name).symlink_to("/var/log/pods/nowhere/0.log")
    return host


def test_each(host: FakeHost) -> None:
    """A pod's, and nobody's."""
    host.start(7, POD)
    host.start(8, HOST)
    assert host.owners(7, 8) == {7: OWNER, 8: None}


def test_none(host: FakeHost) -> None:
    """Who asks about nobody is told of nobody."""
    host.start(7, POD)
    assert host.owners() == {}


def test_ended(host: FakeHost) -> None:
    """A process that has ended is left out, not taken for the host's."""
    host.start(7, POD)
    assert host.owners(6, 7) == {7: OWNER}


@pytest.mark.parametrize("name", ["cgroup", "stat"])
def test_ends_while_it_is_looked_at(host: FakeHost, name: str) -> None:
    """Whichever of its files is gone first, or empty."""
    host.start(7, POD)
    (host.places.proc / "7" / name).unlink()
    assert host.owners(7) == {}


def test_half_a_file(host: FakeHost) -> None:
    """The same."""
    host.start(7, POD)
    (host.places.proc / "7/stat").write_text("")
    assert host.owners(7) == {}


@pytest.mark.parametrize(
    ("began", "told", "known"),
    [
        pytest.param(60, 5, True, id="before"),
        pytest.param(60, 0, True, id="just told"),
        pytest.param(10, 30, False, id="after"),
        pytest.param(0, 5, False, id="just begun"),
    ],
)
def test_an_id_that_is_another_s_by_now(host: FakeHost, began: float, told: float, known: bool) -> None:
    """Who began after the driver told of the id is not whom it told of."""
    host.start(7, POD, age=began)
    assert host.owners(7, age=told) == ({7: OWNER} if known else {})


def test_a_pod_that_the_kubelet_does_not_have(host: FakeHost) -> None:
    """Is nobody's by name."""
    host.start(7, POD.replace(ID, ID[::-1]))
    assert host.owners(7) == {7: None}


def test_bytes_that_are_no_text(host: FakeHost) -> None:
    """A process may call itself anything."""
    host.start(7, POD)
    stat = host.places.proc / "7/stat"
    stat.write_bytes(stat.read_bytes().replace(b"python3", b"\xff\xfe) ("))
    assert host.owners(7) == {7: OWNER}


def test_mps(host: FakeHost) -> None:
    """Servers of MPS are told."""
    host.start(7, POD)
    host.start(8, HOST, name="nvidia-cuda-mps")
    assert find_owners(host.places, (7, 8), 5).mps == {8}


class TestNotTold:
    @pytest.mark.parametrize(
        ("namespace", "words"),
        [
            pytest.param(
                "pid:[4026532281]", r"the host's process ids are not seen .*; set hostPID: true", id="a pod's"
            ),
            pytest.param(None, r"/self/ns/pid can't be read \(No such file.*\); set -proc-directory", id="no /proc"),
        ],
    )
    def test_process_ids(self, host: FakeHost, namespace: str | None, words: str) -> None:
        """Without the host's, the same ids are other processes'."""
        host.start(7, POD)
        link = host.places.proc / "self/ns/pid"
        link.unlink()
        if namespace:
            link.symlink_to(namespace)
        with pytest.raises(NotToldError, match=words):
            host.owners(7)

    def test_links(self, host: FakeHost) -> None:
        """Without the kubelet's links no pod has a name."""
        host.start(7, POD)
        places = attrs.evolve(host.places, container_logs=host.places.proc / "nowhere")
        with pytest.raises(NotToldError, match=r"/nowhere can't be listed \(No such file or directory\); mount"):
            find_owners(places, (7,), 5)


def test_this_machine(tmp_path: Path) -> None:
    """The real /proc: this process is known where it is in the host's namespace, and refused elsewhere."""
    places = Places(Path("/proc"), tmp_path)
    if os.readlink("/proc/self/ns/pid") == HOST_NAMESPACE:
        assert find_owners(places, (os.getpid(),), 0).containers == {os.getpid(): None}
    else:
        with pytest.raises(NotToldError, match="hostPID"):
            find_owners(places, (os.getpid(),), 0)
