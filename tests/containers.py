"""Real processes as containers of pods: in real cgroups where this machine has a hierarchy that can be written to.

Knows the kernel's and the kubelet's names, not what sgpu makes of them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sgpu.node.container import Container
from sgpu.pods.processes import HOST_NAMESPACE, Places

#: Ends on SIGTERM, and does not.
SLEEP = ("sleep", "60")
STUBBORN = ("sh", "-c", "trap '' TERM; echo; exec sleep 60")


class Containers:
    """Containers whose processes `places` shows, and no others. Their processes are killed at the end.

    `hierarchy` is the root of one of the kernel's; None: the cgroup of a process is a file.
    """

    def __init__(self, root: Path, hierarchy: Path | None) -> None:
        self.places = Places(root / "proc", root / "containers")
        self.processes: list[subprocess.Popen[str]] = []
        self._hierarchy = hierarchy
        self._cgroups: list[Path] = []
        # As in the host's namespace, wherever this runs: nothing here needs more than the processes' own ids.
        (self.places.proc / "self/ns").mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (self.places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
        self.places.container_logs.mkdir(exist_ok=True)

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with process:
                process.kill()
        for cgroup in reversed(self._cgroups):
            cgroup.rmdir()

    def start(self, owner: Container, *command: str, ready: bool = False) -> subprocess.Popen[str]:
        """Run a command in a container of its own; `ready`: wait for its first line."""
        process = subprocess.Popen(
            command or SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
        )
        self.processes.append(process)
        if ready and process.stdout:
            process.stdout.readline()
        self.move(process, owner)
        return process

    def move(self, process: subprocess.Popen[str], owner: Container) -> None:
        """Move a process to another container, which is new."""
        container_id = uuid4().hex * 2
        parts = (f"sgpu-test-{container_id[:8]}", "kubepods", f"pod{uuid4()}", container_id)
        shown = self.places.proc / str(process.pid)
        if self._hierarchy:
            self._enter(self._hierarchy, parts, process.pid)
            if not shown.is_symlink():
                shown.symlink_to(f"/proc/{process.pid}")
        else:
            shown.mkdir(exist_ok=True)
            (shown / "cgroup").write_text(f"0::/{'/'.join(parts)}\n")
            with suppress(FileExistsError):
                (shown / "stat").symlink_to(f"/proc/{process.pid}/stat")
        (self.places.container_logs / f"{owner.pod}_{owner.namespace}_{owner.container}-{container_id}.log").touch()

    def _enter(self, hierarchy: Path, parts: Sequence[str], pid: int) -> None:
        cgroup = hierarchy
        for part in parts:
            cgroup /= part
            cgroup.mkdir()
            self._cgroups.append(cgroup)
        (cgroup / "cgroup.procs").write_text(str(pid))


def hierarchies() -> dict[str, Path | None]:
    """Return the hierarchies of cgroups that can be written to, by version, and files in place of one."""
    found: dict[str, Path | None] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, options, *_ = line.split()
        version = {"cgroup2": "v2", "cgroup": "v1"}.get(kind)
        # Of version 1, one that limits nothing: a new group of cpuset takes no process.
        if version and (version == "v2" or "pids" in options.split(",")) and _is_writable(Path(directory)):
            found.setdefault(version, Path(directory))
    return {**dict(sorted(found.items(), reverse=True)), "files": None}


@contextmanager
def containers(root: Path) -> Iterator[Containers]:
    """Containers in the newest hierarchy that there is."""
    with Containers(root, next(iter(hierarchies().values()))) as made:
        yield made


def _is_writable(hierarchy: Path) -> bool:
    probe = hierarchy / f"sgpu-test-{uuid4().hex}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
