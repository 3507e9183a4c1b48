"""libnvidia-ml as Python, against a stub library that the tests steer."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
from stub_driver import FUNCTIONS, GIB, StubDriver, StubGpu

from sgpu.driver.nvml import (
    Code,
    Event,
    EventSet,
    EventType,
    Fabric,
    Handle,
    Library,
    LibraryNotFoundError,
    Memory,
    MemoryLimit,
    NvmlError,
    RemappedRows,
    open_library,
    search,
)
from sgpu.driver.nvml.constants import TEXT_SIZE, VARIANTS
from sgpu.driver.nvml.search import DIRECTORIES, candidates

SHORT = 0  # milliseconds: an event wait that looks once

#: What calls each function, apart from those that open and close something.
CALLS: dict[str, Callable[[Library, Handle], object]] = {
    "nvmlSystemGetDriverVersion": lambda library, _: library.driver_version(),
    "nvmlDeviceGetCount": lambda library, _: library.count(),
    "nvmlDeviceGetHandleByIndex": lambda library, _: library.handle(0),
    "nvmlDeviceGetUUID": Library.uuid,
    "nvmlDeviceGetName": Library.name,
    "nvmlDeviceGetMinorNumber": Library.minor_number,
    "nvmlDeviceGetPciInfo": Library.pci_bus_id,
    "nvmlDeviceGetMemoryInfo": Library.memory,
    "nvmlDeviceGetUtilizationRates": Library.utilization,
    "nvmlDeviceGetFieldValues": Library.recovery_action,
    "nvmlDeviceGetRemappedRows": Library.remapped_rows,
    "nvmlDeviceGetRetiredPagesPendingStatus": Library.retired_pages_pending,
    "nvmlDeviceGetGpuFabricInfoV": Library.fabric,
    "nvmlDeviceGetSupportedEventTypes": lambda library, handle: EventSet(library, None).register(handle, 0),
    "nvmlEventSetCreate": lambda library, _: library.event_set().__enter__(),
}


def python(program: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program in an interpreter of its own, which has imported sgpu.driver.nvml."""
    program = f"import pathlib, sys; from sgpu.driver.nvml import open_library\n{program}"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True)


def found(root: Path) -> Path:
    """Return the library that is opened. It is unloaded then: the loader goes by its path."""
    with open_library(root) as library:
        return library.path


@pytest.fixture
def driver(tmp_path: Path) -> StubDriver:
    """A driver with two GPUs."""
    driver = StubDriver(tmp_path)
    driver.gpus(2)
    return driver


@pytest.fixture
def library(driver: StubDriver) -> Iterator[Library]:
    """The driver's library, open."""
    with open_library(driver.root) as library:
        yield library


