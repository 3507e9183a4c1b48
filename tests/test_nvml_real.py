"""The binding with NVIDIA's own library: Debian's package of it, or a driver that the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import real_driver
from stub_driver import FUNCTIONS

from sgpu.driver.nvml import Code, EventType, NvmlError, list_processes, open_library, search, utilization_by_process
from sgpu.driver.nvml._bindings import ffi

#: There when the kernel's part of the driver is loaded.
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
#: Functions that are younger than driver 535, which Debian 12 has.
YOUNGER = frozenset({"nvmlDeviceGetGpuFabricInfoV", "nvmlDeviceGetMemoryLimits_v1", "nvmlDeviceSetMemoryLimits_v1"})

without_gpu = pytest.mark.skipif(KERNEL_DRIVER.exists(), reason="this machine has an NVIDIA driver")
with_gpu = pytest.mark.skipif(not KERNEL_DRIVER.exists(), reason=f"needs an NVIDIA driver ({KERNEL_DRIVER})")


@pytest.fixture(scope="session")
def driver() -> Path:
    """A directory that has NVIDIA's library."""
    return real_driver.real_driver()


@pytest.mark.skipif(real_driver.VARIABLE in os.environ, reason=f"{real_driver.VARIABLE} has its own layout")
def test_debian_layout(driver: Path) -> None:
    """Find and load the library where Debian's package puts it."""
    path, _ = search.dlopen(driver)
    assert path == driver / "usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.1"


def test_symbols(driver: Path) -> None:
    """Find every function that sgpu may call, old variants too."""
    _, library = search.dlopen(driver)
    absent = set()
    for function in FUNCTIONS - YOUNGER:
        try:
            getattr(library, function)
        except (AttributeError, ffi.error):
            absent.add(function)
    assert not absent


@without_gpu
def test_no_driver(driver: Path) -> None:
    """Raise the library's own error without a driver in the kernel."""
    with pytest.raises(NvmlError) as caught, open_library(driver):
        pass
    error = caught.value
    assert (error.function, error.code, error.text) == ("nvmlInit_v2", Code.DRIVER_NOT_LOADED, "Driver Not Loaded")


@with_gpu
def test_machine() -> None:
    """Read all facts of each GPU of this machine, and register it for XIDs."""
    with open_library(Path("/")) as library, library.event_set() as event_set:
        assert library.driver_version() in KERNEL_DRIVER.read_text()
        assert library.count() > 0
        for handle in map(library.handle, range(library.count())):
            assert library.uuid(handle).startswith("GPU-")
            assert library.name(handle)
            assert Path(f"/dev/nvidia{library.minor_number(handle)}").exists()
            assert library.pci_bus_id(handle).count(":") == 2
            memory = library.memory(handle)
            assert 0 < memory.used + memory.free <= memory.total
            assert all((each.memory or 0) <= memory.total for each in list_processes(library, handle).values())
            assert all(percent <= 100 for percent in utilization_by_process(library, handle, 0).values())
            assert event_set.register(handle, EventType.XID_CRITICAL) == EventType.XID_CRITICAL
        assert event_set.wait(1) is None
