"""Whose a process is: cgroups as kernels, runtimes and cgroup drivers write them, and the kubelet's links to logs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpu.attribution import Stat, container_ids, read_links, read_stat
from sgpu.usage import Holder

pytestmark = pytest.mark.pure

A = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
B = "dc4c41add0c76ddfb37635d4e486925e1f331e7b43884c1c7d03f3cfc262fa58"
NODE = "2a20df40bcc485f63d9ae65c9d848e6e0125000f0ef1af1698e488f6c82512bf"
#: A pod's UID, as it is and as systemd's units have it.
POD = "db2a923a-6073-4fff-9ded-bdc17874f57a"
UNIT = POD.replace("-", "_")
SLICE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNIT}.slice"


def v1(path: str, *others: str) -> str:
    """A process in the same place of each hierarchy of cgroup v1; `others` are lines that come first."""
    names = ("pids", "blkio", "freezer", "devices", "memory", "cpuset", "cpu,cpuacct", "name=systemd")
    lines = [f"{number}:{name}:{path}" for number, name in enumerate(names, start=len(others) + 1)]
    return "\n".join((*others, *lines, ""))


def v2(path: str) -> str:
    return f"0::{path}\n"


class TestContainerIds:
    @pytest.mark.parametrize(
        ("cgroup", "ids"),
        [
            # cgroupfs driver
            pytest.param(v1(f"/kubepods/besteffort/pod{POD}/{A}"), [A], id="v1 cgroupfs"),
            pytest.param(v1(f"/kubepods/pod{POD}/{A}"), [A], id="v1 cgroupfs, guaranteed"),
            pytest.param(v2(f"/kubepods/burstable/pod{POD}/{A}"), [A], id="v2 cgroupfs"),
            pytest.param(v1(f"/kubepods/burstable/pod{POD}/crio-{A}"), [A], id="v1 cgroupfs, CRI-O"),
            pytest.param(v2(f"/kubepods/burstable/pod{POD}/crio-{A}"), [A], id="v2 cgroupfs, CRI-O"),
            # systemd driver
            pytest.param(v1(f"{SLICE}/cri-containerd-{A}.scope"), [A], id="v1 systemd, containerd"),
            pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope"), [A], id="v2 systemd, containerd"),
            pytest.param(
                v2(f"/kubepods.slice/kubepods-pod{UNIT}.slice/cri-containerd-{A}.scope"), [A], id="guaranteed"
            ),
            pytest.param(v1(f"{SLICE}/crio-{A}.scope"), [A], id="v1 systemd, CRI-O"),
            pytest.param(v2(f"{SLICE}/crio-{A}.scope"), [A], id="v2 systemd, CRI-O"),
            pytest.param(v2(f"{SLICE}/crio-{A}.scope/container"), [A], id="v2 systemd, CRI-O with crun"),
            pytest.param(v1(f"{SLICE}/docker-{A}.scope"), [A], id="v1 systemd, docker"),
            pytest.param(v2(f"{SLICE}/docker-{A}.scope"), [A], id="v2 systemd, docker"),
            pytest.param(v2(f"{SLICE}/libpod-{A}.scope/container"), [A], id="Podman"),
            pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope/init.scope"), [A], id="systemd in the container"),
            pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope/system.slice/x.service"), [A], id="a service in it"),
            # systemd driver of the kubelet, cgroupfs driver of the runtime
            pytest.param(
                v1(f"/system.slice/containerd.service/kubepods-burstable-pod{UNIT}.slice:cri-containerd:{A}"),
                [A],
                id="v1, drivers that differ",
            ),
            pytest.param(
                v2(f"/system.slice/containerd.service/kubepods-besteffort-pod{UNIT}.slice:cri-containerd:{A}"),
                [A],
                id="v2, drivers that differ",
            ),
            pytest.param(
                v2(f"/kubepods-pod{UNIT}.slice:cri-containerd:{A}"), [A], id="drivers that differ, no systemd"
            ),
            # A cgroup namespace of our own
            pytest.param(
                v2(f"/../../kubepods-burstable-pod{UNIT}.slice/cri-containerd-{A}.scope"), [A], id="beside us"
            ),
            pytest.param(v2(f"/../cri-containerd-{A}.scope"), [A], id="in our pod"),
            pytest.param(v2(f"/../../../../besteffort/pod{POD}/{A}"), [A], id="beside us, cgroupfs"),
            pytest.param(v1(f"/../../besteffort/pod{POD}/{A}", "0::/"), [A], id="beside us, v1"),
            pytest.param(v2("/"), [], id="our own"),
            pytest.param(v2("/../../../../system.slice/gdm.service"), [], id="of the host, beside us"),
            # Nodes that are containers, containers in containers
            pytest.param(v1(f"/docker/{NODE}/kubelet/kubepods/besteffort/pod{POD}/{A}"), [NODE, A], id="kind, v1"),
            pytest.param(
                v2(
                    f"/docker/{NODE}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNIT}.slice/"
                    f"cri-containerd-{A}.scope"
                ),
                [NODE, A],
                id="kind with systemd",
            ),
            pytest.param(
                v2(f"/system.slice/docker-{NODE}.scope/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{A}.scope"),
                [NODE, A],
                id="kind on systemd, v2",
            ),
            pytest.param(v1(f"/docker/{NODE}/kubepods/burstable/pod{POD}/{A}"), [NODE, A], id="k3d"),
            pytest.param(v2(f"/k8s.io/{A}"), [A], id="ctr"),
            pytest.param(v1(f"/kubepods/burstable/pod{POD}/{A}/docker/{B}"), [A, B], id="docker in docker"),
            pytest.param(v2(f"{SLICE}/cri-containerd-{A}.scope/docker/{B}"), [A, B], id="docker in docker, v2"),
            # v1 and v2 together
            pytest.param(v1(f"/kubepods/burstable/pod{POD}/{A}", "0::/"), [A], id="hybrid, v2 is the root"),
            pytest.param(v1("/", f"0::{SLICE}/crio-{A}.scope"), [A], id="hybrid, v1 is the root"),
            pytest.param(
                f"13:misc:/\n12:rdma:/\n5:devices:/kubepods/pod{POD}/{A}\n1:name=systemd:/\n0::/\n", [A], id="in few"
            ),
            # No containers of Kubernetes
            pytest.param(v1(f"/docker/{A}"), [A], id="docker"),
            pytest.param(v2(f"/system.slice/docker-{A}.scope"), [A], id="docker, v2"),
            pytest.param(v2(f"/machine.slice/libpod-{A}.scope/container"), [A], id="podman"),
            pytest.param(v2(f"/machine.slice/libpod-conmon-{A}.scope"), [], id="Podman's monitor"),
            pytest.param(v2(f"{SLICE}/crio-conmon-{A}.scope"), [], id="CRI-O's monitor"),
            pytest.param(v1(f"/kubepods/burstable/pod{POD}/crio-conmon-{A}"), [], id="CRI-O's monitor, cgroupfs"),
            pytest.param(v2("/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope"), [], id="a user"),
            pytest.param(v2("/system.slice/containerd.service"), [], id="the runtime"),
            pytest.param(v2("/init.scope"), [], id="init"),
            pytest.param(v1("/"), [], id="kernel"),
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
    def test_each(self, cgroup: str, ids: list[str]) -> None:
        """All containers that a process is in, the outermost first."""
        assert list(container_ids(cgroup)) == ids

    @given(st.text())
    def test_anything(self, text: str) -> None:
        """Whatever is read, there is an answer."""
        assert container_ids(text) == ()


def link(pod: str, namespace: str, container: str, container_id: str) -> str:
    """The name of a link, cut as the kubelet cuts it."""
    return f"{pod}_{namespace}_{container}-{container_id}"[:251] + ".log"


class TestFind:
    LINKS = read_links([link("one", "team", "main", A), link("two-0", "other", "a-b-c", B)])

    @pytest.mark.parametrize(
        ("cgroup", "container"),
        [
            pytest.param(v2(f"{SLICE}/crio-{A}.scope"), Holder("team", "one", "main"), id="one"),
            pytest.param(v1(f"/kubepods/pod{POD}/{B}"), Holder("other", "two-0", "a-b-c"), id="other"),
            pytest.param(v2(f"/docker/{NODE}/kubepods/pod{POD}/{B}"), Holder("other", "two-0", "a-b-c"), id="kind"),
            pytest.param(v2(f"{SLICE}/crio-{A}.scope/docker/{NODE}"), Holder("team", "one", "main"), id="in a pod"),
            pytest.param(v2(f"{SLICE}/crio-{A}.scope/{B}"), Holder("team", "one", "main"), id="under a false name"),
            pytest.param(v2(f"/docker/{NODE}"), None, id="no pod's"),
            pytest.param(v2("/"), None, id="none"),
        ],
    )
    def test_each(self, cgroup: str, container: Holder | None) -> None:
        """A process is the outermost container's that the kubelet has."""
        assert self.LINKS.find(cgroup) == container