class TestSearch:
    def test_order(self, tmp_path: Path) -> None:
        """Open the first library in the order of search, wherever it is."""
        image = StubDriver(tmp_path / "elsewhere").path.read_bytes()
        paths = list(candidates(tmp_path / "host"))
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        for path in paths:
            assert found(tmp_path / "host") == path
            path.unlink()

    def test_other_machines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Look in the directories that Debian has for this machine's kind, and not in those of others."""
        machine = os.uname_result(("Linux", "node", "6.1", "#1", "aarch64"))
        monkeypatch.setattr(os, "uname", lambda: machine)
        directories = runpy.run_path(str(search.__file__))["DIRECTORIES"]
        assert "usr/lib/aarch64-linux-gnu" in directories
        assert not [directory for directory in directories if "x86_64" in directory]

    def test_nothing_there(self, tmp_path: Path) -> None:
        """Name every directory that was looked in."""
        with pytest.raises(LibraryNotFoundError) as caught:
            found(tmp_path)
        assert (caught.value.host_path, caught.value.refused) == (tmp_path, ())
        assert all(directory in str(caught.value) for directory in (str(tmp_path), *DIRECTORIES))

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            pytest.param(lambda image: b"", "file too short", id="empty"),
            pytest.param(lambda image: b"not found: 404\n" * 100, "invalid ELF header", id="text"),
            pytest.param(lambda image: image[:40], "file too short", id="truncated"),
            pytest.param(lambda image: image[:4] + b"\1" + image[5:], "wrong ELF class: ELFCLASS32", id="32 bit"),
            pytest.param(None, "cannot open shared object file: No such file or directory", id="a link to nowhere"),
        ],
    )
    def test_broken(self, driver: StubDriver, spoil: Callable[[bytes], bytes] | None, reason: str) -> None:
        """Pass over a file that the loader refuses, and say why where no other loads."""
        good = driver.root / "usr/lib64/libnvidia-ml.so.1"
        good.parent.mkdir(parents=True)
        image = driver.path.read_bytes()
        driver.path.unlink()
        if spoil:
            driver.path.write_bytes(spoil(image))
        else:
            driver.path.symlink_to("/nowhere")
        good.write_bytes(image)
        assert found(driver.root) == good
        good.unlink()
        with pytest.raises(LibraryNotFoundError) as caught:
            found(driver.root)
        assert caught.value.refused == ((driver.path, reason),)
        assert f"{driver.path}: {reason}" in str(caught.value)

    def test_half_copied(self, driver: StubDriver) -> None:
        """Pass over a library that somebody is still copying: to load it would end the process."""
        driver.path.write_bytes(driver.path.read_bytes()[:3000])
        done = python("open_library(pathlib.Path(sys.argv[1])).__enter__()", driver.root)
        assert done.returncode == 1
        assert b"LibraryNotFoundError" in done.stderr

    def test_import(self, driver: StubDriver) -> None:
        """Load no library at import, also where the loader would find one."""
        done = python("print(open('/proc/self/maps').read())", LD_LIBRARY_PATH=str(driver.path.parent))
        assert b"_cffi_backend" in done.stdout
        assert b"libnvidia-ml" not in done.stdout


class TestOpen:
    def test_init_fails(self, driver: StubDriver) -> None:
        """Raise the function, the code and NVML's text where the driver can't start, and shut nothing down."""
        driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        failures: list[tuple[str, int]] = []
        with pytest.raises(NvmlError) as caught, open_library(driver.root, lambda *failure: failures.append(failure)):
            pass
        error = caught.value
        assert (error.function, error.code, error.text) == ("nvmlInit_v2", Code.DRIVER_NOT_LOADED, "Driver Not Loaded")
        assert all(fact in str(error) for fact in ("nvmlInit_v2", "Driver Not Loaded", "9"))
        assert failures == [("nvmlInit_v2", Code.DRIVER_NOT_LOADED)]
        assert driver.calls("nvmlShutdown") == 0

    @pytest.mark.parametrize("code", [Code.SUCCESS, Code.GPU_IS_LOST], ids=["shut down", "refused"])
    def test_shutdown(self, driver: StubDriver, code: int) -> None:
        """Shut the library down at the end, also after an error, which stays the error if that fails."""
        driver.fail("nvmlShutdown", code)
        failures: list[tuple[str, int]] = []
        with suppress(ZeroDivisionError), open_library(driver.root, lambda *failure: failures.append(failure)):
            assert driver.calls("nvmlShutdown") == 0
            raise ZeroDivisionError
        assert driver.calls("nvmlShutdown") == 1
        assert failures == ([("nvmlShutdown", code)] if code else [])

    def test_two_drivers(self, driver: StubDriver, tmp_path: Path) -> None:
        """Take libraries at two paths for two, though they share a soname."""
        other = StubDriver(tmp_path / "other")
        with open_library(driver.root) as library, open_library(other.root) as other_library:
            assert (library.count(), other_library.count()) == (2, 0)

    def test_upgrade(self, driver: StubDriver) -> None:
        """Open the new driver after it was replaced."""
        for without in ([], ["nvmlDeviceGetCount_v2"]):
            newer = StubDriver(driver.root, without=without)
            with open_library(driver.root) as library:
                library.count()
            assert newer.calls("nvmlDeviceGetCount_v2") == (without == [])
            del library  # a library that is still referenced stays loaded, and is what opening it again gives


