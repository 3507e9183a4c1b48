"""Signals reach the process that was meant, and nobody else: real processes, in real cgroups where there are any."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import trio
from containers import Containers, containers, hierarchies
from virtual_clock import real
from watching import wait_until

from sgpu.node.container import Container, Process
from sgpu.pods.processes import find_owners
from sgpu.pods.signals import ProcessGoneError, SignalRefusedError, open_process

pytestmark = pytest.mark.process

OWNER, OTHER = Container("team", "trainer", "main"), Container("team", "trainer", "sidecar")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Containers]:
    with containers(tmp_path) as host:
        yield host


def chosen(host: Containers, child: subprocess.Popen[str]) -> Process:
    """The process as the guard knows it."""
    owners = find_owners(host.places, (child.pid,), 0.0)
    assert owners.containers == {child.pid: OWNER}
    return owners.processes[child.pid]


def terminate(host: Containers, process: Process) -> bool:
    """Send it SIGTERM, and return whether it ended."""

    async def main() -> bool:
        async with open_process(host.places, process, OWNER) as opened:
            opened.send(signal.SIGTERM)
            return await opened.ends_within(20)

    return trio.run(main)


@pytest.mark.parametrize("hierarchy", hierarchies().values(), ids=hierarchies())
def test_each_hierarchy(tmp_path: Path, hierarchy: Path | None) -> None:
    """End the process, and no other of the container or beside it."""
    with Containers(tmp_path, hierarchy) as host:
        child, other = host.start(OWNER), host.start(OTHER)
        assert terminate(host, chosen(host, child))
        assert child.wait() == -signal.SIGTERM
        assert other.poll() is None


def test_another_program(host: Containers) -> None:
    """End a process that runs another program by now: it is the same process."""
    child = host.start(OWNER, "sh", "-c", "read line; exec sleep 60")
    process = chosen(host, child)
    assert child.stdin
    child.stdin.write("\n")
    child.stdin.flush()
    wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n", "it runs another program")
    assert terminate(host, process)


def end(host: Containers, child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(end, "has ended", id="ended"),
        pytest.param(lambda host, child: host.move(child, OTHER), "not in that container", id="another container"),
        pytest.param(
            lambda host, child: (host.places.proc / "self/ns/pid").unlink(), "-proc-directory", id="container unknown"
        ),
    ],
)
def test_changed(host: Containers, change: Callable[[Containers, subprocess.Popen[str]], object], reason: str) -> None:
    """Signal nobody where anything is not as it was."""
    child = host.start(OWNER)
    process = chosen(host, child)
    before = os.listdir("/proc/self/fd")
    change(host, child)
    with pytest.raises(ProcessGoneError, match=reason):
        terminate(host, process)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert child.poll() in (None, -signal.SIGKILL)


def test_reused_id(host: Containers) -> None:
    """Spare a process that has the id of one that ended, even in the same container."""
    child = host.start(OWNER)
    process = chosen(host, child)
    with pytest.raises(ProcessGoneError, match="ended"):
        terminate(host, attrs.evolve(process, start=process.start - 1))
    assert child.poll() is None


def test_mps_server(host: Containers) -> None:
    """Never signal a server of MPS, with which all of its clients would end."""
    child = host.start(OWNER, "sh", "-c", "printf nvidia-cuda-mps > /proc/$$/comm; echo; read line", ready=True)
    with pytest.raises(ProcessGoneError):
        terminate(host, chosen(host, child))
    assert child.poll() is None


@real
async def test_ends_in_between(host: Containers) -> None:
    """Signal nobody when it ends after it was opened, whoever gets its id."""
    child = host.start(OWNER)
    process = chosen(host, child)
    async with open_process(host.places, process, OWNER) as opened:
        end(host, child)
        with pytest.raises(ProcessGoneError, match="ended"):
            opened.send(signal.SIGTERM)
        assert await opened.ends_within(0.1)


@pytest.mark.parametrize(
    ("function", "code"),
    [("signal.pidfd_send_signal", errno.EPERM), ("os.pidfd_open", errno.ENOSYS)],
    ids=["not root", "old kernel"],
)
def test_refused(host: Containers, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Say what the kernel refuses, and what to do."""
    process = chosen(host, host.start(OWNER))

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(function, refuse)
    with pytest.raises(SignalRefusedError, match=rf"{os.strerror(code)}; .*root.*hostPID: true"):
        terminate(host, process)
