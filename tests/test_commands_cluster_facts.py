"""What the answers of daemons come to: agents, sums, faults, uses, room."""

from __future__ import annotations

from math import inf
from typing import Any

import attrs
import pytest
from fake_api import pod, pod_list
from fake_status import GPU, SNAPSHOT

from sgpu.commands.cluster.agents import EVERYWHERE, Agent, Answer, list_path, on_nodes, parse_agents
from sgpu.commands.cluster.facts import (
    Amount,
    PodUse,
    by_node,
    faults,
    in_namespace,
    parse_amount,
    pods,
    room,
    total,
    unknown_room,
)
from sgpu.lib.sizes import GIB
from sgpu.node.usage import ContainerUse
from sgpu.observe.snapshot import GpuSnapshot, ResourceSnapshot

pytestmark = pytest.mark.pure

DOWN = attrs.evolve(GPU, healthy=False, reason="XID 79")
HIDDEN = attrs.evolve(GPU, allocated=None, memory_free=None)
FULL = attrs.evolve(GPU, allocated=100, memory_free=GIB)
EXCLUDED = attrs.evolve(GPU, resource="", shares=0, allocated=None)


def answer(node: str, *gpus: GpuSnapshot, problem: str = "", **fields: Any) -> Answer:  # noqa: ANN401
    snapshot = None if problem else attrs.evolve(SNAPSHOT, gpus=gpus, **fields)
    return Answer(node, "kube-system", f"sgpu-{node}", problem, snapshot)


def use(pod: str, shares: int, used: int | None, **fields: Any) -> ContainerUse:  # noqa: ANN401
    return ContainerUse("team", pod, "main", shares, memory_used=used, **fields)


class TestAgents:
    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            pytest.param(pod("n"), "", id="runs"),
            pytest.param(pod("n", "Pending", podIP=""), "its sgpu pod sgpu-n is Pending", id="pending"),
            pytest.param(
                pod("n", "Pending", containerStatuses=[{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]),
                "its sgpu pod sgpu-n is Pending: ImagePullBackOff",
                id="no image",
            ),
            pytest.param(
                pod("n", "Pending", initContainerStatuses=[{"state": {"waiting": {"reason": "PodInitializing"}}}]),
                "its sgpu pod sgpu-n is Pending",
                id="initializing",
            ),
            pytest.param({**pod("n"), "status": {}}, "its sgpu pod sgpu-n is not started", id="new"),
        ],
    )
    def test_problem(self, given: dict[str, Any], problem: str) -> None:
        """Say why a pod can't be asked."""
        assert parse_agents(pod_list(given)) == (Agent("n", "kube-system", "sgpu-n", 2112, problem),)

    def test_ports_and_ends(self) -> None:
        """Take the port by its name, else the default; leave out pods that have ended or have no node."""
        named, unnamed, pending, ended = pod("a"), pod("b"), pod("c"), pod("d", "Failed")
        named["spec"]["containers"][0]["ports"] = [{"containerPort": 1}, {"name": "metrics", "containerPort": 9}]
        unnamed["spec"]["containers"][0].pop("ports")
        pending["spec"].pop("nodeName")
        agents = parse_agents(pod_list(named, unnamed, pending, ended))
        assert [agent.port for agent in agents] == [9, 2112]
        assert agents[0].path == "/api/v1/namespaces/kube-system/pods/sgpu-a:9/proxy/status"
        assert on_nodes(agents, "a*") == agents[:1]
        assert on_nodes(agents, "") == agents

    @pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"items": [{}]}', b'{"items": 1}', b"[" * 100_000])
    def test_no_list(self, text: bytes) -> None:
        """Raise ValueError for anything else."""
        with pytest.raises(ValueError, match=r"."):
            parse_agents(text)

    def test_list_path(self) -> None:
        """Look in one namespace, or in all."""
        assert list_path("gpu", "app=sgpu") == "/api/v1/namespaces/gpu/pods?labelSelector=app%3Dsgpu"
        assert list_path(EVERYWHERE, "a") == "/api/v1/pods?labelSelector=a"


