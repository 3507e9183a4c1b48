"""The doctor on metrics and probes: who answers there, and which GPUs the daemon has for unhealthy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest
from daemon_process import short_directory
from fake_status import GPU, SNAPSHOT, answering, http
from findings import expect

from sgpu.commands.doctor import served
from sgpu.commands.doctor.finding import Finding
from sgpu.commands.doctor.served import check_gpus, check_served
from sgpu.observe.snapshot import GpuSnapshot, encode


@contextmanager
def port(*, listens: bool) -> Iterator[str]:
    """Give the address of a port that takes connections and says nothing, or takes none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if listens:
            yield address
            return
    yield address


ANSWERS = {
    "ready": (http(b"sgpu 1"), http(b"ok"), "ok", ""),
    "not ready": (http(b"sgpu 1"), http(b"no GPU\nyet", "503 Service Unavailable"), "FAIL", "no GPU yet"),
    "another program": (http(b"<html>"), http(b"ok"), "warn", ""),
    "no HTTP": (b"SSH-2.0-x\r\n", b"", "warn", ""),
}


@pytest.mark.parametrize(("first", "ready", "level", "fact"), ANSWERS.values(), ids=ANSWERS)
def test_answers(first: bytes, ready: bytes, level: str, fact: str) -> None:
    """The daemon says whether it is ready, and another program is not taken for it."""

    def answer(request: bytes) -> bytes:
        return ready if request.startswith(b"GET /readyz ") else first

    with socket.create_server(("127.0.0.1", 0)) as listener, answering(listener, answer):
        expect(check_served(f"127.0.0.1:{listener.getsockname()[1]}", running=True), level, fact)


@pytest.mark.parametrize(("running", "level"), [(True, "warn"), (False, "skip")], ids=["daemon", "no daemon"])
def test_nobody_listens(running: bool, level: str) -> None:
    """That nobody listens is news only where a daemon runs."""
    with port(listens=False) as address:
        expect(check_served(address, running=running), level, address)


def test_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is not waited for."""
    monkeypatch.setattr(served, "TIMEOUT", 0.2)
    with port(listens=True) as address:
        expect(check_served(address, running=True), "FAIL", address, "0.2 s")


@pytest.mark.parametrize(
    ("address", "level"), [("no-such-host.invalid:1", "warn"), ("", "skip"), ("127.0.0.1:0", "skip")]
)
def test_no_address(address: str, level: str) -> None:
    """Where no address leads to the daemon, it is not asked."""
    expect(check_served(address, running=True), level, address, advice="-metrics-address" if level == "warn" else "")


def gpus(*gpus: GpuSnapshot) -> list[Finding]:
    """Return what is found with a daemon that has these."""
    answer = http(encode(attrs.evolve(SNAPSHOT, gpus=gpus)))
    with short_directory() as directory, answering(directory / "status", lambda _: answer):
        return list(check_gpus(str(directory / "status")))


def test_healthy_gpus() -> None:
    """GPUs that are all well are one line."""
    (finding,) = gpus(GPU, attrs.evolve(GPU, uuid="GPU-2"))
    expect(finding, "ok", 2)


def test_unhealthy_gpus() -> None:
    """Each that is down has a line, with the reason and since when."""
    down = attrs.evolve(GPU, uuid="GPU-2", healthy=False, reason="XID 79: off the bus", since=86400.0)
    two, three = gpus(GPU, down, attrs.evolve(down, uuid="GPU-3"))
    assert two.subject.endswith("GPU-2")
    assert three.subject.endswith("GPU-3")
    expect(two, "FAIL", "1970-01-02 00:00:00Z", "XID 79: off the bus", advice="python -m sgpu status")


def test_no_gpus() -> None:
    """Why the daemon has no GPU, or is not there, other lines say."""
    (finding,) = gpus()
    expect(finding, "skip")
    (finding,) = check_gpus("/nowhere/status")
    expect(finding, "skip", "/nowhere/status")