class TestVariants:
    @pytest.mark.parametrize("absent", range(max(map(len, VARIANTS.values()))))
    def test_fall_back(self, tmp_path: Path, absent: int) -> None:
        """Call the newest variant that the library has; the answers of all mean the same."""
        has = {function: variants[min(absent, len(variants) - 1)] for function, variants in VARIANTS.items()}
        without = {name for function, names in VARIANTS.items() for name in names[: names.index(has[function])]}
        if absent:
            without.add("nvmlDeviceGetMemoryInfo_v2")
        driver = StubDriver(tmp_path, without=without)
        driver.set(gpus=[StubGpu(bus_id="00000001:AF:1F.0", total=15 * GIB, used=4 * GIB, reserved=GIB)])
        with open_library(tmp_path) as library, library.event_set() as event_set:
            assert (library.count(), event_set.wait(SHORT)) == (1, None)
            assert library.pci_bus_id(library.handle(0)) == "00000001:AF:1F.0"
            # Older ones count what the driver reserves.
            used, reserved = (5 * GIB, None) if absent else (4 * GIB, GIB)
            assert library.memory(library.handle(0)) == Memory(15 * GIB, used, 10 * GIB, reserved)
        for function, variant in has.items():
            assert driver.calls(function) == driver.calls(variant) > 0

    def test_missing(self, tmp_path: Path) -> None:
        """Raise an error that names the function where the library has no variant of it."""
        StubDriver(tmp_path, without=FUNCTIONS - {"nvmlInit_v2"})
        with open_library(tmp_path) as library:
            for function, call in CALLS.items():
                with pytest.raises(NvmlError, match="Function Not Found") as caught:
                    call(library, Handle(None))
                assert (caught.value.function, caught.value.code) == (function, Code.FUNCTION_NOT_FOUND)
        StubDriver(tmp_path / "init", without=VARIANTS["nvmlInit"])
        with pytest.raises(NvmlError, match=r"nvmlInit.*Function Not Found"), open_library(tmp_path / "init"):
            pass

    def test_dispensable(self, tmp_path: Path) -> None:
        """Do without what only ends the use of something, and without texts of errors."""
        driver = StubDriver(tmp_path, without=["nvmlShutdown", "nvmlEventSetFree", "nvmlErrorString"])
        with open_library(tmp_path) as library:
            with library.event_set() as event_set:
                assert event_set.wait(SHORT) is None
            driver.fail("nvmlDeviceGetCount", 9)
            with pytest.raises(NvmlError) as caught:
                library.count()
        assert "9" in caught.value.text


@pytest.mark.parametrize(
    ("codes", "counts"),
    [
        ([999, Code.GPU_IS_LOST, Code.DRIVER_NOT_LOADED, Code.LIB_RM_VERSION_MISMATCH], True),
        ([Code.INVALID_ARGUMENT, Code.NOT_SUPPORTED, Code.NO_PERMISSION, Code.NOT_FOUND], False),
        ([Code.INSUFFICIENT_SIZE, Code.TIMEOUT, Code.FUNCTION_NOT_FOUND, Code.NO_DATA], False),
        ([Code.ARGUMENT_VERSION_MISMATCH], False),
    ],
)
def test_failures(driver: StubDriver, codes: Sequence[int], counts: bool) -> None:
    """Hand on each failure of a function, each time; what NVML answers in the ordinary course is none."""
    failures: list[tuple[str, int]] = []
    with open_library(driver.root, lambda *failure: failures.append(failure)) as library:
        for code in codes:
            driver.fail("nvmlDeviceGetName", code)
            for _ in range(2):
                with pytest.raises(NvmlError):
                    library.name(library.handle(0))
    assert failures == [("nvmlDeviceGetName", code) for code in codes for _ in range(2) if counts]