class TestNodes:
    def test_serving_daemon(self) -> None:
        """Take the daemon that serves, not the one that stands by or does not answer; sort node2 before node10."""
        serving, standby = answer("node10", GPU), answer("node10", standby=True)
        other, silent = answer("node2", GPU), answer("node2", problem="no answer")
        assert by_node([standby, serving, silent, other, silent]) == [other, serving]
        assert by_node([serving, standby]) == [serving]

    def test_namespace(self) -> None:
        """Keep the containers of a namespace, and the GPUs that these have."""
        mine, others = use("a", 1, GIB), attrs.evolve(use("b", 1, GIB), namespace="x")
        both, none = attrs.evolve(GPU, containers=(mine, others)), attrs.evolve(GPU, containers=(others,))
        kept, silent = in_namespace([answer("n", both, none), answer("m", problem="x")], "team")
        assert kept == answer("n", attrs.evolve(GPU, containers=(mine,)))
        assert silent == answer("m", problem="x")

    def test_total(self) -> None:
        """A sum of which a part is unknown is unknown."""
        assert (total([1, 2]), total([1, None]), total([])) == (3, None, 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(answer("n", GPU), [], id="none"),
        pytest.param(answer("n", problem="no answer"), [("sgpu", "no answer")], id="silent"),
        pytest.param(
            answer("n", DOWN), [("Tesla T4 00000000:3B:00.0", "unhealthy for 1 s: XID 79")], id="by the node's clock"
        ),
        pytest.param(answer("n", waiting="no driver"), [("sgpu", "waiting: no driver")], id="waiting"),
        pytest.param(
            answer("n", GPU, resources=(ResourceSnapshot("a.b/c", False, 0), ResourceSnapshot("a.b/d", True, 0))),
            [
                ("a.b/c", "not registered with the kubelet (the daemon's log says why)"),
                ("a.b/d", "registered, but the kubelet does not watch its devices"),
            ],
            id="kubelet",
        ),
        pytest.param(
            answer("n", GPU, standby=True, resources=(ResourceSnapshot("a.b/c", False, 0),)),
            [("sgpu", "stands by, and no daemon that serves answers on this node")],
            id="standby",
        ),
    ],
)
def test_faults(given: Answer, expected: list[tuple[str, str]]) -> None:
    """List what is wrong of each node."""
    assert [(fault.subject, fault.message) for fault in faults([given])] == expected


class TestPods:
    @pytest.mark.parametrize(
        ("gpu", "used", "part", "ratio"),
        [
            pytest.param(GPU, use("a", 10, 3 * GIB), 15 * GIB // 10, 2.0, id="share"),
            pytest.param(GPU, use("a", 10, GIB, memory_limit=4 * GIB), 4 * GIB, 0.25, id="limit"),
            pytest.param(GPU, use("a", 0, GIB), 0, inf, id="no share"),
            pytest.param(GPU, use("a", 0, 0), 0, 0.0, id="no share, no use"),
            pytest.param(GPU, use("a", 10, None), 15 * GIB // 10, None, id="unknown use"),
            pytest.param(attrs.evolve(GPU, memory_total=None), use("a", 1, 1), None, None, id="unknown memory"),
            pytest.param(EXCLUDED, use("a", 0, 1), None, None, id="not offered"),
        ],
    )
    def test_ratio(self, gpu: GpuSnapshot, used: ContainerUse, part: int | None, ratio: float | None) -> None:
        """Compare what a container uses with its limit, or with its part."""
        pod = PodUse("n", gpu, used)
        assert (pod.part, pod.ratio) == (part, ratio)

    def test_order(self) -> None:
        """Sort by use over part; unknown ones come after it, those of no pod last."""
        nobody = ContainerUse("", "", "", 0, memory_used=9 * GIB)
        uses = (nobody, use("unknown", 1, None), use("little", 50, GIB), use("much", 1, GIB), use("stray", 0, GIB))
        answers = [answer("m", problem="x"), answer("n", attrs.evolve(GPU, containers=uses))]
        assert [pod.use.pod for pod in pods(answers)] == ["stray", "much", "little", "unknown", ""]


class TestRoom:
    @pytest.mark.parametrize(
        ("text", "amount"),
        [
            ("4", Amount(4)),
            ("20GiB", Amount(1, 20 * GIB)),
            ("0.5Gi", Amount(1, GIB // 2)),
            ("1MiB", Amount(1, 1 << 20)),
        ],
    )
    def test_amounts(self, text: str, amount: Amount) -> None:
        """A number is one of shares; with a unit it is memory."""
        assert parse_amount(text) == amount

    @pytest.mark.parametrize("text", ["", "0", "0GiB", "-1", "1.5", "4GB", "GiB", "4 GiB", "1e3"])
    def test_no_amount(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"\A"):
            parse_amount(text)

    @pytest.mark.parametrize(
        ("amount", "expected"),
        [
            pytest.param(Amount(97), [("big", 2), ("one", 1)], id="shares"),
            pytest.param(Amount(98), [("big", 1)], id="of two GPUs"),
            pytest.param(Amount(1, 3 * GIB), [("big", 2), ("big", 2), ("one", 2)], id="memory"),
            pytest.param(Amount(1, 9 * GIB), [], id="nowhere"),
            pytest.param(Amount(1, GIB // 32), [("big", 97), ("big", 97), ("one", 97)], id="no more than shares"),
        ],
    )
    def test_places(self, amount: Amount, expected: list[tuple[str, int]]) -> None:
        """Find healthy GPUs with free shares: shares on a node, memory on one GPU."""
        answers = [
            answer("one", GPU, DOWN, FULL, HIDDEN, EXCLUDED),
            answer("big", GPU, GPU),
            answer("x", problem="silent"),
        ]
        assert [(place.node, place.times) for place in room(answers, amount)] == expected
        assert unknown_room(answers, amount) == [HIDDEN]
