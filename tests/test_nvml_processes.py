"""The processes of a GPU, as the stub library lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from stub_driver import MIB, StubDriver, StubGpu

from sgpu.nvml import (
    Code,
    Handle,
    Library,
    NvmlError,
    memory_by_process,
    open_library,
    processes,
    utilisation_by_process,
)
from sgpu.nvml.processes import COMPUTE, FIRST_ROOM, LAYOUTS, NOT_AVAILABLE, OTHERS

LISTS = {COMPUTE: "compute", OTHERS[0]: "graphics", OTHERS[1]: "mps"}


@pytest.fixture
def driver(tmp_path: Path) -> StubDriver:
    """A driver with one GPU."""
    driver = StubDriver(tmp_path)
    driver.gpus(1)
    return driver


@pytest.fixture
def library(driver: StubDriver) -> Iterator[Library]:
    with open_library(driver.root) as library:
        yield library


def gpu(library: Library) -> Handle:
    return library.handle(0)


class TestMemory:
    @pytest.mark.parametrize("name", LISTS.values())
    def test_each_list(self, driver: StubDriver, library: Library, name: str) -> None:
        """Whichever list a process is in."""
        driver.change(StubGpu(), **{name: ((4711, 5 * MIB), (1, MIB))})
        assert memory_by_process(library, gpu(library)) == {4711: 5 * MIB, 1: MIB}

    def test_none(self, library: Library) -> None:
        """Nobody uses it."""
        assert memory_by_process(library, gpu(library)) == {}

    @pytest.mark.parametrize(
        ("compute", "graphics", "mps", "expected"),
        [
            pytest.param(7, 5, 6, 7, id="the largest"),
            pytest.param(7, 7, 7, 7, id="never the sum"),
            pytest.param(NOT_AVAILABLE, NOT_AVAILABLE, NOT_AVAILABLE, None, id="not known"),
            pytest.param(NOT_AVAILABLE, 5, NOT_AVAILABLE, 5, id="known in one list"),
            pytest.param(0, NOT_AVAILABLE, NOT_AVAILABLE, 0, id="none is known"),
        ],
    )
    def test_in_several_lists(
        self, driver: StubDriver, library: Library, compute: int, graphics: int, mps: int, expected: int | None
    ) -> None:
        """A process counts once."""
        driver.change(StubGpu(), compute=((1, compute),), graphics=((1, graphics),), mps=((1, mps),))
        assert memory_by_process(library, gpu(library)) == {1: expected}

    @pytest.mark.parametrize("name", LISTS)
    @pytest.mark.parametrize("absent", range(1, len(LAYOUTS)))
    def test_older_variants(self, tmp_path: Path, name: str, absent: int) -> None:
        """They fill other structures."""
        driver = StubDriver(tmp_path, without=[name + suffix for suffix, _ in LAYOUTS[:absent]])
        entries = ((1, MIB), (2, 2 * MIB), (3, NOT_AVAILABLE))
        driver.gpus(1)
        driver.change(StubGpu(), **{LISTS[name]: entries})
        with open_library(tmp_path) as library:
            assert memory_by_process(library, gpu(library)) == {1: MIB, 2: 2 * MIB, 3: None}
        assert driver.calls(name) == driver.calls(name + LAYOUTS[absent][0]) == 1

    @pytest.mark.parametrize("count", [0, 1, 2, FIRST_ROOM, FIRST_ROOM + 1])
    def test_drivers_with_longer_entries(self, driver: StubDriver, library: Library, count: int) -> None:
        """Some drivers' entries are longer than they say: none is read askew, and nothing is written past the end."""
        entries = tuple((1000 + number, number * MIB) for number in range(count))
        driver.change(StubGpu(), compute=entries)
        driver.set(process_surplus=processes.SURPLUS)
        assert memory_by_process(library, gpu(library)) == dict(entries)

    @pytest.mark.parametrize("count", [FIRST_ROOM, FIRST_ROOM + 1, 1000])
    def test_many(self, driver: StubDriver, library: Library, count: int) -> None:
        """More than there was room for at first are asked for again."""
        entries = tuple((1000 + number, number * MIB) for number in range(count))
        driver.change(StubGpu(), compute=entries)
        assert memory_by_process(library, gpu(library)) == dict(entries)
        assert driver.calls(COMPUTE) == (1 if count <= FIRST_ROOM else 2)

    def test_too_many(self, driver: StubDriver, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        """A driver that is never content is not asked for ever."""
        monkeypatch.setattr(processes, "MOST_ROOM", 4 * FIRST_ROOM)
        driver.fail(COMPUTE, Code.INSUFFICIENT_SIZE)
        with pytest.raises(NvmlError, match="Insufficient Size"):
            memory_by_process(library, gpu(library))
        assert driver.calls(COMPUTE) == 3

    @pytest.mark.parametrize("name", OTHERS)
    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND])
    def test_a_list_that_there_is_not(self, driver: StubDriver, library: Library, name: str, code: int) -> None:
        """Of graphics or MPS: the others are told."""
        driver.change(StubGpu(), compute=((1, MIB),))
        driver.fail(name, code)
        assert memory_by_process(library, gpu(library)) == {1: MIB}

    @pytest.mark.parametrize("name", LISTS)
    def test_a_list_that_fails(self, driver: StubDriver, library: Library, name: str) -> None:
        """Half of the truth would be taken for all of it."""
        driver.fail(name, 999)
        with pytest.raises(NvmlError, match=name):
            memory_by_process(library, gpu(library))

    def test_without_the_list_of_compute(self, driver: StubDriver, library: Library) -> None:
        """Then it can't be told who uses the GPU."""
        driver.change(StubGpu(), compute=None, graphics=((1, MIB),))
        with pytest.raises(NvmlError, match="Not Supported"):
            memory_by_process(library, gpu(library))


