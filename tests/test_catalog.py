"""What is offered under which name, as GPUs, rules and allocations come and go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import attrs
import pytest

from sgpu.catalog import Catalog
from sgpu.device import Device, Health
from sgpu.listing import TooManySharesError
from sgpu.policy import Policy, PolicyConflictError, Rule

SHARED = "example.com/shared-gpu"
WHOLE = "example.com/whole-gpu"
#: More shares than fit one message, on two GPUs but not on one.
MANY = 100_000


def gpu(letter: str, name: str = "Tesla T4") -> Device:
    return Device(uuid=f"GPU-{letter}", name=name, pci_bus_id="00000000:3B:00.0", shares=100, device_nodes=())


A, B, C = gpu("a"), gpu("b"), gpu("c", "NVIDIA A100")
WHOLE_B = Rule("f:1", uuid="GPU-b", shares=1, resource=WHOLE)


def policy(*rules: Rule, shares: int = 4) -> Policy:
    return Policy(SHARED, shares, rules)


@pytest.fixture
def catalog() -> Catalog:
    """One that offers A shared and B whole."""
    made = Catalog(policy(WHOLE_B))
    made.replace((A, B))
    return made


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[tuple[int, str]]]]:
    """What was logged so far, with its level."""
    with caplog.at_level(logging.DEBUG, "sgpu"):
        yield lambda: [(record.levelno, record.getMessage()) for record in caplog.records]


def offered(catalog: Catalog) -> dict[str, dict[str, int]]:
    """Resource → UUID → shares, those kept included."""
    return {
        resource: {device.uuid: device.shares + len(device.kept) for device in inventory.devices}
        for resource, inventory in catalog.inventories.items()
    }


class TestReplace:
    def test_before(self) -> None:
        """As long as no GPU is known, nothing is offered."""
        assert Catalog(policy(WHOLE_B)).inventories == {}

    def test_each_resource_has_an_inventory(self, catalog: Catalog) -> None:
        """The GPUs are divided by the rules."""
        assert offered(catalog) == {SHARED: {"GPU-a": 4}, WHOLE: {"GPU-b": 1}}

    def test_a_resource_without_gpus(self) -> None:
        """It has an inventory too, which a GPU may come to."""
        catalog = Catalog(policy(WHOLE_B))
        catalog.replace((A,))
        assert offered(catalog) == {SHARED: {"GPU-a": 4}, WHOLE: {}}
        whole = catalog.inventories[WHOLE]
        catalog.replace((A, B))
        assert catalog.inventories[WHOLE] is whole
        assert offered(catalog) == {SHARED: {"GPU-a": 4}, WHOLE: {"GPU-b": 1}}

    def test_only_what_changes_is_told(self, catalog: Catalog) -> None:
        """A GPU that fails is news for its resource and for no other."""
        shared, whole = catalog.inventories[SHARED].changed, catalog.inventories[WHOLE].changed
        catalog.replace((A, attrs.evolve(B, health=Health.UNHEALTHY, reason="lost")))
        assert not shared.is_set()
        assert whole.is_set()
        assert catalog.inventories[WHOLE].devices[0].health is Health.UNHEALTHY


class TestRefused:
    @pytest.mark.parametrize(
        ("rules", "error"),
        [
            pytest.param(policy(WHOLE_B, Rule("f:2", name="*T4*", shares=2)), PolicyConflictError, id="two rules"),
            pytest.param(policy(shares=MANY), TooManySharesError, id="too many shares"),
            pytest.param(
                policy(Rule("f:2", name="*", resource=WHOLE), shares=MANY),
                TooManySharesError,
                id="of a rule's resource",
            ),
        ],
    )
    def test_the_first_ones(self, rules: Policy, error: type[Exception]) -> None:
        """What can't be offered from the beginning is for the operator to put right."""
        catalog = Catalog(rules)
        with pytest.raises(error):
            catalog.replace((A, B))
        assert catalog.inventories == {}

    def test_as_many_in_two_resources(self) -> None:
        """Each resource has a message of its own."""
        catalog = Catalog(policy(Rule("f:1", uuid="GPU-b", resource=WHOLE), shares=MANY))
        catalog.replace((A, B))
        assert offered(catalog) == {SHARED: {"GPU-a": MANY}, WHOLE: {"GPU-b": MANY}}

    @pytest.mark.parametrize(
        ("rules", "words"),
        [
            pytest.param(
                policy(Rule("f:1", uuid="GPU-c", shares=2), Rule("f:2", name="*A100*", shares=2)),
                "GPU GPU-c (NVIDIA A100 at 00000000:3B:00.0) is claimed twice",
                id="two rules",
            ),
            pytest.param(policy(shares=MANY), "200000 shares on 2 GPU(s) do not fit", id="too many shares"),
        ],
    )
    def test_a_later_one(self, messages: Callable[[], list[tuple[int, str]]], rules: Policy, words: str) -> None:
        """A GPU that is added and can't be offered is told once; those before it are offered and looked after as ever.

        Once the rules are put right, it is offered as well.
        """
        catalog = Catalog(rules)
        catalog.replace((A,))
        before = offered(catalog)
        ill = attrs.evolve(A, health=Health.UNHEALTHY, reason="lost")
        for devices in ((A, C), (ill, C), (A, C), (ill, C)):
            catalog.replace(devices)
            assert offered(catalog) == before
            assert catalog.inventories[SHARED].devices[0].health is devices[0].health
        errors = [message for level, message in messages() if level == logging.ERROR]
        assert len(errors) == 1
        assert errors[0].startswith(f"GPUs that were added are not offered: {words}")
        catalog.apply(policy())
        assert offered(catalog) == {SHARED: {"GPU-a": 4, "GPU-c": 4}}

    def test_it_is_told_again(self, messages: Callable[[], list[tuple[int, str]]]) -> None:
        """When it was fine in between."""
        catalog = Catalog(policy(shares=MANY))
        for devices in ((A,), (A, B), (A,), (A, B)):
            catalog.replace(devices)
        assert len(messages()) == 2

    def test_all_of_a_sudden(self) -> None:
        """Rules that can't even be kept for the GPUs from before leave what is offered as it is."""
        by_bus = Rule("f:2", pci_bus_id="af:00.0", shares=2)
        catalog = Catalog(policy(Rule("f:1", uuid="GPU-a", shares=3), by_bus))
        catalog.replace((A,))
        catalog.replace((attrs.evolve(A, pci_bus_id="00000000:AF:00.0"),))
        assert offered(catalog) == {SHARED: {"GPU-a": 3}}


