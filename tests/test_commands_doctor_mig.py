"""The doctor on MIG. What stands in for device nodes are links to the kernel's own nodes 1:3 and 1:5."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from findings import expect, find

from sgpu.commands.doctor.finding import Finding
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.mig import check_mig
from sgpu.driver.messages import GpuReport, InstanceReport
from sgpu.node.figures import Figures
from sgpu.node.policy import Mig, Policy, Rule

SMALL = InstanceReport(
    "MIG-a", "A100 MIG 1g.5gb", "1g.5gb", 1, 0, 5, ("nvidia-caps/nvidia-cap12", "nvidia-caps/nvidia-cap13")
)
LARGE = attrs.evolve(SMALL, uuid="MIG-b", profile="3g.20gb", memory_bytes=20)
CARD = GpuReport(
    "GPU-p", "A100", "0:3B:0.0", ("nvidia0",), figures=Figures(40), mig_mode=True, mig_pending=True, instances=(SMALL,)
)
PLAIN = GpuReport("GPU-o", "T4", "0:5E:0.0", ("nvidia1",))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """The nodes of the capabilities, and the kernel's list of drivers."""
    (tmp_path / "nvidia-caps").mkdir()
    for number, target in ((12, "/dev/null"), (13, "/dev/zero")):
        (tmp_path / f"nvidia-caps/nvidia-cap{number}").symlink_to(target)
    (tmp_path / "devices").write_text("Character devices:\n  1 nvidia-caps\n\nBlock devices:\n")
    return tmp_path


def check(dev: Path, *gpus: GpuReport, mig: Mig = Mig.SHARED, rules: tuple[Rule, ...] = ()) -> list[Finding]:
    policy = Policy("example.com/gpu", 100, rules, mig, "example.com/mig-{profile}")
    return list(check_mig(policy, dev, Host(proc=dev), gpus))


def test_off(dev: Path) -> None:
    """No GPU in MIG mode is as it should be; where the GPUs are unknown, nothing is said."""
    (finding,) = check(dev, PLAIN)
    expect(finding, "ok", "no GPU")
    (unknown,) = check_mig(Policy("a.b/c", 1), dev, Host(), None)
    expect(unknown, "skip")


def test_layout(dev: Path) -> None:
    """Instances are counted by profile."""
    (finding,) = check(dev, PLAIN, attrs.evolve(CARD, instances=(SMALL, attrs.evolve(SMALL, uuid="MIG-c"))))
    expect(finding, "ok", "2 x 1g.5gb")


@pytest.mark.parametrize(
    ("facts", "mig", "level", "fact", "advice"),
    [
        pytest.param({"instances": ()}, Mig.SHARED, "FAIL", "no instances", "nvidia-smi mig -cgi", id="no instances"),
        pytest.param({}, Mig.OFF, "warn", "-mig off", "-mig shared", id="left out"),
        pytest.param({"mig_pending": False}, Mig.SHARED, "warn", "off after", "--gpu-reset", id="pending off"),
    ],
)
def test_card(dev: Path, facts: dict[str, object], mig: Mig, level: str, fact: str, advice: str) -> None:
    """Say what keeps a card from being offered, and a mode that waits for a reset."""
    finding = check(dev, attrs.evolve(CARD, **facts), mig=mig)[0]  # type: ignore[arg-type]
    expect(finding, level, fact, advice=advice)
    assert "GPU-p" in finding.subject


def test_pending_on(dev: Path) -> None:
    """A mode that will be on is said of a GPU that is not in MIG mode."""
    pending, _ = check(dev, attrs.evolve(PLAIN, mig_pending=True))
    expect(pending, "warn", "on after its next reset", advice="--gpu-reset")


def test_permission(dev: Path) -> None:
    """A process that may not ask about the card is told so, and what that changes."""
    refused = check(dev, attrs.evolve(CARD, memory_refused=True))[1]
    expect(refused, "warn", "insufficient permissions", advice="privileged")


def test_problem(dev: Path) -> None:
    """What the poll found wrong with an instance is a failure, with its cure."""
    problem = "/dev/nvidia-caps/nvidia-cap13 is not there; `nvidia-modprobe -f …` on the host makes it"
    broken = attrs.evolve(SMALL, problem=problem)
    expect(
        find(check(dev, attrs.evolve(CARD, instances=(broken,))), "MIG instance MIG-a"), "FAIL", "cap13", advice="-f …"
    )


@pytest.mark.parametrize(
    ("target", "devices", "fact"),
    [
        pytest.param("/dev/shm", "  1 nvidia-caps\n", "no", id="no device"),
        pytest.param("/dev/zero", "511 nvidia-caps\n", "511", id="another major number"),
        pytest.param("/dev/zero", "  2 other\n", "", id="unknown major number"),
    ],
)
def test_nodes(dev: Path, target: str, devices: str, fact: str) -> None:
    """A node that is no device, or the one of a driver that was reloaded, is a failure."""
    node = dev / "nvidia-caps/nvidia-cap13"
    node.unlink()
    node.symlink_to(target)
    (dev / "devices").write_text(f"Character devices:\n{devices}\n")
    found = [finding for finding in check(dev, CARD) if finding.subject == "MIG instance MIG-a"]
    assert bool(found) is bool(fact)
    for finding in found:
        expect(finding, "FAIL", fact, advice="nvidia-modprobe -f")


class TestMixed:
    CARD = attrs.evolve(CARD, instances=(SMALL, LARGE))

    def test_shared(self, dev: Path) -> None:
        """Instances of several profiles under one resource are said, because a pod can't choose."""
        expect(find(check(dev, self.CARD), "MIG layouts"), "warn", "1g.5gb, 3g.20gb", advice="-mig profile")

    @pytest.mark.parametrize(
        ("mig", "rules"),
        [
            pytest.param(Mig.PROFILE, (), id="by profile"),
            pytest.param(Mig.SHARED, (Rule("f:1", mig_profile="3g.20gb", resource="a.b/c"),), id="by a rule"),
            pytest.param(
                Mig.SHARED,
                (Rule("f:1", mig_profile="3g.20gb", shares=1), Rule("f:2", uuid="MIG-b", shares=1)),
                id="rules that contradict each other",
            ),
        ],
    )
    def test_apart(self, dev: Path, mig: Mig, rules: tuple[Rule, ...]) -> None:
        """Nothing is said where each has a resource of its own, or another check finds the rules wrong."""
        assert not [
            finding for finding in check(dev, self.CARD, mig=mig, rules=rules) if finding.subject == "MIG layouts"
        ]
