"""Listening on a unix socket that nobody else listens on."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from sgpu.files import MAX_SOCKET_PATH_BYTES
from sgpu.rpc import AddressInUseError, identity, listen, unix

#: Tries to listen; says whether it does; keeps at it until its input ends.
LISTENER: Final = """
import sys
from pathlib import Path
from sgpu.rpc import AddressInUseError, listen
print("ready", flush=True)
sys.stdin.readline()
try:
    with listen(Path(sys.argv[1])):
        print("listening", flush=True)
        sys.stdin.readline()
except AddressInUseError as error:
    print(f"refused {error.pid}", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@contextmanager
def listener_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that tries to listen when a line comes in."""
    command = [sys.executable, "-c", LISTENER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert heard(process) == "ready"
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def leave_stale(path: Path) -> None:
    """A socket whose process is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(str(path)) == 0


class TestListen:
    def test_it_listens_until_its_end(self, path: Path) -> None:
        """Connections are queued from the start; the socket is gone afterwards."""

        async def main() -> None:
            with listen(path) as listener:
                assert connects(path)
                async with await listener.accept() as stream:
                    assert await stream.receive_some() == b""

        trio.run(main)
        assert not path.exists()

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
    def test_only_the_owner_may_connect(self, umask: int, path: Path) -> None:
        """Mode 0600, whatever the umask."""
        before = os.umask(umask)
        try:
            with listen(path):
                assert stat.filemode(path.stat().st_mode) == "srw-------"
        finally:
            os.umask(before)

    def test_a_stale_socket_is_replaced(self, path: Path) -> None:
        """By a new one that works."""
        leave_stale(path)
        assert not connects(path)
        with listen(path):
            assert connects(path)
        assert not path.exists()

    def test_a_live_socket_is_refused(self, path: Path) -> None:
        """The error says who has it, and that one goes on."""
        with listener_process(path) as other:
            tell(other)
            assert heard(other) == "listening"
            with pytest.raises(AddressInUseError) as caught, listen(path):
                pass
            assert caught.value.path == path
            assert caught.value.pid == other.pid
            assert str(caught.value).startswith(f"process {other.pid} ({sys.executable} -c ")
            assert str(caught.value).endswith(f"already listens on {path}")
            assert connects(path)

    def test_a_full_backlog_counts_as_alive(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody has to accept to be alive, and nobody waits for that."""
        monkeypatch.setattr(unix, "BACKLOG", 16)
        with listen(path), ExitStack() as clients:
            for _ in range(17):
                client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.connect(str(path))
            with pytest.raises(AddressInUseError, match="another process already listens"), listen(path):
                pass
            assert path.exists()

    def test_of_many_that_start_at_once_one_gets_it(self, path: Path) -> None:
        """Over a stale socket too; the others name the one."""
        leave_stale(path)
        with ExitStack() as stack:
            processes = [stack.enter_context(listener_process(path)) for _ in range(4)]
            for process in processes:
                tell(process)
            said = {process.pid: heard(process) for process in processes}
            (winner,) = [pid for pid, word in said.items() if word == "listening"]
            assert sorted(said.values()) == ["listening", *[f"refused {winner}"] * 3]
            assert connects(path)

    def test_a_socket_that_is_about_to_listen_cannot_be_seen(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It would refuse connections as a stale one does; whoever comes at that moment gets the name."""
        chmod = os.chmod

        def slow_chmod(new: Path, mode: int) -> None:
            monkeypatch.undo()
            assert not path.exists()
            stack.enter_context(listen(path))
            chmod(new, mode)

        with ExitStack() as stack:
            monkeypatch.setattr(os, "chmod", slow_chmod)
            with pytest.raises(AddressInUseError) as caught, listen(path):
                pass
            assert caught.value.pid == os.getpid()
            assert connects(path)
            assert os.listdir(path.parent) == [path.name]

    def test_a_socket_that_replaced_a_stale_one_meanwhile_stays(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was taken away is looked at once more, and put back."""
        leave_stale(path)
        rename = Path.rename

        def slow_rename(self: Path, target: Path) -> Path:
            monkeypatch.undo()
            stack.enter_context(listen(path))
            return rename(self, target)

        with ExitStack() as stack:
            monkeypatch.setattr(Path, "rename", slow_rename)
            with pytest.raises(AddressInUseError), listen(path):
                pass
            assert connects(path)
            assert os.listdir(path.parent) == [path.name]

    def test_a_burst_of_peers(self, path: Path) -> None:
        """All of them are connected before the first is accepted."""
        with listen(path), ExitStack() as clients:
            for _ in range(300):
                client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.setblocking(False)
                client.connect(str(path))

    @pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["shared", "exclusive"])
    def test_a_lock_on_the_directory_is_in_nobodys_way(self, kind: int, path: Path) -> None:
        """Anybody can take it who may list the directory."""
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, kind)
            with listen(path):
                assert connects(path)
        finally:
            os.close(descriptor)

    def test_a_killed_process_leaves_no_one_out(self, path: Path) -> None:
        """Its socket is stale, and it holds no lock."""
        with listener_process(path) as other:
            tell(other)
            assert heard(other) == "listening"
            other.kill()
            other.wait()
            assert path.exists()
            with listen(path):
                assert connects(path)

    @pytest.mark.parametrize(
        "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("x")], ids=["file", "directory", "link"]
    )
    def test_what_is_no_socket_is_left_alone(self, make: Callable[[Path], None], path: Path) -> None:
        """OSError that names it."""
        make(path)
        before = identity(path)
        with pytest.raises(FileExistsError, match="not a socket") as caught, listen(path):
            pass
        assert caught.value.filename == str(path)
        assert identity(path) == before

    def test_a_directory_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        """OSError that names it."""
        with pytest.raises(FileNotFoundError, match="nowhere"), listen(tmp_path / "nowhere" / "s"):
            pass

    def test_a_path_as_long_as_allowed(self, tmp_path: Path) -> None:
        """Works; one byte more is an OSError that says so."""
        name = "s" * (MAX_SOCKET_PATH_BYTES - len(str(tmp_path)) - 1)
        with listen(tmp_path / name):
            assert connects(tmp_path / name)
        with pytest.raises(OSError, match="too long"), listen(tmp_path / f"{name}s"):
            pass

    @pytest.mark.parametrize("replacement", [Path.touch, leave_stale, None], ids=["file", "socket", "nothing"])
    def test_only_our_own_socket_is_removed_at_the_end(
        self, replacement: Callable[[Path], None] | None, path: Path
    ) -> None:
        """What has taken its place meanwhile stays, and that nothing has is no error."""
        with listen(path):
            path.unlink()
            if replacement:
                replacement(path)
            there = identity(path)
        assert identity(path) == there

    def test_the_socket_is_removed_after_an_error_too(self, path: Path) -> None:
        """Which comes through."""
        with pytest.raises(ZeroDivisionError), listen(path):
            raise ZeroDivisionError
        assert not path.exists()

    def test_no_descriptor_stays_open(self, path: Path) -> None:
        """Neither of a success nor of a failure."""

        def descriptors() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = descriptors()
        with listen(path):
            with pytest.raises(AddressInUseError), listen(path):
                pass
            assert descriptors() == before + 1
        path.touch()
        with pytest.raises(FileExistsError), listen(path):
            pass
        assert descriptors() == before


class TestAddressInUseError:
    @pytest.mark.parametrize(
        ("pid", "who"),
        [
            pytest.param(0, "another process", id="not to be told"),
            pytest.param(2**22 + 1, "process 4194305 (not visible from here)", id="gone"),
        ],
    )
    def test_a_process_that_cannot_be_seen(self, pid: int, who: str) -> None:
        """Is in another namespace, or gone by the time it is named."""
        assert str(AddressInUseError(Path("/s"), pid)) == f"{who} already listens on /s"


class TestIdentity:
    def test_the_same_file(self, path: Path) -> None:
        """Has the same identity under another name, and none under the old one."""
        path.touch()
        before = identity(path)
        path.rename(path.with_name("t"))
        assert identity(path.with_name("t")) == before is not None
        assert identity(path) is None

    def test_a_file_made_anew(self, path: Path) -> None:
        """Has another identity, as long as the old one is held open."""
        path.touch()
        with closing(path.open()):
            before = identity(path)
            path.unlink()
            path.touch()
            assert identity(path) != before

    def test_a_link(self, path: Path) -> None:
        """Is not what it points to."""
        path.touch()
        link = path.with_name("t")
        link.symlink_to(path)
        assert identity(link) != identity(path)

    @pytest.mark.parametrize("below", ["nowhere/s", "file/s"])
    def test_what_cannot_be_reached(self, below: str, tmp_path: Path) -> None:
        """Has none."""
        (tmp_path / "file").touch()
        assert identity(tmp_path / below) is None
