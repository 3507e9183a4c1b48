"""Files that others write, of any content: what reads them answers, or raises what it says, and ends."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Final

import attrs
import test_driver_cordon_file as cordons
import yaml
from fuzzing import TEXTS, check_message, limited, mutated, near
from hypothesis import example, given
from hypothesis import strategies as st
from test_lib_elf import made

from sgpu.cli import main
from sgpu.commands.stage.host import Host
from sgpu.config.flags import UsageError
from sgpu.config.load import load
from sgpu.config.settings import SETTINGS
from sgpu.driver import cordon_file, fault_file
from sgpu.driver.health import Clearance, Fault, FaultRecord
from sgpu.lib.elf import LONGEST_SONAME, ElfError, is_cut_short, read_elf
from sgpu.node.container import Container
from sgpu.node.policy import Policy, Rule
from sgpu.node.state import NodeState
from sgpu.pods.cgroups import container_ids, is_in_pod
from sgpu.pods.checkpoint import FILE, read_checkpoint, strangers
from sgpu.pods.container import read_links
from sgpu.pods.processes import HOST_NAMESPACE, Places, Stat, find_owners, read_stat

ID: Final = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
BOOT: Final = "e2a8e0c5-3c5d-4e38-9a0e-2f1a5c1d0b7e"


@contextmanager
def file(content: bytes, name: str = "file") -> Iterator[Path]:
    """A file with that content, in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        yield path


# The -config file

CONFIG: Final = {
    **{name: field.default for name, field in SETTINGS.items()},
    "ignore-xids": [13, 31],
    "gpus": [
        {"uuid": "GPU-a", "shares": 2},
        {"pci-bus-id": "0000:3b:00.0", "resource": "example.com/a"},
        {"name": "*A100*", "exclude": True},
    ],
}
YAML: Final = [
    yaml.safe_dump(CONFIG).encode(),
    b"a: &a [1, 2]\nb: *a\n<<: {c: !!binary eA==}\nd: 2001-01-01\ne: |\n  x\n? [f]\n: 0x1f\n",
]


@given(mutated(*YAML) | near(CONFIG).map(lambda document: json.dumps(document).encode()) | st.binary(max_size=40))
@example(b'plugin-directory: "/\\ud800"')  # no name of a file has such a character
@example(b"? " + b"x" * 5000 + b"\n: 1")
def test_config_file(content: bytes) -> None:
    """Load settings that `-print-config` prints and that load again as the same, or refuse them in one short line."""
    with file(content) as path, limited():
        try:
            loaded = load({"config": str(path)}, {})
        except UsageError as error:
            check_message(error)
            return
        again = printed(path)
    with file(again) as path:
        reloaded = load({"config": str(path)}, {})
    assert reloaded.settings == loaded.settings
    assert placeless(reloaded.policy) == placeless(loaded.policy)


def placeless(policy: Policy) -> list[Rule]:
    return [attrs.evolve(rule, place="") for rule in policy.rules]


def printed(path: Path) -> bytes:
    """What -print-config prints."""
    with redirect_stdout(io.StringIO()) as output:
        assert main(["-print-config", f"-config={path}"], {}) == 0
    return output.getvalue().encode()


# The kubelet's checkpoint

ENTRY: Final = {
    "PodUID": "db2a923a-6073-4fff-9ded-bdc17874f57a",
    "ContainerName": "main",
    "ResourceName": "example.com/gpu",
    "DeviceIDs": {"-1": ["GPU-a::0"], "0": ["GPU-a::1"]},
    "AllocResp": "Gi8KDC9kZXYvbnZpZGlhMBIML2Rldi9udmlkaWEwGgJydw==",
}
CHECKPOINTS: Final = (
    {"Data": {"PodDeviceEntries": [ENTRY], "RegisteredDevices": {"example.com/gpu": ["GPU-a::0"]}}, "Checksum": 1},
    {"PodDeviceEntries": [{**ENTRY, "DeviceIDs": ["GPU-a::0"]}], "RegisteredDevices": None},
)


