"""The views of the cluster, as text."""

from __future__ import annotations

import io

import attrs
import pytest
from fake_status import GPU, SNAPSHOT
from rich.console import Console

from sgpu.commands.cluster.agents import Answer
from sgpu.commands.cluster.facts import Amount
from sgpu.commands.cluster.view import VIEWS, Options
from sgpu.lib.sizes import GIB
from sgpu.node.usage import ContainerUse
from sgpu.observe.snapshot import CordonSnapshot

pytestmark = pytest.mark.pure

USES = (
    ContainerUse("", "", "", shares=0, memory_used=GIB, processes=2),
    ContainerUse("ci", "runner", "job", shares=4, memory_used=GIB, utilization=7),
    ContainerUse("ml", "stray", "main", shares=0, memory_used=GIB),
    ContainerUse("ml", "unknown", "main", shares=1),
    ContainerUse("ml", "over", "main", shares=1, memory_used=GIB, exceeded=GIB // 2),
)
USED = attrs.evolve(GPU, containers=USES)
DOWN = attrs.evolve(GPU, pci_bus_id="00000000:3C:00.0", healthy=False, reason="XID 79", since=-298.0, memory_used=None)
HIDDEN = attrs.evolve(GPU, allocated=None, memory_free=None, withheld=2, resource="a.b/c")
NODES = (
    Answer("gpu-1", "kube-system", "sgpu-a", "", attrs.evolve(SNAPSHOT, gpus=(USED,))),
    Answer("gpu-2", "kube-system", "sgpu-b", "", attrs.evolve(SNAPSHOT, gpus=(GPU, DOWN))),
    Answer("gpu-3", "kube-system", "sgpu-c", "no answer within 2 s", None),
)
HERE, HIDING = NODES[:1], Answer("gpu-4", "x", "y", "", attrs.evolve(SNAPSHOT, gpus=(HIDDEN,), simulated=True))

SUMMARY = "2 of 3 nodes answered; 3 GPUs, 1 unhealthy; 9 of 300 shares used\n"
NODES_TEXT = """\
Node   GPUs  Shares used  Free   Memory used  Faults
gpu-1     1        3/100    97  7.0/15.0 GiB  0
gpu-2   1/2        6/200    97    -/30.0 GiB  1
gpu-3     -            -     -             -  no answer within 2 s

"""
GPUS_TEXT = """\
Node   GPU                        Shares used  Free  Withheld   Memory used  Util  Health
gpu-1  Tesla T4 00000000:3B:00.0        3/100    97         0  7.0/15.0 GiB  37 %  healthy
gpu-2  Tesla T4 00000000:3B:00.0        3/100    97         0  7.0/15.0 GiB  37 %  healthy
gpu-2  Tesla T4 00000000:3C:00.0        3/100     0         0    -/15.0 GiB  37 %  unhealthy: XID 79
gpu-3  -                                    -     -         -             -     -  no answer within 2 s

"""
PODS_TEXT = """\
Pod                  Node   GPU                        Shares     Used  May use    Used %  Util
ml/stray             gpu-1  Tesla T4 00000000:3B:00.0       0  1.0 GiB    0 MiB  no share     -
ml/over              gpu-1  Tesla T4 00000000:3B:00.0       1  1.0 GiB  154 MiB     667 %     -
ci/runner            gpu-1  Tesla T4 00000000:3B:00.0       4  1.0 GiB  614 MiB     167 %   7 %
ml/unknown           gpu-1  Tesla T4 00000000:3B:00.0       1        -  154 MiB         -     -
no pod: 2 processes  gpu-1  Tesla T4 00000000:3B:00.0       -  1.0 GiB        -         -     -

"""
FAULTS_TEXT = """\
Node   What                       Fault
gpu-2  Tesla T4 00000000:3C:00.0  unhealthy for 5 min: XID 79
gpu-3  sgpu                       no answer within 2 s

"""
SHARES_TEXT = """\
Room for 90 shares
Node   Free shares  Fits  Resource
gpu-1           97   1 x  deepomatic.com/shared-gpu
gpu-2           97   1 x  deepomatic.com/shared-gpu

unknown for 1 node that did not answer
"""
MEMORY_TEXT = """\
Room for 3.0 GiB of a GPU's memory and a share
Node   GPU                        Free memory  Free shares  Fits  Resource
gpu-1  Tesla T4 00000000:3B:00.0      8.0 GiB           97   2 x  deepomatic.com/shared-gpu
gpu-2  Tesla T4 00000000:3B:00.0      8.0 GiB           97   2 x  deepomatic.com/shared-gpu

unknown for 1 node that did not answer
"""


def text(view: str, *answers: Answer, wide: bool = False, amount: Amount | None = None, width: int = 1000) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False, markup=False)
    console.print(VIEWS[view](answers, Options(wide, amount or Amount())))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


