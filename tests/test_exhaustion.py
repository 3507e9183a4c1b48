"""What the kernel refuses, for real: the daemon names the limit, goes on as well as it can, and recovers by itself.

Limits are the kernel's own: of a process (prlimit), of a user namespace, of a mount in one.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from daemon_process import COMMAND, LoggedProcess, children_of
from driver_layout import compile_driver, multiarch
from fake_kubelet import FakeKubelet
from node import Node

from sgpu.__main__ import NO_ROOM
from sgpu.lib.limits import MEMORY

pytestmark = [pytest.mark.process, pytest.mark.soak]

#: Root may have any number of processes: as another user, who may still open root's files.
NOT_ROOT: Final = (
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
)
SHARES: Final = 100


def namespace(script: str) -> list[str]:
    """The begin of a command line that runs in user and mount namespaces of its own, once the script has run there."""
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", f'{script}; exec "$@"', "sh"]


def need(prefix: Sequence[str]) -> None:
    """Skip the test where this can't be done."""
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot set the limit here: {getattr(error, 'stderr', error)}".strip())


@pytest.mark.parametrize("limit", ["instances", "watches"])
def test_inotify(node: Node, limit: str) -> None:
    """Poll the plugin directory, and notice a kubelet that restarts."""
    need(prefix := namespace(f"echo 0 > /proc/sys/user/max_inotify_{limit}"))
    with FakeKubelet(node.plugins) as kubelet, node.daemon(command=[*prefix, *COMMAND]) as daemon:
        kubelet.wait_devices(SHARES)
        daemon.wait_log(f"fs.inotify.max_user_{limit}")
        kubelet.restart()
        kubelet.wait_registrations(2)
        kubelet.wait_devices(SHARES)


@pytest.mark.parametrize(
    ("user", "name", "limit", "words"),
    [
        pytest.param((), "nofile", 10, "ulimit -n", id="descriptors"),
        pytest.param(NOT_ROOT, "nproc", 1, "pids.max", id="processes and threads"),
        pytest.param(NOT_ROOT, "nproc", 3, "pids.max", id="processes"),
    ],
)
def test_process_limit(node: Node, user: tuple[str, ...], name: str, limit: int, words: str) -> None:
    """Wait for more, saying for what, and register as soon as there is more."""
    need(prefix := (*user, "prlimit", f"--{name}={limit}:"))
    with FakeKubelet(node.plugins) as kubelet, node.daemon(command=[*prefix, *COMMAND]) as daemon:
        daemon.wait_log(words)
        pid, *_ = children_of(daemon.process.pid) or [daemon.process.pid]  # there may be no process for a parent
        subprocess.run([*user, "prlimit", f"--pid={pid}", f"--{name}=1000:"], check=True)
        kubelet.wait_devices(SHARES)
        assert "Traceback" not in daemon.logs


@pytest.mark.parametrize(
    ("what", "one_line"),
    [
        pytest.param("import sgpu.cli; sgpu.cli.main = fail(MemoryError())", True, id="imports"),
        pytest.param(f"import sgpu.cli; sgpu.cli.main = fail(ImportError({NO_ROOM!r}))", True, id="libraries"),
        pytest.param("import sgpu.daemon; sgpu.daemon.run = fail(MemoryError())", True, id="daemon"),
        pytest.param("import sgpu.cli; sgpu.cli.main = fail(ImportError('another'))", False, id="another error"),
    ],
)
def test_no_memory_left(what: str, one_line: bool) -> None:
    """End with one line. (Played: where memory really ends is another place each time.)"""
    fail = "def fail(error):\n def failing(*_): raise error\n return failing\n"
    code = f"{fail}{what}\nfrom sgpu.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert (ended.stderr == f"sgpu: {MEMORY}\n") is one_line


@pytest.mark.parametrize(
    ("options", "words"), [("size=4k", "file system is full"), ("ro", "mounted read-only")], ids=["full", "read-only"]
)
def test_state_file(node: Node, options: str, words: str) -> None:
    """Go on without the state file, and say what a restart will not know."""
    node.state.parent.mkdir()
    where = shlex.quote(str(node.state.parent))
    fill = "" if options == "ro" else f"; head -c 4k /dev/zero > {where}/other"
    need(prefix := namespace(f"mount -t tmpfs -o {options} none {where}{fill}"))
    with FakeKubelet(node.plugins) as kubelet, node.daemon(command=[*prefix, *COMMAND]) as daemon:
        line = daemon.wait_log(f"cannot write {node.state}").text
        assert words in line
        assert "restart" in line
        kubelet.wait_devices(SHARES)


def test_library_on_noexec(node: Node) -> None:
    """Say why the library can't be loaded."""
    where = shlex.quote(str(node.driver.path.parent))
    remount = f"mount --bind {where} {where}; mount -o remount,bind,noexec {where}"
    need(prefix := namespace(remount))
    with node.daemon(command=[*prefix, *COMMAND]) as daemon:
        daemon.wait_log("noexec")


@pytest.mark.parametrize(
    ("options", "words"),
    [("size=64k", "takes room for two sets"), ("ro", "mounted read-only"), ("noexec", "noexec")],
    ids=["full", "read-only", "noexec"],
)
def test_stage(tmp_path: Path, options: str, words: str) -> None:
    """Refuse in one line, with what helps."""
    (tmp_path / "root").mkdir()
    (tmp_path / "host").mkdir()
    multiarch(tmp_path / "root", compile_driver(tmp_path / "driver", "550.54.15"))
    where = shlex.quote(str(tmp_path / "host"))
    need(prefix := namespace(f"mount -t tmpfs -o {options} none {where}"))
    flags = ["-host-root", tmp_path / "root", "-host-path", tmp_path / "host", "-lock-file", tmp_path / "lock"]
    with LoggedProcess([*prefix, *COMMAND, "stage", *map(str, flags)]) as stage:
        assert stage.wait_exit() == 1
        assert words in stage.logs
        assert len(stage.lines) == 1
