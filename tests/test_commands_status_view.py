"""A snapshot as `status` shows it, as text at several widths."""

from __future__ import annotations

import io
from typing import Any

import attrs
import fake_status
import pytest
from rich.console import Console

from sgpu.commands.status.view import TABLE, View, render
from sgpu.lib.sizes import GIB
from sgpu.node.container import StaleAnswer
from sgpu.node.usage import ContainerUse
from sgpu.observe.describe import ago, notes
from sgpu.observe.snapshot import CordonSnapshot, GpuSnapshot, ResourceSnapshot, Snapshot

pytestmark = pytest.mark.pure

#: 2026-01-02 12:00:00 UTC.
NOW = 1767355200.0
STALE = 25.0

HEALTHY = attrs.evolve(
    fake_status.GPU,
    since=NOW - 3 * 3600 - 100,
    containers=(
        ContainerUse("", "", "", shares=0, memory_used=GIB, processes=2),
        ContainerUse("default", "notebook", "main", shares=1, memory_used=300 << 20, utilization=0, processes=1),
        ContainerUse("inference", "bert-7d6b9c4f5-qm4zt", "server", shares=2, memory_used=5 * GIB, utilization=25),
    ),
)
DOWN = attrs.evolve(
    HEALTHY,
    uuid="GPU-5d0a3c1e-7b7e-5c0f-9d3b-0e4a8f6b7c22",
    pci_bus_id="00000000:3C:00.0",
    healthy=False,
    reason="XID 79: the GPU has fallen off the bus; reset the GPU",
    since=NOW - 200,
    memory_used=None,
    utilization=None,
    allocated=4,
    containers=(ContainerUse("ci", "runner", "job", shares=4), ContainerUse("ci", "stray", "job", shares=0)),
)
SNAPSHOT = attrs.evolve(fake_status.SNAPSHOT, time=NOW, sampled_at=NOW - 2, gpus=(HEALTHY, DOWN))

AT_80 = """\
GPU, pod and container                        Memory           Util  Shares
Tesla T4  00000000:3B:00.0                    7.0/15.0 GiB     37 %   3 used
GPU-bf428e1d-2c9a-5d47-8f6a-3d0b6f1c2e11      ███████░░░░░░░░        97 free
healthy for 3 h                                                       0 withheld
  inference/bert-7d6b9c4f5-qm4zt server       5.0 GiB          25 %   2
  default/notebook main                       300 MiB           0 %   1
  no pod: 2 processes                         1.0 GiB             -

Tesla T4  00000000:3C:00.0                    -/15.0 GiB          -   4 used
GPU-5d0a3c1e-7b7e-5c0f-9d3b-0e4a8f6b7c22                             96 down
unhealthy for 3 min, since 11:56:40Z: XID                             0 withheld
79: the GPU has fallen off the bus; reset
the GPU
  ci/runner job                               -                   -   4
  ci/stray job                                -                   -   0
"""

AT_40 = """\
Tesla T4  00000000:3B:00.0
GPU-bf428e1d-2c9a-5d47-8f6a-3d0b6f1c2e11
healthy for 3 h
memory  #######........  7.0/15.0 GiB
util    37 %
shares  3 used, 97 free, 0 withheld
  inference/bert-7d6b9c4f5-qm4zt server
    5.0 GiB, 25 %, 2 shares
  default/notebook main
    300 MiB, 0 %, 1 share
  no pod: 2 processes
    1.0 GiB, -

Tesla T4  00000000:3C:00.0
GPU-5d0a3c1e-7b7e-5c0f-9d3b-0e4a8f6b7c22
unhealthy for 3 min, since 11:56:40Z:
XID 79: the GPU has fallen off the bus;
reset the GPU
memory  -/15.0 GiB
util    -
shares  4 used, 96 down, 0 withheld
  ci/runner job
    -, -, 4 shares
  ci/stray job
    -, -, 0 shares
"""


def limited(state: str) -> GpuSnapshot:
    use = ContainerUse(
        "ci", "runner", "job", 4, memory_used=GIB, memory_limit=2 * GIB, limit_state=state, limit_reason="no R615"
    )
    return attrs.evolve(HEALTHY, containers=(use,))


