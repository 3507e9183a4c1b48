"""The operator's rules per GPU: which GPUs they are about, and what comes of them."""

from __future__ import annotations

import attrs
import pytest

from sgpu.device import Device
from sgpu.policy import Policy, PolicyConflictError, Rule, divide

pytestmark = pytest.mark.pure

SHARED = "example.com/shared-gpu"
WHOLE = "example.com/whole-gpu"


def gpu(letter: str, name: str = "Tesla T4", bus_id: str = "00000000:3B:00.0") -> Device:
    return Device(uuid=f"GPU-{letter}", name=name, pci_bus_id=bus_id, shares=100, device_nodes=())


A = gpu("a")
B = gpu("b", "NVIDIA A100-SXM4-80GB", "00000000:AF:00.0")
C = gpu("c", "NVIDIA A100-PCIE-40GB", "00000001:05:00.0")
ALL = (A, B, C)


def policy(*rules: Rule) -> Policy:
    return Policy(SHARED, 10, rules)


def divided(policy: Policy, kept: dict[str, set[str]] | None = None) -> dict[str, dict[str, int]]:
    """Resource → UUID → shares."""
    return {
        resource: {device.uuid: device.shares for device in devices}
        for resource, devices in divide(policy, ALL, kept or {}).items()
    }


class TestMatches:
    @pytest.mark.parametrize(
        ("uuid", "matched"),
        [
            pytest.param("GPU-a", True, id="the same"),
            pytest.param("gpu-A", True, id="in another case"),
            pytest.param("GPU-b", False, id="another"),
            pytest.param("GPU-", False, id="the beginning"),
            pytest.param("GPU-*", False, id="no pattern"),
        ],
    )
    def test_uuid(self, uuid: str, matched: bool) -> None:
        """A UUID is one GPU's, however it is capitalised."""
        assert Rule("f:1", uuid=uuid).matches(A) is matched

    @pytest.mark.parametrize("known", ["00000000:3B:00.0", "0000:3b:00.0"], ids=["of NVML", "of the kernel"])
    @pytest.mark.parametrize(
        ("bus_id", "matched"),
        [
            pytest.param("00000000:3B:00.0", True, id="eight digits"),
            pytest.param("0000:3b:00.0", True, id="four digits"),
            pytest.param("3b:00.0", True, id="no domain"),
            pytest.param("0:3B:0.0", True, id="without zeros"),
            pytest.param("0001:3b:00.0", False, id="another domain"),
            pytest.param("0000:3c:00.0", False, id="another bus"),
            pytest.param("0000:3b:01.0", False, id="another device"),
            pytest.param("0000:3b:00.1", False, id="another function"),
        ],
    )
    def test_bus_id(self, bus_id: str, known: str, matched: bool) -> None:
        """A PCI bus id may be written as NVML or as the kernel has it, or with no domain for domain 0."""
        assert Rule("f:1", pci_bus_id=bus_id).matches(attrs.evolve(A, pci_bus_id=known)) is matched

    @pytest.mark.parametrize("known", ["", "unknown", "00000000:3B:00.8"])
    def test_no_bus_id(self, known: str) -> None:
        """What is no bus id is nobody's."""
        assert not Rule("f:1", pci_bus_id="00:00.0").matches(attrs.evolve(A, pci_bus_id=known))

    @pytest.mark.parametrize(
        ("pattern", "matched"),
        [
            pytest.param("NVIDIA A100-SXM4-80GB", "b", id="the name"),
            pytest.param("nvidia a100-sxm4-80gb", "b", id="in another case"),
            pytest.param("*A100*", "bc", id="part of it"),
            pytest.param("*a100*", "bc", id="part of it in another case"),
            pytest.param("A100", "", id="part of it without stars"),
            pytest.param("*-?0GB", "bc", id="any character"),
            pytest.param("*[68]0gb", "b", id="one of several"),
            pytest.param("*[!8]0GB", "c", id="none of several"),
            pytest.param("*", "abc", id="all"),
        ],
    )
    def test_name(self, pattern: str, matched: str) -> None:
        """A product name is matched by a pattern as in a shell, whatever its case."""
        assert [device.uuid for device in ALL if Rule("f:1", name=pattern).matches(device)] == [
            f"GPU-{letter}" for letter in matched
        ]


