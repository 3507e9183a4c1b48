"""Identity of files, and files and directories that only their owner can open."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sgpu.lib.files import (
    content_identity,
    make_private_directory,
    read_regular_file,
    write_private_file,
    write_public_file,
)


@pytest.fixture(params=[0o000, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever the process was started with."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_a_private_directory(tmp_path: Path) -> None:
    """Each one that was made has 0700, whatever the umask; one that was there stays as it is."""
    tmp_path.chmod(0o755)
    make_private_directory(tmp_path / "run/sgpu")
    make_private_directory(tmp_path / "run/sgpu")
    assert [mode(tmp_path / name) for name in (".", "run", "run/sgpu")] == [0o755, 0o700, 0o700]


@pytest.mark.usefixtures("umask")
def test_a_private_file(tmp_path: Path) -> None:
    """It has 0600, whatever the umask, also where there was one that others could read."""
    path = tmp_path / "state.json"
    path.touch()
    path.chmod(0o644)
    write_private_file(path, b"new")
    assert (mode(path), path.read_bytes()) == (0o600, b"new")


@pytest.mark.usefixtures("umask")
def test_a_public_file(tmp_path: Path) -> None:
    """It has 0644, whatever the umask, and its name before it is complete begins with a dot."""
    (tmp_path / ".sgpu.new").touch()  # of a process that was killed
    write_public_file(tmp_path / "sgpu", b"new")
    assert (mode(tmp_path / "sgpu"), os.listdir(tmp_path)) == (0o644, ["sgpu"])


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """Its place is taken; the file that it leads to is left alone."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "state.json.new").symlink_to(other)
    write_private_file(tmp_path / "state.json", b"new")
    assert other.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["other", "state.json"]


def test_a_directory_where_a_file_is(tmp_path: Path) -> None:
    """It is an error."""
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError):
        make_private_directory(tmp_path / "run/sgpu")


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is there is no error where none could be made; one that is missing is."""

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    make_private_directory(tmp_path)
    with pytest.raises(OSError, match="Read-only"):
        make_private_directory(tmp_path / "run")


def rewrite_in_the_same_moment(file: Path) -> None:
    moment = file.stat().st_mtime_ns
    file.write_text("longer")
    os.utime(file, ns=(0, moment))


def rewrite_in_another_moment(file: Path) -> None:
    file.write_text("three")
    os.utime(file, ns=(0, 1))


def replace(file: Path) -> None:
    status = file.stat()
    new = file.with_name("new")
    new.write_text("three")
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(file)


def link_elsewhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("other")


@pytest.mark.parametrize("change", [rewrite_in_the_same_moment, rewrite_in_another_moment, replace, link_elsewhere])
def test_another_content(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """A file that was rewritten or replaced, also through a link, counts as another; there may be none."""
    file = tmp_path / "file"
    file.write_text("three")
    (tmp_path / "other").write_text("three")
    before = content_identity(file)
    assert content_identity(file) == before is not None
    change(file)
    assert content_identity(file) not in (before, None)
    file.unlink()
    assert content_identity(file) is None


class TestReadRegularFile:
    def test_content(self, tmp_path: Path) -> None:
        """Return all of it, up to the limit."""
        path = tmp_path / "f"
        path.write_bytes(b"12345")
        assert read_regular_file(path, 5) == b"12345"
        with pytest.raises(OSError, match="more than 4 bytes"):
            read_regular_file(path, 4)

    def test_no_file(self, tmp_path: Path) -> None:
        """A pipe, a device, a directory or a socket is refused at once, also behind a link."""
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "socket"))
        for name in ("pipe", "link", ".", "socket"):
            with pytest.raises(OSError) as refused:  # noqa: PT011  # whatever its errno
                read_regular_file(tmp_path / name)
            assert refused.value.filename == str(tmp_path / name)
