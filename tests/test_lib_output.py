"""Standard output that can't be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGPU_")}
    command = [sys.executable, "-m", "sgpu", *arguments]
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False, **options
    )


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["-print-config"], ["-help"], ["doctor", "-simulate", "1"]], ids=lambda a: a[0])
def test_full(arguments: list[str]) -> None:
    """One line, and exit code 1."""
    with open("/dev/full", "w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "standard output" in done.stderr


@pytest.mark.process
def test_closed() -> None:
    """Likewise."""
    done = run("-print-config", stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