@given(
    near(*CHECKPOINTS).map(lambda document: json.dumps(document).encode())
    | mutated(*(json.dumps(document).encode() for document in CHECKPOINTS))
    | st.binary(max_size=40)
)
@example(json.dumps({"Data": {"RegisteredDevices": {"r": [1]}}}).encode())
@example(json.dumps({"Data": {"PodDeviceEntries": [{**ENTRY, "DeviceIDs": [["GPU-a::0"]]}]}}).encode())
def test_checkpoint(content: bytes) -> None:
    """Return texts and nothing else, no more than there are in the file, or raise ValueError."""
    with file(content, FILE) as path, limited():
        try:
            checkpoint = read_checkpoint(path.parent)
        except ValueError:
            return
    texts = [each for entry in checkpoint.entries for each in (entry.pod_uid, entry.container, entry.resource)]
    ids = [each for entry in checkpoint.entries for each in entry.ids]
    ids += [each for listed in checkpoint.healthy.values() for each in listed]
    assert {type(each) for each in (*texts, *ids)} <= {str}
    assert sum(map(len, ids)) <= len(content)
    strangers(ids)
    assert sum(map(len, checkpoint.held.values())) <= len(ids)


# The state file

STATE: Final = {
    "version": 1,
    "boot_id": BOOT,
    "driver_version": "550.54.15",
    "faults": {"GPU-a": [{"reason": "it broke", "since": 17.25, "cure": "reset"}]},
}
FAULTS: Final = st.builds(Fault, TEXTS, st.floats(0, 1e9), st.sampled_from(Clearance))
RECORDS: Final = st.builds(
    FaultRecord, TEXTS, st.dictionaries(TEXTS, st.lists(FAULTS, max_size=3).map(tuple), max_size=3)
)


@given(RECORDS)
def test_state_file_round_trip(record: FaultRecord) -> None:
    """Load in the same boot what was saved, whatever the texts are."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "state.json")
        fault_file.save(path, BOOT, record)
        assert fault_file.load(path, BOOT) == record


@given(
    near(STATE).map(lambda document: json.dumps(document).encode())
    | mutated(json.dumps(STATE).encode())
    | st.binary(max_size=40)
)
@example(json.dumps(STATE).replace("17.25", "-1e308").encode())
def test_state_file(content: bytes) -> None:
    """Return a record that a monitor can begin with and that can be saved, or set the file aside."""
    with file(content) as path, limited():
        record = fault_file.load(path, BOOT)
        if record == FaultRecord():
            return
        fault_file.save(path, BOOT, record)
        assert fault_file.load(path, BOOT) == record
    for faults in record.faults.values():
        assert all(type(fault.reason) is str and 0 <= fault.since < 1e10 for fault in faults)


CORDONS: Final = {"version": 1, "boot_id": BOOT, "cordons": [cordons.ENTRY]}


@given(near(CORDONS).map(lambda document: json.dumps(document).encode()) | mutated(json.dumps(CORDONS).encode()))
def test_cordon_file(content: bytes) -> None:
    """Return cordoned GPUs that can be shown and saved, or set the file aside."""
    with file(content) as path, limited():
        cordoned = cordon_file.load(path, BOOT)
        node = NodeState(Policy("example.com/gpu", 2), 5, clock=lambda: 0.0)
        node.set_cordoned(cordoned)
        node.set_gpus(tuple(cordoned.values()))
        cordon_file.save(path, BOOT, cordoned)
        assert cordon_file.load(path, BOOT) == cordoned


# The host's libraries


def cache(entries: list[tuple[int, int]], strings: bytes) -> bytes:
    """A loader's cache: of each entry, where its name and its path are in the strings."""
    start = 48 + 24 * len(entries)
    table = b"".join(struct.pack("=4xII12x", start + name, start + path) for name, path in entries)
    return struct.pack("=20sII20x", b"glibc-ld.so.cache1.1", len(entries), len(strings)) + table + strings


OFFSETS: Final = st.integers(0, 60)
SMALL_CACHE: Final = cache([(0, 14), (5, 20)], b"libcuda.so.1\0\0/usr/lib/libcuda.so.1\0")
CACHES: Final = st.builds(cache, st.lists(st.tuples(OFFSETS, OFFSETS), max_size=40), st.binary(max_size=60))


#: Each entry names all of the same megabyte.
ONE_STRING: Final = cache([(0, 0)] * 2000, b"/" + b"x" * 2**20 + b"\0")