@pytest.mark.parametrize(
    ("view", "amount", "expected"),
    [
        pytest.param("nodes", None, NODES_TEXT, id="nodes"),
        pytest.param("gpus", None, GPUS_TEXT, id="gpus"),
        pytest.param("pods", None, PODS_TEXT, id="pods"),
        pytest.param("faults", None, FAULTS_TEXT, id="faults"),
        pytest.param("room", Amount(90), SHARES_TEXT, id="room for shares"),
        pytest.param("room", Amount(1, 3 * GIB), MEMORY_TEXT, id="room for memory"),
    ],
)
def test_views(view: str, amount: Amount | None, expected: str) -> None:
    """Show each view with the reason of a node that does not answer, and the sum of all."""
    assert text(view, *NODES, amount=amount) == expected + SUMMARY


@pytest.mark.parametrize(
    ("view", "facts"),
    [
        ("nodes", ["550.54", "Tesla T4", "1 s ago", "kube-system/sgpu-a", "simulated"]),
        ("gpus", [GPU.uuid, "deepomatic.com/shared-gpu", "a.b/c"]),
        ("pods", ["job", GPU.uuid]),
    ],
)
def test_wide(view: str, facts: list[str]) -> None:
    """Show more columns."""
    page = text(view, *NODES, HIDING, wide=True)
    assert [fact for fact in facts if fact not in page] == []


def test_cordon() -> None:
    """Show a cordon beside the health, and no room on the GPU."""
    cordon = CordonSnapshot("bad row", SNAPSHOT.time - 60)
    gpu = attrs.evolve(GPU, cordon=cordon, withheld=GPU.shares - (GPU.allocated or 0))
    answer = Answer("gpu-1", "x", "y", "", attrs.evolve(SNAPSHOT, gpus=(gpu,)))
    assert "healthy; cordoned for 1 min (bad row): 3 shares in use" in text("gpus", answer)
    assert "no node that answers has room" in text("room", answer)


def test_unknown() -> None:
    """Show nothing unknown as zero, in no sum."""
    never = Answer("new", "x", "y", "", attrs.evolve(SNAPSHOT, gpus=(), sampled_at=None, driver_version=""))
    assert "gpu-4     1        -/100     -  7.0/15.0 GiB  0\n" in text("nodes", HIDING)
    assert "- of 100 shares used" in text("nodes", HIDING)
    bare = attrs.evolve(GPU, memory_total=None, memory_used=None)
    assert "3/100    97            -  0" in text(
        "nodes", Answer("n", "x", "y", "", attrs.evolve(SNAPSHOT, gpus=(bare,)))
    )
    assert "unknown for 1 GPU: nobody reports" in text("room", HIDING)
    assert "no node that answers has room for 1 share\n" in text("room", HIDING)
    assert " -       - " in text("nodes", never, wide=True)


def test_nothing() -> None:
    """Say so where there is nothing to list."""
    idle = attrs.evolve(NODES[1], snapshot=attrs.evolve(SNAPSHOT))
    assert text("pods", idle).startswith("no pod on the nodes that answered has a share, or uses a GPU\n")
    assert text("faults", idle).startswith("no faults\n")


def test_escape() -> None:
    """Show text of others on one line; it is no markup. Narrow terminals fold it."""
    evil = attrs.evolve(NODES[2], node="[red]\x1b[31m\n", problem="[b]x" * 30)
    assert "[red]\\x1b[31m\\n" in text("nodes", evil)
    assert all(len(line) <= 80 for line in text("faults", evil, width=80).splitlines())


def test_styles() -> None:
    """Problems are red, names of columns bold, where there are colors: in a wide table as in a folded one."""
    for width in (200, 60):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
        with console.capture() as seen:
            console.print(VIEWS["nodes"](NODES, Options()))
        assert "\x1b[1;31mno " in seen.get()
        assert "\x1b[1mNode" in seen.get()
