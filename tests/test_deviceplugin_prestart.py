"""PreStartContainer: a container waits until its pod is limited."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from virtual_clock import beside

from sgpu.deviceplugin.prestart import wait_limited
from sgpu.node.cgroup_limit import LimitAnswer, LimitState, Target
from sgpu.node.gpu import Gpu
from sgpu.node.limits import WantedLimits
from sgpu.node.policy import Policy
from sgpu.node.shares import Share
from sgpu.node.state import NodeState
from sgpu.pods.gate import TIMEOUT
from sgpu.rpc import RpcError

RESOURCE = "example.com/gpu"
SHARE = Share("GPU-a", 0)
POD = "/kubepods/pod1"
OPEN = pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])


def find(node: NodeState) -> None:
    """As the cgroup's watcher does when it is asked to look."""
    node.enforcement.want(WantedLimits({Target("GPU-a", POD): 5}, {}, {SHARE: (POD,)}))


def answers(state: LimitState, reason: str = "") -> Callable[[NodeState], None]:
    def answer(node: NodeState) -> None:
        find(node)
        table = node.enforcement.table().values()
        node.set_limits([LimitAnswer(wanted, state, wanted.hard, reason=reason) for wanted in table])

    return answer


def waited(
    *steps: Callable[[NodeState], None], fail_open: bool = False, factor: float = 1, memory: int | None = 10
) -> float:
    """Let these happen, a second each, once a look is asked for. Returns the seconds until the container starts."""

    async def main() -> float:
        node = NodeState(Policy(RESOURCE, 2, limit_factor=factor), interval=5)
        node.set_gpus((Gpu("GPU-a", "T4", "0:3B:0.0", (), memory),))
        look, began = node.enforcement.look.next, trio.current_time()

        async def happen() -> None:
            await look.wait()
            for step in steps:
                await trio.sleep(1)
                step(node)

        async with beside(happen):
            await wait_limited(node, RESOURCE, [str(SHARE)], fail_open=fail_open)
        return trio.current_time() - began

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_enforced() -> None:
    """Start once the limit is read back, and no sooner."""
    assert waited(find, answers(LimitState.PENDING), answers(LimitState.ENFORCED)) == 3


@pytest.mark.parametrize(("factor", "memory"), [(0, 10), (1, None)], ids=["no limits", "memory unknown"])
def test_nothing_to_wait_for(factor: float, memory: int | None) -> None:
    """Start at once where there is no limit to wait for."""
    assert waited(factor=factor, memory=memory) == 0


@OPEN
@pytest.mark.parametrize(
    ("steps", "seconds", "fact"),
    [
        pytest.param([answers(LimitState.REFUSED, "no R615")], 1, "no R615", id="refused"),
        pytest.param([answers(LimitState.FOREIGN, "somebody's")], 1, "somebody's", id="foreign"),
        pytest.param([], TIMEOUT, "no pod", id="no pod"),
        pytest.param([lambda node: node.enforcement.set_problem("cgroup v1")], 1, "cgroup v1", id="no cgroups"),
        pytest.param([find], TIMEOUT, "driver", id="no answer"),
    ],
)
def test_not_enforced(
    steps: list[Callable[[NodeState], None]],
    seconds: float,
    fact: str,
    fail_open: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Say why, and let the container start, or fail."""
    if fail_open:
        assert waited(*steps, fail_open=True) == seconds
    else:
        with pytest.RaisesGroup(pytest.RaisesExc(RpcError, match=fact)):
            waited(*steps)
    assert fact in caplog.text
    assert str(SHARE) in caplog.text
