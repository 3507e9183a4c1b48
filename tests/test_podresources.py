"""Who has which share, asked of a kubelet on grpcio."""

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

from sgpu import podresources
from sgpu.podresources import PodResourcesError, list_holders
from sgpu.usage import Holder

OTHER = "example.com/gpu"


@pytest.fixture
def path() -> Iterator[Path]:
    """Where the socket goes."""
    with short_directory() as directory:
        yield directory / "kubelet.sock"


@pytest.fixture
def kubelet(path: Path) -> Iterator[FakePodResources]:
    """A kubelet that tells."""
    with FakePodResources(path) as serving:
        yield serving


def holders(path: Path, resources: Collection[str] = (RESOURCE,)) -> Mapping[str, Holder]:
    held = trio.run(list_holders, path, resources)
    assert tuple(held) == tuple(resources)
    return {share_id: holder for each in held.values() for share_id, holder in each.items()}


def refusal(path: Path) -> str:
    """What is said about it: always one line with the path."""
    with pytest.raises(PodResourcesError) as refused:
        holders(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


class TestHolders:
    def test_none(self, kubelet: FakePodResources) -> None:
        """No pods are an answer."""
        assert holders(kubelet.path) == {}

    def test_every_container_of_every_pod(self, kubelet: FakePodResources) -> None:
        """By share id, with namespace, pod and container; pods without a share are left out."""
        kubelet.assign("team", "one", "main", ["GPU-a::0", "GPU-b::7"])
        kubelet.assign("team", "one", "sidecar", ["GPU-a::1"])
        kubelet.assign("other", "two", "main", ["GPU-a::2"])
        kubelet.assign("other", "none", "main", [])
        assert holders(kubelet.path) == {
            "GPU-a::0": Holder("team", "one", "main"),
            "GPU-b::7": Holder("team", "one", "main"),
            "GPU-a::1": Holder("team", "one", "sidecar"),
            "GPU-a::2": Holder("other", "two", "main"),
        }

    def test_only_these_resources(self, kubelet: FakePodResources) -> None:
        """Other plugins' devices are none of ours, whatever their ids; several resources of ours all are."""
        kubelet.assign("team", "one", "main", ["GPU-a::0"])
        kubelet.assign("team", "one", "main", ["GPU-b::0"], resource=OTHER)
        kubelet.assign("team", "two", "main", ["GPU-c::0"], resource="nvidia.com/gpu")
        assert holders(kubelet.path).keys() == {"GPU-a::0"}
        assert holders(kubelet.path, (RESOURCE, OTHER)).keys() == {"GPU-a::0", "GPU-b::0"}
        assert holders(kubelet.path, ()) == {}

    def test_released(self, kubelet: FakePodResources) -> None:
        """A pod that is gone holds nothing."""
        kubelet.assign("default", "one", "main", ["GPU-a::0"])
        kubelet.assign("default", "two", "main", ["GPU-a::1"])
        kubelet.release("one")
        assert holders(kubelet.path).keys() == {"GPU-a::1"}

    def test_many(self, kubelet: FakePodResources) -> None:
        """A list of hundreds of kilobytes: 16 GPUs of 1000 shares, all of them taken."""
        share_ids = [f"GPU-1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a{gpu:02x}::{n}" for gpu in range(16) for n in range(1000)]
        for number, share_id in enumerate(share_ids):
            kubelet.assign("team", f"pod-{number}", "main", [share_id])
        assert holders(kubelet.path).keys() == set(share_ids)

    def test_a_list_of_megabytes(self, kubelet: FakePodResources) -> None:
        """650 pods with many ids of another plugin's (5.2 MB): as with a small one."""
        for number in range(650):
            ids = [f"other-device-{number}-{index:050d}" for index in range(110)]
            kubelet.assign("team", f"pod-{number}", "main", ids, resource=OTHER)
        kubelet.assign("team", "ours", "main", ["GPU-a::0"])
        assert holders(kubelet.path) == {"GPU-a::0": Holder("team", "ours", "main")}


class TestErrors:
    def test_no_socket(self, path: Path) -> None:
        """A node whose socket is not mounted, or a kubelet that has not made it yet."""
        assert refusal(path).startswith(f"the kubelet does not answer on {path}: ")

    def test_nobody_listens(self, path: Path) -> None:
        """A kubelet that was stopped leaves its socket behind."""
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        assert "the kubelet does not answer" in refusal(path)

    def test_not_grpc(self, path: Path) -> None:
        """Something else that listens there is told as such, and does not raise anything else."""

        async def main() -> None:
            listener = trio.SocketListener(await bound(path))

            async def hang_up(stream: trio.SocketStream) -> None:
                await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                await stream.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.serve_listeners, hang_up, [listener]))
                with pytest.raises(PodResourcesError, match="does not answer"):
                    await list_holders(path, (RESOURCE,))
                nursery.cancel_scope.cancel()

        trio.run(main)

    @pytest.mark.parametrize(
        ("code", "hint"),
        [
            pytest.param(grpc.StatusCode.UNIMPLEMENTED, True, id="too old"),
            pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, False, id="asked too often"),
        ],
    )
    def test_refused(self, kubelet: FakePodResources, code: grpc.StatusCode, hint: bool) -> None:
        """What the kubelet says is passed on; of one that knows no such method, which Kubernetes does."""
        kubelet.refuse(code, "not today")
        said = refusal(kubelet.path)
        assert said.startswith(f"the kubelet's List call on {kubelet.path} failed: {code.name}: not today")
        assert ("it needs Kubernetes 1.20" in said) is hint
        kubelet.accept()
        assert holders(kubelet.path) == {}

    def test_too_long(self, kubelet: FakePodResources, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is said is about the size, and not about the socket, which is the right one."""
        monkeypatch.setattr(podresources, "MAX_ANSWER_BYTES", 100)
        kubelet.assign("team", "one", "main", [f"GPU-a::{number}" for number in range(20)])
        said = refusal(kubelet.path)
        assert "a message of " in said
        assert "where 100 are taken" in said
        assert "-pod-resources-socket" not in said

    def test_stopped_while_asked(self, path: Path) -> None:
        """A kubelet that goes away in the middle of a call."""

        async def main() -> None:
            listener = trio.SocketListener(await bound(path))

            async def go(stream: trio.SocketStream) -> None:
                await stream.receive_some()
                await stream.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.serve_listeners, go, [listener]))
                with pytest.raises(PodResourcesError, match="does not answer"):
                    await list_holders(path, (RESOURCE,))
                nursery.cancel_scope.cancel()

        trio.run(main)

    def test_too_slow(self, kubelet: FakePodResources, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kubelet that does not answer in time is given up."""
        monkeypatch.setattr(podresources, "TIMEOUT", 0.2)
        kubelet.delay = 30
        assert refusal(kubelet.path) == f"the kubelet did not answer on {kubelet.path} within 0.2 s"

    def test_cancelled(self, kubelet: FakePodResources) -> None:
        """While it waits, it can be given up, and that is no error of the kubelet's."""
        kubelet.delay = 30

        async def main() -> None:
            with trio.move_on_after(0.2) as scope:
                await list_holders(kubelet.path, (RESOURCE,))
            assert scope.cancelled_caught

        trio.run(main)


async def bound(path: Path) -> trio.socket.SocketType:
    """A socket that listens at the path."""
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()
    return listening
