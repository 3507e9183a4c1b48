"""`kubectl sgpu` runs on macOS and Windows: where what only Linux, or only Unix, has is not there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_api import path, pod, pod_list, serving
from fake_status import SNAPSHOT
from packaging.requirements import Requirement

from sgpu.observe.snapshot import encode

ROOT = Path(__file__).parents[1]
#: Modules of Python that Windows lacks, and packages that are installed on Linux alone.
UNIX = {"fcntl", "termios", "tty", "pty", "pwd", "grp", "resource", "syslog", "curses", "readline"}
LINUX = {"inotify_simple", "cffi", "purerpc", "anyio", "google", "prometheus_client", "yaml", "h2"}
#: Parts of modules that are there, which Windows lacks.
PARTS = {
    "os": ("fork", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_PATH", "getuid", "geteuid", "mkfifo", "statvfs"),
    "signal": (
        "SIGHUP",
        "SIGKILL",
        "SIGWINCH",
        "SIGCHLD",
        "SIGUSR1",
        "pthread_sigmask",
        "sigtimedwait",
        "pidfd_send_signal",
    ),
    "socket": ("AF_UNIX", "SO_PEERCRED"),
}
#: As such a machine has it; then the command.
PROGRAM = f"""
import functools, importlib, socket, sys
socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # Windows has pairs of another family
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {UNIX | LINUX!r}:
            raise ModuleNotFoundError(f"there is no {{name}} here", name=name)
sys.meta_path.insert(0, Missing())
for module in {UNIX | LINUX!r} & set(sys.modules):
    del sys.modules[module]
for module, names in {PARTS!r}.items():
    parts = vars(importlib.import_module(module))
    parts["__all__"] = [name for name in parts.get("__all__", ()) if name not in names]
    for name in names:
        parts.pop(name, None)
from sgpu.__main__ import kubectl_sgpu
kubectl_sgpu()
"""


@pytest.mark.process
@pytest.mark.parametrize("words", [["nodes"], ["pods", "-o=json"], ["-watch", "-help"]], ids=" ".join)
def test_without_linux(words: list[str]) -> None:
    """Show the cluster there."""
    with serving({"pods": (200, pod_list(pod("n"))), path("n"): (200, encode(SNAPSHOT))}) as address:
        command = [sys.executable, "-c", PROGRAM, *words, f"-address={address}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"nodes": "1 of 1 node answered", "pods": "0.1.0", "-watch": "sgpu cluster: "}[words[0]] in done.stdout


@pytest.mark.static
def test_dependencies() -> None:
    """What it does without is installed on Linux alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everywhere = {
        requirement.name
        for requirement in map(Requirement, project["dependencies"])
        if not requirement.marker or requirement.marker.evaluate({"sys_platform": "win32"})
    }
    assert everywhere == {"attrs", "h11", "rich", "trio"}