class TestFacts:
    def test_all(self, driver: StubDriver, library: Library) -> None:
        """Read each fact as the driver gives it; the minor number need not be the index."""
        gpu = StubGpu(
            uuid="GPU-01234567-89ab-cdef-0123-456789abcdef",
            minor=7,
            bus_id="0000C0DE:AF:1F.0",
            name="NVIDIA H200",
            total=141 * GIB,
            used=5 * GIB,
            reserved=GIB,
            utilization=37,
            recovery_action=2,
            rows_pending=0,
            rows_failed=1,
            pages_pending=1,
            fabric_state=3,
            fabric_status=999,
        )
        driver.set(gpus=[StubGpu(), gpu], driver_version="535.261.03")
        handle = library.handle(1)
        assert {function: call(library, handle) for function, call in CALLS.items() if "Event" not in function} == {
            "nvmlSystemGetDriverVersion": "535.261.03",
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": library.handle(0),
            "nvmlDeviceGetUUID": gpu.uuid,
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetMinorNumber": 7,
            "nvmlDeviceGetPciInfo": "0000C0DE:AF:1F.0",
            "nvmlDeviceGetMemoryInfo": Memory(total=141 * GIB, used=5 * GIB, free=135 * GIB, reserved=GIB),
            "nvmlDeviceGetUtilizationRates": 37,
            "nvmlDeviceGetFieldValues": 2,
            "nvmlDeviceGetRemappedRows": RemappedRows(pending=False, failed=True),
            "nvmlDeviceGetRetiredPagesPendingStatus": True,
            "nvmlDeviceGetGpuFabricInfoV": Fabric(state=3, status=999),
        }

    @pytest.mark.parametrize(
        ("call", "function", "called"),
        [
            pytest.param(Library.memory, "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo", id="of a variant"),
            pytest.param(Library.recovery_action, "", "nvmlDeviceGetFieldValues", id="of a field"),
        ],
    )
    def test_error(
        self,
        driver: StubDriver,
        library: Library,
        call: Callable[[Library, Handle], object],
        function: str,
        called: str,
    ) -> None:
        """Raise the error of one GPU with the function that was called; the other GPU answers."""
        _, second = driver.gpus(2)
        driver.change(second, recovery_action=0)
        if function:
            driver.fail(function, Code.NOT_SUPPORTED, StubGpu(0))
        with pytest.raises(NvmlError) as caught:
            call(library, library.handle(0))
        error = caught.value
        assert (error.function, error.code, error.text) == (called, Code.NOT_SUPPORTED, "Not Supported")
        call(library, library.handle(1))

    @pytest.mark.parametrize(
        ("name", "read"),
        [
            pytest.param("", "", id="empty"),
            pytest.param("x" * (TEXT_SIZE - 1), "x" * (TEXT_SIZE - 1), id="longest"),
            pytest.param("Tesla\udcff", "Tesla\N{REPLACEMENT CHARACTER}", id="not UTF-8"),
        ],
    )
    def test_texts(self, driver: StubDriver, library: Library, name: str, read: str) -> None:
        """Read a text up to the size of the buffer, whatever its bytes are."""
        driver.set(gpus=[StubGpu(name=name)])
        assert library.name(library.handle(0)) == read

    def test_text_too_long(self, driver: StubDriver, library: Library) -> None:
        """Raise NVML's error for a text that does not fit: it was told the size of the buffer."""
        driver.set(gpus=[StubGpu(name="x" * TEXT_SIZE)])
        with pytest.raises(NvmlError, match="nvmlDeviceGetName: Insufficient Size"):
            library.name(library.handle(0))


