"""libnvidia-ml as Python, against a stub library that the tests steer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from stub_driver import GIB, MIB, StubDriver, StubGpu

from sgpu.nvml import Code, Event, EventType, Library, LibraryNotFoundError, Memory, NvmlError, open_library
from sgpu.nvml.constants import TEXT_SIZE, VARIANTS
from sgpu.nvml.search import DIRECTORIES, NAMES, candidates

SHORT = 0  # milliseconds: an event wait that looks once
LONG = 10_000  # milliseconds: an event wait that a test never sits out

#: An accessor for each function that open_library itself does not need.
ACCESSORS: dict[str, Callable[[Library], object]] = {
    "nvmlSystemGetDriverVersion": lambda library: library.driver_version(),
    "nvmlDeviceGetCount": lambda library: library.count(),
    "nvmlDeviceGetHandleByIndex": lambda library: library.handle(0),
    "nvmlDeviceGetUUID": lambda library: library.uuid(library.handle(0)),
    "nvmlDeviceGetName": lambda library: library.name(library.handle(0)),
    "nvmlDeviceGetMinorNumber": lambda library: library.minor_number(library.handle(0)),
    "nvmlDeviceGetPciInfo": lambda library: library.pci_bus_id(library.handle(0)),
    "nvmlDeviceGetMemoryInfo": lambda library: library.memory(library.handle(0)),
    "nvmlDeviceGetSupportedEventTypes": lambda library: register(library),
    "nvmlDeviceRegisterEvents": lambda library: register(library),
    "nvmlEventSetCreate": lambda library: register(library),
    "nvmlEventSetWait": lambda library: wait(library),
}
#: Those of them that are about one GPU.
FUNCTIONS_OF_ONE_GPU = {name for name in ACCESSORS if name.startswith("nvmlDevice")} - {"nvmlDeviceGetCount"}


def register(library: Library) -> int:
    with library.event_set() as event_set:
        return event_set.register(library.handle(0), EventType.XID_CRITICAL)


def wait(library: Library) -> Event | None:
    with library.event_set() as event_set:
        return event_set.wait(SHORT)


def python(program: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program in an interpreter of its own, which has imported sgpu.nvml."""
    program = f"import pathlib, sys; from sgpu.nvml import open_library\n{program}"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True)


def found(root: Path) -> Path:
    """Which library is opened. It is unloaded when this returns: its path is the loader's key to what is loaded."""
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
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("directory", DIRECTORIES)
    def test_each_place(self, tmp_path: Path, directory: str, name: str) -> None:
        """The library is found in every directory, under both names."""
        driver = StubDriver(tmp_path / "elsewhere")
        path = tmp_path / "host" / directory / name
        path.parent.mkdir(parents=True)
        driver.path.rename(path)
        assert found(tmp_path / "host") == path

    def test_order(self, tmp_path: Path) -> None:
        """Of several libraries the first one in the order of search is opened."""
        image = StubDriver(tmp_path / "elsewhere").path.read_bytes()
        paths = list(candidates(tmp_path / "host"))
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        for path in paths:
            assert found(tmp_path / "host") == path
            path.unlink()

    def test_nothing_there(self, tmp_path: Path) -> None:
        """Where there is none, the error names every directory that was looked in, and that is all."""
        with pytest.raises(LibraryNotFoundError) as caught:
            found(tmp_path)
        assert (caught.value.host_path, caught.value.refused) == (tmp_path, ())
        words = f"from under {tmp_path} (there is none in {', '.join(DIRECTORIES)})"
        assert str(caught.value).endswith(words)

    def test_link_to_nowhere(self, tmp_path: Path) -> None:
        """As where a link leads out of what is mounted: the error has the loader's words for it, and no others."""
        link = tmp_path / "lib64/libnvidia-ml.so.1"
        link.parent.mkdir()
        link.symlink_to("/nowhere/libnvidia-ml.so.1")
        with pytest.raises(LibraryNotFoundError) as caught:
            found(tmp_path)
        words = "cannot open shared object file: No such file or directory"
        assert caught.value.refused == ((link, words),)
        assert str(caught.value).endswith(f"from under {tmp_path} ({link}: {words})")

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            pytest.param(lambda image: b"", "file too short", id="empty"),
            pytest.param(lambda image: b"not found: 404\n" * 100, "invalid ELF header", id="text"),
            pytest.param(lambda image: image[:40], "file too short", id="truncated"),
            pytest.param(lambda image: image[:4] + b"\1" + image[5:], "wrong ELF class: ELFCLASS32", id="32 bit"),
        ],
    )
    def test_broken(self, driver: StubDriver, spoil: Callable[[bytes], bytes], words: str) -> None:
        """A file that the loader refuses is passed over; where no other loads, the error says why it was."""
        good = driver.root / "usr/lib64/libnvidia-ml.so.1"
        good.parent.mkdir(parents=True)
        image = driver.path.read_bytes()
        driver.path.unlink()
        driver.path.write_bytes(spoil(image))
        good.write_bytes(image)
        assert found(driver.root) == good
        good.unlink()
        with pytest.raises(LibraryNotFoundError) as caught:
            found(driver.root)
        refused = dict(caught.value.refused)
        assert words in refused[driver.path]
        assert str(driver.path) not in refused[driver.path]

    def test_half_copied(self, driver: StubDriver) -> None:
        """A library that somebody is still copying is passed over, and does not take the process along."""
        driver.path.write_bytes(driver.path.read_bytes()[:3000])
        done = python("open_library(pathlib.Path(sys.argv[1])).__enter__()", driver.root)
        assert done.returncode == 1
        assert b"LibraryNotFoundError" in done.stderr

    def test_import(self, driver: StubDriver) -> None:
        """Importing the module loads no library, also where the loader would find one."""
        done = python("print(open('/proc/self/maps').read())", LD_LIBRARY_PATH=str(driver.path.parent))
        assert b"_cffi_backend" in done.stdout
        assert b"libnvidia-ml" not in done.stdout


