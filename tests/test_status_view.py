"""What `status` shows of a snapshot, as text at several widths."""

from __future__ import annotations

import io
from typing import Any

import attrs
import pytest
from rich.console import Console, RenderableType

from sgpu.snapshot import ContainerUse, GpuSnapshot, ResourceSnapshot, Snapshot
from sgpu.status.view import TABLE, View, ago, notes, render

pytestmark = pytest.mark.pure

GIB = 1 << 30
#: 2026-01-02 12:00:00 UTC.
NOW = 1767355200.0
STALE = 25.0

HEALTHY = GpuSnapshot(
    uuid="GPU-bf428e1d-2c9a-5d47-8f6a-3d0b6f1c2e11",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    resource="deepomatic.com/shared-gpu",
    healthy=True,
    reason="",
    since=NOW - 3 * 3600 - 100,
    memory_total=15 * GIB,
    memory_used=7 * GIB,
    memory_free=8 * GIB,
    utilisation=37,
    shares=100,
    allocated=3,
    withheld=0,
    containers=(
        ContainerUse("", "", "", shares=0, memory_used=GIB, processes=2),
        ContainerUse("default", "notebook", "main", shares=1, memory_used=300 << 20, utilisation=0, processes=1),
        ContainerUse("inference", "bert-7d6b9c4f5-qm4zt", "server", shares=2, memory_used=5 * GIB, utilisation=25),
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
    utilisation=None,
    allocated=4,
    containers=(ContainerUse("ci", "runner", "job", shares=4), ContainerUse("ci", "stray", "job", shares=0)),
)
FULL = attrs.evolve(
    HEALTHY, name="NVIDIA A100-SXM4-80GB", memory_total=80 * GIB, memory_used=79 * GIB, withheld=97, containers=()
)
SNAPSHOT = Snapshot(
    version="0.1.0",
    time=NOW,
    driver_version="550.54.15",
    waiting="",
    sampled_at=NOW - 2,
    holders_known=True,
    processes_trouble="",
    resources=(ResourceSnapshot("deepomatic.com/shared-gpu", registered=True, streams=1),),
    gpus=(HEALTHY, DOWN),
)

AT_80 = """\
sgpu 0.1.0, driver 550.54.15, last sample 2 s ago
deepomatic.com/shared-gpu: registered with the kubelet

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
sgpu 0.1.0, driver 550.54.15, last
sample 2 s ago
deepomatic.com/shared-gpu: registered
with the kubelet

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


def text(snapshot: Snapshot, width: int | None, *, ascii_only: bool = False, now: float = NOW) -> str:
    """What stands on the screen, without the blanks at the ends of lines."""
    return printed(render(snapshot, now, View(width, ascii_only, STALE)), width or 1000)


def printed(page: RenderableType, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, highlight=False, markup=False).print(page)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


class TestWidths:
    def test_table(self) -> None:
        """Side by side where there is room for a UUID: 80 columns are enough."""
        assert text(SNAPSHOT, 80) == AT_80

    def test_stack(self) -> None:
        """Below each other where there is not."""
        assert text(SNAPSHOT, 40, ascii_only=True) == AT_40

    @pytest.mark.parametrize("width", [20, 30, 40, 60, TABLE - 1, TABLE, 100, 132, 250, None])
    def test_nothing_is_lost(self, width: int | None) -> None:
        """Whatever the width: lines are folded, not cut."""
        shown = "".join(text(SNAPSHOT, width).split())
        for gpu in SNAPSHOT.gpus:
            assert gpu.uuid in shown
            for use in gpu.containers:
                assert not use.pod or f"{use.namespace}/{use.pod}" in shown or use.pod[:9] in shown
        for line in text(SNAPSHOT, width).splitlines():
            assert len(line) <= (width or 100)

    def test_names_stay_whole(self) -> None:
        """Where there is no terminal, for who searches in it."""
        use = attrs.evolve(HEALTHY.containers[1], pod="a" * 200)
        shown = text(attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(HEALTHY, containers=(use,)),)), None)
        assert f"  default/{'a' * 200} main  300 MiB" in shown


class TestHead:
    def test_before_the_driver(self) -> None:
        """Nothing is known yet, and it says what is waited for."""
        waiting = attrs.evolve(
            SNAPSHOT, driver_version="", waiting="no libnvidia-ml.so.1 below /x", sampled_at=None, gpus=(), resources=()
        )
        assert text(waiting, 100) == (
            "sgpu 0.1.0, driver not there yet, last sample -\n! waiting: no libnvidia-ml.so.1 below /x\n"
        )

    def test_simulated(self) -> None:
        """That there is no driver is no trouble then, nor that nobody's processes are known."""
        gpu = attrs.evolve(HEALTHY, memory_used=None, memory_free=None, utilisation=None)
        simulated = attrs.evolve(
            SNAPSHOT, driver_version="", sampled_at=None, processes_trouble="", gpus=(gpu,), simulated=True
        )
        assert text(simulated, 100).splitlines()[:3] == [
            "sgpu 0.1.0, simulated GPUs, no driver",
            "deepomatic.com/shared-gpu: registered with the kubelet",
            "",
        ]

    @pytest.mark.parametrize(
        ("registered", "streams", "words"),
        [
            pytest.param(True, 1, "registered with the kubelet", id="all is well"),
            pytest.param(True, 0, "registered, but the kubelet does not watch its devices", id="no stream"),
            pytest.param(False, 0, "not registered with the kubelet (the daemon's log says why)", id="not registered"),
        ],
    )
    def test_resources(self, registered: bool, streams: int, words: str) -> None:
        """Each with how it stands with the kubelet."""
        resource = ResourceSnapshot("example.com/gpu", registered, streams)
        assert f"\nexample.com/gpu: {words}\n" in text(attrs.evolve(SNAPSHOT, resources=(resource,)), 100)


class TestNotes:
    def test_none(self) -> None:
        """Nothing to say when all is as it should be."""
        assert list(notes(SNAPSHOT, NOW, STALE)) == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            pytest.param({"waiting": "no library"}, "waiting: no library", id="waits"),
            pytest.param({"gpus": ()}, "the driver tells of no GPU", id="no GPU"),
            pytest.param({"sampled_at": NOW - 90}, "the driver last answered 1 min ago", id="old figures"),
            pytest.param({"holders_known": False}, "on -pod-resources-socket", id="kubelet does not tell"),
            pytest.param(
                {"processes_trouble": "set hostPID: true"}, "set hostPID: true", id="processes not told apart"
            ),
        ],
    )
    def test_notes(self, changes: dict[str, Any], words: str) -> None:
        """One for each thing that is not, with what to do, also to be seen."""
        snapshot = attrs.evolve(SNAPSHOT, **changes)
        (note,) = notes(snapshot, NOW, STALE)
        assert words in note
        assert f"! {note.split()[0]}" in text(snapshot, 300)

    def test_a_driver_that_hangs(self) -> None:
        """Is one trouble, not two: whose its processes are is not known because it does not tell them."""
        gpus = (attrs.evolve(HEALTHY, memory_used=None), DOWN)
        hangs = attrs.evolve(SNAPSHOT, gpus=gpus, sampled_at=NOW - 90)
        (note,) = notes(hangs, NOW, STALE)
        assert "the driver last answered" in note


