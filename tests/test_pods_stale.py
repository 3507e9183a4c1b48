"""Stored answers of the kubelet that are no longer right."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from sgpu.api import v1beta1_pb2
from sgpu.node.container import Container, StaleAnswer
from sgpu.node.gpu import Gpu, MigInstance
from sgpu.node.shares import Share
from sgpu.pods.checkpoint import FILE, read_checkpoint
from sgpu.pods.held import Holders
from sgpu.pods.stale import stale_answers

RESOURCE = "example.com/gpu"
HELD = {RESOURCE: {Share(f"GPU-{name}", 0): Container("team", "trainer", "main") for name in "abc"}}
GPUS = [
    Gpu("GPU-a", "Tesla T4", "00000000:3B:00.0", ("nvidia0", "nvidiactl", "nvidia-uvm")),
    Gpu("GPU-b", "Tesla T4", "00000000:5E:00.0", ("nvidia1", "nvidiactl", "nvidia-uvm")),
    Gpu("GPU-c", "Tesla T4", "00000000:AF:00.0", (), simulated=True),
]

#: Of one GPU, with the minor numbers of their capabilities.
INSTANCES = {"MIG-a": (21, 22), "MIG-b": (30, 31)}


def stored(*nodes: str) -> str:
    """Return an answer with these device nodes, as the kubelet stores it."""
    devices = [v1beta1_pb2.DeviceSpec(container_path=f"/dev/{node}") for node in (*nodes, "nvidiactl", "nvidia-uvm")]
    return base64.b64encode(v1beta1_pb2.ContainerAllocateResponse(devices=devices).SerializeToString()).decode()


def stale(
    directory: Path,
    answer: object,
    ids: Sequence[str],
    resource: str = RESOURCE,
    held: Holders = HELD,
    gpus: Sequence[Gpu] = GPUS,
) -> list[StaleAnswer]:
    entry = {"PodUID": "u", "ContainerName": "main", "ResourceName": resource, "DeviceIDs": {"-1": ids}}
    data = {"PodDeviceEntries": [{**entry, "AllocResp": answer}]}
    (directory / FILE).write_text(json.dumps({"Data": data, "Checksum": 1}))
    return stale_answers(read_checkpoint(directory), held, gpus)


@pytest.mark.parametrize(
    ("nodes", "ids", "right"),
    [
        (("nvidia1",), ["GPU-a::0"], ("/dev/nvidia0",)),
        (("nvidia1", "nvidia2"), ["GPU-a::0", "GPU-b::0"], ("/dev/nvidia0", "/dev/nvidia1")),
        (("nvidia0", "nvidia1"), ["GPU-a::0"], ("/dev/nvidia0",)),
    ],
    ids=["another GPU", "one of two", "one too many"],
)
def test_stale(tmp_path: Path, nodes: Sequence[str], ids: Sequence[str], right: tuple[str, ...]) -> None:
    """Name the pod, the GPUs that it gets and those that it should get."""
    paths = tuple(f"/dev/{node}" for node in nodes)
    assert stale(tmp_path, stored(*nodes), ids) == [StaleAnswer("team/trainer", paths, right)]


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        pytest.param(stored("nvidia0"), ["GPU-a::0"], id="right"),
        pytest.param(stored("nvidia1", "nvidia0"), ["GPU-a::0", "GPU-b::0"], id="right, in another order"),
        pytest.param(stored("nvidia1"), ["GPU-a::1"], id="of a pod that has ended"),
        pytest.param(stored("nvidia1"), ["GPU-d::0"], id="of a GPU that is not there"),
        pytest.param(stored("nvidia1"), ["GPU-c::0"], id="of a simulated GPU"),
        pytest.param(stored("nvidia1"), ["nvidia0-_-1"], id="of another plugin"),
        pytest.param(stored(), ["GPU-a::0"], id="no GPU in it"),
        pytest.param(None, ["GPU-a::0"], id="none stored"),
        pytest.param("?", ["GPU-a::0"], id="not base64"),
        pytest.param("/////w==", ["GPU-a::0"], id="not an answer"),
    ],
)
def test_not_stale(tmp_path: Path, answer: object, ids: Sequence[str]) -> None:
    """Leave out answers that are right, or of which nothing is known."""
    assert stale(tmp_path, answer, ids) == []


def test_other_resource(tmp_path: Path) -> None:
    """Leave out resources that are not ours."""
    assert stale(tmp_path, stored("nvidia1"), ["GPU-a::0"], "example.com/other") == []


@pytest.mark.parametrize(
    ("nodes", "ids", "right"),
    [
        (("nvidia3", "nvidia-caps/nvidia-cap21", "nvidia-caps/nvidia-cap22"), ["MIG-a::0"], None),
        (("nvidia3", "nvidia-caps/nvidia-cap30", "nvidia-caps/nvidia-cap31"), ["MIG-a::0"], (21, 22)),
        (("nvidia3", "nvidia-caps/nvidia-cap30", "nvidia-caps/nvidia-cap31"), ["MIG-a::0", "MIG-b::0"], None),
        (("nvidia3",), ["MIG-a::0"], (21, 22)),
    ],
    ids=["right", "another instance of the same GPU", "one of two", "the GPU alone"],
)
def test_instances(tmp_path: Path, nodes: Sequence[str], ids: Sequence[str], right: tuple[int, ...] | None) -> None:
    """A MIG instance is told from others of its GPU by its capabilities. Of several, a container gets one."""
    capabilities = {name: tuple(f"nvidia-caps/nvidia-cap{n}" for n in ns) for name, ns in INSTANCES.items()}
    instances = (MigInstance(name, "", "1g.5gb", 1, nodes) for name, nodes in capabilities.items())
    gpu = attrs.evolve(GPUS[0], device_nodes=("nvidia3", "nvidiactl"), mig_mode=True, instances=tuple(instances))
    held = {RESOURCE: {Share(name, 0): Container("team", "trainer", "main") for name in INSTANCES}}
    found = stale(tmp_path, stored(*nodes), ids, held=held, gpus=[gpu])
    assert [answer.right for answer in found] == (
        [] if right is None else [(*(f"/dev/nvidia-caps/nvidia-cap{n}" for n in right), "/dev/nvidia3")]
    )