class TestRule:
    @pytest.mark.parametrize(
        ("rule", "words"),
        [
            pytest.param(Rule("f:1", uuid="GPU-a"), "`uuid: GPU-a` (f:1)", id="uuid"),
            pytest.param(Rule("f:1", pci_bus_id="3b:00.0"), "`pci-bus-id: 3b:00.0` (f:1)", id="bus id"),
            pytest.param(Rule("f:1", name="*"), "`name: *` (f:1)", id="name"),
        ],
    )
    def test_words(self, rule: Rule, words: str) -> None:
        """It is called as it is written, with its place."""
        assert str(rule) == words

    def test_place(self) -> None:
        """Where it stands makes no difference to what it says."""
        assert Rule("f:1", name="*", shares=2) == Rule("f:9", name="*", shares=2) != Rule("f:1", name="*", shares=3)


class TestResources:
    def test_each_once(self) -> None:
        """The name for all others comes first, then each that a rule gives; none for what is excluded."""
        rules = (
            Rule("f:1", uuid="GPU-a", resource=WHOLE),
            Rule("f:2", uuid="GPU-b", resource=WHOLE),
            Rule("f:3", uuid="GPU-c", resource=SHARED),
            Rule("f:4", uuid="GPU-d", shares=1),
            Rule("f:5", uuid="GPU-e", resource="example.com/none", exclude=True),
            Rule("f:6", uuid="GPU-f", resource="example.com/other"),
        )
        assert policy(*rules).resources() == (SHARED, WHOLE, "example.com/other")

    def test_without_rules(self) -> None:
        """There is one."""
        assert policy().resources() == (SHARED,)


class TestUnmatched:
    def test_unmatched(self) -> None:
        """The rules that no GPU of the node is meant by, in order."""
        absent, also_absent = Rule("f:2", uuid="GPU-x", shares=1), Rule("f:4", name="*H100*", exclude=True)
        rules = (Rule("f:1", uuid="GPU-a", shares=1), absent, Rule("f:3", name="*A100*", shares=1), also_absent)
        assert policy(*rules).unmatched(ALL) == [absent, also_absent]
        assert policy(*rules).unmatched([]) == list(rules)


