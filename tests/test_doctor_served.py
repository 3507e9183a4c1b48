"""The doctor on metrics and probes: who answers there, and what the daemon says of itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final

import attrs
import fake_status
import pytest
from daemon_process import short_directory
from findings import about, told

from sgpu.doctor import served
from sgpu.doctor.finding import Finding
from sgpu.doctor.served import check_account, check_served
from sgpu.snapshot import Snapshot, encode


@contextmanager
def answering(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server with these pages; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages.get(self.path, (404, "?"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def port(*, listens: bool) -> Iterator[str]:
    """A port that takes connections and says nothing, or takes none; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if listens:
            yield address
            return
    yield address


@pytest.mark.parametrize(
    ("pages", "level", "words"),
    [
        pytest.param({"/": (200, "sgpu 1"), "/readyz": (200, "ok")}, "ok", "and is ready", id="ready"),
        pytest.param(
            {"/": (200, "sgpu 1"), "/readyz": (503, "no GPU\nyet")}, "FAIL", "is not ready: no GPU yet", id="not ready"
        ),
        pytest.param({"/": (200, "<html>")}, "warn", "another program answers on 127.0.0.1:", id="another"),
    ],
)
def test_answers(pages: dict[str, tuple[int, str]], level: str, words: str) -> None:
    """The daemon says whether it is ready, and another program is told apart."""
    with answering(pages) as address:
        assert told(check_served(address, running=True), level, words)


def test_nobody() -> None:
    """Nobody listens: which is news only if a daemon runs."""
    with port(listens=False) as address:
        assert told(check_served(address, running=True), "warn", f"nobody listens on {address}", "the daemon's log")
        assert told(check_served(address, running=False), "skip", f"nobody listens on {address}")


def test_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is not waited for."""
    monkeypatch.setattr(served, "TIMEOUT", 0.2)
    with port(listens=True) as address:
        assert told(check_served(address, running=True), "FAIL", "does not answer within 0.2 s")


def test_no_http() -> None:
    """What listens speaks something else."""
    with port(listens=False) as address:
        pass
    host, _, number = address.partition(":")
    with socket.create_server((host, int(number))) as listener:

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert told(check_served(address, running=True), "warn", "another program")
        thread.join()


def test_no_such_host() -> None:
    """An address that leads nowhere."""
    assert told(check_served("no-such-host.invalid:1", running=True), "warn", "can't be asked")


@pytest.mark.parametrize("address", ["", "127.0.0.1:0"])
def test_none(address: str) -> None:
    """None are wanted, or nobody knows where."""
    assert told(check_served(address, running=True), "skip", "-metrics-address is")


def account(snapshot: Snapshot) -> list[Finding]:
    """What is found with a daemon that says that."""
    with short_directory() as directory:
        path = directory / "status"
        with fake_status.answering(path, lambda _: fake_status.http(encode(snapshot))):
            return list(check_account(str(path)))


class TestAccount:
    WELL: Final = fake_status.GPU
    DOWN: Final = attrs.evolve(WELL, uuid="GPU-2", healthy=False, reason="XID 79: off the bus", since=86400.0)

    def test_healthy(self) -> None:
        (finding,) = account(fake_status.SNAPSHOT)
        assert told(finding, "ok", "all 1 for healthy")

    def test_down(self) -> None:
        """Each that is down has its line, with the reason and since when."""
        others = attrs.evolve(self.DOWN, uuid="GPU-3")
        findings = account(attrs.evolve(fake_status.SNAPSHOT, gpus=(self.WELL, self.DOWN, others)))
        assert [finding.subject for finding in findings] == ["daemon's GPU GPU-2", "daemon's GPU GPU-3"]
        words = "unhealthy since 1970-01-02 00:00:00Z: XID 79: off the bus"
        assert told(about(findings, "daemon's GPU GPU-2"), "FAIL", words, "status` says which pods")

    def test_no_gpu(self) -> None:
        """Why there is none, other lines say."""
        (finding,) = account(attrs.evolve(fake_status.SNAPSHOT, gpus=()))
        assert told(finding, "skip", "none yet")

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            pytest.param("", "-status-socket is empty", id="not wanted"),
            pytest.param("/nowhere/status", "no daemon answers on /nowhere/status", id="nobody"),
        ],
    )
    def test_no_answer(self, path: str, words: str) -> None:
        (finding,) = check_account(path)
        assert told(finding, "skip", words)
