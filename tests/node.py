"""A node in a temporary directory: plugin directory, stub driver, device nodes, and the daemon's flags for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon_process import DaemonProcess, short_directory
from stub_driver import StubDriver

RESOURCE = "deepomatic.com/shared-gpu"


class Node:
    """What a node has for the daemon. Starts with a driver for one GPU and all device nodes."""

    def __init__(self, root: Path) -> None:
        self.plugins = root / "p"
        self.host = root / "host"
        self.dev = root / "dev"
        self.sys = root / "sys"
        for directory in (self.plugins, self.host, self.dev, self.sys):
            directory.mkdir()
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

    def set_numa_node(self, bus_id: str, node: int) -> None:
        """What the kernel says of the PCI device that NVML calls `bus_id`."""
        device = self.sys / "bus/pci/devices" / bus_id.lower()[4:]
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")

    def daemon(self, *flags: str | int, simulate: int = 0) -> DaemonProcess:
        """The daemon on this node, to be entered."""
        places: Iterable[str | int | Path] = ("-dev-directory", self.dev, "-sysfs-directory", self.sys)
        extra = ("-simulate", simulate) if simulate else ()
        return DaemonProcess(self.plugins, self.host, [str(flag) for flag in (*places, *extra, *flags)])


@contextmanager
def new_node() -> Iterator[Node]:
    """A node that is removed at the end."""
    with short_directory() as root:
        yield Node(root)