class TestDivide:
    def test_without_rules(self) -> None:
        """All GPUs are offered alike, in their order, and nothing else about them is changed."""
        assert divide(policy(), ALL, {}) == {SHARED: tuple(attrs.evolve(device, shares=10) for device in ALL)}

    def test_no_gpus(self) -> None:
        """Every resource is there, without any."""
        assert divided(policy(Rule("f:1", name="*H100*", resource=WHOLE))) == {
            SHARED: {"GPU-a": 10, "GPU-b": 10, "GPU-c": 10},
            WHOLE: {},
        }
        assert divide(policy(Rule("f:1", name="*", resource=WHOLE)), [], {}) == {SHARED: (), WHOLE: ()}

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            pytest.param(
                Rule("f:1", name="*A100*", shares=3),
                {SHARED: {"GPU-a": 10, "GPU-b": 3, "GPU-c": 3}},
                id="another number of shares",
            ),
            pytest.param(
                Rule("f:1", name="*A100*", resource=WHOLE),
                {SHARED: {"GPU-a": 10}, WHOLE: {"GPU-b": 10, "GPU-c": 10}},
                id="another resource",
            ),
            pytest.param(
                Rule("f:1", uuid="GPU-b", resource=WHOLE, shares=1),
                {SHARED: {"GPU-a": 10, "GPU-c": 10}, WHOLE: {"GPU-b": 1}},
                id="both",
            ),
            pytest.param(Rule("f:1", uuid="GPU-b", exclude=True), {SHARED: {"GPU-a": 10, "GPU-c": 10}}, id="left out"),
            pytest.param(
                Rule("f:1", uuid="GPU-b", shares=1, exclude=False),
                {SHARED: {"GPU-a": 10, "GPU-b": 1, "GPU-c": 10}},
                id="expressly not left out",
            ),
            pytest.param(Rule("f:1", name="*", exclude=True), {SHARED: {}}, id="all left out"),
        ],
    )
    def test_rule(self, rule: Rule, expected: dict[str, dict[str, int]]) -> None:
        """What a rule says is so for the GPUs it is about; the rest is as for the others."""
        assert divided(policy(rule)) == expected

    def test_all_at_once(self) -> None:
        """One node can share one GPU, offer another whole, and leave one out."""
        rules = (Rule("f:1", name="*SXM4*", resource=WHOLE, shares=1), Rule("f:5", pci_bus_id="1:5:0.0", exclude=True))
        assert divided(policy(*rules)) == {SHARED: {"GPU-a": 10}, WHOLE: {"GPU-b": 1}}

    @pytest.mark.parametrize(
        "second",
        [
            pytest.param(Rule("f:9", pci_bus_id="af:00.0", shares=1), id="another selector"),
            pytest.param(Rule("f:9", uuid="gpu-B", exclude=True), id="the same in another case"),
            pytest.param(Rule("f:9", name="*A100*", exclude=True), id="a wider one"),
        ],
    )
    def test_two_rules(self, second: Rule) -> None:
        """Two rules that are about one GPU are refused, with the GPU and both their places."""
        with pytest.raises(PolicyConflictError) as refused:
            divide(policy(Rule("f:7", uuid="GPU-b", shares=1), second), ALL, {})
        assert str(refused.value) == (
            "GPU GPU-b (NVIDIA A100-SXM4-80GB at 00000000:AF:00.0) is claimed twice: "
            f"by `uuid: GPU-b` (f:7) and by {second}"
        )

    def test_two_rules_for_no_gpu(self) -> None:
        """Rules that could be about the same GPU are fine as long as there is none."""
        rules = (Rule("f:1", name="*H100*", shares=1), Rule("f:2", name="*H*", exclude=True))
        assert divided(policy(*rules)) == divided(policy())


class TestKept:
    @staticmethod
    def kept(policy: Policy, kept: dict[str, set[str]]) -> dict[str, tuple[int, ...]]:
        devices = (device for each in divide(policy, ALL, kept).values() for device in each)
        return {device.uuid: device.kept for device in devices if device.kept}

    def test_beyond_the_number(self) -> None:
        """Shares that containers have stay, in order, though there are fewer now; others are there anyway."""
        allocated = {f"GPU-a::{number}" for number in (11, 9, 10, 0, 100)} | {"GPU-b::1"}
        assert self.kept(policy(), {SHARED: allocated}) == {"GPU-a": (10, 11, 100)}

    def test_of_the_rule(self) -> None:
        """The number is that of the GPU."""
        rule = Rule("f:1", uuid="GPU-a", shares=2)
        assert self.kept(policy(rule), {SHARED: {"GPU-a::2", "GPU-b::2"}}) == {"GPU-a": (2,)}

    def test_of_another_resource(self) -> None:
        """A GPU that was shared and is now offered whole is not offered once more for each share that is in use."""
        rule = Rule("f:1", uuid="GPU-a", shares=1, resource=WHOLE)
        allocated = {"GPU-a::5", "GPU-a::6"}
        assert self.kept(policy(rule), {SHARED: allocated}) == {}
        assert self.kept(policy(rule), {SHARED: allocated, WHOLE: {"GPU-a::7"}}) == {"GPU-a": (7,)}

    @pytest.mark.parametrize("share_id", ["", "GPU-a", "GPU-a::", "GPU-a::x", "GPU-a::010", "GPU-x::10", "gpu-a::10"])
    def test_others(self, share_id: str) -> None:
        """What is no share of this node's is not made one."""
        assert self.kept(policy(), {SHARED: {share_id}, "example.com/gone": {"GPU-a::10"}}) == {}
