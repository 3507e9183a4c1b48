"""A snapshot as it travels from the daemon to `status`."""

from __future__ import annotations

import attrs
import pytest

from sgpu.snapshot import ContainerUse, GpuSnapshot, ResourceSnapshot, Snapshot, decode, encode

pytestmark = pytest.mark.pure

USE = ContainerUse("default", "server", "main", shares=2, memory_used=1 << 30, utilisation=7, processes=1)
GPU = GpuSnapshot(
    uuid="GPU-a",
    name="Tesla T4",
    pci_bus_id="00000000:3B:00.0",
    resource="deepomatic.com/shared-gpu",
    healthy=False,
    reason="XID 79",
    since=1.5,
    memory_total=16 << 30,
    memory_used=None,
    memory_free=None,
    utilisation=None,
    shares=100,
    allocated=None,
    withheld=3,
    containers=(USE,),
)
SNAPSHOT = Snapshot(
    version="0.1.0",
    time=2.0,
    driver_version="550.54",
    waiting="",
    sampled_at=None,
    holders_known=False,
    processes_trouble="",
    resources=(ResourceSnapshot("deepomatic.com/shared-gpu", registered=True, streams=1),),
    gpus=(GPU,),
)


@pytest.mark.parametrize("snapshot", [SNAPSHOT, attrs.evolve(SNAPSHOT, gpus=(), resources=())], ids=["full", "empty"])
def test_what_is_sent_is_what_arrives(snapshot: Snapshot) -> None:
    """All of it, with nothing that is not known turned into a figure."""
    assert decode(encode(snapshot)) == snapshot


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"gpus": []}', b'{"gpus": 1, "resources": []}', b"[" * 100_000])
def test_anything_else_is_refused(text: bytes) -> None:
    """As when the daemon is of another version."""
    with pytest.raises(ValueError, match=r"."):
        decode(text)
