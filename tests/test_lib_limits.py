"""Which limit an error is about."""

from __future__ import annotations

import errno

import pytest

from sgpu.lib.limits import cure, explain

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(OSError(errno.EMFILE, "too many"), "ulimit -n", id="descriptors"),
        pytest.param(BlockingIOError(errno.EAGAIN, "again"), "pids.max", id="processes"),
        pytest.param(OSError(errno.ENOSPC, "full"), "full: free", id="disk"),
        pytest.param(OSError(errno.EROFS, "ro"), "read-only", id="read-only"),
        pytest.param(OSError(errno.EACCES, "denied"), "is it ours?", id="no limit"),
        pytest.param(ValueError("odd"), "is it ours?", id="no number"),
    ],
)
def test_cure(error: Exception, words: str) -> None:
    """Name the limit where it is one, and else what the caller knows."""
    assert words in cure(error, "is it ours?")
    assert explain(error, "is it ours?") == f"{error}; {cure(error, 'is it ours?')}"


def test_nothing_helps() -> None:
    """Add nothing where nothing is known."""
    assert explain(ValueError("odd")) == "odd"
