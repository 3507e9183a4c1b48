"""MIG instances as units: what they are offered as, what their containers get, and what becomes of those that go."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import attrs
import pytest

from sgpu.node.container import Container
from sgpu.node.edits import AllocationOptions, HostPaths, UnhealthyShareError, UnknownShareError
from sgpu.node.figures import Figures
from sgpu.node.gpu import Gpu, Health, MigInstance, Unit, units
from sgpu.node.offers import offers
from sgpu.node.policy import Mig, Policy, PolicyConflictError, Rule, assign, mig_notes
from sgpu.node.rank import MultiShare
from sgpu.node.shares import Share
from sgpu.node.state import NodeState

pytestmark = pytest.mark.pure

SHARED = "example.com/gpu"
MIB = 1 << 20
OPTIONS = AllocationOptions(HostPaths("/host/nvidia", "/usr/local/nvidia", "/dev"), framework_hints=False)
POD = Container("team", "one", "main")


def instance(letter: str, profile: str = "1g.5gb", mib: int | None = 4864, reason: str = "") -> MigInstance:
    memory = None if mib is None else mib * MIB
    return MigInstance(f"MIG-{letter}", f"NVIDIA A100 MIG {profile}", profile, memory, (f"c/{letter}",), reason)


def card(*instances: MigInstance, **fields: object) -> Gpu:
    facts = {"mig_mode": True, "mig_pending": True, "memory_total": 40960 * MIB, **fields}
    made = Gpu("GPU-p", "NVIDIA A100", "00000000:3B:00.0", ("nvidia2", "nvidiactl"), instances=instances)
    return attrs.evolve(made, **facts)  # type: ignore[arg-type]


WHOLE = Gpu("GPU-w", "Tesla T4", "00000000:5E:00.0", ("nvidia0", "nvidiactl"), memory_bytes=100 * MIB)
SMALL, LARGE = instance("a"), instance("b", "3g.20gb", 19968)
CARD = card(SMALL, LARGE)


class TestUnits:
    def test_instances(self) -> None:
        """In MIG mode each instance is a unit, with the parent's node, its own capabilities and its memory."""
        nodes = ("nvidia2", "c/a", "nvidiactl")
        assert units(CARD)[0] == Unit(CARD, "MIG-a", "NVIDIA A100 MIG 1g.5gb", nodes, 4864 * MIB, SMALL)
        assert [unit.uuid for unit in units(CARD)] == ["MIG-a", "MIG-b"]
        assert units(card()) == ()
        bare = attrs.evolve(SMALL, capability_nodes=())
        (simulated,) = units(card(bare, simulated=True, device_nodes=()))
        assert simulated.device_nodes == ()

    @pytest.mark.parametrize(
        ("of_card", "of_instance", "reason", "since"),
        [
            *(("", "", "", 5.0), ("lost", "", "lost", 3.0), ("", "XID 94", "XID 94", 5.0)),
            ("lost", "XID 94", "lost; XID 94", 3.0),
        ],
    )
    def test_health(self, of_card: str, of_instance: str, reason: str, since: float) -> None:
        """The faults of the card are those of all of its instances, and an instance has faults of its own."""
        health = Health.UNHEALTHY if of_card else Health.HEALTHY
        gpu = card(instance("a", reason=of_instance), SMALL, reason=of_card, health=health, since=3.0)
        gpu = attrs.evolve(gpu, instances=(attrs.evolve(gpu.instances[0], since=5.0),))
        (unit,) = units(gpu)
        assert (unit.reason, unit.since) == (reason, since)
        assert unit.health is (Health.UNHEALTHY if reason else Health.HEALTHY)