class TestEvents:
    ALL = EventType.XID_CRITICAL | EventType.DOUBLE_BIT_ECC

    @pytest.mark.parametrize(
        ("supported", "wanted", "registered"),
        [
            pytest.param(0x1F, ALL, ALL, id="all"),
            pytest.param(EventType.XID_CRITICAL, ALL, EventType.XID_CRITICAL, id="some"),
            pytest.param(ALL, EventType.DOUBLE_BIT_ECC, EventType.DOUBLE_BIT_ECC, id="fewer than could be"),
            pytest.param(0, ALL, 0, id="none"),
        ],
    )
    def test_register(self, driver: StubDriver, library: Library, supported: int, wanted: int, registered: int) -> None:
        """Register a GPU for what is both wanted and supported; if that is nothing, not at all."""
        driver.set(gpus=[StubGpu(event_types=supported)])
        with library.event_set() as event_set:
            assert event_set.register(library.handle(0), wanted) == registered
            driver.event(StubGpu(), EventType.DOUBLE_BIT_ECC)
            driver.xid(StubGpu(), 48)
            events = [event_set.wait(SHORT), event_set.wait(SHORT)]
        assert sum(event.type for event in events if event) == registered
        assert driver.calls("nvmlDeviceRegisterEvents") == (registered != 0)

    def test_each_event_once(self, driver: StubDriver, library: Library) -> None:
        """Return events one at a time, in order, each with the GPU's UUID, though that GPU is lost by now."""
        first, second = driver.state.gpus
        with library.event_set() as event_set:
            event_set.register(library.handle(0), self.ALL)
            event_set.register(library.handle(1), self.ALL)
            driver.set(gpus=[first, attrs.evolve(second, lost=True)])
            driver.xid(second, 1001)
            driver.event(first, EventType.DOUBLE_BIT_ECC)
            driver.xid(second, 1002)
            assert [event_set.wait(SHORT) for _ in range(4)] == [
                Event(second.uuid, EventType.XID_CRITICAL, 1001),
                Event(first.uuid, EventType.DOUBLE_BIT_ECC, 0),
                Event(second.uuid, EventType.XID_CRITICAL, 1002),
                None,
            ]

    def test_wait_times_out(self, library: Library) -> None:
        """Wait for so many milliseconds where no event comes."""
        with library.event_set() as event_set:
            begin = time.monotonic()
            assert event_set.wait(30) is None
            assert time.monotonic() - begin >= 0.029  # NVML's milliseconds are whole ones

    def test_wait_fails(self, driver: StubDriver, library: Library) -> None:
        """Raise the error that NVML ends a wait with."""
        driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        with library.event_set() as event_set, pytest.raises(NvmlError) as caught:
            event_set.wait(10_000)
        assert (caught.value.function, caught.value.code) == ("nvmlEventSetWait_v2", Code.GPU_IS_LOST)

    @pytest.mark.parametrize("code", [Code.SUCCESS, Code.GPU_IS_LOST], ids=["freed", "refused"])
    def test_free(self, driver: StubDriver, library: Library, code: int) -> None:
        """Free the set at the end, whatever comes of it."""
        driver.fail("nvmlEventSetFree", code)
        with library.event_set():
            assert driver.calls("nvmlEventSetFree") == 0
        assert driver.calls("nvmlEventSetFree") == 1


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda driver: driver.fail("nvmlDeviceGetCuont", 1), id="steering"),
        pytest.param(lambda driver: StubDriver(driver.root, without=["nvmlDeviceGetCuont"]), id="leaving out"),
        pytest.param(lambda driver: driver.calls("nvmlDeviceGetCuont"), id="counting"),
    ],
)
def test_stub(driver: StubDriver, call: Callable[[StubDriver], object]) -> None:
    """Refuse to steer a function that the header does not declare, lest a test pass for nothing."""
    with pytest.raises(ValueError, match="nvmlDeviceGetCuont"):
        call(driver)


class TestMemoryLimits:
    @pytest.mark.parametrize("backend", ["dmem", "misc"])
    def test_set_and_read_back(self, tmp_path: Path, backend: str) -> None:
        """Set a limit, read it back with what is used, replace it, and remove it: then there is none."""
        driver, cgroup = StubDriver(tmp_path), tmp_path / "pod1"
        gpu, _ = driver.gpus(2)
        driver.set(limits=backend, limit_used={"pod1": 5})
        cgroup.mkdir()
        with open_library(tmp_path) as library:
            first, second = map(library.handle, range(2))
            assert library.memory_limit(first, str(cgroup)) is None
            for limit in (GIB, 2 * GIB):
                library.set_memory_limit(first, str(cgroup), limit)
                assert library.memory_limit(first, str(cgroup)) == MemoryLimit(hard=limit, used=5)
            assert library.memory_limit(second, str(cgroup)) is None
            library.set_memory_limit(first, str(cgroup), None)
            assert library.memory_limit(first, str(cgroup)) is None
            with pytest.raises(NvmlError) as caught:
                library.set_memory_limit(first, str(cgroup), gpu.total + 1)
        assert caught.value.code == Code.INVALID_ARGUMENT

    def test_removed_cgroup(self, tmp_path: Path) -> None:
        """A limit goes with its cgroup, and a new one of that name has none."""
        driver, cgroup = StubDriver(tmp_path), tmp_path / "pod1"
        driver.gpus(1)
        driver.set(limits="misc")
        cgroup.mkdir()
        with open_library(tmp_path) as library:
            handle = library.handle(0)
            library.set_memory_limit(handle, str(cgroup), GIB)
            cgroup.rmdir()
            with pytest.raises(NvmlError) as caught:
                library.memory_limit(handle, str(cgroup))
            cgroup.mkdir()
            assert library.memory_limit(handle, str(cgroup)) is None
        assert caught.value.code == Code.OPERATING_SYSTEM
