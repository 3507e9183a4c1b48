"""The processes of a GPU, as the stub library lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_driver import MIB, StubDriver, StubGpu

from sgpu.driver.nvml import (
    Code,
    Handle,
    Library,
    NvmlError,
    list_processes,
    open_library,
    processes,
    utilization_by_process,
)
from sgpu.driver.nvml.processes import COMPUTE, FIRST_ROOM, GRAPHICS, LAYOUTS, MPS, NOT_AVAILABLE, ListedProcess

LISTS = {COMPUTE: "compute", GRAPHICS: "graphics", MPS: "mps"}


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
    @pytest.mark.parametrize(("suffix", "newer"), [("_v3", 0), ("_v2", 1), ("", 2)], ids=["newest", "second", "first"])
    def test_lists(self, tmp_path: Path, suffix: str, newer: int) -> None:
        """Read all lists, each by the newest variant that the driver has: older ones fill other structures."""
        driver = StubDriver(tmp_path, without=[name + layout[0] for name in LISTS for layout in LAYOUTS[:newer]])
        driver.gpus(1)
        driver.change(StubGpu(), compute=((1, MIB), (2, NOT_AVAILABLE), (3, 0)), graphics=((4, 4),), mps=((5, 5),))
        with open_library(tmp_path) as library:
            assert list_processes(library, gpu(library)) == {
                **{1: ListedProcess(MIB), 2: ListedProcess(None), 3: ListedProcess(0), 4: ListedProcess(4)},
                5: ListedProcess(5, is_mps_client=True),
            }
        for name in LISTS:
            assert driver.calls(name) == driver.calls(name + suffix)

    @pytest.mark.parametrize(
        ("compute", "graphics", "mps", "expected"),
        [
            *((7, 5, 6, 7), (5, 6, 7, 7), (7, 7, 7, 7), (NOT_AVAILABLE, NOT_AVAILABLE, NOT_AVAILABLE, None)),
            *((NOT_AVAILABLE, 5, NOT_AVAILABLE, 5), (0, NOT_AVAILABLE, NOT_AVAILABLE, 0)),
        ],
    )
    def test_in_several_lists(
        self, driver: StubDriver, library: Library, compute: int, graphics: int, mps: int, expected: int | None
    ) -> None:
        """Count a process once."""
        driver.change(StubGpu(), compute=((1, compute),), graphics=((1, graphics),), mps=((1, mps),))
        assert list_processes(library, gpu(library)) == {1: ListedProcess(expected, is_mps_client=True)}

    @pytest.mark.parametrize("surplus", [0, 8, -8], ids=["", "longer entries", "shorter entries"])
    @pytest.mark.parametrize("count", [0, 1, 2, FIRST_ROOM, FIRST_ROOM + 1, 1000])
    def test_many(self, driver: StubDriver, library: Library, count: int, surplus: int) -> None:
        """Read as many as there are, also where a driver's entries are longer or shorter than it says."""
        entries = tuple((1000 + number, number * MIB) for number in range(count))
        driver.change(StubGpu(), compute=entries)
        driver.set(process_surplus=surplus)
        assert list_processes(library, gpu(library)) == {pid: ListedProcess(memory) for pid, memory in entries}

    def test_too_many(self, driver: StubDriver, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give up on a driver that never has enough room."""
        monkeypatch.setattr(processes, "MOST_ROOM", 3 * FIRST_ROOM)
        driver.fail(COMPUTE, Code.INSUFFICIENT_SIZE)
        with pytest.raises(NvmlError, match="Insufficient Size"):
            list_processes(library, gpu(library))

    @pytest.mark.parametrize("name", [GRAPHICS, MPS])
    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND])
    def test_missing_list(self, driver: StubDriver, library: Library, name: str, code: int) -> None:
        """Do without a list of graphics or MPS that there is not."""
        driver.change(StubGpu(), compute=((1, MIB),))
        driver.fail(name, code)
        assert list_processes(library, gpu(library)) == {1: ListedProcess(MIB)}

    @pytest.mark.parametrize(
        ("name", "code"),
        [(COMPUTE, Code.NOT_SUPPORTED), (COMPUTE, Code.FUNCTION_NOT_FOUND), *((name, 999) for name in LISTS)],
    )
    def test_failing_list(self, driver: StubDriver, library: Library, name: str, code: int) -> None:
        """Raise the error of a list that must not be missing, or that fails: a part would be taken for all."""
        driver.fail(name, code)
        with pytest.raises(NvmlError, match=name) as caught:
            list_processes(library, gpu(library))
        assert caught.value.code == code


class TestUtilization:
    SINCE = 1_700_000_000_000_000
    LATER = SINCE + 1

    @pytest.mark.parametrize(
        ("samples", "expected"),
        [
            pytest.param([], {}, id="none"),
            pytest.param([(1, 30, 0), (2, 100, 0), (3, 0, 0)], {1: 30, 2: 100, 3: 0}, id="some"),
            pytest.param([(1, 30, LATER), (2, 7, LATER), (1, 61, LATER), (1, 0, LATER)], {1: 30, 2: 7}, id="average"),
            pytest.param([(1, 30, SINCE), (2, 40, LATER)], {2: 40}, id="from before"),
            pytest.param([(0, 30, 0), (1, 101, 0), (2, 2147483632, 0), (3, 5, 0)], {3: 5}, id="not filled"),
            pytest.param(
                [(number, number % 100, 0) for number in range(1, FIRST_ROOM + 100)],
                {number: number % 100 for number in range(1, FIRST_ROOM + 100)},
                id="more than there was room for",
            ),
        ],
    )
    @pytest.mark.parametrize("stale", [False, True], ids=["", "driver with stale samples"])
    def test_samples(
        self,
        driver: StubDriver,
        library: Library,
        samples: list[tuple[int, int, int]],
        expected: dict[int, int],
        stale: bool,
    ) -> None:
        """Average the percentages of each process since then, without entries that the driver did not fill."""
        driver.change(StubGpu(), samples=tuple(samples))
        driver.set(stale_samples=stale)
        assert utilization_by_process(library, gpu(library), self.SINCE) == expected

    @pytest.mark.parametrize("code", [Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, 999])
    def test_fails(self, driver: StubDriver, library: Library, code: int) -> None:
        """Raise what NVML answers: what that means is the caller's to decide."""
        driver.fail("nvmlDeviceGetProcessUtilization", code)
        with pytest.raises(NvmlError) as caught:
            utilization_by_process(library, gpu(library), self.SINCE)
        assert caught.value.code == code


def test_two_gpus(driver: StubDriver, library: Library) -> None:
    """Return the processes of the GPU that is asked for."""
    first, second = driver.gpus(2)
    driver.change(first, compute=((1, MIB),), samples=((1, 10, 0),))
    driver.change(second, compute=((1, 2 * MIB),), samples=((1, 20, 0),))
    assert [list_processes(library, library.handle(index)) for index in (0, 1)] == [
        {1: ListedProcess(MIB)},
        {1: ListedProcess(2 * MIB)},
    ]
    assert [utilization_by_process(library, library.handle(index), 0) for index in (0, 1)] == [{1: 10}, {1: 20}]