@given(CACHES | mutated(SMALL_CACHE) | st.binary(max_size=40).map(lambda raw: SMALL_CACHE[:48] + raw))
@example(ONE_STRING)
def test_loader_cache(content: bytes) -> None:
    """Return absolute paths, in all not much longer than the file, or nothing."""
    with file(content, "etc/ld.so.cache") as path, limited():
        found = Host(path.parents[1]).loader_cache()
    assert all(target.is_absolute() for _, target in found)
    assert sum(len(name) + len(str(target)) for name, target in found) <= 2 * len(content)


ELFS: Final = [made(bits, order, 62, b"libx.so.1") for bits in (32, 64) for order in "<>"]


#: Thousands of dynamic segments, and of sections: 4 MB that took hours, when for each segment all sections were read.
MANY_HEADERS: Final = (
    ELFS[2][:16]
    + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 64 + 56 * 5000, 0, 64, 56, 5000, 64, 60_000, 0)
    + struct.pack("<IIQQQQQQ", 2, 0, 0, 0, 0, 16, 16, 0) * 5000
    + bytes(64 * 60_000)
)


@given(mutated(*ELFS) | st.binary(max_size=80).map(lambda raw: ELFS[2][:16] + raw))
@example(MANY_HEADERS)
def test_elf(content: bytes) -> None:
    """Read a header, or raise ElfError; with a soname that is a name."""
    with file(content) as path, limited():
        is_cut_short(path)
        with suppress(ElfError):
            elf = read_elf(path)
            assert elf.bits in (32, 64)
            assert len(elf.soname) <= LONGEST_SONAME


# /proc, cgroups, and the kubelet's links to logs

CGROUP: Final = f"0::/kubepods.slice/kubepods-poddb2a923a_6073_4fff_9ded_bdc17874f57a.slice/cri-containerd-{ID}.scope\n"
STAT: Final = f"7 (python3) S {'1 ' * 18}100 0 0\n"
LINK: Final = f"trainer_team_main-{ID}.log"


@given(st.binary(max_size=15), st.integers(0, 2**64 - 1))
def test_stat_round_trip(name: bytes, start: int) -> None:
    """Tell name and start of a process, whatever it calls itself."""
    text = name.decode(errors="replace")
    assert read_stat(f"7 ({text}) S {'-1 ' * 18}{start} 0 0\n") == Stat(text, start)


@given(mutated(STAT.encode()), mutated(CGROUP.encode(), f"1:cpu:/{ID}\n0::/x/{ID}".encode()), mutated(LINK.encode()))
def test_process(stat: bytes, cgroup: bytes, link: bytes) -> None:
    """Attribute a process or leave it out, whatever the kernel says of it and the links are called."""
    with tempfile.TemporaryDirectory() as directory, limited():
        places = Places(Path(directory, "proc"), Path(directory, "containers"))
        (places.proc / "self/ns").mkdir(parents=True)
        (places.proc / "self/ns/pid").symlink_to(HOST_NAMESPACE)
        (places.proc / "7").mkdir()
        (places.proc / "7/stat").write_bytes(stat)
        (places.proc / "7/cgroup").write_bytes(cgroup)
        places.container_logs.mkdir()
        (places.container_logs / LINK).touch()
        with suppress(OSError, ValueError):  # no name of a file
            (places.container_logs / os.fsdecode(link.replace(b"/", b""))).touch()
        owners = find_owners(places, {7}, 0)
    assert {*owners.containers, *owners.unknown} <= {7}


@given(st.text() | mutated(CGROUP.encode()).map(lambda raw: raw.decode(errors="replace")))
def test_cgroups(text: str) -> None:
    """Return nothing but ids, and each once."""
    with limited():
        is_in_pod(text)
        found = container_ids(text)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in found)
    assert len(set(found)) == len(found)


NAMES: Final = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,60}[a-z0-9])?", fullmatch=True)
IDS: Final = st.text("0123456789abcdef", min_size=64, max_size=64)
CONTAINERS: Final = st.builds(Container, NAMES, NAMES, NAMES)


@given(st.dictionaries(IDS, CONTAINERS, max_size=5), st.lists(mutated(LINK.encode()).map(os.fsdecode), max_size=3))
def test_log_links(containers: dict[str, Container], others: list[str]) -> None:
    """Find each container whatever its names are, the dash in front of an id being the last one, beside any others."""
    links = [f"{each.pod}_{each.namespace}_{each.container}-{key}.log" for key, each in containers.items()]
    found = read_links([*others, *links])
    for key, container in containers.items():
        assert found.find(f"0::/kubepods/pod1/{key}\n") == container