class TestPolicy:
    def assigned(self, *rules: Rule, gpu: Gpu = CARD, mig: Mig = Mig.SHARED) -> dict[str, tuple[str, int]]:
        policy = Policy(SHARED, 100, rules, mig, "nvidia.com/mig-{profile}")
        return {unit.uuid: (resource, terms.shares) for resource, unit, terms in assign(policy, [*units(gpu)])}

    @pytest.mark.parametrize(
        ("one", "of_card", "shares"),
        [
            pytest.param(instance("a", "1g.5gb", 4864), 40960, 11, id="by memory, rounded down"),
            pytest.param(instance("a", "7g.141gb", 143360), 143771, 99, id="nearly all"),
            pytest.param(instance("a", "7g.40gb", 50000), 40960, 100, id="more than the card says it has"),
            pytest.param(instance("a", "1g.5gb", 1), 40960, 1, id="at least one"),
            pytest.param(instance("a", "1c.3g.20gb", None), 40960, 42, id="by slices"),
            pytest.param(instance("a", "4g.20gb", 19968), None, 57, id="memory of the card unknown"),
            pytest.param(instance("a", "8g.20gb", 1), None, 100, id="more slices than any has"),
            pytest.param(instance("a", "?", None), 40960, 14, id="no slices known"),
        ],
    )
    def test_shared(self, one: MigInstance, of_card: int | None, shares: int) -> None:
        """Each instance is offered as shares of the resource, by its part of the card's memory, and at least as one."""
        gpu = card(one, memory_total=of_card and of_card * MIB)
        assert self.assigned(gpu=gpu) == {"MIG-a": (SHARED, shares)}

    def test_limits(self) -> None:
        """Within an instance nobody is limited, whatever the policy or a rule says: the driver can't."""
        policy = Policy(SHARED, 100, (Rule("f:1", uuid="MIG-a", limit_factor=2),), limit_factor=1)
        made = assign(policy, [*units(CARD), *units(WHOLE)])
        assert {unit.uuid: terms.limit_factor for _, unit, terms in made} == {"MIG-a": 0, "MIG-b": 0, "GPU-w": 1}

    def test_profile(self) -> None:
        """Each profile has a resource of its own, with each instance whole. A plus is not legal there."""
        gpu = card(SMALL, LARGE, instance("c", "1g.5gb+me"), instance("d", "1g.12gb-me"))
        assert self.assigned(gpu=gpu, mig=Mig.PROFILE) == {
            "MIG-a": ("nvidia.com/mig-1g.5gb", 1),
            "MIG-b": ("nvidia.com/mig-3g.20gb", 1),
            "MIG-c": ("nvidia.com/mig-1g.5gb.me", 1),
            "MIG-d": ("nvidia.com/mig-1g.12gb-me", 1),
        }

    def test_off(self) -> None:
        """No instance is offered, whatever the rules say. Other GPUs are."""
        assert self.assigned(Rule("f:1", uuid="MIG-a", shares=3), mig=Mig.OFF) == {}
        assert self.assigned(gpu=WHOLE, mig=Mig.OFF) == {"GPU-w": (SHARED, 100)}

    @pytest.mark.parametrize("mig", [Mig.SHARED, Mig.PROFILE])
    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            pytest.param([Rule("f:1", uuid="mig-A", shares=3)], {"MIG-a": (None, 3)}, id="UUID of an instance"),
            pytest.param([Rule("f:1", mig_profile="3g.20GB", shares=2)], {"MIG-b": (None, 2)}, id="profile"),
            pytest.param([Rule("f:1", mig_profile="1g.5gb", exclude=True)], {"MIG-a": None}, id="excluded"),
            pytest.param([Rule("f:1", mig_profile="1g.5gb", resource="a.b/c")], {"MIG-a": ("a.b/c", None)}, id="name"),
            pytest.param([Rule("f:1", uuid="gpu-P", exclude=True)], {"MIG-a": None, "MIG-b": None}, id="of the card"),
            pytest.param(
                [Rule("f:1", name="NVIDIA A100", exclude=True), Rule("f:2", uuid="MIG-a", shares=7)],
                {"MIG-a": (None, 7), "MIG-b": None},
                id="an instance's before its card's",
            ),
        ],
    )
    def test_rules(
        self, rules: list[Rule], expected: Mapping[str, tuple[str | None, int | None] | None], mig: Mig
    ) -> None:
        """A rule is for the instances that it names, or for all of a card; what it leaves out is as without it."""
        plain, ruled = self.assigned(mig=mig), self.assigned(*rules, mig=mig)
        for uuid, (resource, shares) in plain.items():
            change = expected.get(uuid, (None, None))
            assert ruled.get(uuid) == (change and (change[0] or resource, change[1] or shares))

    def test_shares_of_a_card(self) -> None:
        """The shares that a rule gives a card are divided among its instances, unless each is offered whole."""
        rule = Rule("f:1", pci_bus_id="3b:00.0", shares=1000)
        assert self.assigned(rule) == {"MIG-a": (SHARED, 118), "MIG-b": (SHARED, 487)}
        assert {shares for _, shares in self.assigned(rule, mig=Mig.PROFILE).values()} == {1}

    def test_conflict(self) -> None:
        """Two rules that name one instance are refused, with both and the instance."""
        with pytest.raises(PolicyConflictError, match=r"MIG instance MIG-a .*`uuid: MIG-a` .*`mig-profile: 1g.5gb`"):
            self.assigned(Rule("f:1", uuid="MIG-a", shares=1), Rule("f:2", mig_profile="1g.5gb", shares=2))

    @pytest.mark.parametrize(
        ("gpu", "mig", "words"),
        [
            pytest.param(CARD, Mig.SHARED, [], id="nothing to say"),
            pytest.param(CARD, Mig.OFF, ["-mig off"], id="left out"),
            pytest.param(card(), Mig.SHARED, ["no instances"], id="no instances"),
            pytest.param(card(SMALL, mig_pending=False), Mig.PROFILE, ["off after its next reset"], id="pending off"),
            pytest.param(card(mig_mode=False), Mig.SHARED, ["on after its next reset"], id="pending on"),
        ],
    )
    def test_notes(self, gpu: Gpu, mig: Mig, words: list[str]) -> None:
        """Say what keeps a GPU in MIG mode from being offered, and a mode that waits for a reset."""
        notes = mig_notes(Policy(SHARED, 1, mig=mig), [WHOLE, gpu])
        assert len(notes) == len(words)
        assert all(word in note and "GPU-p" in note for word, note in zip(words, notes, strict=True))


