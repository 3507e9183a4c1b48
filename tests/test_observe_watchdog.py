"""Stuck loops are reported, and a stuck event loop ends the process."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from fake_kubelet import FakeKubelet
from node import Node

from sgpu.observe.watchdog import GRACE, INTERVAL, STUCK_AFTER, Watchdog
from sgpu.parent import SIGNALED

#: The daemon, less patient, and with a signal that blocks its event loop.
IMPATIENT = """
import signal, time
from sgpu.observe import watchdog
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(60))
watchdog.exit_when_stuck.__defaults__ = (0.8, 0.2)
from sgpu.__main__ import main
main()
"""


class TestEventLoop:
    def test_within_half_a_minute(self) -> None:
        """End the process within half a minute, which is how long the kubelet may wait for a call."""
        assert STUCK_AFTER + INTERVAL <= 30

    @pytest.mark.process
    def test_the_daemon(self, node: Node) -> None:
        """End the daemon, with the stack in its log: Kubernetes starts another."""
        with FakeKubelet(node.plugins) as kubelet, node.daemon(command=(sys.executable, "-c", IMPATIENT)) as daemon:
            kubelet.wait_devices(100)
            os.kill(daemon.pid, signal.SIGUSR1)
            assert daemon.wait_exit() == SIGNALED + signal.SIGALRM
            assert "most recent call first" in daemon.logs


class TestWatchdog:
    def test_expired(self) -> None:
        """Report a loop once what it said and the grace are over, and no longer once it is heard of."""
        now = 1000.0
        watchdog = Watchdog(lambda: now)
        watchdog.arm("pods", 5)
        now += 5 + GRACE
        assert not watchdog.expired()
        now += 1
        watchdog.arm("driver", 5)
        assert watchdog.expired() == {"pods": GRACE + 1}
        watchdog.arm("pods", 5)
        assert not watchdog.expired()

    def test_disarm(self) -> None:
        """Expect nothing of a loop that waits for what may never come."""
        now = 1000.0
        watchdog = Watchdog(lambda: now)
        watchdog.arm("registration", 5)
        watchdog.disarm("registration")
        watchdog.disarm("registration")
        now += 1e9
        assert not watchdog.expired()