def text(snapshot: Snapshot, width: int | None = None, *, ascii_only: bool = False, now: float = NOW) -> str:
    """Return the screen's text, without trailing blanks."""
    file = io.StringIO()
    console = Console(file=file, width=width or 1000, color_system=None, highlight=False, markup=False)
    console.print(render(snapshot, now, View(width, ascii_only)))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def of(*gpus: GpuSnapshot) -> Snapshot:
    return attrs.evolve(SNAPSHOT, gpus=gpus)


class TestWidths:
    def test_table(self) -> None:
        """Stand side by side where there is room for a UUID: 80 columns are enough."""
        assert text(SNAPSHOT, 80).partition("\n\n")[2] == AT_80

    def test_stack(self) -> None:
        """Stand below each other where there is not; use only ASCII where that is asked for."""
        assert text(SNAPSHOT, 40, ascii_only=True).partition("\n\n")[2] == AT_40

    @pytest.mark.parametrize("width", [20, 30, 40, 60, TABLE - 1, TABLE, 100, 132, 250, None])
    def test_nothing_is_lost(self, width: int | None) -> None:
        """Fold lines instead of cutting them, whatever the width."""
        shown = "".join(text(SNAPSHOT, width).split())
        for gpu in SNAPSHOT.gpus:
            assert gpu.uuid in shown
            for use in gpu.containers:
                assert not use.pod or f"{use.namespace}/{use.pod}" in shown or use.pod[:9] in shown
        for line in text(SNAPSHOT, width).splitlines():
            assert len(line) <= (width or 100)

    def test_names_stay_whole(self) -> None:
        """Never split a name where there is no terminal, for those who search in the text."""
        use = attrs.evolve(HEALTHY.containers[1], pod="a" * 200)
        assert f"  default/{'a' * 200} main  300 MiB" in text(of(attrs.evolve(HEALTHY, containers=(use,))))


class TestHead:
    def test_driver(self) -> None:
        """Show the versions and how long ago the driver answered."""
        first = text(SNAPSHOT).splitlines()[0]
        assert all(fact in first for fact in ("sgpu 0.1.0", "550.54", "2 s"))

    def test_before_the_driver(self) -> None:
        """Show what is waited for, and nothing that is unknown."""
        waiting = attrs.evolve(
            SNAPSHOT, driver_version="", waiting="no libnvidia-ml.so.1 below /x", sampled_at=None, gpus=(), resources=()
        )
        head, note = text(waiting).splitlines()
        assert "sgpu 0.1.0, driver" in head
        assert note.startswith("! ")
        assert note.endswith("no libnvidia-ml.so.1 below /x")

    def test_simulated(self) -> None:
        """Show that GPUs are simulated; that there is no driver and no sample is no problem then."""
        gpu = attrs.evolve(HEALTHY, memory_used=None, memory_free=None, utilization=None)
        simulated = attrs.evolve(of(gpu), driver_version="", sampled_at=None, simulated=True)
        head, _, rest = text(simulated).partition("\n")
        assert "simulated" in head
        assert "sample" not in head
        assert "!" not in rest

    def test_claims(self) -> None:
        """Show what claims take, and why the scheduler does not know the resource."""
        gpu = attrs.evolve(HEALTHY, memory_claimed=3 << 29)
        shown = text(attrs.evolve(of(gpu), resources=(ResourceSnapshot("example.com/gpu", True, 1, "no\nserver"),)))
        assert r"not published: no\nserver" in shown
        assert "claims for 1.5 GiB" in shown

    @pytest.mark.parametrize(("api", "name"), [("dra", "(DRA)"), ("device-plugin", "a device plugin")])
    def test_front_end(self, api: str, name: str) -> None:
        """Show how GPUs are offered, and why, where sgpu chose it."""
        assert f"{name}: 2 claims" in text(attrs.evolve(SNAPSHOT, api=api, api_reason="2 claims"))

    def test_resources(self) -> None:
        """Show of each resource how it stands with the kubelet."""
        resources = tuple(
            ResourceSnapshot(f"example.com/{registered}{streams}", registered, streams)
            for registered, streams in ((True, 1), (True, 0), (False, 0))
        )
        shown = text(attrs.evolve(SNAPSHOT, resources=resources)).splitlines()[1:4]
        names, states = zip(*(line.split(": ") for line in shown), strict=True)
        assert names == tuple(resource.name for resource in resources)
        assert len(set(states)) == 3
        assert ["watch" in state for state in states] == [False, True, False]
        assert [state.startswith("not registered") for state in states] == [False, False, True]