class Made:
    """A node with a card in MIG mode, or what is left of it."""

    def __init__(self, *gpus: Gpu, shares: int = 20, mig: Mig = Mig.SHARED, rules: tuple[Rule, ...] = ()) -> None:
        self.node = NodeState(Policy(SHARED, shares, rules, mig, "a.b/mig-{profile}"), 5, clock=lambda: self.now)
        self.now = 0.0
        self.node.set_gpus(gpus or (CARD,))

    def hold(self, *shares: str, resource: str = SHARED) -> None:
        held = {share: POD for share in map(Share.parse, shares) if share}
        self.node.set_holders({name: held if name == resource else {} for name in self.node.resources()})

    def listed(self, resource: str = SHARED) -> dict[str, str]:
        return {
            share: health.value
            for offer in self.node.offered(resource)
            for share, health in zip(offer.share_ids(), offer.share_health(), strict=True)
        }


class TestGone:
    """Shares of instances that were destroyed, and of GPUs whose MIG mode was turned on."""

    def test_in_use(self) -> None:
        """Only the shares that containers have stay listed, as unhealthy, until they are given back.

        All, as long as it is unknown who has what.
        """
        made = Made()
        made.node.set_gpus((card(LARGE),))
        assert [made.listed()[f"MIG-a::{number}"] for number in range(2)] == ["Unhealthy", "Unhealthy"]
        made.node.set_gpus((CARD,))  # one that is there again is as any other
        made.hold("MIG-a::1", "MIG-b::0")
        assert set(made.listed().values()) == {"Healthy"}
        made.node.set_gpus((card(LARGE),))
        large = {f"MIG-b::{number}": "Healthy" for number in range(9)}
        assert made.listed() == {**large, "MIG-a::1": "Unhealthy"}
        with pytest.raises(UnhealthyShareError, match=r"MIG instance MIG-a is unhealthy .*destroyed"):
            made.node.allocate(SHARED, [["MIG-a::1"]], OPTIONS)
        with pytest.raises(UnknownShareError):
            made.node.allocate(SHARED, [["MIG-a::0"]], OPTIONS)
        made.hold("MIG-b::0")
        assert not any(share.startswith("MIG-a") for share in made.listed())

    def test_given_away_moments_ago(self) -> None:
        """A share that was just given away is in use, though nobody lists it yet."""
        made = Made()
        made.hold()
        made.node.allocate(SHARED, [["MIG-a::0"]], OPTIONS)
        made.node.set_gpus((card(LARGE),))
        assert made.listed()["MIG-a::0"] == "Unhealthy"
        made.now = 61.0
        made.hold()
        assert "MIG-a::0" not in made.listed()

    def test_mode(self) -> None:
        """A GPU whose MIG mode is turned on is no unit any more, nor its instances when it is turned off again."""
        made = Made(attrs.evolve(CARD, mig_mode=False, instances=()))
        made.hold("GPU-p::3")
        made.node.set_gpus((CARD,))
        assert made.listed()["GPU-p::3"] == "Unhealthy"
        assert "GPU-p::0" not in made.listed()
        made.hold("MIG-a::0", "GPU-p::3")
        made.node.set_gpus((attrs.evolve(CARD, mig_mode=False, instances=()),))
        assert [share for share, health in made.listed().items() if health == "Unhealthy"] == ["MIG-a::0"]
        assert made.listed()["GPU-p::3"] == "Healthy"

    def test_profile(self) -> None:
        """The resource of a profile stays for as long as an instance has it, or a container has a share of one."""
        made = Made(mig=Mig.PROFILE)
        small, large = "a.b/mig-1g.5gb", "a.b/mig-3g.20gb"
        assert made.node.resources() == (SHARED, small, large)
        made.hold("MIG-a::0", resource=small)
        made.node.set_gpus((card(LARGE),))
        assert made.listed(small) == {"MIG-a::0": "Unhealthy"}
        made.hold()
        assert made.node.resources() == (SHARED, large)

    def test_refused(self) -> None:
        """Where the rules refuse what is there now, what is gone is not offered as healthy all the same."""
        rules = (Rule("f:1", mig_profile="2g.10gb", shares=1), Rule("f:2", uuid="MIG-c", shares=2))
        made = Made(rules=rules)
        made.node.set_gpus((card(LARGE, instance("c", "2g.10gb", 9856)),))
        assert {health for share, health in made.listed().items() if share.startswith("MIG-a")} == {"Unhealthy"}
        assert {health for share, health in made.listed().items() if share.startswith("MIG-b")} == {"Healthy"}

    def test_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """The log names the pods that use an instance that is gone, or has become unhealthy."""
        made = Made()
        made.hold("MIG-a::1", "MIG-b::0")
        caplog.set_level(logging.WARNING)
        made.node.set_gpus((card(instance("b", "3g.20gb", 19968, reason="XID 94")),))
        made.node.set_gpus((card(),))
        messages = [record.getMessage() for record in caplog.records]
        assert [message for message in messages if "used by" in message] == [
            f"MIG instance {what} and is used by team/one"
            for what in ("MIG-b is unhealthy", "MIG-a is gone", "MIG-b is gone")
        ]


