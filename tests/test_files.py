"""Files and directories that only their owner can open."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgpu.files import make_private_directory, write_private_file


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever the process was started with."""
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
class TestModes:
    def test_directories(self, tmp_path: Path) -> None:
        """Each that was made has 0700; one that was there stays as it is."""
        tmp_path.chmod(0o755)
        make_private_directory(tmp_path / "run/sgpu")
        make_private_directory(tmp_path / "run/sgpu")
        assert [mode(tmp_path / name) for name in (".", "run", "run/sgpu")] == [0o755, 0o700, 0o700]

    def test_files(self, tmp_path: Path) -> None:
        """0600, also where there was one that others could read."""
        path = tmp_path / "state.json"
        path.touch()
        path.chmod(0o644)
        write_private_file(path, b"new")
        assert (mode(path), path.read_bytes()) == (0o600, b"new")


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """Its place is taken; the file that it leads to is left alone."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "state.json.new").symlink_to(other)
    write_private_file(tmp_path / "state.json", b"new")
    assert other.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["other", "state.json"]


def test_a_directory_where_a_file_is(tmp_path: Path) -> None:
    """Is an error."""
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError):
        make_private_directory(tmp_path / "run/sgpu")