@pytest.mark.parametrize("width", [TABLE, 40])
@pytest.mark.parametrize(("state", "mark"), [("enforced", ""), ("refused", " !"), ("pending", " !")])
def test_limits(state: str, mark: str, width: int) -> None:
    """Show what a container may use beside what it uses, marked unless the driver enforces it."""
    shown = text(of(limited(state)), width)
    assert f"1.0 GiB / 2.0 GiB{mark}" in shown
    assert ("! memory limits" in shown) == bool(mark)


class TestNotes:
    @pytest.mark.parametrize(
        ("changes", "fact"),
        [
            pytest.param({"waiting": "no library"}, "no library", id="waiting"),
            pytest.param({"waiting": "no library", "gpus": ()}, "no library", id="waiting, no GPU"),
            pytest.param({"gpus": ()}, "no GPU", id="no GPU"),
            pytest.param({"sampled_at": NOW - 90}, "1 min", id="old figures"),
            pytest.param({"holders_known": False}, "-pod-resources-socket", id="holders unknown"),
            pytest.param({"stale_answers": (StaleAnswer("a/b", ("/x",), ("/y",)),)}, "a/b (/x instead", id="stale"),
            pytest.param({"cordoned_elsewhere": ("GPU-x",)}, "GPU-x", id="cordoned elsewhere"),
            pytest.param({"processes_problem": "set hostPID: true"}, "set hostPID: true", id="processes unknown"),
            pytest.param({"gpus": (limited("refused"), limited("enforced"))}, "(1): no R615", id="no limit"),
        ],
    )
    def test_each(self, changes: dict[str, Any], fact: str) -> None:
        """Note each problem once, with what to do, and show it."""
        snapshot = attrs.evolve(SNAPSHOT, **changes)
        (note,) = notes(snapshot, NOW)
        assert fact in note
        assert f"\n! {note}\n" in text(snapshot)

    @pytest.mark.parametrize("sampled_at", [None, NOW - STALE], ids=["never", "just fresh"])
    def test_none(self, sampled_at: float | None) -> None:
        """Note nothing when all is well."""
        assert list(notes(attrs.evolve(SNAPSHOT, sampled_at=sampled_at), NOW)) == []


