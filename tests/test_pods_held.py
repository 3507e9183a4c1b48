"""Devices by resource and id → shares, and GPUs that other plugins gave out."""

from __future__ import annotations

import pytest

from sgpu.node.container import Container, OtherUse
from sgpu.node.gpu import Gpu, MigInstance
from sgpu.node.shares import Share
from sgpu.pods.held import Held, OtherDevice, collect, other_uses

pytestmark = pytest.mark.pure

OURS, THEIRS = "example.com/gpu", "nvidia.com/gpu"
UUID, OTHER_UUID = "GPU-bf428e1d-f221-55de-a77f-a61755a4d727", "GPU-5d0a3c1e-7b7e-5c0f-9d3b-0e4a8f6b7c22"
INSTANCE = "MIG-0f1e2d3c-4b5a-5968-8776-a5b4c3d2e1f0"
GPUS = [
    Gpu(UUID, "T4", "00000000:3B:00.0", ("nvidia0", "nvidiactl")),
    Gpu(OTHER_UUID, "T4", "00000000:5E:00.0", (), instances=(MigInstance(INSTANCE, "T4 MIG 1g.5gb", "1g.5gb", 5),)),
]
POD, INIT = Container("team", "one", "main"), Container("team", "one", "init")


@pytest.mark.parametrize(
    ("resource", "device_id", "is_share", "is_other"),
    [
        pytest.param(OURS, f"{UUID}::3", True, False, id="a share"),
        pytest.param(THEIRS, f"{UUID}::3", False, True, id="the same id of another plugin"),
        pytest.param(OURS, "nvidia0-_-3", False, True, id="of a plugin before"),
        pytest.param(OURS, f"{UUID}::03", False, True, id="almost a share"),
        pytest.param("example.com/fpga", "fpga-7", False, False, id="no GPU"),
    ],
)
def test_collect(resource: str, device_id: str, is_share: bool, is_other: bool) -> None:
    """Tell shares from devices of others, and leave out what is no GPU."""
    held = collect([(resource, [device_id], POD)], [OURS])
    assert held.shares == {OURS: {Share(UUID, 3): POD} if is_share else {}}
    assert held.others == ({OtherDevice(resource, device_id): POD} if is_other else {})
    assert held.has(resource, device_id) is (is_share or is_other)


def test_merge() -> None:
    """Have both together."""
    listed = Held({OURS: {Share(UUID, 1): POD}}, {OtherDevice(THEIRS, UUID): POD})
    found = Held({OURS: {Share(UUID, 2): INIT}}, {OtherDevice(THEIRS, OTHER_UUID): INIT})
    assert listed.merge(found) == Held(
        {OURS: {Share(UUID, 1): POD, Share(UUID, 2): INIT}},
        {OtherDevice(THEIRS, UUID): POD, OtherDevice(THEIRS, OTHER_UUID): INIT},
    )


@pytest.mark.parametrize(
    ("device_id", "uuid", "whole"),
    [
        pytest.param(UUID, UUID, True, id="NVIDIA's"),
        pytest.param(f"{UUID}::7", UUID, False, id="NVIDIA's, shared"),
        pytest.param(f"{UUID}-7", UUID, False, id="HAMi's"),
        pytest.param(f"MIG-{UUID}/7/0", UUID, False, id="NVIDIA's, MIG by its GPU"),
        pytest.param("nvidia0", UUID, True, id="Google's"),
        pytest.param("nvidia0/vgpu3", UUID, False, id="Google's, shared"),
        pytest.param("nvidia0-_-3", UUID, False, id="Deepomatic's"),
        pytest.param(OTHER_UUID, OTHER_UUID, True, id="of a GPU without device nodes"),
        pytest.param(UUID.replace("b", "c"), None, False, id="of no GPU of this node"),
        pytest.param("nvidia1", None, False, id="of no device node of this node"),
        pytest.param(INSTANCE, INSTANCE, True, id="NVIDIA's, MIG"),
        pytest.param(f"{INSTANCE}::3", INSTANCE, False, id="NVIDIA's, MIG, shared"),
        pytest.param(INSTANCE.replace("0f", "1f"), None, False, id="of no MIG instance of this node"),
        pytest.param("nvidia-nic", None, False, id="no GPU"),
    ],
)
def test_other_uses(device_id: str, uuid: str | None, whole: bool) -> None:
    """Find the GPU or MIG instance by its UUID or device node, and whether it is all of it."""
    uses = other_uses({OtherDevice(THEIRS, device_id): POD}, GPUS)
    assert uses == ({uuid: (OtherUse(POD, THEIRS, whole),)} if uuid else {})