class TestOpen:
    @pytest.mark.parametrize(
        ("code", "text"),
        [
            pytest.param(Code.DRIVER_NOT_LOADED, "Driver Not Loaded", id="no driver"),
            pytest.param(Code.LIB_RM_VERSION_MISMATCH, "Driver/library version mismatch", id="another version"),
            pytest.param(999, "Unknown Error", id="unknown"),
        ],
    )
    def test_init_fails(self, driver: StubDriver, code: int, text: str) -> None:
        """A driver that can't start is an error with the function, the code and NVML's text; nothing is shut down."""
        driver.fail("nvmlInit", code)
        with pytest.raises(NvmlError) as caught, open_library(driver.root):
            pass
        error = caught.value
        assert (error.function, error.code, error.text) == ("nvmlInit_v2", code, text)
        assert str(error) == f"nvmlInit_v2: {text} (NVML error {code})"
        assert driver.calls("nvmlShutdown") == 0

    def test_shutdown(self, driver: StubDriver) -> None:
        """At the end the library is shut down, once; what was opened is of no use then."""
        with open_library(driver.root) as library:
            assert driver.calls("nvmlShutdown") == 0
        assert driver.calls("nvmlShutdown") == 1
        with pytest.raises(NvmlError) as caught:
            library.count()
        assert caught.value.text == "Uninitialized"

    def test_shutdown_after_error(self, driver: StubDriver) -> None:
        """An error inside leaves as it is, and the library is shut down."""
        with pytest.raises(ZeroDivisionError), open_library(driver.root):
            raise ZeroDivisionError
        assert driver.calls("nvmlShutdown") == 1

    def test_shutdown_fails(self, driver: StubDriver) -> None:
        """A driver that refuses the shutdown does not hide what ended the use of it."""
        driver.fail("nvmlShutdown", Code.GPU_IS_LOST)
        with open_library(driver.root):
            pass

    def test_twice(self, driver: StubDriver) -> None:
        """Two users of one library don't shut each other down."""
        with open_library(driver.root) as library:
            with open_library(driver.root):
                pass
            assert library.count() == 2

    def test_two_drivers(self, driver: StubDriver, tmp_path: Path) -> None:
        """Libraries at two paths are two, though they share a soname."""
        other = StubDriver(tmp_path / "other")
        with open_library(driver.root) as library, open_library(other.root) as other_library:
            assert (library.count(), other_library.count()) == (2, 0)

    def test_upgrade(self, driver: StubDriver) -> None:
        """Opening again after the driver was replaced gives the new one."""
        for without in ([], ["nvmlDeviceGetCount_v2"]):
            newer = StubDriver(driver.root, without=without)
            with open_library(driver.root) as library:
                library.count()
            assert newer.calls("nvmlDeviceGetCount_v2") == (without == [])
            del library  # a library that is still referenced stays loaded, and is what opening it again gives