class TestGpus:
    @pytest.mark.parametrize(
        ("cordon", "allocated", "fact"),
        [
            (CordonSnapshot("bad row", NOW - 90), 3, "cordoned for 1 min (bad row): 3 shares in use"),
            (CordonSnapshot("", NOW - 90), 1, "cordoned for 1 min: 1 share in use"),
            (CordonSnapshot("", NOW), 0, "being released"),
            (CordonSnapshot("", NOW), None, "unknown"),
            (CordonSnapshot("", NOW, problem="it hangs"), 0, "not released: it hangs"),
            (CordonSnapshot("", NOW, released=True), 0, "released for a reset"),
        ],
        ids=["in use", "one share", "free", "holders unknown", "held", "released"],
    )
    @pytest.mark.parametrize("width", [None, 40])
    def test_cordon(self, cordon: CordonSnapshot, allocated: int | None, fact: str, width: int | None) -> None:
        """Show that a GPU is cordoned, why, since when, and how far that is."""
        shown = text(of(attrs.evolve(HEALTHY, cordon=cordon, allocated=allocated)), width)
        assert fact in shown.replace("\n", " " if width else "\n")
        assert "cordoned" not in text(of(HEALTHY))

    @pytest.mark.parametrize(
        ("changes", "shares"),
        [
            pytest.param({"withheld": 97}, ["3 used", "0 free", "97 withheld"], id="withheld"),
            pytest.param({"withheld": 90}, ["3 used", "7 free", "90 withheld"], id="partly withheld"),
            pytest.param({"allocated": None}, ["100 in all", "0 withheld"], id="holders unknown"),
            pytest.param({"shares": 1}, ["3 used", "0 free", "0 withheld"], id="more used than there are now"),
        ],
    )
    def test_shares(self, changes: dict[str, Any], shares: list[str]) -> None:
        """Show how many shares are used, free and withheld, as far as it is known."""
        shown = text(of(attrs.evolve(HEALTHY, containers=(), **changes)), 40)
        assert f"\nshares  {', '.join(shares)}\n" in shown

    @pytest.mark.parametrize(
        ("used", "total", "figures", "bar"),
        [
            pytest.param(None, None, "-", "", id="unknown"),
            pytest.param(None, 80 * GIB, "-/80.0 GiB", "", id="use unknown"),
            pytest.param(0, 80 * GIB, "0.0/80.0 GiB", "...............", id="none"),
            pytest.param(79 * GIB, 80 * GIB, "79.0/80.0 GiB", "###############", id="nearly all"),
            pytest.param(90 * GIB, 80 * GIB, "90.0/80.0 GiB", "###############", id="more than all"),
        ],
    )
    def test_memory(self, used: int | None, total: int | None, figures: str, bar: str) -> None:
        """Show the memory in figures, and as a bar."""
        shown = text(of(attrs.evolve(HEALTHY, memory_used=used, memory_total=total)), 40, ascii_only=True)
        assert f"\nmemory  {bar}{'  ' if bar else ''}{figures}\n" in shown

    @pytest.mark.parametrize("width", [40, 100])
    def test_resources(self, width: int) -> None:
        """Show the resource of each GPU where there are several, and which GPU is not offered."""
        shown = text(of(HEALTHY, attrs.evolve(DOWN, resource="")), width)
        assert "\nnot offered" in shown
        assert "\nas deepomatic" not in shown
        two = (*SNAPSHOT.resources, ResourceSnapshot("example.com/whole-gpu", registered=True, streams=1))
        shown = text(attrs.evolve(SNAPSHOT, resources=two), width)
        assert shown.count("\nas deepomatic.com/shared-gpu") == 2

    @pytest.mark.parametrize("width", [40, 100])
    def test_over_user(self, width: int) -> None:
        """Show beside what a container uses that this is more than it may use."""
        use = attrs.evolve(HEALTHY.containers[2], exceeded=2 * GIB)
        shown = text(of(attrs.evolve(HEALTHY, containers=(use, HEALTHY.containers[1]))), width)
        assert " 5.0 GiB > 2.0 GiB" in shown
        assert shown.count(">") == 1

    def test_another_day(self) -> None:
        """Show the date of a fault that is not of today."""
        assert " 2 d, since 2026-01-02 11:56Z: XID 79" in text(SNAPSHOT, now=NOW + 2 * 86400)

    def test_control_characters(self) -> None:
        """Let nothing that is shown do anything to the terminal."""
        shown = text(of(attrs.evolve(DOWN, reason="a\x1b[2Jb\nc", name="[red]T4")))
        assert r"a\x1b[2Jb\nc" in shown
        assert "[red]T4" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (0.9, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h"), (86399, "23 h"), (86400, "1 d")],
)
def test_ago(seconds: float, words: str) -> None:
    """Show a span in one unit, never longer than it was."""
    assert ago(seconds) == words


def test_instances() -> None:
    """Name the GPU of a MIG instance, and say that a GPU in MIG mode has no instances."""
    instance = attrs.evolve(HEALTHY, uuid="MIG-a", name="A100 MIG 1g.5gb", parent="GPU-p", mig_profile="1g.5gb")
    lines = text(of(instance, attrs.evolve(HEALTHY, mig_mode=True)), 80).splitlines()
    (parent,) = (number for number, line in enumerate(lines) if "of GPU-p" in line)
    assert lines[parent - 1].startswith("MIG-a")
    assert sum("in MIG mode, without instances" in line for line in lines) == 1
