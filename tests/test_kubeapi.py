"""Requests to the API server, over TLS as in a pod; and watches, retries and mirrors on a virtual clock."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from fake_api_server import Answer, FakeApiServer, connected, serving
from virtual_clock import beside, real, virtual

from sgpu.kubeapi import Access, ApiServer, ApiServerError, Mirror, open_api_server
from sgpu.kubeapi import client as client_module
from sgpu.kubeapi.access import FRESH, Credentials, in_cluster

#: httpcore leaves a socket to the garbage collector if it is cancelled while TLS begins.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*unclosed <socket.socket:pytest.PytestUnraisableExceptionWarning",
    "ignore:(?s).*<socket.socket fd=:pytest.PytestUnraisableExceptionWarning",
)

THINGS = "/api/v1/nodes"


def thing(name: str, color: str = "red") -> dict[str, object]:
    return {"metadata": {"name": name}, "color": color}


async def failure(api: ApiServer, path: str = f"{THINGS}/a") -> ApiServerError:
    with pytest.raises(ApiServerError) as caught:
        await api.get(path)
    return caught.value


class TestAccess:
    @pytest.mark.parametrize(
        ("host", "url"), [("10.96.0.1", "https://10.96.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
    )
    def test_in_a_pod(self, host: str, url: str) -> None:
        """By what the kubelet puts there."""
        environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "443"}
        access = in_cluster(environment, "-x", "k8s/x", Path("/d"))
        assert access == Access(url, Path("/d/token"), Path("/d/ca.crt"), "k8s/x")

    def test_not_in_a_pod(self) -> None:
        """The message says what is needed."""
        with pytest.raises(ApiServerError, match="-x needs sgpu to run in a pod"):
            in_cluster({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "-x", "k8s/x")

    @real
    async def test_the_token_is_read_again(self, tmp_path: Path) -> None:
        """After a minute, or when it was refused."""
        now = [0.0]
        with serving(FakeApiServer(), tmp_path) as access:
            credentials = Credentials(access, lambda: now[0])
            assert await credentials.token() == "a-token"
            (tmp_path / "token").write_text("b")
            assert await credentials.token() == "a-token"
            now[0] = FRESH
            assert await credentials.token() == "b"
            (tmp_path / "token").write_text("c")
            credentials.expire()
            assert await credentials.token() == "c"

    @pytest.mark.parametrize(("name", "content"), [("token", None), ("ca.crt", None), ("ca.crt", ""), ("ca.crt", "x")])
    @real
    async def test_files_that_are_no_use(
        self, tmp_path: Path, name: str, content: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Missing, empty, or something else; and not only for a moment."""
        monkeypatch.setattr(client_module, "REQUEST_TIMEOUT", 0.5)
        with serving(FakeApiServer(), tmp_path) as access:
            (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
            async with open_api_server(access) as api:
                assert "automountServiceAccountToken" in str(await failure(api))


class TestOverTls:
    @real
    async def test_all_requests(self, tmp_path: Path) -> None:
        """Create, get, replace, a conflict, patch, delete, delete again, get what is not there."""
        server = FakeApiServer()
        with serving(server, tmp_path) as access:
            async with open_api_server(access) as api:
                created = await api.create(THINGS, thing("a"))
                assert await api.get(f"{THINGS}/a") == created
                await api.create(THINGS, thing("b"), dry_run=True)
                assert list(server.objects) == [f"{THINGS}/a"]
                replaced = await api.replace(f"{THINGS}/a", {**created, "color": "blue"})
                assert replaced["color"] == "blue"
                with pytest.raises(ApiServerError) as caught:
                    await api.replace(f"{THINGS}/a", created)
                assert caught.value.conflict
                patched = await api.patch(f"{THINGS}/a", {"color": None, "size": {"x": 1}})
                assert (patched.get("color"), patched["size"]) == (None, {"x": 1})
                await api.delete(f"{THINGS}/a")
                await api.delete(f"{THINGS}/a")
                assert (await failure(api)).not_found

    @real
    async def test_a_watch(self, tmp_path: Path) -> None:
        """Events come as they happen, and the end of the connection in the middle of a line is an error."""
        server = FakeApiServer()
        with serving(server, tmp_path) as access:
            async with open_api_server(access) as api, api.watch(THINGS, "0") as events:
                server.put(f"{THINGS}/a", thing("a"))
                assert (await anext(events)).kind == "ADDED"
                server.remove(f"{THINGS}/a")
                assert (await anext(events)).kind == "DELETED"
                server.hang_up()
                with pytest.raises(ApiServerError, match="no usable answer"):
                    await anext(events)

    @real
    async def test_a_watch_that_is_left(self, tmp_path: Path) -> None:
        """In the middle of an answer: nothing is left to the garbage collector, and the client goes on."""
        server = FakeApiServer()
        server.put(f"{THINGS}/a", thing("a"))
        with serving(server, tmp_path) as access:
            async with open_api_server(access) as api:
                async with api.watch(THINGS, "0") as events:
                    await anext(events)
                await api.get(f"{THINGS}/a")

    @real
    async def test_another_authority(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that the service account's authority does not know is not talked to."""
        monkeypatch.setattr(client_module, "REQUEST_TIMEOUT", 0.5)
        server, other = FakeApiServer(), tmp_path / "other"
        other.mkdir()
        with serving(server, tmp_path) as access, serving(FakeApiServer(), other) as foreign:
            async with open_api_server(attrs.evolve(access, ca_file=foreign.ca_file)) as api:
                assert "did not sign its certificate" in str(await failure(api))
        gc.collect()  # whatever was left of these attempts
        assert not server.requests

    @real
    async def test_nobody_listens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is tried again for a while, and the message names the address."""
        monkeypatch.setattr(client_module, "REQUEST_TIMEOUT", 0.5)
        with serving(FakeApiServer(), tmp_path) as access:
            pass
        async with open_api_server(access) as api:
            assert access.url in str(await failure(api))

    @real
    async def test_a_token_that_is_refused(self, tmp_path: Path) -> None:
        """The next request has what the file has then."""
        server = FakeApiServer()
        server.put(f"{THINGS}/a", thing("a"))
        with serving(server, tmp_path) as access:
            async with open_api_server(access) as api:
                await api.get(f"{THINGS}/a")
                server.tokens = {"new"}
                (tmp_path / "token").write_text("new")
                assert (await failure(api)).status == 401
                await api.get(f"{THINGS}/a")


class TestRequests:
    @virtual
    async def test_a_passing_failure(self) -> None:
        """Reads are sent again; the server's own wish for time is heard."""
        server = FakeApiServer()
        busy = Answer(429, {"message": "too many"}, {"Retry-After": "3"})
        server.instead["GET"] = [busy, Answer(500, {"message": "leader"}), Answer(200, {"color": "red"})]
        async with connected(server) as api:
            start = trio.current_time()
            assert (await api.get(f"{THINGS}/a"))["color"] == "red"
            assert 3 <= trio.current_time() - start < 5

    @virtual
    async def test_writes_are_not_sent_twice(self) -> None:
        """After a 500 nobody knows whether it was done."""
        server = FakeApiServer()
        server.instead["POST"] = [Answer(500, {"message": "leader"})]
        async with connected(server) as api:
            with pytest.raises(ApiServerError, match="500 leader"):
                await api.create(THINGS, thing("a"))
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (Answer(401, {"message": "Unauthorized"}), "the token of sgpu's service account is not accepted"),
            (Answer(403, {"message": 'clusterrole "system:discovery" not found'}), "has just started"),
            (Answer(403, {"message": "cannot get"}), "403 cannot get .does sgpu's service account have the rights"),
            (
                Answer(404, {"message": "the server could not find the requested resource"}),
                "does not have this version of the API",
            ),
            (Answer(400, {}), "400 {}"),
        ],
        ids=lambda value: str(value.status) if isinstance(value, Answer) else "",
    )
    @virtual
    async def test_what_to_do(self, answer: Answer, message: str) -> None:
        """Each refusal says it where the server does not."""
        server = FakeApiServer()
        server.instead["GET"] = [answer]
        async with connected(server) as api:
            with pytest.raises(ApiServerError, match=message):
                await api.get(f"{THINGS}/a")

    @virtual
    async def test_a_slow_server(self) -> None:
        """A request ends; so a claim's preparation does before the kubelet gives up."""
        server = FakeApiServer()
        server.delay = 100.0
        async with connected(server) as api:
            assert "no answer within 15 s" in str(await failure(api))
            assert trio.current_time() == pytest.approx(15)

    @virtual
    async def test_an_answer_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More than an object can have is not read."""
        monkeypatch.setattr(client_module, "MAX_BYTES", 1000)
        server = FakeApiServer()
        server.put(f"{THINGS}/a", thing("a", "x" * 2000))
        async with connected(server) as api:
            assert "for one object" in str(await failure(api))
            with pytest.raises(ApiServerError, match="for one object"):
                async with api.watch(THINGS, "0") as events:
                    await anext(events)

    @pytest.mark.parametrize("content", [b"<html>", b"", b"[1]", b"\xff"], ids=["html", "nothing", "list", "binary"])
    @virtual
    async def test_nonsense(self, content: bytes) -> None:
        """From whatever is between; sent again, as it may pass."""
        server = FakeApiServer()
        server.instead["GET"] = [Answer(200, content)]
        async with connected(server) as api:
            assert "no usable answer from http://fake" in str(await failure(api))

    @virtual
    async def test_nonsense_in_a_watch(self) -> None:
        """Another program's stream of objects."""
        server = FakeApiServer()
        server.instead["GET"] = [Answer(200, b'{"type": 1}\n')]
        async with connected(server) as api:
            with pytest.raises(ApiServerError, match="without type or object"):
                async with api.watch(THINGS, "0") as events:
                    await anext(events)

    @virtual
    async def test_a_deletion_that_is_refused(self) -> None:
        """Only what is gone counts as deleted."""
        server = FakeApiServer()
        server.instead["DELETE"] = [Answer(403, {"message": "cannot delete"})]
        async with connected(server) as api:
            with pytest.raises(ApiServerError, match="cannot delete"):
                await api.delete(f"{THINGS}/a")

    @virtual
    async def test_cancelled(self) -> None:
        """In the middle of a request and of a watch; nothing is left behind."""
        server = FakeApiServer()
        server.delay = 1.0
        async with connected(server) as api:
            with trio.move_on_after(0.5) as scope:
                await api.get(f"{THINGS}/a")
            assert scope.cancelled_caught
            with trio.move_on_after(5) as scope:
                async with api.watch(THINGS, "0") as events:
                    await anext(events)
            assert scope.cancelled_caught