class TestVariants:
    @pytest.mark.parametrize(
        ("function", "absent"),
        [
            pytest.param(function, depth, id=f"{function} without {depth} newer")
            for function, variants in VARIANTS.items()
            for depth in range(len(variants))
        ],
    )
    def test_fall_back(self, tmp_path: Path, function: str, absent: int) -> None:
        """The newest variant that the library has is the one that is called."""
        driver = StubDriver(tmp_path, without=VARIANTS[function][:absent])
        driver.gpus(1)
        with open_library(tmp_path) as library:
            ACCESSORS.get(function, Library.count)(library)
        assert driver.calls(function) == driver.calls(VARIANTS[function][absent]) == 1

    @pytest.mark.parametrize("function", ACCESSORS)
    def test_missing(self, tmp_path: Path, function: str) -> None:
        """A function without any variant in the library is an error that names it, not a crash."""
        variants = {*VARIANTS.get(function, ()), function}
        if function == "nvmlDeviceGetMemoryInfo":
            variants.add("nvmlDeviceGetMemoryInfo_v2")
        driver = StubDriver(tmp_path, without=variants)
        driver.gpus(1)
        with open_library(tmp_path) as library:
            with pytest.raises(NvmlError) as caught:
                ACCESSORS[function](library)
            assert (caught.value.function, caught.value.code) == (function, Code.FUNCTION_NOT_FOUND)
            assert "Function Not Found" in caught.value.text

    def test_missing_init(self, tmp_path: Path) -> None:
        """A library that can't be initialised at all is the same error."""
        StubDriver(tmp_path, without=VARIANTS["nvmlInit"])
        with pytest.raises(NvmlError) as caught, open_library(tmp_path):
            pass
        assert (caught.value.function, caught.value.code) == ("nvmlInit", Code.FUNCTION_NOT_FOUND)

    def test_missing_at_the_end(self, tmp_path: Path) -> None:
        """What only ends the use of something may be missing."""
        StubDriver(tmp_path, without=["nvmlShutdown", "nvmlEventSetFree"])
        with open_library(tmp_path) as library:
            assert wait(library) is None

    def test_missing_texts(self, tmp_path: Path) -> None:
        """Without nvmlErrorString the text is the code."""
        driver = StubDriver(tmp_path, without=["nvmlErrorString"])
        driver.fail("nvmlInit", 9)
        with pytest.raises(NvmlError) as caught, open_library(tmp_path):
            pass
        assert caught.value.text == "error 9"


class TestFailures:
    @pytest.mark.parametrize(
        ("code", "told"),
        [
            pytest.param(999, True, id="unknown"),
            pytest.param(Code.GPU_IS_LOST, True, id="lost"),
            pytest.param(Code.NOT_SUPPORTED, False, id="not supported"),
            pytest.param(Code.NO_DATA, False, id="no data"),
            pytest.param(Code.INSUFFICIENT_SIZE, False, id="no room"),
            pytest.param(Code.FUNCTION_NOT_FOUND, False, id="no function"),
        ],
    )
    def test_told(self, driver: StubDriver, code: int, told: bool) -> None:
        """What should not be answered is told by function and code, each time; what is in order is not."""
        failures: list[tuple[str, int]] = []
        driver.fail("nvmlDeviceGetName", code)
        with open_library(driver.root, lambda *failure: failures.append(failure)) as library:
            for _ in range(2):
                with pytest.raises(NvmlError):
                    library.name(library.handle(0))
        assert failures == [("nvmlDeviceGetName", code)] * (2 if told else 0)

    def test_while_it_is_opened_and_closed(self, driver: StubDriver) -> None:
        """Also where nobody minds."""
        failures: list[tuple[str, int]] = []
        driver.fail("nvmlShutdown", Code.GPU_IS_LOST)
        with open_library(driver.root, lambda *failure: failures.append(failure)):
            driver.fail("nvmlInit", Code.DRIVER_NOT_LOADED)
        with pytest.raises(NvmlError), open_library(driver.root, lambda *failure: failures.append(failure)):
            pass
        assert failures == [("nvmlShutdown", Code.GPU_IS_LOST), ("nvmlInit_v2", Code.DRIVER_NOT_LOADED)]

    def test_a_wait_without_an_event(self, driver: StubDriver) -> None:
        """Is what there mostly is."""
        failures: list[tuple[str, int]] = []
        with open_library(driver.root, lambda *failure: failures.append(failure)) as library:
            assert wait(library) is None
        assert failures == []


