"""CDI files of claims, by the rules of CDI's schema."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sgpu.dra import cdi
from sgpu.node.edits import ContainerEdits, DeviceNode, Mount

EDITS = ContainerEdits(
    {"A": "1", "B": "x=y"}, (DeviceNode("/host/dev/nvidia0", "/dev/nvidia0"),), (Mount("/host/nvidia", "/usr/nvidia"),)
)
UID = "0bbbd118-70da-4ff8-91a6-60268122ab7a"
#: What schema.json and defs.json of CDI 0.5.0 allow in each object; nothing else may be there.
FIELDS = {
    "": {"cdiVersion", "kind", "annotations", "devices", "containerEdits"},
    "devices": {"name", "annotations", "containerEdits"},
    "containerEdits": {"env", "deviceNodes", "mounts", "hooks"},
    "deviceNodes": {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"},
    "mounts": {"hostPath", "containerPath", "options", "type"},
}


def names(thing: object, parent: str = "") -> list[tuple[str, str]]:
    """Every key with the key of the object that it is in."""
    if isinstance(thing, list):
        return [pair for each in thing for pair in names(each, parent)]
    if isinstance(thing, dict):
        return [(parent, key) for key in thing] + [pair for key in thing for pair in names(thing[key], key)]
    return []


def test_render() -> None:
    """A device has its edits, and no more than the version of the file allows."""
    made = cdi.render({f"{UID}-s": EDITS, "bare": ContainerEdits({"A": "1"}, (), ())})
    assert [key for parent, key in names(made) if key not in FIELDS[parent]] == []
    assert made["cdiVersion"] == "0.5.0"
    device, bare = made["devices"]
    assert device["containerEdits"] == {
        "env": ["A=1", "B=x=y"],
        "deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/host/dev/nvidia0", "permissions": "mrw"}],
        "mounts": [
            {
                "hostPath": "/host/nvidia",
                "containerPath": "/usr/nvidia",
                "options": ["ro", "nosuid", "nodev", "rbind"],
            }
        ],
    }
    assert bare["containerEdits"] == {"env": ["A=1"]}
    # vendor/class=device, as parser.go of CDI has it: letters and digits at both ends, in the class no dot
    assert re.fullmatch(
        r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]=[A-Za-z0-9][A-Za-z0-9_.:-]*[A-Za-z0-9]",
        cdi.device_id(device["name"]),
    )


def test_files(tmp_path: Path) -> None:
    """A file is there at once, and gone as often as it is removed; those of other claims are left over."""
    directory = tmp_path / "cdi"
    for uid in ("1", "2", "1"):
        cdi.write(directory, uid, {"d": EDITS})
    (directory / "k8s.gpu.deepomatic.com-claim_3.json.new").touch()
    (directory / "nvidia.json").touch()
    assert json.loads(cdi.file(directory, "1").read_text())["kind"] == "k8s.gpu.deepomatic.com/claim"
    assert cdi.remove_others(directory, {"1"}) == ["2"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "k8s.gpu.deepomatic.com-claim_1.json",
        "nvidia.json",
    ]
    for _ in range(2):
        cdi.remove(directory, "1")
    assert not cdi.file(directory, "1").exists()
    assert cdi.remove_others(tmp_path / "none", ()) == []
