"""Container ids in cgroups, as kernels, runtimes and cgroup drivers write them."""

from __future__ import annotations

import pytest

from sgpu.pods.cgroups import container_ids, is_in_pod

pytestmark = pytest.mark.pure

A = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
B = "dc4c41add0c76ddfb37635d4e486925e1f331e7b43884c1c7d03f3cfc262fa58"
#: A pod's UID, and the slice that systemd makes of it.
POD = "db2a923a-6073-4fff-9ded-bdc17874f57a"
UNIT = f"pod{POD.replace('-', '_')}.slice"
SLICE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{UNIT}"


def v1(path: str, *others: str) -> str:
    """The same place in hierarchies of cgroup v1; `others` are lines that come first."""
    lines = [f"{number}:{name}:{path}" for number, name in enumerate(("pids", "cpu,cpuacct", "name=systemd"), start=1)]
    return "\n".join((*others, *lines, ""))


def v2(path: str) -> str:
    return f"0::{path}\n"


@pytest.mark.parametrize(
    ("cgroup", "ids"),
    [
        # cgroupfs driver
        pytest.param(v1(f"/kubepods/besteffort/pod{POD}/{A}"), [A], id="cgroupfs, v1"),
        pytest.param(v2(f"/kubepods/pod{POD}/{A}"), [A], id="cgroupfs, v2"),
        pytest.param(v1(f"/kubepods/burstable/pod{POD}/crio-{A}"), [A], id="cgroupfs, CRI-O"),
        # systemd driver
        pytest.param(v1(f"{SLICE}/cri-containerd-{A}.scope"), [A], id="containerd, v1"),
        pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope"), [A], id="containerd, v2"),
        pytest.param(v2(f"{SLICE}/crio-{A}.scope"), [A], id="CRI-O"),
        pytest.param(v2(f"{SLICE}/crio-{A}.scope/container"), [A], id="CRI-O with crun"),
        pytest.param(v1(f"{SLICE}/docker-{A}.scope"), [A], id="docker"),
        pytest.param(v2(f"{SLICE}/libpod-{A}.scope/container"), [A], id="Podman"),
        pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope/system.slice/x.service"), [A], id="a service in one"),
        # systemd driver of the kubelet, cgroupfs driver of the runtime
        pytest.param(
            v1(f"/system.slice/containerd.service/kubepods-burstable-{UNIT}:cri-containerd:{A}"), [A], id="two drivers"
        ),
        pytest.param(v2(f"/kubepods-{UNIT}:cri-containerd:{A}"), [A], id="two drivers, no systemd"),
        # Relative to a cgroup namespace of our own
        pytest.param(v2(f"/../../kubepods-burstable-{UNIT}/cri-containerd-{A}.scope"), [A], id="beside us"),
        pytest.param(v1(f"/../../besteffort/pod{POD}/{A}", "0::/"), [A], id="beside us, v1"),
        pytest.param(v2("/"), [], id="our own"),
        # Containers in containers
        pytest.param(v1(f"/docker/{B}/kubelet/kubepods/besteffort/pod{POD}/{A}"), [B, A], id="kind"),
        pytest.param(
            v2(f"/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{A}.scope"),
            [B, A],
            id="kind on systemd",
        ),
        pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope/docker/{B}"), [A, B], id="docker in docker"),
        # v1 and v2 together
        pytest.param(v1(f"/kubepods/burstable/pod{POD}/{A}", "0::/"), [A], id="hybrid, v2 is the root"),
        pytest.param(v1("/", f"0::{SLICE}/crio-{A}.scope"), [A], id="hybrid, v1 is the root"),
        pytest.param(f"13:misc:/\n5:devices:/kubepods/pod{POD}/{A}\n0::/\n", [A], id="in one of them"),
        # No containers of Kubernetes
        pytest.param(v2(f"/machine.slice/libpod-conmon-{A}.scope"), [], id="Podman's monitor"),
        pytest.param(v2(f"{SLICE}/crio-conmon-{A}.scope"), [], id="CRI-O's monitor"),
        pytest.param(v1(f"/kubepods/burstable/pod{POD}/crio-conmon-{A}"), [], id="CRI-O's monitor, cgroupfs"),
        pytest.param(v2("/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope"), [], id="a user"),
        pytest.param(v2(f"/kubepods/burstable/pod{POD}"), [], id="a pod, and no container of it"),
        # Odd ones
        pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope (deleted)"), [A], id="about to end"),
        pytest.param(v2(f"/a/{A}0"), [], id="too long"),
        pytest.param(v2(f"/a/{A[1:]}"), [], id="too short"),
        pytest.param(v2(f"/a/{A.upper()}"), [], id="in capitals"),
        pytest.param(v2(f"/a/{A}.service"), [], id="a service with such a name"),
        pytest.param(v2(f"/a/x:y:z/{A}"), [A], id="colons"),
        pytest.param("", [], id="nothing"),
        pytest.param(f"{A}\n", [], id="no cgroup"),
    ],
)
def test_each(cgroup: str, ids: list[str]) -> None:
    """Return all containers that a process is in, the outermost first."""
    assert list(container_ids(cgroup)) == ids


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        pytest.param(v2(f"/kubepods/burstable/pod{POD}"), True, id="the pod's own"),
        pytest.param(v2(f"/kubepods/burstable/pod{POD}/kata_overhead"), True, id="a sandbox"),
        pytest.param(v1(SLICE), True, id="systemd"),
        pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope"), True, id="a container"),
        pytest.param(v2(f"/../..{SLICE}/cri-containerd-{A}.scope"), True, id="relative"),
        pytest.param(v2("/kubepods.slice"), False, id="all pods"),
        pytest.param(v2(f"/system.slice/docker-{A}.scope"), False, id="a container of the host's"),
        pytest.param(v2(f"/user.slice/pod{POD}"), False, id="named like a pod"),
        pytest.param("", False, id="nothing"),
    ],
)
def test_is_in_pod(cgroup: str, expected: bool) -> None:
    """By the kubelet's names for cgroups of pods."""
    assert is_in_pod(cgroup) is expected
