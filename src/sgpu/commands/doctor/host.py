"""The kernel's view of the machine: modules, devices, the PCI bus."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from sgpu.driver import kernelmodule
from sgpu.driver.kernelmodule import read_text


@attrs.frozen
class Host:
    """The kernel's directories. `proc` is this container's own, in which the drivers are the machine's all the same."""

    proc: Path = Path("/proc")
    sysfs: Path = Path("/sys")

    def module_version(self) -> str:
        """Return the version of the kernel module; empty where it is not loaded, or not visible."""
        return kernelmodule.module_version(self.proc, self.sysfs)

    def major(self, name: str) -> int | None:
        """Return the major device number of a driver, by its name in `/proc/devices`."""
        for line in read_text(self.proc / "devices").partition("Block devices")[0].splitlines():
            number, _, driver = line.strip().partition(" ")
            if driver == name and number.isdecimal():
                return int(number)
        return None

    def pci_gpus(self) -> tuple[str, ...] | None:
        """Return the addresses of NVIDIA's display and 3D controllers on the PCI bus; None where it can't be seen."""
        devices = self.sysfs / "bus/pci/devices"
        if not devices.is_dir():
            return None
        return tuple(
            sorted(
                device.name
                for device in devices.iterdir()
                if read_text(device / "vendor").strip() == "0x10de" and read_text(device / "class").startswith("0x03")
            )
        )


def why_not_writable(directory: Path) -> str:
    """Say why no file can be created in a directory, judged without creating one; empty if one can."""
    if not directory.is_dir():
        return "it is not a directory" if directory.exists() else "it is not there"
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return "it is mounted read-only"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"user {os.getuid()} may not write to it"
    return ""