class TestFacts:
    def test_all(self, driver: StubDriver, library: Library) -> None:
        """Each fact is read as the driver gives it; the minor number need not be the index."""
        gpu = StubGpu(
            uuid="GPU-01234567-89ab-cdef-0123-456789abcdef",
            minor=7,
            bus_id="0000C0DE:AF:1F.0",
            name="NVIDIA H200",
            total=141 * GIB,
            used=5 * GIB,
            reserved=GIB,
        )
        driver.set(gpus=[StubGpu(), gpu], driver_version="535.261.03")
        handle = library.handle(1)
        assert library.driver_version() == "535.261.03"
        assert library.count() == 2
        assert library.uuid(handle) == gpu.uuid
        assert library.name(handle) == "NVIDIA H200"
        assert library.minor_number(handle) == 7
        assert library.pci_bus_id(handle) == "0000C0DE:AF:1F.0"
        assert library.memory(handle) == Memory(total=141 * GIB, used=5 * GIB, free=135 * GIB)

    def test_memory_of_old_drivers(self, tmp_path: Path) -> None:
        """Without the second variant, what the driver reserves counts as used."""
        driver = StubDriver(tmp_path, without=["nvmlDeviceGetMemoryInfo_v2"])
        driver.set(gpus=[StubGpu(total=15 * GIB, used=4 * GIB, reserved=GIB)])
        with open_library(tmp_path) as library:
            assert library.memory(library.handle(0)) == Memory(total=15 * GIB, used=5 * GIB, free=10 * GIB)

    def test_memory_not_supported(self, driver: StubDriver, library: Library) -> None:
        """A GPU that has no memory figures says so; the older variant is not asked instead."""
        driver.fail("nvmlDeviceGetMemoryInfo_v2", Code.NOT_SUPPORTED)
        with pytest.raises(NvmlError) as caught:
            library.memory(library.handle(0))
        assert caught.value.code == Code.NOT_SUPPORTED
        assert driver.calls("nvmlDeviceGetMemoryInfo") == 1

    @pytest.mark.parametrize("absent", [1, 2], ids=["second variant", "first variant"])
    def test_bus_id_of_old_drivers(self, tmp_path: Path, absent: int) -> None:
        """The bus id can be had from older variants, in whatever length they know it."""
        driver = StubDriver(tmp_path, without=VARIANTS["nvmlDeviceGetPciInfo"][:absent])
        driver.set(gpus=[StubGpu(bus_id="00000001:AF:1F.0")])
        with open_library(tmp_path) as library:
            assert library.pci_bus_id(library.handle(0)) in ("0001:AF:1F.0", "00000001:AF:1F.0")

    @pytest.mark.parametrize(
        ("name", "read"),
        [
            pytest.param("", "", id="empty"),
            pytest.param("x" * (TEXT_SIZE - 1), "x" * (TEXT_SIZE - 1), id="longest"),
            pytest.param("Tesla\udcff", "Tesla\N{REPLACEMENT CHARACTER}", id="no text"),
        ],
    )
    def test_texts(self, driver: StubDriver, library: Library, name: str, read: str) -> None:
        """A text is read up to the size of the buffer, and whatever its bytes are."""
        driver.set(gpus=[StubGpu(name=name)])
        assert library.name(library.handle(0)) == read

    def test_text_too_long(self, driver: StubDriver, library: Library) -> None:
        """A text that does not fit is NVML's error."""
        driver.set(gpus=[StubGpu(name="x" * TEXT_SIZE)])
        with pytest.raises(NvmlError, match="nvmlDeviceGetName: Insufficient Size"):
            library.name(library.handle(0))

    @pytest.mark.parametrize("function", sorted(FUNCTIONS_OF_ONE_GPU))
    def test_one_gpu_fails(self, driver: StubDriver, library: Library, function: str) -> None:
        """An error for one GPU names function and code, and leaves the other GPU alone."""
        first, second = driver.state.gpus
        driver.fail(function, Code.GPU_IS_LOST, first)
        with pytest.raises(NvmlError) as caught:
            ACCESSORS[function](library)
        assert caught.value.function.startswith(function)
        assert (caught.value.code, caught.value.text) == (Code.GPU_IS_LOST, "GPU is lost")
        driver.set(gpus=[second, first])
        ACCESSORS[function](library)

    def test_lost(self, driver: StubDriver, library: Library) -> None:
        """A lost GPU still counts, can't be had by its index, and is an error on a handle from before."""
        first, second = driver.state.gpus
        handle = library.handle(0)
        driver.change(first, lost=True)
        assert library.count() == 2
        for call in (lambda: library.handle(0), lambda: library.uuid(handle), lambda: library.memory(handle)):
            with pytest.raises(NvmlError, match="GPU is lost"):
                call()
        assert library.uuid(library.handle(1)) == second.uuid

    def test_vanished(self, driver: StubDriver, library: Library) -> None:
        """A GPU that was taken out is an error on a handle from before; the others move up."""
        second = driver.state.gpus[1]
        handle = library.handle(0)
        driver.set(gpus=[second])
        assert library.count() == 1
        with pytest.raises(NvmlError, match="GPU is lost"):
            library.name(handle)
        assert library.uuid(library.handle(0)) == second.uuid
        with pytest.raises(NvmlError, match="Invalid Argument"):
            library.handle(1)


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
        """A GPU is registered for what is both wanted and supported; if that is nothing, not at all."""
        driver.set(gpus=[StubGpu(event_types=supported)])
        with library.event_set() as event_set:
            assert event_set.register(library.handle(0), wanted) == registered
            driver.event(StubGpu(), EventType.DOUBLE_BIT_ECC)
            driver.xid(StubGpu(), 48)
            events = [event_set.wait(SHORT), event_set.wait(SHORT)]
        assert sum(event.type for event in events if event) == registered
        assert driver.calls("nvmlDeviceRegisterEvents") == (registered != 0)

    def test_each_event_once(self, driver: StubDriver, library: Library) -> None:
        """Events come one at a time, in order, each once, with the GPU's UUID and for an XID its number."""
        first, second = driver.state.gpus
        driver.xid(first, 13)  # before the registration, so never heard of
        with library.event_set() as event_set:
            event_set.register(library.handle(0), self.ALL)
            event_set.register(library.handle(1), self.ALL)
            driver.xid(second, 79)
            driver.event(first, EventType.DOUBLE_BIT_ECC)
            driver.xid(second, 31)
            assert [event_set.wait(SHORT) for _ in range(4)] == [
                Event(second.uuid, EventType.XID_CRITICAL, 79),
                Event(first.uuid, EventType.DOUBLE_BIT_ECC, 0),
                Event(second.uuid, EventType.XID_CRITICAL, 31),
                None,
            ]

    def test_only_registered(self, driver: StubDriver, library: Library) -> None:
        """Events of a GPU that is not registered are not heard of."""
        first, second = driver.state.gpus
        with library.event_set() as event_set:
            event_set.register(library.handle(0), self.ALL)
            driver.xid(second, 79)
            driver.xid(first, 48)
            event = event_set.wait(SHORT)
            assert event is not None
            assert event.uuid == first.uuid

    def test_wait_ends_early(self, driver: StubDriver, library: Library) -> None:
        """A wait ends when the event comes."""
        with library.event_set() as event_set:
            event_set.register(library.handle(0), self.ALL)
            timer = threading.Timer(0.02, driver.xid, [StubGpu(0), 48])
            timer.start()
            assert event_set.wait(LONG) == Event(StubGpu(0).uuid, EventType.XID_CRITICAL, 48)
            timer.join()

    def test_wait_times_out(self, library: Library) -> None:
        """A wait without an event lasts as long as it was told to, and gives None."""
        with library.event_set() as event_set:
            begin = time.monotonic()
            assert event_set.wait(30) is None
            assert time.monotonic() - begin >= 0.029  # NVML's milliseconds are whole ones

    def test_wait_fails(self, driver: StubDriver, library: Library) -> None:
        """A wait that NVML ends with an error raises it."""
        driver.fail("nvmlEventSetWait", Code.GPU_IS_LOST)
        with library.event_set() as event_set, pytest.raises(NvmlError) as caught:
            event_set.wait(LONG)
        assert (caught.value.function, caught.value.code) == ("nvmlEventSetWait_v2", Code.GPU_IS_LOST)

    def test_lost_with_the_event(self, driver: StubDriver, library: Library) -> None:
        """The XID that says that a GPU fell off the bus is heard, though the GPU can't be asked its UUID any more."""
        gpu = driver.state.gpus[0]
        with library.event_set() as event_set:
            event_set.register(library.handle(0), self.ALL)
            driver.set(gpus=[attrs.evolve(gpu, lost=True), driver.state.gpus[1]])
            driver.xid(gpu, 79)
            assert event_set.wait(SHORT) == Event(gpu.uuid, EventType.XID_CRITICAL, 79)

    @pytest.mark.parametrize("code", [Code.SUCCESS, Code.GPU_IS_LOST], ids=["freed", "refused"])
    def test_free(self, driver: StubDriver, library: Library, code: int) -> None:
        """The set is freed at the end, and what is wrong with that is no matter."""
        driver.fail("nvmlEventSetFree", code)
        with library.event_set():
            assert driver.calls("nvmlEventSetFree") == 0
        assert driver.calls("nvmlEventSetFree") == 1


