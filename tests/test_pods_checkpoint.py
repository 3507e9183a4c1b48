"""The kubelet's record of devices, as its versions write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sgpu.pods.checkpoint import FILE, Checkpoint, read_checkpoint, strangers

RESOURCE = "example.com/gpu"


def entry(ids: object, resource: str = RESOURCE) -> Mapping[str, Any]:
    return {"PodUID": "x", "ContainerName": "main", "ResourceName": resource, "DeviceIDs": ids}


@pytest.mark.parametrize(
    ("content", "checkpoint"),
    [
        pytest.param(
            {"Data": {"PodDeviceEntries": [entry({"-1": ["a"], "0": ["b"]}), entry({"1": None})]}, "Checksum": 1},
            Checkpoint({}, {RESOURCE: ["a", "b"]}),
            id="by NUMA node",
        ),
        pytest.param(
            {"Data": {"PodDeviceEntries": [entry(["a"]), entry(None), entry(["b"], "x/y")]}},
            Checkpoint({}, {RESOURCE: ["a"], "x/y": ["b"]}),
            id="lists, before 1.20",
        ),
        pytest.param({"PodDeviceEntries": [entry(["a"])]}, Checkpoint({}, {RESOURCE: ["a"]}), id="bare, up to 1.8"),
        pytest.param(
            {"Data": {"PodDeviceEntries": None, "RegisteredDevices": {RESOURCE: ["a", "b"], "x/y": None}}},
            Checkpoint({RESOURCE: ("a", "b"), "x/y": ()}, {}),
            id="healthy devices",
        ),
        pytest.param({"Data": {"PodDeviceEntries": None, "RegisteredDevices": None}}, Checkpoint({}, {}), id="empty"),
    ],
)
def test_read(tmp_path: Path, content: object, checkpoint: Checkpoint) -> None:
    """Return the healthy devices and the held ones, by resource."""
    (tmp_path / FILE).write_text(json.dumps(content))
    assert read_checkpoint(tmp_path) == checkpoint


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
    """Return the ids that are no share's, or no GPU's."""
    assert strangers(["GPU-a::0", "GPU-a", "MIG-a::0", "GPU-a::07", "GPU-b::12"]) == ["GPU-a", "MIG-a::0", "GPU-a::07"]