@asynccontextmanager
async def mirrored(server: FakeApiServer) -> AsyncIterator[Mirror]:
    """A mirror that has run for a second."""
    async with connected(server) as api:
        mirror = Mirror(api, THINGS, {})
        async with beside(mirror.run):
            await trio.sleep(1)
            yield mirror


class TestMirror:
    @virtual
    async def test_it_follows(self) -> None:
        """What is there, what comes, changes and goes; through a watch that ends, breaks, or can't be resumed."""
        server = FakeApiServer()
        server.put(f"{THINGS}/a", thing("a"))
        async with mirrored(server) as mirror:
            assert mirror.synced
            for disturbances in ((), (server.hang_up,), (server.forget,), (server.forget, server.hang_up)):
                for disturb in disturbances:
                    disturb()
                for color in ("blue", "green"):
                    server.put(f"{THINGS}/a", thing("a", color))
                    server.put(f"{THINGS}/b", thing("b"))
                    await trio.sleep(70)
                    assert mirror.objects["a"]["color"] == color
                    server.remove(f"{THINGS}/b")
                    await trio.sleep(70)
                    assert list(mirror.objects) == ["a"]

    @virtual
    async def test_it_resumes(self) -> None:
        """A watch that the server ended goes on where its last bookmark was: nothing is listed again, for a day."""
        server = FakeApiServer()
        async with mirrored(server) as mirror:
            server.requests.clear()
            changed = mirror.changed.next
            for _ in range(24):
                await trio.sleep(3600)
                server.put("/api/v1/others/a", thing("a"))
                await trio.sleep(600)
                server.forget_before_now()
            assert set(server.requests) == {f"GET {THINGS}?watch"}
            assert 160 < len(server.requests) < 340
            assert not changed.is_set()

    @virtual
    async def test_a_late_deletion(self) -> None:
        """What was made anew, and taken over here, is not lost to the old one's end."""
        server = FakeApiServer()
        server.put(f"{THINGS}/a", thing("a"))
        async with mirrored(server) as mirror:
            server.remove(f"{THINGS}/a")
            mirror.put(server.put(f"{THINGS}/a", thing("a", "new")))
            await trio.sleep(1)
            assert mirror.objects["a"]["color"] == "new"

    @virtual
    async def test_a_server_that_refuses(self, caplog: pytest.LogCaptureFixture) -> None:
        """One line a reason, and seldom a request."""
        server = FakeApiServer()
        server.instead["GET"] = [Answer(403, {"message": "forbidden"})]
        async with mirrored(server) as mirror:
            await trio.sleep(3600)
            assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
            assert len(server.requests) < 250
            assert not mirror.synced
