"""Registering, and watching the plugin directory, in one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import outcome as outcomes
import pytest
import trio
import trio.testing
from daemon_process import short_directory
from purerpc import StatusCode

from sgpu import kubelet, rpc
from sgpu.api import v1alpha_grpc, v1alpha_pb2, v1beta1_grpc, v1beta1_pb2
from sgpu.kubelet import RegistrationFailedError

Answer = Callable[[str], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class Registrar(v1beta1_grpc.RegistrationServicer):
    """The Registration service of current kubelets."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def Register(self, request: v1beta1_pb2.RegisterRequest) -> v1beta1_pb2.Empty:
        await self._answer(request.version)
        return v1beta1_pb2.Empty()


class AlphaRegistrar(v1alpha_grpc.RegistrationServicer):
    """The same of the kubelets before 1.10."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def Register(self, request: v1alpha_pb2.RegisterRequest) -> v1alpha_pb2.Empty:
        await self._answer(request.version)
        return v1alpha_pb2.Empty()


async def register(path: Path, *servicers: Registrar | AlphaRegistrar) -> str:
    """Register with a kubelet that has these services."""
    handler = partial(rpc.serve_connection, rpc.routes(servicer.service for servicer in servicers))
    with rpc.listen(path / kubelet.SOCKET) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, handler, [listener]))
            outcome = await outcomes.acapture(
                kubelet.register, path / kubelet.SOCKET, "x.sock", "a.example/b", v1beta1_pb2.DevicePluginOptions()
            )
            nursery.cancel_scope.cancel()
    return outcome.unwrap()  # out here, where no nursery wraps an error in a group


async def accept(version: str) -> None:
    """Take any version."""


def refuse(code: StatusCode, message: str) -> Answer:
    async def answer(version: str) -> None:
        raise rpc.RpcError(code, message)

    return answer


def only(accepted: str) -> Answer:
    async def answer(version: str) -> None:
        if version != accepted:
            raise rpc.RpcError(StatusCode.UNKNOWN, f'requested API version "{version}" is not supported by kubelet.')

    return answer


class TestRegister:
    @pytest.mark.parametrize(
        ("servicers", "version"),
        [
            ([Registrar(only("v1beta1"))], "v1beta1"),
            ([AlphaRegistrar(only("v1alpha2"))], "v1alpha2"),
            ([AlphaRegistrar(only("v1alpha1"))], "v1alpha1"),
            ([Registrar(only("v9")), AlphaRegistrar(only("v1alpha2"))], "v1alpha2"),
        ],
        ids=["1.10", "1.9", "1.8", "version refused"],
    )
    def test_the_newest_version_that_the_kubelet_takes(
        self, directory: Path, servicers: list[Registrar | AlphaRegistrar], version: str
    ) -> None:
        """v1beta1 first; the next where the service is not there or the version refused."""
        assert trio.run(register, directory, *servicers) == version

    def test_another_refusal_is_not_about_the_version(self, directory: Path) -> None:
        """The older versions are not tried, and what the kubelet said is passed on."""
        asked: list[str] = []

        async def note(version: str) -> None:
            asked.append(version)

        with pytest.raises(RegistrationFailedError, match=r"refused a\.example/b: UNKNOWN: the resource name is bad"):
            trio.run(
                register,
                directory,
                Registrar(refuse(StatusCode.UNKNOWN, "the resource name is bad")),
                AlphaRegistrar(note),
            )
        assert not asked

    def test_nothing_but_strangers(self, directory: Path) -> None:
        """A server that knows no version of the service is named as one that refuses."""
        with pytest.raises(RegistrationFailedError, match="UNIMPLEMENTED"):
            trio.run(register, directory)

    def test_no_socket(self, directory: Path) -> None:
        """The path is in the message."""

        async def check() -> None:
            with pytest.raises(RegistrationFailedError, match=rf"does not answer on {directory}/kubelet\.sock"):
                await kubelet.register(
                    directory / kubelet.SOCKET, "x.sock", "a.example/b", v1beta1_pb2.DevicePluginOptions()
                )

        trio.run(check)

    def test_a_kubelet_that_never_answers(self, directory: Path) -> None:
        """Given up after 15 s; cancelling before that works too."""

        async def check() -> None:
            started = trio.current_time()
            with pytest.raises(RegistrationFailedError, match="within 15 s"):
                await register(directory, Registrar(trio_sleep))
            assert trio.current_time() - started == pytest.approx(15)
            with trio.move_on_after(3) as scope:
                await register(directory, Registrar(trio_sleep))
            assert scope.cancelled_caught

        async def trio_sleep(version: str) -> None:
            await trio.sleep(3600)

        trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0.05))

    def test_a_kubelet_that_talks_something_else(self, directory: Path) -> None:
        """A failed registration, like any other, and no crash."""

        async def answer_http(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))

        async def check() -> None:
            with rpc.listen(directory / kubelet.SOCKET) as listener:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(trio.serve_listeners, answer_http, [listener]))
                    with pytest.raises(RegistrationFailedError):
                        await kubelet.register(
                            directory / kubelet.SOCKET, "x.sock", "a.example/b", v1beta1_pb2.DevicePluginOptions()
                        )
                    nursery.cancel_scope.cancel()

        trio.run(check)


@contextmanager
def bound(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        yield


class TestPinned:
    def test_a_pinned_socket_s_identity_is_not_given_again(self, directory: Path) -> None:
        """Removed and made anew a hundred times, each time at once."""
        path = directory / "s"
        for _ in range(100):
            with bound(path), kubelet.pinned(path) as identity:
                path.unlink()
                with bound(path):
                    assert rpc.identity(path) != identity
                path.unlink()

    def test_nothing_there_is_none(self, directory: Path) -> None:
        """As `rpc.identity` says it."""
        with kubelet.pinned(directory / "s") as identity:
            assert identity is None

    def test_no_descriptor_is_left(self, directory: Path) -> None:
        """However often."""
        path = directory / "s"
        with bound(path):
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                with kubelet.pinned(path):
                    pass
            assert len(os.listdir("/proc/self/fd")) == before
