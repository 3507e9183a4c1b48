"""The containers of processes, by the names of the kubelet's links to logs."""

from __future__ import annotations

import pytest

from sgpu.node.container import Container
from sgpu.pods.container import read_links

pytestmark = pytest.mark.pure

A = "7b216cfe8a62b00ed90be013da65d6e1a5a4cf2f81fd97587cb4e61119c2526b"
B = "dc4c41add0c76ddfb37635d4e486925e1f331e7b43884c1c7d03f3cfc262fa58"
#: Of no container of this kubelet.
OTHER = "2a20df40bcc485f63d9ae65c9d848e6e0125000f0ef1af1698e488f6c82512bf"
ONE, TWO = Container("team", "one", "main"), Container("other", "two-0", "a-b-c")


def link(container: Container, container_id: str) -> str:
    """The name of a link, cut as the kubelet cuts it."""
    return f"{container.pod}_{container.namespace}_{container.container}-{container_id}"[:251] + ".log"


def cgroup(*ids: str) -> str:
    """A process in these containers, the outermost first."""
    return f"0::/kubepods/{'/'.join(ids)}\n"


@pytest.mark.parametrize(
    ("ids", "container"),
    [
        pytest.param([A], ONE, id="one"),
        pytest.param([B], TWO, id="other"),
        pytest.param([OTHER, B], TWO, id="in a node that is a container"),
        pytest.param([A, OTHER], ONE, id="with a container of its own"),
        pytest.param([A, B], ONE, id="under a false name"),
        pytest.param([OTHER], None, id="no pod's"),
        pytest.param([], None, id="none"),
    ],
)
def test_find(ids: list[str], container: Container | None) -> None:
    """Return the outermost container that the kubelet has."""
    assert read_links([link(ONE, A), link(TWO, B)]).find(cgroup(*ids)) == container


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lost+found", id="another file"),
        pytest.param(f"one_team_main-{A}.log.gz", id="another suffix"),
        pytest.param(f"one_team_{A}.log", id="no container"),
        pytest.param(f"one_main-{A}.log", id="no namespace"),
        pytest.param(f"one_team_main-{A}0.log", id="no id"),
        pytest.param(f"one_team_main_x-{A}.log", id="four names"),
        pytest.param(f"one_team_main-{A[:40]}.log", id="cut, and not by the kubelet"),
    ],
)
def test_other_names(name: str) -> None:
    """Leave out what no kubelet calls a link."""
    links = read_links([name])
    assert (dict(links.whole), dict(links.cut)) == ({}, {})


@pytest.mark.parametrize(
    ("length", "found"),
    [(184, True), (185, True), (236, True), (237, False), (247, False), (249, False), (300, False)],
    ids=["whole", "a digit less", "twelve digits", "eleven digits", "one digit", "none", "long"],
)
def test_long_names(length: int, found: bool) -> None:
    """Recognize a container by what is left of its id, if that is enough, and take no other for it."""
    long = Container("n" * 20, "p" * (length - 30), "c" * 10)
    links = read_links([link(long, A), link(TWO, B)])
    assert links.find(cgroup(A)) == (long if found else None)
    assert links.find(cgroup(B)) == TWO
    assert links.find(cgroup(OTHER)) is None
