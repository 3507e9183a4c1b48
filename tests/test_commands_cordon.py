"""The commands `cordon` and `uncordon`: what they ask, how long they wait, what they say and return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from daemon_process import short_directory
from fake_status import GPU, SNAPSHOT, answering, http

from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.node.usage import ContainerUse
from sgpu.observe.orders import Done, encode
from sgpu.observe.snapshot import CordonSnapshot, GpuSnapshot
from sgpu.observe.snapshot import encode as encode_snapshot

DONE = Done(GPU.uuid, GPU.name, GPU.pci_bus_id, changed=True)
POD = ContainerUse("team", "trainer", "main", shares=3)
STRAY = ContainerUse("", "", "", shares=0, processes=2)
IN_USE = attrs.evolve(GPU, cordon=CordonSnapshot("", 1.0), containers=(POD, STRAY))
RELEASED = attrs.evolve(GPU, cordon=CordonSnapshot("", 1.0, released=True), allocated=0)
HELD = attrs.evolve(GPU, cordon=CordonSnapshot("", 1.0, problem="it hangs"), allocated=0, memory_used=None)
INSTANCE = attrs.evolve(IN_USE, uuid="MIG-a", parent=GPU.uuid)


@pytest.fixture
def path() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "status.sock"


def daemon(*states: GpuSnapshot | bytes | None) -> Callable[[bytes], bytes]:
    """A daemon that carries out each order, and shows these states of the GPU, the last one again and again."""
    left = list(states)

    def answer(request: bytes) -> bytes:
        if request.startswith(b"POST"):
            return http(encode(DONE))
        state = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(state, bytes):
            return state
        return http(encode_snapshot(attrs.evolve(SNAPSHOT, gpus=(state,) if state else ())))

    return answer


def test_cordon(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Send the order, and say which GPU it was and who still has shares."""
    with answering(path, daemon(IN_USE)) as requests:
        assert main(["cordon", "0", "-reason", "bad row", f"-status-socket={path}"], {}) == OK
    assert requests[0].startswith(b"POST /cordon ")
    assert requests[0].endswith(b'{"gpu": "0", "reason": "bad row"}')
    said = capsys.readouterr().out
    assert [fact for fact in (GPU.uuid, GPU.pci_bus_id, "3 shares", "team/trainer") if fact not in said] == []


def test_uncordon(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Send that order; say so where there was nothing to do."""
    with answering(path, daemon(GPU)) as requests:
        assert main(["uncordon", GPU.uuid, f"-status-socket={path}"], {}) == OK
    assert requests[0].startswith(b"POST /uncordon ")
    first = capsys.readouterr().out
    with answering(path, lambda _: http(encode(attrs.evolve(DONE, changed=False)))):
        assert main(["uncordon", GPU.uuid, f"-status-socket={path}"], {}) == OK
    assert GPU.uuid in first != capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (http(b"'9' is no GPU of this node\n", "409 Conflict"), "'9' is no GPU"),
        (http(b"gpu and reason have to be texts\n", "400 Bad Request"), "have to be texts"),
        (http(b"there is no '/cordon' here", "404 Not Found"), "update"),
        (http(b"it has a body", "413 Request Entity Too Large"), "update"),
        (http(b"", "503 x"), "503"),
        (b"", "restart"),
    ],
    ids=["refused", "bad", "no such path", "older daemon", "odd", "hung up"],
)
@pytest.mark.parametrize("verb", ["cordon", "uncordon"])
def test_refused(path: Path, capsys: pytest.CaptureFixture[str], verb: str, answer: bytes, fact: str) -> None:
    """Print one line with the reason."""
    with answering(path, lambda _: answer):
        assert main([verb, "9", f"-status-socket={path}"], {}) == FAILED
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n"), fact in captured.err) == ("", 1, True)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Name the GPU, and one only."""
    assert [main(["cordon"], {}), main(["uncordon", "0", "1"], {}), main(["cordon", "0", "-wait=x"], {})] == [USAGE] * 3
    assert capsys.readouterr().out == ""


class TestWait:
    def test_until_it_is_released(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Wait over a restart of the daemon, say each change once, and name users outside of Kubernetes."""
        states = (IN_USE, IN_USE, b"", None, HELD, RELEASED)
        with answering(path, daemon(*states)):
            assert main(["cordon", "0", "-wait", f"-status-socket={path}"], {}) == OK
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 4
        assert ["team/trainer" in lines[0], "restart" in lines[1], "it hangs" in lines[3]] == [True] * 3
        assert "2 process" in captured.out

    @pytest.mark.parametrize("state", [IN_USE, INSTANCE], ids=["GPU", "instance"])
    def test_timeout(self, path: Path, capsys: pytest.CaptureFixture[str], state: GpuSnapshot) -> None:
        """Give up in time, and say who still has a share."""
        with answering(path, daemon(state)):
            assert main(["cordon", "0", "-wait", "-timeout=0.1", f"-status-socket={path}"], {}) == FAILED
        assert "team/trainer" in capsys.readouterr().err.splitlines()[-1]

    def test_interrupt(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Give up at Ctrl-C, too, and leave signals as they were."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        looks, main_thread = [], threading.get_ident()

        def answer(request: bytes) -> bytes:
            looks.append(request)
            if len(looks) == 3:  # after the order, and what is said of it: the first look of the wait
                signal.pthread_kill(main_thread, signal.SIGINT)
            return daemon(IN_USE)(request)

        with answering(path, answer):
            assert main(["cordon", "0", "-wait", f"-status-socket={path}"], {}) == FAILED
        assert "SIGINT" in (last := capsys.readouterr().err.splitlines()[-1])
        assert "team/trainer" in last
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

    def test_uncordoned_meanwhile(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Do not wait for what does not come."""
        with answering(path, daemon(IN_USE, GPU)):
            assert main(["cordon", "0", "-wait", f"-status-socket={path}"], {}) == FAILED
        assert "uncordoned" in capsys.readouterr().err