class TestLinks:
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("", id="nothing"),
            pytest.param("lost+found", id="another file"),
            pytest.param(f"one_team_main-{A}.log.gz", id="another suffix"),
            pytest.param(f"one_team_{A}.log", id="no container"),
            pytest.param(f"one_main-{A}.log", id="no namespace"),
            pytest.param(f"one_team_main-{A}0.log", id="no id"),
            pytest.param(f"one_team_main_x-{A}.log", id="four names"),
            pytest.param(f"one_team_main-{A[:40]}.log", id="cut, and not by the kubelet"),
        ],
    )
    def test_others(self, name: str) -> None:
        """What is not named so is no container's."""
        links = read_links([name])
        assert (dict(links.whole), dict(links.cut)) == ({}, {})

    @pytest.mark.parametrize("length", [170, 184, 185, 200, 235, 236])
    def test_cut(self, length: int) -> None:
        """A container whose names are long is recognised by what there is of its id, and no other for it."""
        pod, namespace = "p" * 100, "n" * 20
        container = "c" * (length - len(pod) - len(namespace))
        links = read_links([link(pod, namespace, container, A), link("one", "team", "main", B)])
        assert links.find(v2(f"{SLICE}/crio-{A}.scope")) == Holder(namespace, pod, container)
        assert links.find(v2(f"{SLICE}/crio-{B}.scope")) == Holder("team", "one", "main")
        assert links.find(v2(f"{SLICE}/crio-{NODE}.scope")) is None

    @pytest.mark.parametrize("length", [237, 247, 248, 249, 300])
    def test_cut_too_much(self, length: int) -> None:
        """Without its id, it can't be recognised; and nobody else is taken for it."""
        pod = "p" * (length - 30)
        links = read_links([link(pod, "n" * 20, "c" * 10, A)])
        assert links.find(v2(f"{SLICE}/crio-{A}.scope")) is None

    NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,60}[a-z0-9])?", fullmatch=True)
    IDS = st.text("0123456789abcdef", min_size=64, max_size=64)

    @given(st.dictionaries(IDS, st.tuples(NAMES, NAMES, NAMES), max_size=5))
    def test_each_is_found(self, containers: dict[str, tuple[str, str, str]]) -> None:
        """Whatever their names and ids are: the dash in front of an id is the last one."""
        links = read_links(link(pod, namespace, name, key) for key, (namespace, pod, name) in containers.items())
        for key, names in containers.items():
            assert links.find(v2(f"{SLICE}/crio-{key}.scope")) == Holder(*names)