class TestUtilisation:
    SINCE = 1_700_000_000_000_000

    def read(self, driver: StubDriver, library: Library, *samples: tuple[int, int, int]) -> dict[int, int]:
        driver.change(StubGpu(), samples=samples)
        return dict(utilisation_by_process(library, gpu(library), self.SINCE))

    def test_each(self, driver: StubDriver, library: Library) -> None:
        """Of each process."""
        assert self.read(driver, library, (1, 30, 0), (2, 100, 0), (3, 0, 0)) == {1: 30, 2: 100, 3: 0}

    def test_none(self, driver: StubDriver, library: Library) -> None:
        """NVML says so with an error."""
        assert self.read(driver, library) == {}

    def test_average(self, driver: StubDriver, library: Library) -> None:
        """Over all samples of a process in that time."""
        later = self.SINCE + 1000
        assert self.read(driver, library, (1, 30, later), (2, 7, later), (1, 61, later + 1), (1, 0, later + 2)) == {
            1: 30,
            2: 7,
        }

    def test_since(self, driver: StubDriver, library: Library) -> None:
        """What is from before does not count, though the driver may tell it."""
        for stale in (False, True):
            driver.set(stale_samples=stale)
            assert self.read(driver, library, (1, 30, self.SINCE - 1), (2, 40, self.SINCE + 1)) == {2: 40}

    def test_entries_that_were_not_filled(self, driver: StubDriver, library: Library) -> None:
        """They have no process, or no percentage."""
        assert self.read(driver, library, (0, 30, 0), (1, 101, 0), (2, 2147483632, 0), (3, 5, 0)) == {3: 5}

    def test_many(self, driver: StubDriver, library: Library) -> None:
        """More than there was room for at first."""
        samples = [(number, number % 100, 0) for number in range(1, FIRST_ROOM + 100)]
        assert self.read(driver, library, *samples) == {pid: percent for pid, percent, _ in samples}

    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999])
    def test_fails(self, driver: StubDriver, library: Library, code: int) -> None:
        """It is the caller's to say what that means."""
        driver.fail("nvmlDeviceGetProcessUtilization", code)
        with pytest.raises(NvmlError) as caught:
            self.read(driver, library)
        assert caught.value.code == code


def test_two_gpus(driver: StubDriver, library: Library) -> None:
    """Each has processes of its own."""
    first, second = driver.gpus(2)
    driver.change(first, compute=((1, MIB),), samples=((1, 10, 0),))
    driver.change(second, compute=((1, 2 * MIB),), samples=((1, 20, 0),))
    assert [memory_by_process(library, library.handle(index)) for index in (0, 1)] == [{1: MIB}, {1: 2 * MIB}]
    assert [utilisation_by_process(library, library.handle(index), 0) for index in (0, 1)] == [{1: 10}, {1: 20}]


def test_lost(driver: StubDriver, library: Library) -> None:
    """A GPU that is lost answers this no more than anything else."""
    handle = library.handle(0)
    driver.set(gpus=[attrs.evolve(StubGpu(), lost=True)])
    with pytest.raises(NvmlError, match="GPU is lost"):
        memory_by_process(library, handle)
    with pytest.raises(NvmlError, match="GPU is lost"):
        utilisation_by_process(library, handle, 0)
