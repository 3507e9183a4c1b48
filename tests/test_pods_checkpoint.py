"""The kubelet's record of devices, as its versions write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sgpu.pods.checkpoint import FILE, read_checkpoint, strangers

RESOURCE = "example.com/gpu"


def entry(ids: object, resource: str = RESOURCE) -> Mapping[str, Any]:
    return {"PodUID": "x", "ContainerName": "main", "ResourceName": resource, "DeviceIDs": ids}


@pytest.mark.parametrize(
    ("content", "healthy", "held"),
    [
        pytest.param(
            {"Data": {"PodDeviceEntries": [entry({"-1": ["a"], "0": ["b"]}), entry({"1": None})]}, "Checksum": 1},
            {},
            {RESOURCE: ["a", "b"]},
            id="by NUMA node",
        ),
        pytest.param(
            {"Data": {"PodDeviceEntries": [entry(["a"]), entry(None), entry(["b"], "x/y")]}},
            {},
            {RESOURCE: ["a"], "x/y": ["b"]},
            id="lists, before 1.20",
        ),
        pytest.param({"PodDeviceEntries": [entry(["a"])]}, {}, {RESOURCE: ["a"]}, id="bare, up to 1.8"),
        pytest.param(
            {"Data": {"PodDeviceEntries": None, "RegisteredDevices": {RESOURCE: ["a", "b"], "x/y": None}}},
            {RESOURCE: ("a", "b"), "x/y": ()},
            {},
            id="healthy devices",
        ),
        pytest.param({"Data": {"PodDeviceEntries": None, "RegisteredDevices": None}}, {}, {}, id="empty"),
    ],
)
def test_read(
    tmp_path: Path, content: object, healthy: Mapping[str, Sequence[str]], held: Mapping[str, Sequence[str]]
) -> None:
    """Return the healthy devices and the held ones, by resource."""
    (tmp_path / FILE).write_text(json.dumps(content))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.healthy, checkpoint.held) == (healthy, held)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\xff",
        "[]",
        '{"Data": 1}',
        '{"Data": {"PodDeviceEntries": 1}}',
        '{"Data": {"PodDeviceEntries": [{}]}}',
        '{"Data": {"RegisteredDevices": [1]}}',
        "[" * 100_000,
    ],
    ids=["empty", "no text", "a list", "a number", "no entries", "an entry without keys", "no devices", "deep"],
)
def test_not_a_kubelet_s(tmp_path: Path, content: str) -> None:
    """Raise ValueError for anything else."""
    (tmp_path / FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"."):
        read_checkpoint(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    """Raise OSError where there is none."""
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path)


def test_strangers() -> None:
    """Return the ids that are no share's, or neither a GPU's nor a MIG instance's."""
    found = strangers(["GPU-a::0", "GPU-a", "MIG-a::0", "MIG-a", "x::0", "GPU-a::07"])
    assert found == ["GPU-a", "MIG-a", "x::0", "GPU-a::07"]
