"""The containers that have shares, as a kubelet on grpcio lists them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import grpc
import pytest
import trio
from daemon_process import short_directory
from fake_pod_resources import RESOURCE, FakePodResources
from virtual_clock import beside, real

from sgpu.node.claims import ClaimedUnit, Pod, PreparedClaim
from sgpu.node.container import Container
from sgpu.node.shares import Share
from sgpu.pods import holders
from sgpu.pods.held import Held
from sgpu.pods.holders import PodResourcesError, open_lister

OTHER = "example.com/gpu"


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "kubelet.sock"


@pytest.fixture
def kubelet(path: Path) -> Iterator[FakePodResources]:
    with FakePodResources(path) as serving:
        yield serving


async def list_holders(path: Path, resources: Collection[str], claims: Collection[PreparedClaim] = ()) -> Held:
    """Ask once."""
    async with open_lister(path) as lister:
        return await lister.list_holders(resources, claims)


def listed(path: Path, *resources: str) -> Mapping[str, Mapping[str, Container]]:
    """The containers by resource and id."""
    answer = trio.run(list_holders, path, resources or (RESOURCE,))
    return {
        resource: {str(share): holder for share, holder in each.items()} for resource, each in answer.shares.items()
    }


def refusal(path: Path) -> str:
    """The message of the error; it always has the path."""
    with pytest.raises(PodResourcesError) as refused:
        trio.run(list_holders, path, (RESOURCE,))
    assert str(path) in str(refused.value)
    return str(refused.value)


class TestAnswers:
    def test_containers(self, kubelet: FakePodResources) -> None:
        """Return the container of each share, and leave out what has none, and ids that are no share's."""
        assert listed(kubelet.path) == {RESOURCE: {}}
        kubelet.assign("team", "one", "main", ["GPU-a::0", "GPU-b::7", "GPU-a", "GPU-a::07"])
        kubelet.assign("team", "one", "sidecar", ["GPU-a::1"])
        kubelet.assign("other", "two", "main", ["GPU-a::2"])
        kubelet.assign("other", "none", "main", [])
        assert listed(kubelet.path) == {
            RESOURCE: {
                "GPU-a::0": Container("team", "one", "main"),
                "GPU-b::7": Container("team", "one", "main"),
                "GPU-a::1": Container("team", "one", "sidecar"),
                "GPU-a::2": Container("other", "two", "main"),
            }
        }

    def test_resources(self, kubelet: FakePodResources) -> None:
        """Return the shares of each resource that is asked for, and leave out other plugins' devices."""
        kubelet.assign("team", "one", "main", ["GPU-a::0"])
        kubelet.assign("team", "one", "main", ["GPU-a::0"], resource=OTHER)
        kubelet.assign("team", "two", "main", ["GPU-c::0"], resource="nvidia.com/gpu")
        one = {"GPU-a::0": Container("team", "one", "main")}
        assert listed(kubelet.path) == {RESOURCE: one}
        assert listed(kubelet.path, RESOURCE, OTHER, "example.com/none") == {
            RESOURCE: one,
            OTHER: one,
            "example.com/none": {},
        }

    def test_claims(self, kubelet: FakePodResources) -> None:
        """Of claims that are prepared, the last container that has one counts, and its pod until there is one."""
        units = {name: ClaimedUnit(name, "GPU-a", RESOURCE, (Share("GPU-a", int(name)),)) for name in "012"}
        pods = {"0": (Pod("u", "one"),), "1": (Pod("v", "two"),), "2": ()}
        claims = [PreparedClaim(name, "team", f"c{name}", pods[name], (unit,)) for name, unit in units.items()]
        for container in ("main", "sidecar"):
            kubelet.claim("team", "one", container, "0")
        kubelet.claim("team", "other", "main", "of another driver")
        held = trio.run(list_holders, kubelet.path, (RESOURCE,), claims)
        assert {str(share): holder for share, holder in held.shares[RESOURCE].items()} == {
            "GPU-a::0": Container("team", "one", "sidecar"),
            "GPU-a::1": Container("team", "two", ""),
            "GPU-a::2": Container("team", "claim c2", ""),
        }
        both = tuple(Container("team", "one", container) for container in ("main", "sidecar"))
        assert held.claimants == {Share("GPU-a", 0): both}

    def test_megabytes(self, kubelet: FakePodResources) -> None:
        """Take an answer of megabytes: 650 pods with many ids of another plugin's (5.2 MB)."""
        for number in range(650):
            ids = [f"other-device-{number}-{index:050d}" for index in range(110)]
            kubelet.assign("team", f"pod-{number}", "main", ids, resource=OTHER)
        kubelet.assign("team", "ours", "main", ["GPU-a::0"])
        assert listed(kubelet.path) == {RESOURCE: {"GPU-a::0": Container("team", "ours", "main")}}


