"""GPUs that are not there, and their faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from sgpu.device import Health
from sgpu.listing import list_bytes
from sgpu.settings import KNOBS
from sgpu.simulation import read_faults, simulated_devices, with_faults

pytestmark = pytest.mark.pure

#: The most that -simulate takes.
MOST = 64


class TestDevices:
    def test_stable(self) -> None:
        """A simulated GPU has the same UUID at every start, however many there are and however many shares."""
        few, many = simulated_devices(2, 1), simulated_devices(MOST, 100)
        assert [device.uuid for device in few] == [device.uuid for device in many[:2]]

    def test_stable_across_processes(self) -> None:
        """And in every process: ids are kept by the kubelet across restarts."""
        code = "from sgpu.simulation import simulated_devices; print(simulated_devices(1, 1)[0].uuid)"
        printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        assert printed.strip() == "GPU-219469ad-d8dc-5356-80eb-36bfcd1ac270"

    def test_distinct(self) -> None:
        """No two simulated GPUs share a UUID, a name or an address."""
        devices = simulated_devices(MOST, 1)
        for fact in ("uuid", "name", "pci_bus_id"):
            assert len({getattr(device, fact) for device in devices}) == MOST

    def test_like_any_other(self) -> None:
        """They are healthy, have memory and the shares asked for; no device node, and they say what they are."""
        (device,) = simulated_devices(1, 7)
        assert device.simulated
        assert device.health is Health.HEALTHY
        assert device.memory_bytes == 16 * 1024**3
        assert len(device.share_ids()) == 7
        assert device.device_nodes == ()

    def test_as_long_as_real_ones(self) -> None:
        """Their ids have the length of real ones, so that sizes seen in a simulation hold."""
        (device,) = simulated_devices(1, 100)
        real = attrs.evolve(device, uuid="GPU-1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a11")
        assert list_bytes([device]) == list_bytes([real])

    def test_none(self) -> None:
        """None asked for, none made."""
        assert simulated_devices(0, 100) == ()

    def test_most(self) -> None:
        """The most that the setting takes is what the tests here go up to."""
        kind = KNOBS["simulate"].metadata["kind"]
        assert kind.check(MOST)
        assert not kind.check(MOST + 1)


class TestReadFaults:
    @pytest.mark.parametrize(
        ("text", "faults"),
        [
            pytest.param("", {}, id="empty"),
            pytest.param("0", {0: "simulated fault"}, id="no newline at the end"),
            pytest.param("1\n", {1: "simulated fault"}, id="a number alone"),
            pytest.param("0 XID 79\n", {0: "XID 79"}, id="a reason"),
            pytest.param("  0   two words  \n", {0: "two words"}, id="spaces around"),
            pytest.param("0\r\n2 hot\r\n", {0: "simulated fault", 2: "hot"}, id="line ends of other systems"),
            pytest.param("0\n\n2\n", {0: "simulated fault", 2: "simulated fault"}, id="an empty line"),
            pytest.param("0 first\n0 second\n", {0: "second"}, id="the last one counts"),
            pytest.param("63\n64\n", {63: "simulated fault", 64: "simulated fault"}, id="more than there are"),
            pytest.param("00 x\n", {0: "x"}, id="a leading zero"),
            pytest.param("# 0\nx 1\n-1\n1.5\n0x1\n²\n,\n3 yes\n", {3: "yes"}, id="garbage lines"),
        ],
    )
    def test_lines(self, tmp_path: Path, text: str, faults: dict[int, str]) -> None:
        """Each line that starts with a number is a fault of that GPU; others are left alone."""
        path = tmp_path / "faults"
        path.write_bytes(text.encode())
        assert read_faults(path) == faults

    def test_no_file(self, tmp_path: Path) -> None:
        """No file, no faults: it may be made later."""
        assert read_faults(tmp_path / "missing" / "faults") == {}

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"\xff\xfe\n3 yes\n", id="not UTF-8"),
            pytest.param(b"9" * 5000 + b"\n3 yes\n", id="an endless number"),
            pytest.param(b"3\tyes\n", id="a tab"),
        ],
    )
    def test_rough_files(self, tmp_path: Path, content: bytes) -> None:
        """Whatever else is in the file, the lines that can be read count."""
        path = tmp_path / "faults"
        path.write_bytes(content)
        assert read_faults(path)[3] == "yes"

    def test_unreadable(self, tmp_path: Path) -> None:
        """What can't be read, a directory say, is no fault of a GPU, and no reason to stop."""
        assert read_faults(tmp_path) == {}


class TestWithFaults:
    def test_named(self) -> None:
        """The GPUs named are unhealthy with that reason, and nothing else about them changes."""
        devices = simulated_devices(3, 1)
        assert with_faults(devices, {1: "XID 79"}, now=5.0) == (
            devices[0],
            attrs.evolve(devices[1], health=Health.UNHEALTHY, reason="XID 79", since=5.0),
            devices[2],
        )

    def test_beyond(self) -> None:
        """Numbers of GPUs that there are not, are of no consequence."""
        devices = simulated_devices(2, 1)
        assert with_faults(devices, {2: "x", 99: "y"}, now=5.0) == devices

    def test_back(self) -> None:
        """Without faults the GPUs are as they were, but for how long they have been."""
        devices = simulated_devices(2, 1, now=1.0)
        assert with_faults(devices, {}, now=5.0) == devices
        back = with_faults(with_faults(devices, {0: "x"}, now=5.0), {}, now=6.0)
        assert back == (attrs.evolve(devices[0], since=6.0), devices[1])

    def test_another_reason(self) -> None:
        """It is still down, and no shorter for that."""
        devices = with_faults(simulated_devices(1, 1), {0: "x"}, now=5.0)
        (device,) = with_faults(devices, {0: "y"}, now=6.0)
        assert (device.reason, device.since) == ("y", 5.0)