class TestStat:
    REST = "S 1 16052 16052 0 -1 4194560 10 20 30 40 1 2 3 4 20 0 1 0 {start} 2924544 183 18446744073709551615 1 1 0 0"

    @pytest.mark.parametrize("name", ["python3", "", "a b", "x) S 1 (y", "))", "tmux: server"])
    def test_each(self, name: str) -> None:
        """The name can have any character."""
        assert read_stat(f"16052 ({name}) {self.REST.format(start=123456)}\n") == Stat(name, 123456)

    @pytest.mark.parametrize(
        "stat", ["", "16052", "16052 (python3", "16052 (python3) S 1", f"1 (x) {REST.format(start='x')}"]
    )
    def test_anything_else(self, stat: str) -> None:
        """Is a ValueError."""
        with pytest.raises(ValueError, match=r"."):
            read_stat(stat)

    @pytest.mark.parametrize(
        ("name", "server"), [("nvidia-cuda-mps", True), ("nvidia-smi", False), ("nvidia-cuda-mpsx", False)]
    )
    def test_mps(self, name: str, server: bool) -> None:
        """The server of MPS has a long name, of which the kernel keeps a part."""
        assert Stat(name, 0).is_mps_server is server
        assert "nvidia-cuda-mps-server"[:15] == "nvidia-cuda-mps"
