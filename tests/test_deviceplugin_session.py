"""Staying registered, in one process: which kubelet is asked, and when; which resources are registered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from daemon_process import short_directory
from rpc_peer import serving
from test_deviceplugin_registration import Registrar
from virtual_clock import beside, real, until

from sgpu import rpc
from sgpu.config.settings import endpoint
from sgpu.deviceplugin import registration
from sgpu.deviceplugin.servicer import PluginContext
from sgpu.deviceplugin.session import DirectoryRemovedError, is_removed, loop_name, stay_registered
from sgpu.deviceplugin.succession import Succession
from sgpu.driver.simulated import simulated_gpus
from sgpu.node.edits import AllocationOptions, HostPaths
from sgpu.node.policy import Policy
from sgpu.node.state import NodeState
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.watchdog import Watchdog

RESOURCE = "a.example/b"
#: Seconds that a test's own wait may take, fewer than a kubelet gets to answer; only a failing test gets there.
TIMEOUT = 10.0
assert TIMEOUT < registration.REGISTER_TIMEOUT


class Plugin:
    """A node's resource, and the daemon's counters for it."""

    def __init__(self) -> None:
        node = NodeState(Policy(RESOURCE, 1), interval=5)
        node.set_gpus(simulated_gpus(1))
        self.context = PluginContext(node, RESOURCE, AllocationOptions(HostPaths("/host", "/container", "/dev")))
        self.counters = Counters()
        self.registrations = Registrations(self.counters)
        self.now = 0.0
        self.watchdog = Watchdog(lambda: self.now)

    async def run(self, directory: Path) -> None:
        await stay_registered(directory, self.context, self.registrations, self.counters, self.watchdog, Succession())

    async def wait_registered(self) -> None:
        await until(lambda: self.registrations.by_resource[RESOURCE].registered)


@real
async def test_a_new_kubelet_is_asked_while_the_old_one_has_not_answered() -> None:
    """Register with it at once, and keep our own socket. Expect an attempt to end, and nothing once registered."""
    plugin = Plugin()
    old_was_asked = trio.Event()

    async def never(version: str, resource: str) -> None:
        old_was_asked.set()
        await trio.sleep_forever()

    async def at_once(version: str, resource: str) -> None:
        pass

    with short_directory() as directory, trio.fail_after(TIMEOUT):
        path, ours, new = (directory / name for name in (registration.SOCKET, endpoint(RESOURCE), "new"))
        async with (
            serving(rpc.routes([Registrar(never).service]), path),
            serving(rpc.routes([Registrar(at_once).service]), new),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(plugin.run, directory)
            await old_was_asked.wait()
            before = rpc.identity(ours)
            plugin.now = 3600.0
            assert loop_name(RESOURCE) in plugin.watchdog.expired()
            os.replace(new, path)
            await plugin.wait_registered()
            assert rpc.identity(ours) == before
            assert not plugin.watchdog.expired()
            nursery.cancel_scope.cancel()
    assert plugin.counters.registrations == {(RESOURCE, False): 1, (RESOURCE, True): 1}


@real
async def test_a_kubelet_that_comes_right_after_it_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register with it once: it is not taken for another one later."""
    plugin, asked, pinned = Plugin(), trio.Event(), registration.pinned

    async def count(version: str, resource: str) -> None:
        asked.set()

    with short_directory() as directory, trio.fail_after(TIMEOUT):
        new = directory / "new"

        @contextmanager
        def just_before(path: Path) -> Iterator[rpc.Identity | None]:
            with pinned(path) as pin:
                if pin is None:
                    os.replace(new, path)
                yield pin

        monkeypatch.setattr(registration, "pinned", just_before)
        async with serving(rpc.routes([Registrar(count).service]), new), beside(plugin.run, directory):
            await asked.wait()
            await plugin.wait_registered()
            await trio.sleep(0.1)
    assert plugin.counters.registrations == {(RESOURCE, False): 1, (RESOURCE, True): 1}


@real
async def test_a_socket_that_is_removed_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another one: a kubelet that starts just then removes it before anyone has looked which file it is."""
    listen, registered = rpc.listen, trio.Event()
    made: list[Path] = []

    @contextmanager
    def listen_in_vain_at_first(path: Path) -> Iterator[trio.SocketListener]:
        with listen(path) as listener:
            made.append(path)
            if len(made) == 1:
                path.unlink()
            yield listener

    async def at_once(version: str, resource: str) -> None:
        if len(made) > 1:
            registered.set()

    with short_directory() as directory, trio.fail_after(TIMEOUT):
        async with (
            serving(rpc.routes([Registrar(at_once).service]), directory / registration.SOCKET),
            trio.open_nursery() as nursery,
        ):
            monkeypatch.setattr(rpc, "listen", listen_in_vain_at_first)
            nursery.start_soon(Plugin().run, directory)
            await registered.wait()
            assert made[1].exists()
            nursery.cancel_scope.cancel()


def test_a_directory_that_is_removed_below_its_mount(tmp_path: Path) -> None:
    """End: a new directory on the host is never seen from here, so that only a restart helps.

    It is told from one that is there, and from one that is not.
    """

    async def check(path: Path) -> None:
        with trio.fail_after(TIMEOUT), pytest.raises(DirectoryRemovedError):
            await Plugin().run(path)

    directory = tmp_path / "d"
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        assert not is_removed(directory)
        directory.rmdir()
        assert not is_removed(directory)
        assert is_removed(Path(f"/proc/self/fd/{descriptor}"))
        trio.run(check, Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)