class TestConnection:
    """Kept as long as it serves."""

    def test_kept(self, kubelet: FakePodResources, monkeypatch: pytest.MonkeyPatch) -> None:
        """List over one connection, over another one after an error, and at once where the kubelet has restarted."""
        connected: list[str] = []
        connect = trio.open_unix_socket

        async def open_unix_socket(path: str) -> trio.SocketStream:
            connected.append(path)
            return await connect(path)

        async def main() -> None:
            async with open_lister(kubelet.path) as lister:
                for _ in range(3):
                    assert await lister.list_holders([RESOURCE])
                assert len(connected) == 1
                kubelet.__exit__(None, None, None)
                kubelet.__enter__()
                assert await lister.list_holders([RESOURCE])
                assert len(connected) == 2
                kubelet.refuse(grpc.StatusCode.UNAVAILABLE)
                with pytest.raises(PodResourcesError):
                    await lister.list_holders([RESOURCE])
                kubelet.accept()
                assert await lister.list_holders([RESOURCE])
                assert len(connected) == 3

        monkeypatch.setattr(trio, "open_unix_socket", open_unix_socket)
        trio.run(main)


class TestErrors:
    def test_no_socket(self, path: Path) -> None:
        """Name the setting where there is no socket, or nobody listens on the one that was left behind."""
        assert "-pod-resources-socket" in refusal(path)
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        assert "-pod-resources-socket" in refusal(path)

    @pytest.mark.parametrize(
        "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["not gRPC", "stopped during the call"]
    )
    @real
    async def test_not_a_kubelet(self, path: Path, answer: bytes) -> None:
        """Name the setting where what listens gives no answer of gRPC's."""

        async def hang_up(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(answer)
            await stream.aclose()

        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(path))
        listening.listen()
        async with beside(partial(trio.serve_listeners, hang_up, [trio.SocketListener(listening)])):
            with pytest.raises(PodResourcesError, match="-pod-resources-socket"):
                await list_holders(path, (RESOURCE,))

    @pytest.mark.parametrize(
        ("code", "hint"),
        [
            pytest.param(grpc.StatusCode.UNIMPLEMENTED, True, id="too old"),
            pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, False, id="called too often"),
        ],
    )
    def test_refused(self, kubelet: FakePodResources, code: grpc.StatusCode, hint: bool) -> None:
        """Repeat what the kubelet says, with the version that is needed where it knows no such method."""
        kubelet.refuse(code, "not today")
        message = refusal(kubelet.path)
        assert f"{code.name}: not today" in message
        assert ("Kubernetes 1.20" in message, "-pod-resources-socket" in message) == (hint, hint)
        kubelet.accept()
        assert listed(kubelet.path) == {RESOURCE: {}}

    def test_too_long(self, kubelet: FakePodResources, monkeypatch: pytest.MonkeyPatch) -> None:
        """Name the limit, and not the socket, which is the right one."""
        monkeypatch.setattr(holders, "MAX_ANSWER_BYTES", 123)
        kubelet.assign("team", "one", "main", [f"GPU-a::{number}" for number in range(20)])
        message = refusal(kubelet.path)
        assert "123" in message
        assert "-pod-resources-socket" not in message

    def test_too_slow(self, kubelet: FakePodResources, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give up a kubelet that does not answer in time."""
        monkeypatch.setattr(holders, "TIMEOUT", 0.2)
        kubelet.delay = 30
        assert "0.2 s" in refusal(kubelet.path)
