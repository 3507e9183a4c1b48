"""One resource's registration, in one process: which kubelet is asked, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from daemon_process import short_directory
from test_kubelet import Registrar
from test_plugin import offer

from sgpu import kubelet, rpc
from sgpu.inventory import Inventory
from sgpu.record import Record
from sgpu.session import keep_registered
from sgpu.simulation import simulated_devices

RESOURCE = "a.example/b"
#: Seconds that a test's own wait may take, fewer than a kubelet gets to answer; only a failing test gets there.
TIMEOUT = 10.0
assert TIMEOUT < kubelet.REGISTER_TIMEOUT


def test_a_new_kubelet_is_registered_with_while_the_old_one_has_not_answered() -> None:
    """And does not have to wait until the old one has had its time. Our own socket stays as it is."""

    async def check() -> None:
        record = Record(trio.current_time)
        registered = trio.Event()
        asked_the_old = trio.Event()

        async def never(version: str) -> None:
            asked_the_old.set()
            await trio.sleep_forever()

        async def at_once(version: str) -> None:
            registered.set()

        with short_directory() as directory:
            path, ours, new = (directory / name for name in (kubelet.SOCKET, "sgpu-a.example_b.sock", "new"))
            with rpc.listen(path) as old_listener, rpc.listen(new) as new_listener, trio.fail_after(TIMEOUT):
                async with trio.open_nursery() as nursery:
                    for listener, answer in ((old_listener, never), (new_listener, at_once)):
                        handler = partial(rpc.serve_connection, rpc.routes([Registrar(answer).service]))
                        nursery.start_soon(partial(trio.serve_listeners, handler, [listener]))
                    offered = offer(Inventory(simulated_devices(1, 1)))
                    nursery.start_soon(keep_registered, directory, RESOURCE, offered, record)
                    await asked_the_old.wait()
                    before = rpc.identity(ours)
                    os.replace(new, path)
                    await registered.wait()
                    while not record.registrations[RESOURCE].registered:  # noqa: ASYNC110  # a record has no event
                        await trio.sleep(0.01)
                    assert rpc.identity(ours) == before
                    nursery.cancel_scope.cancel()
        assert record.registrations[RESOURCE].attempts == {False: 1, True: 1}

    trio.run(check)


def test_a_socket_that_is_gone_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubelet that starts just then has removed it before anyone looked which file it is: another is made."""
    listen, registered = rpc.listen, trio.Event()
    made: list[Path] = []

    @contextmanager
    def listen_in_vain_at_first(path: Path) -> Iterator[trio.SocketListener]:
        with listen(path) as listener:
            made.append(path)
            if len(made) == 1:
                path.unlink()
            yield listener

    async def at_once(version: str) -> None:
        if len(made) > 1:
            registered.set()

    async def check() -> None:
        with short_directory() as directory, listen(directory / kubelet.SOCKET) as listener, trio.fail_after(TIMEOUT):
            monkeypatch.setattr(rpc, "listen", listen_in_vain_at_first)
            async with trio.open_nursery() as nursery:
                handler = partial(rpc.serve_connection, rpc.routes([Registrar(at_once).service]))
                nursery.start_soon(partial(trio.serve_listeners, handler, [listener]))
                offered = offer(Inventory(simulated_devices(1, 1)))
                nursery.start_soon(keep_registered, directory, RESOURCE, offered, Record(trio.current_time))
                await registered.wait()
                assert made[1].exists()
                nursery.cancel_scope.cancel()

    trio.run(check)
