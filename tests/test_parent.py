"""The daemon's parent, with other children than the daemon; and with the daemon, where the kubelet waits for it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from daemon_process import LoggedProcess, children_of
from fake_kubelet import FakeKubelet
from node import RESOURCE, Node
from watching import is_alive, wait_until

pytestmark = pytest.mark.process

#: A parent that is less patient. What the child does follows.
PARENT = """
import os, signal, sys, time
from sgpu import parent
parent.INTERVAL, parent.PATIENCE = {interval}, 5
def start(alive):
    def live():
        while True:
            os.write(alive, b".")
            time.sleep(0.01)
    print("started", flush=True)
    {child}
sys.exit(parent.run_in_child(start))
"""
ON_SIGNAL = "[signal.signal(n, lambda n, _: (print(f'got {n}', flush=True), os._exit(n))) for n in parent.FORWARDED]"
#: Seconds between the parent's looks.
QUICK = 0.05


@contextmanager
def running(child: str) -> Iterator[LoggedProcess]:
    code = PARENT.format(interval=QUICK, child=child)
    with LoggedProcess([sys.executable, "-c", code]) as process:
        yield process


@pytest.mark.parametrize(
    ("child", "code"),
    [
        ("return 0", 0),
        ("return 3", 3),
        ("sys.exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
    ],
    ids=["success", "code", "exit", "signal"],
)
def test_the_exit_code(child: str, code: int) -> None:
    """It is the child's; of one that a signal ended, as shells say it."""
    with running(child) as process:
        assert process.wait_exit() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(number: int) -> None:
    """They are the child's to handle."""
    with running(f"{ON_SIGNAL}; print('ready', flush=True); live()") as process:
        process.wait_log("ready")
        process.signal(number)
        assert process.wait_exit() == number
        process.wait_log(f"got {number}")


def test_a_child_that_is_stopped() -> None:
    """It is killed, and said so, once it had given signs of life; one that has not begun to is left alone."""
    with running("time.sleep(0.5); os.write(alive, b'.'); print('begins', flush=True); live()") as process:
        process.wait_log("begins")
        (child,) = children_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        assert process.wait_exit() == 1
        assert "no sign of life for 0.25 s" in process.logs
        assert not is_alive(child)


def test_a_child_that_is_stopped_before_it_begins() -> None:
    """It is killed where it should end."""
    with running("signal.signal(15, print); print('deaf', flush=True); time.sleep(60)") as process:
        process.wait_log("deaf")
        (child,) = children_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        process.signal(signal.SIGTERM)
        assert process.wait_exit() == 1


def test_orphans() -> None:
    """Process 1 reaps them: here, a subreaper."""
    subreaper = "import ctypes; ctypes.CDLL(None).prctl(36, 1)"  # PR_SET_CHILD_SUBREAPER
    child = "os.fork() or (os.fork() or os._exit(0)) and os._exit(0); live()"
    with LoggedProcess([sys.executable, "-c", subreaper + PARENT.format(interval=QUICK, child=child)]) as process:
        process.wait_log("started")
        wait_until(lambda: len(children_of(process.pid)) == 1, "the child alone")


def test_a_parent_that_is_killed(node: Node) -> None:
    """The daemon stops as if it were told to."""
    with FakeKubelet(node.plugins) as kubelet, node.daemon() as daemon:
        kubelet.wait_devices(100)
        pid = daemon.pid
        daemon.signal(signal.SIGKILL)
        daemon.wait_log("the parent process has ended")
        kubelet.wait_devices(0)
        wait_until(lambda: not is_alive(pid), "it has ended")
        assert not node.socket.exists()


@pytest.mark.parametrize("simulate", [0, 1], ids=["driver", "simulated"])
def test_a_daemon_that_is_stopped(node: Node, simulate: int) -> None:
    """The kubelet's call ends with an error, and the next daemon serves."""
    code = "from sgpu import parent, __main__; parent.INTERVAL = 3.0; __main__.main()"
    with FakeKubelet(node.plugins) as kubelet:
        with node.daemon(simulate=simulate, command=(sys.executable, "-c", code)) as daemon:
            share = next(iter(kubelet.wait_devices(100)))
            os.kill(daemon.pid, signal.SIGSTOP)
            with pytest.raises(grpc.RpcError) as error:
                kubelet.allocate([share], resource=RESOURCE)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert daemon.wait_exit() == 1
            daemon.wait_log("no sign of life")
        with node.daemon(simulate=simulate):
            kubelet.wait_devices(100)
            kubelet.allocate([share], resource=RESOURCE)
