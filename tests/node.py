"""A node in a temporary directory: plugin directory, stub driver, device nodes, and the daemon's flags for them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_process import COMMAND, DaemonProcess, short_directory
from stub_driver import StubDriver

from sgpu.pods.processes import HOST_NAMESPACE

RESOURCE = "deepomatic.com/shared-gpu"
#: Seconds between the daemon's polls, unless a test says otherwise.
INTERVAL = 0.3


class Node:
    """All that the daemon finds on a node. Starts with a driver for one GPU and all device nodes."""

    def __init__(self, root: Path) -> None:
        self.plugins = root / "p"
        self.host = root / "host"
        self.dev = root / "dev"
        self.sys = root / "sys"
        self.pods = root / "pods.sock"
        self.state = root / "state" / "sgpu.json"
        self.sgpu_socket = root / "status.sock"
        self.proc = root / "proc"
        self.logs = root / "containers"
        for directory in (self.plugins, self.host, self.dev, self.sys, self.proc, self.logs):
            directory.mkdir()
        (self.proc / "self/ns").mkdir(parents=True)
        (self.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
        self.make_nodes("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", *(f"nvidia{minor}" for minor in range(8)))
        self.driver = StubDriver(self.host)
        self.driver.gpus(1)

    @property
    def socket(self) -> Path:
        """The daemon's own socket."""
        return self.plugins / "sgpu-deepomatic.com_shared-gpu.sock"

    def make_nodes(self, *names: str) -> None:
        """Device nodes as far as anyone looks: files of that name."""
        for name in names:
            (self.dev / name).touch()

    def make_mig_minors(self, *, nodes: bool = True) -> None:
        """The kernel's list of capabilities, as a real one has it, and the device nodes of those that tests use."""
        lines, used, number = ["config 1", "monitor 2"], [1, 2], 3
        for gpu in range(8):
            for instance in range(15):
                names = ["access", *(f"ci{compute}/access" for compute in range(8))]
                lines += [f"gpu{gpu}/gi{instance}/{name} {number + offset}" for offset, name in enumerate(names)]
                used += range(number, number + 4) if gpu < 3 else ()
                number += len(names)
        path = self.proc / "driver/nvidia-caps/mig-minors"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        if nodes:
            (self.dev / "nvidia-caps").mkdir()
            self.make_nodes(*(f"nvidia-caps/nvidia-cap{minor}" for minor in used))

    def set_numa_node(self, bus_id: str, node: int) -> None:
        """Set the kernel's NUMA node of the PCI device that NVML calls `bus_id`."""
        device = self.sys / "bus/pci/devices" / bus_id.lower()[4:]
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")

    def make_devices(self) -> None:
        """Make the GPUs' device nodes real ones, of /dev/null, which the stub opens.

        Skips the test where that can't be, or no process can have mounts of its own: it takes CAP_SYS_ADMIN.
        """
        try:
            for gpu in self.driver.state.gpus:
                path = self.dev / f"nvidia{gpu.minor}"
                path.unlink()
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
                path.read_bytes()
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"makes device nodes, and hides them: {error}")
        self.driver.set(dev=str(self.dev))

    def list_in_kernel(self, address: str, minor: int) -> None:
        """List a GPU below /proc, as the kernel's driver does."""
        directory = self.proc / "driver/nvidia/gpus" / address
        directory.mkdir(parents=True)
        (directory / "information").write_text(
            f"Model: \t\t Tesla T4\nBus Location: \t {address}\nDevice Minor: \t {minor}\n"
        )

    def start_process(self, pid: int, container: str = "") -> None:
        """A process of the host's, or of a container (`namespace/pod/container`)."""
        directory = self.proc / str(pid)
        directory.mkdir()
        container_id = f"{pid:064x}"
        path = f"/kubepods/burstable/pod1/{container_id}" if container else "/system.slice/x.service"
        (directory / "cgroup").write_text(f"0::{path}\n")
        (directory / "stat").write_text(f"{pid} (python3) S {'1 ' * 18}1 0 0\n")
        if container:
            namespace, pod, name = container.split("/")
            (self.logs / f"{pod}_{namespace}_{name}-{container_id}.log").touch()

    def daemon(self, *flags: str | float, simulate: int = 0, command: Sequence[str] = COMMAND) -> DaemonProcess:
        """The daemon on this node, to be entered."""
        places: list[str | Path] = ["-state-file", self.state, "-pod-resources-socket", self.pods]
        places += ["-dev-directory", self.dev, "-sysfs-directory", self.sys]
        places += ["-proc-directory", self.proc, "-container-log-directory", self.logs]
        places += ["-cordon-file", self.state.with_name("cordon.json")]
        places += ["-metrics-address=", "-status-socket="]  # not even on a test's own node, unless it asks for them
        extra = ("-simulate", simulate) if simulate else ()
        often = ("-sample-interval", INTERVAL)
        all_flags = [str(flag) for flag in (*places, *often, *extra, *flags)]
        return DaemonProcess(self.plugins, self.host, all_flags, command=command)


@contextmanager
def new_node() -> Iterator[Node]:
    """A node that is removed at the end."""
    with short_directory() as root:
        yield Node(root)
