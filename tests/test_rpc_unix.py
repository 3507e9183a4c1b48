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

from sgpu.lib.files import MAX_SOCKET_PATH_BYTES
from sgpu.rpc import AddressInUseError, Identity, identity, listen, peer_pid, unix

#: Tries to listen when a line comes in; prints whether it does; keeps at it until its input ends.
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
    """Another process that tries to listen when it is told to."""
    command = [sys.executable, "-c", LISTENER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert output(process) == "ready"
            yield process
        finally:
            process.kill()


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def output(process: subprocess.Popen[str]) -> str:
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
        """Queue connections from the start, and remove the socket at the end."""

        async def main() -> None:
            with listen(path) as listener:
                assert connects(path)
                async with await listener.accept() as stream:
                    assert peer_pid(stream.socket) == os.getpid()
                    assert await stream.receive_some() == b""

        trio.run(main)
        assert not path.exists()

    @pytest.mark.parametrize("umask", [0o000, 0o077], ids=oct)
    def test_only_the_owner_may_connect(self, umask: int, path: Path) -> None:
        """Make the socket with mode 0600, whatever the umask."""
        before = os.umask(umask)
        try:
            with listen(path):
                assert stat.filemode(path.stat().st_mode) == "srw-------"
        finally:
            os.umask(before)

    def test_a_stale_socket_is_replaced(self, path: Path) -> None:
        """Take the place of a socket whose process is gone, whoever holds a lock on the directory."""
        leave_stale(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with listen(path):
                assert connects(path)
        finally:
            os.close(descriptor)
        assert os.listdir(path.parent) == []

    def test_a_live_socket_is_refused(self, path: Path) -> None:
        """Raise AddressInUseError with who has it, and leave it alone."""
        with listener_process(path) as other:
            start(other)
            assert output(other) == "listening"
            with pytest.raises(AddressInUseError) as caught, listen(path):
                pass
            assert (caught.value.path, caught.value.pid) == (path, other.pid)
            for said in (str(other.pid), f"{sys.executable} -c", str(path)):
                assert said in str(caught.value)
            assert connects(path)

    def test_a_burst_of_peers_is_queued(self, path: Path) -> None:
        """Let them connect before any is accepted: a peer that would have to wait gives up."""
        with listen(path), ExitStack() as peers:
            for _ in range(300):
                peer = peers.enter_context(socket.socket(socket.AF_UNIX))
                peer.setblocking(False)
                peer.connect(str(path))

    def test_a_full_backlog_counts_as_alive(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refuse at once, without waiting for anybody to accept."""
        monkeypatch.setattr(unix, "BACKLOG", 16)
        with listen(path), ExitStack() as clients:
            for _ in range(17):
                client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.connect(str(path))
            with pytest.raises(AddressInUseError) as caught, listen(path):
                pass
            assert caught.value.pid == 0
            assert path.exists()

    @pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
    def test_of_many_that_start_at_once_one_gets_it(self, path: Path, stale: bool) -> None:
        """The others name it. Of a stale socket's place, a second can deprive the first, which can see it."""
        if stale:
            leave_stale(path)
        with ExitStack() as stack:
            processes = [stack.enter_context(listener_process(path)) for _ in range(4)]
            for process in processes:
                start(process)
            said = {process.pid: output(process) for process in processes}
            listening = {pid for pid, word in said.items() if word == "listening"}
            assert len(listening) in range(1, 2 + stale)
            assert {*said.values()} - {"listening"} <= {f"refused {pid}" for pid in listening}
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(path))
                assert peer_pid(client) in listening

    def test_a_socket_that_is_about_to_listen_cannot_be_seen(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give it its name when it listens: before, it would look stale. Whoever comes meanwhile gets the name."""
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

    @pytest.mark.parametrize("listeners", [1, 2])
    def test_a_socket_that_replaced_a_stale_one_meanwhile_stays(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, listeners: int
    ) -> None:
        """Look again at what was taken away, and put it back, unless another was faster."""
        leave_stale(path)
        rename = Path.rename
        owners: list[Identity | None] = []

        def listen_meanwhile() -> None:
            stack.enter_context(listen(path))
            owners.append(identity(path))

        def slow_rename(self: Path, target: Path) -> Path:
            monkeypatch.undo()
            listen_meanwhile()
            renamed = rename(self, target)
            if listeners == 2:
                listen_meanwhile()
            return renamed

        with ExitStack() as stack:
            monkeypatch.setattr(Path, "rename", slow_rename)
            with pytest.raises(AddressInUseError), listen(path):
                pass
            assert connects(path)
            assert identity(path) == owners[-1]
            assert os.listdir(path.parent) == [path.name]

    def test_a_burst_of_peers(self, path: Path) -> None:
        """Let all of them connect before the first is accepted."""
        with listen(path), ExitStack() as clients:
            for _ in range(300):
                client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.setblocking(False)
                client.connect(str(path))

    @pytest.mark.parametrize(
        "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("x")], ids=["file", "directory", "link"]
    )
    def test_what_is_no_socket_is_left_alone(self, make: Callable[[Path], None], path: Path) -> None:
        """Raise OSError that names it."""
        make(path)
        before = identity(path)
        with pytest.raises(FileExistsError) as caught, listen(path):
            pass
        assert caught.value.filename == str(path)
        assert identity(path) == before

    def test_a_directory_that_is_not_there(self, tmp_path: Path) -> None:
        """Raise OSError that names the socket."""
        with pytest.raises(FileNotFoundError) as caught, listen(tmp_path / "nowhere/s"):
            pass
        assert caught.value.filename == str(tmp_path / "nowhere/s")

    def test_a_path_as_long_as_allowed(self, tmp_path: Path) -> None:
        """Accept it, and raise OSError with the limit for one byte more."""
        name = "s" * (MAX_SOCKET_PATH_BYTES - len(str(tmp_path)) - 1)
        with listen(tmp_path / name):
            assert connects(tmp_path / name)
        with pytest.raises(OSError, match=str(MAX_SOCKET_PATH_BYTES)), listen(tmp_path / f"{name}s"):
            pass

    @pytest.mark.parametrize("replacement", [Path.touch, leave_stale, None], ids=["file", "socket", "nothing"])
    def test_only_our_own_socket_is_removed_at_the_end(
        self, replacement: Callable[[Path], None] | None, path: Path
    ) -> None:
        """Leave what has taken its place meanwhile, and do not mind that nothing has."""
        with listen(path):
            path.unlink()
            if replacement:
                replacement(path)
            there = identity(path)
        assert identity(path) == there

    def test_nothing_is_left_after_an_error(self, path: Path) -> None:
        """Leave neither the socket nor a descriptor, whether listening or what is done meanwhile fails."""
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ZeroDivisionError), listen(path):
            raise ZeroDivisionError
        assert not path.exists()
        with listen(path):
            with pytest.raises(AddressInUseError), listen(path):
                pass
            assert os.listdir(path.parent) == [path.name]
            assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        path.touch()
        with pytest.raises(FileExistsError), listen(path):
            pass
        assert os.listdir(path.parent) == [path.name]
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_process_that_is_gone_by_the_time_it_is_named() -> None:
    """Name its id and the socket."""
    error = AddressInUseError(Path("/s"), 2**22 + 1)
    assert "4194305" in str(error)
    assert "/s" in str(error)


class TestIdentity:
    def test_a_file_made_anew(self, path: Path) -> None:
        """Follow a file to its new name, and tell it from one that is made in its place while it is held open."""
        path.touch()
        with closing(path.open()):
            before = identity(path)
            path.rename(path.with_name("t"))
            assert identity(path.with_name("t")) == before is not None
            path.with_name("t").unlink()
            path.touch()
            assert identity(path) not in (None, before)

    def test_a_link(self, path: Path) -> None:
        """Tell a link from what it points to."""
        path.touch()
        link = path.with_name("t")
        link.symlink_to(path)
        assert identity(link) != identity(path)

    @pytest.mark.parametrize("below", ["s", "nowhere/s", "file/s"])
    def test_what_cannot_be_reached(self, below: str, tmp_path: Path) -> None:
        """Return None."""
        (tmp_path / "file").touch()
        assert identity(tmp_path / below) is None
