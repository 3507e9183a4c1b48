"""The operator's rules: which units they match, and under which resource and as how many shares those are offered."""

from __future__ import annotations

import pytest

from sgpu.node.gpu import Gpu, Unit, units
from sgpu.node.policy import OffersRefusedError, Policy, PolicyConflictError, Rule, assign

pytestmark = pytest.mark.pure

SHARED = "example.com/shared-gpu"
WHOLE = "example.com/whole-gpu"


def unit(letter: str, name: str = "Tesla T4", bus_id: str = "00000000:3B:00.0") -> Unit:
    return units(Gpu(f"GPU-{letter}", name, bus_id, ()))[0]


A = unit("a")
B = unit("b", "NVIDIA A100-SXM4-80GB", "00000000:AF:00.0")
C = unit("c", "NVIDIA A100-PCIE-40GB", "00000001:05:00.0")
ALL = (A, B, C)


def assigned(*rules: Rule) -> str:
    """Return `a10 B1`: the letter of each GPU that is offered, a capital one for WHOLE, and its number of shares."""
    each = assign(Policy(SHARED, 10, rules), ALL)
    letters = {SHARED: str.lower, WHOLE: str.upper}
    return " ".join(f"{letters[resource](unit.uuid[-1])}{terms.shares}" for resource, unit, terms in each)


class TestMatches:
    @pytest.mark.parametrize(
        ("rule", "matched"),
        [
            *((Rule("f:1", uuid="gpu-A"), "a"), (Rule("f:1", uuid="GPU-"), ""), (Rule("f:1", uuid="GPU-*"), "")),
            *((Rule("f:1", name="nvidia a100-SXM4-80gb"), "b"), (Rule("f:1", name="*A100*"), "bc")),
            *((Rule("f:1", name="A100"), ""), (Rule("f:1", name="*-?0GB"), "bc")),
            *((Rule("f:1", name="*[!8]0gb"), "c"), (Rule("f:1", name="*"), "abc")),
        ],
    )
    def test_uuid_and_name(self, rule: Rule, matched: str) -> None:
        """A UUID matches one unit, and a name is a shell pattern for product names. Both ignore case."""
        assert "".join(each.uuid[-1] for each in ALL if rule.matches(each)) == matched

    @pytest.mark.parametrize("known", ["00000000:3B:00.0", "0000:3b:00.0"], ids=["of NVML", "of the kernel"])
    @pytest.mark.parametrize(
        ("bus_id", "matched"),
        [
            *(("00000000:3B:00.0", True), ("0000:3b:00.0", True), ("3b:00.0", True), ("0:3B:0.0", True)),
            *(("0001:3b:00.0", False), ("0000:3c:00.0", False), ("0000:3b:01.0", False), ("0000:3b:00.1", False)),
        ],
    )
    def test_bus_id(self, bus_id: str, known: str, matched: bool) -> None:
        """A PCI bus id may be written as NVML or the kernel writes it, or without a domain for domain 0."""
        assert Rule("f:1", pci_bus_id=bus_id).matches(unit("a", bus_id=known)) is matched

    @pytest.mark.parametrize("known", ["", "unknown", "00000000:3B:00.8"])
    def test_no_bus_id(self, known: str) -> None:
        """A rule matches no unit whose bus id is not one."""
        assert not Rule("f:1", pci_bus_id="00:00.0").matches(unit("a", bus_id=known))


class TestRule:
    @pytest.mark.parametrize(
        ("rule", "selector"),
        [
            pytest.param(Rule("f:1", uuid="GPU-a"), "uuid: GPU-a", id="uuid"),
            pytest.param(Rule("f:1", pci_bus_id="3b:00.0"), "pci-bus-id: 3b:00.0", id="bus id"),
            pytest.param(Rule("f:1", name="*"), "name: *", id="name"),
        ],
    )
    def test_text(self, rule: Rule, selector: str) -> None:
        """A message names a rule as the file has it, with its place."""
        assert selector in str(rule)
        assert "f:1" in str(rule)

    def test_equal(self) -> None:
        """Rules are equal wherever they stand in the file."""
        assert Rule("f:1", name="*", shares=2) == Rule("f:9", name="*", shares=2) != Rule("f:1", name="*", shares=3)


class TestPolicy:
    def test_resources(self) -> None:
        """The default comes first, then each resource of a rule, once; none of a rule that excludes."""
        rules = (
            Rule("f:1", uuid="GPU-a", resource=WHOLE),
            Rule("f:2", uuid="GPU-b", resource=WHOLE),
            Rule("f:3", uuid="GPU-c", resource=SHARED),
            Rule("f:4", uuid="GPU-d", shares=1),
            Rule("f:5", uuid="GPU-e", resource="example.com/none", exclude=True),
            Rule("f:6", uuid="GPU-f", resource="example.com/other"),
        )
        assert Policy(SHARED, 10, rules).resources() == (SHARED, WHOLE, "example.com/other")

    def test_unmatched(self) -> None:
        """The rules that match no unit are returned in order."""
        present, absent = Rule("f:1", uuid="GPU-a", shares=1), Rule("f:2", uuid="GPU-x", shares=1)
        excluding = Rule("f:3", name="*H100*", exclude=True)
        policy = Policy(SHARED, 10, (excluding, present, absent))
        assert policy.unmatched(ALL) == [excluding, absent]


class TestAssign:
    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            pytest.param([], "a10 b10 c10", id="none"),
            pytest.param([Rule("f:1", name="*A100*", shares=3)], "a10 b3 c3", id="another number of shares"),
            pytest.param([Rule("f:1", name="*A100*", resource=WHOLE)], "a10 B10 C10", id="another resource"),
            pytest.param(
                [Rule("f:1", uuid="GPU-b", resource=WHOLE, shares=1), Rule("f:5", pci_bus_id="1:5:0.0", exclude=True)],
                "a10 B1",
                id="both, and one excluded",
            ),
            pytest.param([Rule("f:1", name="*", exclude=True)], "", id="all excluded"),
            pytest.param(
                [Rule("f:1", name="*H100*", shares=1), Rule("f:2", name="*H*", exclude=True)],
                "a10 b10 c10",
                id="two rules for a GPU that is not there",
            ),
        ],
    )
    def test_rules(self, rules: list[Rule], expected: str) -> None:
        """A rule decides for the units it matches; the policy's own values apply to all else, in the given order."""
        assert assigned(*rules) == expected

    def test_conflict(self) -> None:
        """Two rules that match one GPU are refused. The message names the GPU and both rules."""
        first, second = Rule("f:7", uuid="GPU-b", shares=1), Rule("f:9", pci_bus_id="af:00.0", exclude=True)
        with pytest.raises(PolicyConflictError) as refused:
            assigned(first, second)
        assert all(fact in str(refused.value) for fact in ("GPU-b", B.name, B.gpu.pci_bus_id, str(first), str(second)))
        assert isinstance(refused.value, OffersRefusedError)
