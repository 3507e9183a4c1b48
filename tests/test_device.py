"""GPUs and shares as values."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.device import SEPARATOR, Device, Health, Share

pytestmark = pytest.mark.pure

GPU = "GPU-1f9e7f3c-5a3b-4d0a-8b1a-0c9d4d1c9a11"


def make_device(uuid: str = GPU, shares: int = 3) -> Device:
    return Device(uuid=uuid, name="Tesla T4", pci_bus_id="00000000:3B:00.0", shares=shares, device_nodes=("nvidia0",))


class TestHealth:
    def test_words(self) -> None:
        """Health is spelled as the kubelet spells it."""
        assert [health.value for health in Health] == ["Healthy", "Unhealthy"]


class TestDevice:
    def test_share_ids(self) -> None:
        """Shares are named by the GPU's UUID and a number from 0: ids that kubelets remember, never to change."""
        assert make_device().share_ids() == [f"{GPU}::0", f"{GPU}::1", f"{GPU}::2"]

    def test_share_ids_when_unhealthy(self) -> None:
        """A GPU that fails keeps its shares, under the same ids."""
        device = make_device()
        assert attrs.evolve(device, health=Health.UNHEALTHY, reason="XID 79").share_ids() == device.share_ids()

    @pytest.mark.parametrize(
        ("health", "withheld", "words"),
        [
            pytest.param(Health.HEALTHY, (), "Healthy Healthy Healthy", id="healthy"),
            pytest.param(Health.UNHEALTHY, (), "Unhealthy Unhealthy Unhealthy", id="unhealthy"),
            pytest.param(Health.HEALTHY, (0, 2), "Unhealthy Healthy Unhealthy", id="some withheld"),
            pytest.param(Health.HEALTHY, (0, 1, 2), "Unhealthy Unhealthy Unhealthy", id="all withheld"),
            pytest.param(Health.UNHEALTHY, (1,), "Unhealthy Unhealthy Unhealthy", id="unhealthy and withheld"),
            pytest.param(Health.HEALTHY, (3, 99), "Healthy Healthy Healthy", id="none of its shares withheld"),
        ],
    )
    def test_share_health(self, health: Health, withheld: tuple[int, ...], words: str) -> None:
        """Shares are as healthy as their GPU, but for those that are withheld: one word for each, in order."""
        device = attrs.evolve(make_device(), health=health, withheld=frozenset(withheld))
        assert " ".join(word.value for word in device.share_health()) == words
        assert len(device.share_health()) == len(device.share_ids())

    def test_defaults(self) -> None:
        """A GPU is healthy and real unless said otherwise, and what is not known of it is None."""
        device = make_device()
        assert (device.health, device.reason, device.simulated) == (Health.HEALTHY, "", False)
        assert device.memory_bytes is None
        assert device.numa_node is None
        assert device.withheld == frozenset()

    def test_frozen(self) -> None:
        """A device is a value: nobody changes the one that others hold."""
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            make_device().shares = 4  # type: ignore[misc]


class TestShare:
    @pytest.mark.parametrize(
        ("share_id", "share"),
        [
            pytest.param("GPU-1::0", Share("GPU-1", 0), id="first"),
            pytest.param("GPU-1::10", Share("GPU-1", 10), id="two digits"),
            pytest.param("GPU-1::99999", Share("GPU-1", 99_999), id="five digits"),
            pytest.param("MIG-GPU-1/7/0::3", Share("MIG-GPU-1/7/0", 3), id="slashes in the UUID"),
            pytest.param("a::b::2", Share("a::b", 2), id="the last separator counts"),
        ],
    )
    def test_parse(self, share_id: str, share: Share) -> None:
        """An id is taken apart at its last separator."""
        assert Share.parse(share_id) == share

    @pytest.mark.parametrize(
        "share_id",
        [
            pytest.param("", id="empty"),
            pytest.param("::", id="separator alone"),
            pytest.param("::0", id="no UUID"),
            pytest.param("GPU-1", id="no number"),
            pytest.param("GPU-1::", id="empty number"),
            pytest.param("GPU-1:0", id="one colon"),
            pytest.param("GPU-1::x", id="not a number"),
            pytest.param("GPU-1::-1", id="negative"),
            pytest.param("GPU-1::+1", id="sign"),
            pytest.param("GPU-1::01", id="leading zero"),
            pytest.param("GPU-1::00", id="two zeros"),
            pytest.param("GPU-1:: 1", id="space before"),
            pytest.param("GPU-1::1\n", id="newline after"),
            pytest.param("GPU-1::1_0", id="underscore"),
            pytest.param("GPU-1::1.0", id="fraction"),
            pytest.param("GPU-1::0x1", id="hexadecimal"),
            pytest.param("GPU-1::١", id="another script's digit"),
            pytest.param("GPU-1::²", id="superscript"),
        ],
    )
    def test_parse_refused(self, share_id: str) -> None:
        """A share has exactly one id: what Python would also read as that number is not it."""
        assert Share.parse(share_id) is None

    def test_parse_endless_number(self) -> None:
        """A number longer than Python converts does not raise: whoever sends it learns that it is no share."""
        Share.parse(f"{GPU}::{'9' * 5000}")

    @settings(deadline=None)
    @given(uuid=st.text(min_size=1), number=st.integers(0, 10**9 - 1))
    def test_round_trip(self, uuid: str, number: int) -> None:
        """Every share's id parses to that share, whatever the UUID is."""
        assert Share.parse(f"{uuid}{SEPARATOR}{number}") == Share(uuid, number)

    @settings(deadline=None)
    @given(text=st.text(max_size=40))
    def test_any_text(self, text: str) -> None:
        """What parses prints as it was: no two ids name the same share."""
        share = Share.parse(text)
        assert share is None or f"{share.uuid}{SEPARATOR}{share.number}" == text