class TestApply:
    def test_other_numbers(self, catalog: Catalog) -> None:
        """Inventories stay the same objects, which registrations hang on."""
        before = dict(catalog.inventories)
        changed = catalog.changed
        catalog.apply(policy(attrs.evolve(WHOLE_B, shares=2), shares=9))
        assert offered(catalog) == {SHARED: {"GPU-a": 9}, WHOLE: {"GPU-b": 2}}
        assert catalog.inventories == before
        assert not changed.is_set()
        assert catalog.policy.shares == 9

    def test_a_resource_comes(self, catalog: Catalog) -> None:
        """It is there when `changed` is set."""
        changed = catalog.changed
        catalog.apply(policy(WHOLE_B, Rule("f:2", uuid="GPU-a", resource="example.com/new")))
        assert changed.is_set()
        assert not catalog.changed.is_set()
        assert offered(catalog) == {SHARED: {}, WHOLE: {"GPU-b": 1}, "example.com/new": {"GPU-a": 4}}

    def test_a_resource_goes(self, catalog: Catalog) -> None:
        """It lists nothing any more, and is there until it is dropped."""
        whole, changed = catalog.inventories[WHOLE], catalog.changed
        catalog.apply(policy())
        assert changed.is_set()
        assert whole.devices == ()
        assert catalog.inventories[WHOLE] is whole
        assert offered(catalog) == {SHARED: {"GPU-a": 4, "GPU-b": 4}, WHOLE: {}}
        catalog.drop(WHOLE)
        assert offered(catalog) == {SHARED: {"GPU-a": 4, "GPU-b": 4}}

    def test_a_resource_goes_and_comes_back(self, catalog: Catalog) -> None:
        """Before it was dropped, it is the same as before; after that, it is a new one."""
        whole = catalog.inventories[WHOLE]
        catalog.apply(policy())
        catalog.apply(policy(WHOLE_B))
        assert catalog.inventories[WHOLE] is whole
        assert offered(catalog) == {SHARED: {"GPU-a": 4}, WHOLE: {"GPU-b": 1}}
        catalog.apply(policy())
        catalog.drop(WHOLE)
        changed = catalog.changed
        catalog.apply(policy(WHOLE_B))
        assert catalog.inventories[WHOLE] is not whole
        assert changed.is_set()

    @pytest.mark.parametrize(
        ("rules", "error"),
        [
            pytest.param(policy(WHOLE_B, Rule("f:2", name="*", shares=2)), PolicyConflictError, id="two rules"),
            pytest.param(policy(shares=MANY), TooManySharesError, id="too many shares"),
        ],
    )
    def test_refused(self, catalog: Catalog, rules: Policy, error: type[Exception]) -> None:
        """Rules that can't be kept change nothing, also not later."""
        before, old = offered(catalog), catalog.policy
        with pytest.raises(error):
            catalog.apply(rules)
        assert (offered(catalog), catalog.policy) == (before, old)
        catalog.replace((A, B, C))
        assert offered(catalog) == {SHARED: {"GPU-a": 4, "GPU-c": 4}, WHOLE: {"GPU-b": 1}}

    def test_before_there_is_a_gpu(self) -> None:
        """Rules can change while the driver is waited for."""
        catalog = Catalog(policy())
        catalog.apply(policy(WHOLE_B))
        assert offered(catalog) == {SHARED: {}, WHOLE: {}}
        catalog.replace((A, B))
        assert offered(catalog) == {SHARED: {"GPU-a": 4}, WHOLE: {"GPU-b": 1}}


