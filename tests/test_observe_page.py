"""A snapshot as a page for browsers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import attrs
import pytest
from fake_status import GPU, SNAPSHOT

from sgpu.node.usage import ContainerUse
from sgpu.observe.page import render
from sgpu.observe.snapshot import CordonSnapshot, ResourceSnapshot, Snapshot

pytestmark = pytest.mark.pure

USE = ContainerUse("team", "web", "main", 2, 1 << 30, 7, 1)
LIMITED = attrs.evolve(USE, pod="limited", memory_limit=2 << 30, limit_state="pending")
OVER = attrs.evolve(USE, pod="over", exceeded=1 << 29)
NOBODY = ContainerUse("", "", "", 0, processes=3)
DOWN = attrs.evolve(GPU, healthy=False, reason="XID 79: off the bus", memory_used=None, allocated=None, resource="")
#: Void elements, which HTML does not close.
VOID = {"meta"}


class Strict(HTMLParser):
    """Notes elements that are open, and all names of elements and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attributes)}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(snapshot: Snapshot) -> tuple[str, set[str]]:
    """Return the page's text and the names of its elements and attributes; all that is opened is closed."""
    page = render(snapshot, refresh=True).decode()
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return re.sub(r"\s+", " ", re.sub(r"<style>.*</style>|<[^>]*>", " ", page, flags=re.DOTALL)), parser.names


def of(*uses: ContainerUse) -> Snapshot:
    return attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(GPU, containers=uses),))


CORDON = CordonSnapshot("bad row", SNAPSHOT.time - 60, released=True)
CORDONED = attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(GPU, cordon=CORDON),))


@pytest.mark.parametrize(
    ("snapshot", "facts"),
    [
        pytest.param(SNAPSHOT, ["1 GPU, driver 550.54, last sample 1 s ago", "7.0 GiB of 15.0"], id="one"),
        pytest.param(SNAPSHOT, ["37 %", "3 used, 97 free, 0 withheld", "No container has a share"], id="figures"),
        pytest.param(attrs.evolve(SNAPSHOT, gpus=(GPU, DOWN)), ["2 GPUs, 1 unhealthy", "XID 79"], id="unhealthy"),
        pytest.param(attrs.evolve(SNAPSHOT, gpus=(DOWN,)), ["- of 15.0 GiB", "100 in all", "not off"], id="unknown"),
        pytest.param(
            attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(GPU, healthy=False, reason="?"),)), ["97 down"], id="down"
        ),
        pytest.param(attrs.evolve(SNAPSHOT, sampled_at=None, driver_version=""), ["not there yet"], id="no driver"),
        pytest.param(attrs.evolve(SNAPSHOT, simulated=True), ["simulated, no driver"], id="simulated"),
        pytest.param(attrs.evolve(SNAPSHOT, gpus=(), waiting="no library"), ["waiting: no library"], id="waiting"),
        pytest.param(
            attrs.evolve(SNAPSHOT, resources=(ResourceSnapshot("a.b/c", False, 0),)), ["not registered"], id="refused"
        ),
        pytest.param(
            attrs.evolve(SNAPSHOT, resources=(ResourceSnapshot("a.b/c", True, 0),)), ["does not watch"], id="unwatched"
        ),
        pytest.param(of(USE, NOBODY), ["team/web main 2 1.0 GiB - 7 %", "no pod: 3 processes - - - -"], id="uses"),
        pytest.param(CORDONED, ["Cordon cordoned for 1 min (bad row): released for a reset"], id="cordoned"),
        pytest.param(attrs.evolve(SNAPSHOT, api="dra", api_reason="2 claims"), ["(DRA): 2 claims"], id="chosen"),
        pytest.param(of(LIMITED), ["2.0 GiB (not enforced)"], id="limited"),
        pytest.param(of(OVER), ["1.0 GiB (too much) 512 MiB"], id="over its part"),
    ],
)
def test_facts(snapshot: Snapshot, facts: list[str]) -> None:
    """Say what `status` says, with all elements closed, and without scripts or anything to load."""
    text, names = parse(snapshot)
    assert [fact for fact in facts if fact not in text] == []
    assert not names & {"script", "img", "link", "src", "style-src", "onload"}


def test_escape() -> None:
    """Show text of others as text, on one line."""
    evil = "<script>alert('x')</script>\n\"&"
    gpu = attrs.evolve(DOWN, uuid=evil, name=evil, pci_bus_id=evil, reason=evil, resource=evil)
    use = ContainerUse(evil, evil, evil, 1)
    text, names = parse(
        attrs.evolve(
            SNAPSHOT,
            version=evil,
            driver_version=evil,
            processes_problem=evil,
            resources=(ResourceSnapshot(evil, True, 1),),
            gpus=(attrs.evolve(gpu, containers=(use,)),),
        )
    )
    assert "script" not in names
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;\\n&quot;&amp;") == 13


def test_lone_surrogate() -> None:
    """A name can have bytes that are no UTF-8."""
    assert b"\\udc80" in render(of(attrs.evolve(USE, pod="\udc80")), refresh=False)
