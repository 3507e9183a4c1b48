"""A stuck event loop ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from fake_kubelet import FakeKubelet
from node import Node

from sgpu.watchdog import INTERVAL, STUCK_AFTER

#: Blocks the event loop once it has run for a while.
STUCK = """
import time, trio
from sgpu.watchdog import exit_when_stuck

def never_yields():
    time.sleep(60)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exit_when_stuck, 0.4, 0.1)
        await trio.sleep(1)
        print("alive", flush=True)
        never_yields()

trio.run(main)
"""
#: The daemon, less patient, and with a signal that blocks its event loop.
IMPATIENT = """
import signal, time
from sgpu import watchdog
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(60))
watchdog.exit_when_stuck.__defaults__ = (0.8, 0.2)
from sgpu.__main__ import main
main()
"""


def test_within_half_a_minute() -> None:
    """Which is how long the kubelet may wait for a call."""
    assert STUCK_AFTER + INTERVAL <= 30


def test_a_loop_that_never_yields() -> None:
    """Ends the process with code 1 and the stack; one that turns now and then goes on."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "alive\n"
    assert done.returncode == 1
    assert "in never_yields" in done.stderr


@pytest.mark.process
def test_the_daemon(node: Node) -> None:
    """Is ended, with the stack in its log: Kubernetes starts another."""
    with FakeKubelet(node.plugins) as kubelet, node.daemon(command=(sys.executable, "-c", IMPATIENT)) as daemon:
        kubelet.wait_devices(100)
        daemon.signal(signal.SIGUSR1)
        assert daemon.wait_exit() == 1
        assert "most recent call first" in daemon.logs