class TestKeep:
    def test_shrink(self, catalog: Catalog) -> None:
        """Shares that containers have stay known with their ids when there are fewer, until they are free."""
        inventory = catalog.inventories[SHARED]
        catalog.keep({SHARED: {"GPU-a::0", "GPU-a::2", "GPU-a::3"}, WHOLE: set()})
        catalog.apply(policy(WHOLE_B, shares=2))
        assert inventory.devices[0].share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::2", "GPU-a::3"]
        catalog.keep({SHARED: {"GPU-a::3"}, WHOLE: set()})
        assert inventory.devices[0].share_ids() == ["GPU-a::0", "GPU-a::1", "GPU-a::3"]
        catalog.keep({SHARED: set(), WHOLE: set()})
        assert inventory.devices[0].share_ids() == ["GPU-a::0", "GPU-a::1"]

    def test_health_changes_meanwhile(self, catalog: Catalog) -> None:
        """What is kept is kept then, too."""
        catalog.keep({SHARED: {"GPU-a::9"}})
        catalog.replace((attrs.evolve(A, health=Health.UNHEALTHY, reason="lost"), B))
        assert offered(catalog)[SHARED] == {"GPU-a": 5}

    def test_after_a_restart(self) -> None:
        """What containers have can be known before the GPUs are."""
        catalog = Catalog(policy())
        catalog.keep({SHARED: {"GPU-a::9"}})
        assert catalog.inventories == {}
        catalog.replace((A,))
        assert offered(catalog) == {SHARED: {"GPU-a": 5}}

    def test_a_gpu_changes_its_resource(self, catalog: Catalog) -> None:
        """Shares of it that are in use are not offered once more under the new name."""
        catalog.keep({SHARED: {"GPU-a::0", "GPU-a::3"}, WHOLE: {"GPU-b::0"}})
        catalog.apply(policy(Rule("f:1", name="*", shares=1, resource=WHOLE)))
        assert offered(catalog) == {SHARED: {}, WHOLE: {"GPU-a": 1, "GPU-b": 1}}

    def test_the_same_again(self, catalog: Catalog) -> None:
        """It is no news that the same are in use, nor that others are which are there anyway."""
        changed = catalog.inventories[SHARED].changed
        for allocated in ({"GPU-a::0"}, {"GPU-a::0"}, {"GPU-a::1"}, {"GPU-x::7"}):
            catalog.keep({SHARED: allocated})
        assert not changed.is_set()

    def test_more_than_a_message_holds(self, messages: Callable[[], list[tuple[int, str]]]) -> None:
        """What is offered is not put at stake for what is kept."""
        catalog = Catalog(policy(shares=MANY))
        catalog.replace((A,))
        catalog.keep({SHARED: {f"GPU-a::{number}" for number in range(MANY, MANY + 60_000)}})
        assert offered(catalog) == {SHARED: {"GPU-a": MANY}}
        assert [level for level, _ in messages()] == [logging.ERROR]


class TestUnmatched:
    def test_it_is_told_once(self, messages: Callable[[], list[tuple[int, str]]]) -> None:
        """A rule that is about no GPU is a warning with its place, and no more than one, until that changes."""
        absent = Rule("f:7", name="*H100*", shares=1)
        catalog = Catalog(policy(absent, WHOLE_B))
        for devices in ((A, B), (attrs.evolve(A, health=Health.UNHEALTHY), B), (A, B)):
            catalog.replace(devices)
        told = (logging.WARNING, "`name: *H100*` (f:7) is about no GPU of this node")
        assert messages() == [told]
        catalog.replace((A, B, gpu("h", "NVIDIA H100")))
        catalog.replace((A, B))
        assert messages() == [told, told]

    def test_several(self, messages: Callable[[], list[tuple[int, str]]]) -> None:
        """They are told together, so that one does not hide another; other rules are told anew."""
        rules = [Rule(f"f:{line}", uuid=f"GPU-{line}", shares=1) for line in (1, 2)]
        catalog = Catalog(policy(*rules))
        catalog.replace((A,))
        catalog.apply(policy(rules[1]))
        catalog.apply(policy())
        both = "`uuid: GPU-1` (f:1) is about no GPU of this node; `uuid: GPU-2` (f:2) is about no GPU of this node"
        assert [message for _, message in messages()] == [both, "`uuid: GPU-2` (f:2) is about no GPU of this node"]

    def test_without_gpus(self, messages: Callable[[], list[tuple[int, str]]]) -> None:
        """As long as no GPU is known, there is nothing to warn of."""
        Catalog(policy()).apply(policy(WHOLE_B))
        assert messages() == []