class TestStub:
    """What the other tests rely on the stub for, where nothing above shows it."""

    def test_hang(self, driver: StubDriver, library: Library) -> None:
        """A call that hangs blocks its thread alone, and returns when the function works again."""
        driver.hang("nvmlDeviceGetCount")
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(library.count()))
        thread.start()
        deadline = time.monotonic() + 10
        while not driver.calls("nvmlDeviceGetCount") and time.monotonic() < deadline:
            time.sleep(0.001)
        assert library.uuid(library.handle(0)) == StubGpu(0).uuid
        assert thread.is_alive()
        driver.works("nvmlDeviceGetCount")
        thread.join(timeout=10)
        assert counts == [2]

    def test_crash(self, driver: StubDriver) -> None:
        """A call that crashes takes its process along; another process's calls are counted too."""
        driver.crash("nvmlSystemGetDriverVersion")
        done = python("with open_library(pathlib.Path(sys.argv[1])) as library: library.driver_version()", driver.root)
        assert done.returncode == -signal.SIGABRT
        assert driver.call_log() == ["nvmlInit_v2", "nvmlSystemGetDriverVersion"]

    def test_steered_while_open(self, driver: StubDriver, library: Library) -> None:
        """Each change is seen by the next call, however fast they follow one another."""
        for used in range(200):
            driver.set(gpus=[StubGpu(used=used * MIB)])
            assert library.memory(library.handle(0)).used == used * MIB

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda driver: driver.fail("nvmlDeviceGetCuont", 1), id="steering"),
            pytest.param(lambda driver: StubDriver(driver.root, without=["nvmlDeviceGetCuont"]), id="leaving out"),
            pytest.param(lambda driver: driver.calls("nvmlDeviceGetCuont"), id="counting"),
        ],
    )
    def test_misspelt(self, driver: StubDriver, call: Callable[[StubDriver], object]) -> None:
        """A function that the header does not declare is refused, lest a test pass for nothing."""
        with pytest.raises(ValueError, match="nvmlDeviceGetCuont"):
            call(driver)