class TestGpus:
    def test_withheld(self) -> None:
        """Shares that are withheld are not free."""
        shown = text(attrs.evolve(SNAPSHOT, gpus=(FULL,)), 100)
        assert " 3 used\n" in shown
        assert " 0 free\n" in shown
        assert " 97 withheld\n" in shown
        assert "███████████████" in shown

    def test_holders_unknown(self) -> None:
        """Then how many are free is not known either."""
        shown = text(attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(HEALTHY, allocated=None),)), 100)
        assert "100 in all" in shown
        assert "free" not in shown

    def test_more_used_than_there_are(self) -> None:
        """As after the number of shares was lowered: none is free."""
        assert " 0 free" in text(attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(HEALTHY, shares=1),)), 100)

    def test_memory_unknown(self) -> None:
        """As with unified memory."""
        gpu = attrs.evolve(HEALTHY, memory_total=None, memory_used=None, containers=())
        assert "Tesla T4  00000000:3B:00.0                -       37 %" in text(
            attrs.evolve(SNAPSHOT, gpus=(gpu,)), 100
        )

    @pytest.mark.parametrize("width", [40, 100])
    def test_resources(self, width: int) -> None:
        """What a GPU is offered as is said where not all are offered as the same, or one is not."""
        gpus = (HEALTHY, attrs.evolve(DOWN, resource=""))
        shown = text(attrs.evolve(SNAPSHOT, gpus=gpus), width)
        assert "\nnot offered" in shown
        assert "\nas deepomatic" not in shown
        two = (*SNAPSHOT.resources, ResourceSnapshot("example.com/whole-gpu", registered=True, streams=1))
        shown = text(attrs.evolve(SNAPSHOT, resources=two), width)
        assert shown.count("\nas deepomatic.com/shared-gpu") == 2

    def test_of_another_day(self) -> None:
        """A fault that is not of today has its date."""
        assert "unhealthy for 2 d, since 2026-01-02 11:56Z: XID 79" in text(SNAPSHOT, None, now=NOW + 2 * 86400)

    def test_control_characters(self) -> None:
        """What is shown can't do anything to the terminal."""
        gpu = attrs.evolve(DOWN, reason="a\x1b[2Jb\nc", name="[red]T4")
        shown = text(attrs.evolve(SNAPSHOT, gpus=(gpu,)), None)
        assert r"a\x1b[2Jb\nc" in shown
        assert "[red]T4" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (0.9, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h"), (86399, "23 h"), (86400, "1 d")],
)
def test_ago(seconds: float, words: str) -> None:
    """In one unit, never more than it was."""
    assert ago(seconds) == words
