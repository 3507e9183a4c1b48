"""A snapshot as it travels from the daemon to `status`."""

from __future__ import annotations

import json

import attrs
import pytest
from fake_status import GPU, SNAPSHOT

from sgpu.node.container import StaleAnswer
from sgpu.node.usage import ContainerUse
from sgpu.observe.snapshot import CordonSnapshot, Snapshot, decode, encode, publish

pytestmark = pytest.mark.pure

USES = (ContainerUse("team", "web", "main", 2, 1 << 30, 7, 1), ContainerUse("", "", "", 0))
INSTANCE = attrs.evolve(GPU, uuid="MIG-a", parent="GPU-a", mig_profile="1g.5gb")
UNKNOWN = attrs.evolve(GPU, memory_used=None, utilization=None, allocated=None, containers=USES)


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(attrs.evolve(SNAPSHOT, gpus=(GPU, UNKNOWN, INSTANCE), sampled_at=None), id="full"),
        pytest.param(attrs.evolve(SNAPSHOT, gpus=(), resources=()), id="empty"),
        pytest.param(
            attrs.evolve(
                SNAPSHOT,
                gpus=(attrs.evolve(GPU, cordon=CordonSnapshot("bad row", 5.0, released=True)),),
                cordoned_elsewhere=("GPU-b",),
            ),
            id="cordoned",
        ),
        pytest.param(attrs.evolve(SNAPSHOT, stale_answers=(StaleAnswer("a/b", ("/x",), ("/y", "/z")),)), id="stale"),
    ],
)
def test_round_trip(snapshot: Snapshot) -> None:
    """Decode what was encoded; what is unknown stays unknown."""
    assert decode(encode(snapshot)) == snapshot


def test_publish() -> None:
    """Leave out what names device nodes, and nothing else."""
    stale = attrs.evolve(SNAPSHOT, stale_answers=(StaleAnswer("a/b", ("/x",), ("/y",)),))
    assert publish(stale) == SNAPSHOT


def test_newer_daemon() -> None:
    """Leave out fields that only a newer daemon has; a field that an older one lacks has its default."""
    fields = json.loads(encode(attrs.evolve(SNAPSHOT, gpus=(UNKNOWN,))))
    for values in (fields, *fields["gpus"], *fields["gpus"][0]["containers"], *fields["resources"]):
        values["new"] = 1
    del fields["stale_answers"], fields["stale_after"], fields["cordoned_elsewhere"], fields["gpus"][0]["cordon"]
    assert decode(json.dumps(fields).encode()) == attrs.evolve(SNAPSHOT, gpus=(UNKNOWN,))


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"gpus": []}', b'{"gpus": 1, "resources": []}', b"[" * 100_000],
    ids=["empty", "a list", "no keys", "half", "no list", "deep"],
)
def test_anything_else(text: bytes) -> None:
    """Raise ValueError for anything else, as a daemon of another version may send."""
    with pytest.raises(ValueError, match=r"."):
        decode(text)