def test_pressure() -> None:
    """The watermark is each instance's own."""
    made = Made()
    made.hold("MIG-a::1")
    made.node.usage.set_figures({"MIG-a": Figures(100, 1), "MIG-b": Figures(100, 50)}, 0.0)
    assert made.node.update_pressure(0.9) == (frozenset(), {"MIG-a"})
    assert [share for share, health in made.listed().items() if health == "Unhealthy"] == ["MIG-a::0"]


class TestAllocate:
    @pytest.mark.parametrize("multi_share", MultiShare)
    def test_one_instance(self, multi_share: MultiShare) -> None:
        """A container sees its instance alone, with the fair part of its memory, however many shares it has of it."""
        options = attrs.evolve(OPTIONS, multi_share=multi_share)
        (edits,) = Made().node.allocate(SHARED, [["MIG-a::0", "MIG-a::1"]], options)
        assert edits.environment == {
            "SGPU_SHARES": "2",
            "SGPU_GPU_UUIDS": "MIG-a",
            "NVIDIA_VISIBLE_DEVICES": "void",
            "CUDA_VISIBLE_DEVICES": "MIG-a",
            "SGPU_MEMORY_BYTES": str(4864 * MIB),
        }
        assert [node.container_path for node in edits.device_nodes] == ["/dev/nvidia2", "/dev/c/a", "/dev/nvidiactl"]
        assert edits.warning == ""

    @pytest.mark.parametrize(
        ("shares", "uuids", "others"),
        [
            pytest.param("MIG-b::0 MIG-a::0 MIG-b::1", "MIG-b", ["MIG instance MIG-a"], id="two instances"),
            pytest.param("MIG-a::0 GPU-w::1", "MIG-a", ["GPU GPU-w"], id="an instance and a GPU"),
            pytest.param("GPU-w::1 MIG-a::0 MIG-b::0", "GPU-w", ["MIG-a", "MIG-b"], id="a GPU and two instances"),
        ],
    )
    def test_several(self, shares: str, uuids: str, others: list[str], caplog: pytest.LogCaptureFixture) -> None:
        """CUDA sees one instance or GPUs: the first decides, the log names what is of no use, nothing is refused."""
        options = attrs.evolve(OPTIONS, multi_share=MultiShare.STRICT_DISTINCT)
        (edits,) = Made(CARD, WHOLE).node.allocate(SHARED, [shares.split()], options)
        assert edits.environment["SGPU_GPU_UUIDS"] == uuids
        assert edits.environment.get("CUDA_VISIBLE_DEVICES", "GPU-w") == uuids
        assert all(other in caplog.messages[0] for other in others)
        assert int(edits.environment["SGPU_SHARES"]) == shares.count(uuids)
        assert ("/dev/nvidia0" in [node.container_path for node in edits.device_nodes]) is (uuids == "GPU-w")

    def test_load(self) -> None:
        """A container can use an instance only by itself, which is known when shares are chosen."""
        loads = Made(CARD, WHOLE).node.loads(SHARED)
        assert {uuid: load.alone for uuid, load in loads.items()} == {"MIG-a": True, "MIG-b": True, "GPU-w": False}


def test_no_instances(caplog: pytest.LogCaptureFixture) -> None:
    """A card in MIG mode without instances is offered as nothing, and rules for it are not without effect."""
    assert offers(Policy(SHARED, 4), [card()], {}) == {SHARED: ()}
    Made(card(), rules=(Rule("f:1", uuid="GPU-p", shares=1), Rule("f:2", mig_profile="1g.5gb", shares=1)))
    assert [message for message in caplog.messages if "matches no" in message] == [
        "rule `mig-profile: 1g.5gb` (f:2) matches no GPU of this node"
    ]
