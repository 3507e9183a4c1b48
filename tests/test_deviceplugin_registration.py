"""Registering with a kubelet, in one process."""

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
from rpc_peer import serving
from virtual_clock import beside, real

from sgpu import rpc
from sgpu.api import v1alpha_grpc, v1alpha_pb2, v1beta1_grpc, v1beta1_pb2
from sgpu.deviceplugin import registration
from sgpu.deviceplugin.registration import REGISTER_TIMEOUT, RegistrationFailedError

RESOURCE = "a.example/b"
Answer = Callable[[str, str], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class Registrar(v1beta1_grpc.RegistrationServicer):
    """The Registration service of current kubelets. `answer` gets the version and the resource."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def Register(self, request: v1beta1_pb2.RegisterRequest) -> v1beta1_pb2.Empty:
        await self._answer(request.version, request.resource_name)
        return v1beta1_pb2.Empty()


class AlphaRegistrar(v1alpha_grpc.RegistrationServicer):
    """The same of the kubelets before 1.10."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def Register(self, request: v1alpha_pb2.RegisterRequest) -> v1alpha_pb2.Empty:
        await self._answer(request.version, request.resource_name)
        return v1alpha_pb2.Empty()


async def call_register(directory: Path) -> str:
    return await registration.register(
        directory / registration.SOCKET, "x.sock", RESOURCE, v1beta1_pb2.DevicePluginOptions()
    )


async def register(directory: Path, *servicers: Registrar | AlphaRegistrar) -> str:
    """Register with a kubelet that has these services."""
    async with serving(rpc.routes(servicer.service for servicer in servicers), directory / registration.SOCKET):
        outcome = await outcomes.acapture(call_register, directory)
    return outcome.unwrap()  # out here, where no nursery wraps an error in a group


def only(accepted: str) -> Answer:
    """Refuse other versions in the kubelet's own words."""

    async def answer(version: str, resource: str) -> None:
        if version != accepted:
            raise rpc.RpcError(StatusCode.UNKNOWN, f'requested API version "{version}" is not supported by kubelet.')

    return answer


class TestRegister:
    @pytest.mark.parametrize(
        ("servicers", "version"),
        [
            pytest.param([Registrar(only("v1beta1"))], "v1beta1", id="1.10"),
            pytest.param([AlphaRegistrar(only("v1alpha2"))], "v1alpha2", id="1.9"),
            pytest.param([AlphaRegistrar(only("v1alpha1"))], "v1alpha1", id="1.8"),
            pytest.param([Registrar(only("v9")), AlphaRegistrar(only("v1alpha2"))], "v1alpha2", id="version refused"),
        ],
    )
    def test_the_newest_version_that_the_kubelet_takes(
        self, directory: Path, servicers: list[Registrar | AlphaRegistrar], version: str
    ) -> None:
        """Try v1beta1 first, and the next where the service is missing or the version refused."""
        assert trio.run(register, directory, *servicers) == version

    def test_another_refusal_ends_the_attempt(self, directory: Path) -> None:
        """Try no older version, and pass on what the kubelet said of which resource."""

        async def refuse(version: str, resource: str) -> None:
            raise rpc.RpcError(StatusCode.UNKNOWN, "a reason")

        async def fail(version: str, resource: str) -> None:
            pytest.fail("an older version was tried")

        with pytest.raises(RegistrationFailedError, match=rf"{RESOURCE}.*UNKNOWN.*a reason"):
            trio.run(register, directory, Registrar(refuse), AlphaRegistrar(fail))

    @pytest.mark.parametrize(
        ("servicers", "match"),
        [
            pytest.param([], "UNIMPLEMENTED", id="none has the service"),
            pytest.param([Registrar(only("v9"))], "v1beta1", id="the version, not the missing service"),
            pytest.param([Registrar(only("v9")), AlphaRegistrar(only("v9"))], "v1alpha1", id="the last version"),
        ],
    )
    def test_a_kubelet_that_takes_no_version(
        self, directory: Path, servicers: list[Registrar | AlphaRegistrar], match: str
    ) -> None:
        """Pass on the last refusal that is not about a missing service, if there is one."""
        with pytest.raises(RegistrationFailedError, match=match):
            trio.run(register, directory, *servicers)

    def test_no_socket(self, directory: Path) -> None:
        """Fail with the path."""
        with pytest.raises(RegistrationFailedError, match=rf"{directory}/kubelet\.sock"):
            trio.run(call_register, directory)

    def test_a_kubelet_that_never_answers(self, directory: Path) -> None:
        """Give up after REGISTER_TIMEOUT; let Cancelled through before that."""

        async def sleep(version: str, resource: str) -> None:
            await trio.sleep(3600)

        async def check() -> None:
            started = trio.current_time()
            with pytest.raises(RegistrationFailedError, match=rf"kubelet\.sock.*\b{REGISTER_TIMEOUT}\b"):
                await register(directory, Registrar(sleep))
            assert trio.current_time() - started == pytest.approx(REGISTER_TIMEOUT)
            with trio.move_on_after(3) as scope:
                await register(directory, Registrar(sleep))
            assert scope.cancelled_caught

        trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0.05))

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), b""], ids=["HTTP/1", "none"])
    @real
    async def test_a_peer_that_is_no_kubelet(self, directory: Path, answer: bytes) -> None:
        """Fail like any other registration when it talks something else, or hangs up."""

        async def talk(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(answer)

        with rpc.listen(directory / registration.SOCKET) as listener:
            async with beside(partial(trio.serve_listeners, talk, [listener])):
                with pytest.raises(RegistrationFailedError):
                    await call_register(directory)


@contextmanager
def bound(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        yield


class TestPinned:
    def test_no_other_file_gets_its_identity(self, directory: Path) -> None:
        """Hold the identity of a socket that is removed and made anew, a hundred times; leave no descriptor open."""
        path = directory / "s"
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            with bound(path), registration.pinned(path) as identity:
                assert identity == rpc.identity(path) is not None
                path.unlink()
                with bound(path):
                    assert rpc.identity(path) != identity
                path.unlink()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_link_is_not_followed(self, directory: Path) -> None:
        """Give the link's own identity, and None for nothing, as `rpc.identity` does."""
        (directory / "link").symlink_to("nowhere")
        for name in ("link", "nothing"):
            with registration.pinned(directory / name) as identity:
                assert identity == rpc.identity(directory / name)
