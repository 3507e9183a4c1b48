"""Which of the free shares a container should get."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpu.device import Share
from sgpu.placement import preferred

pytestmark = pytest.mark.pure

share_ids = st.builds("{}::{}".format, st.sampled_from(["GPU-a", "GPU-b", "GPU-c"]), st.integers(0, 12))
#: Ids as kubelets send them, and what only a broken one would.
any_ids = st.one_of(share_ids, st.text(max_size=8), st.sampled_from(["GPU-a::01", "GPU-a", "::", "::1", ""]))
sizes = st.integers(-3, 50)


def ids(text: str) -> list[str]:
    """`a0 b1` → the ids of share 0 of GPU a and share 1 of GPU b."""
    return [f"GPU-{word[0]}::{word[1:]}" for word in text.split()]


class TestTable:
    @pytest.mark.parametrize(
        ("available", "must_include", "size", "chosen"),
        [
            pytest.param("a0 a1 b0 b1", "", 2, "a0 b0", id="one of each GPU"),
            pytest.param("a0 b0 b1", "", 1, "b0", id="from the GPU with most left"),
            pytest.param("a0 b0 b1 b2", "", 3, "b0 b1 a0", id="until others have as many"),
            pytest.param("b0 a0", "", 1, "a0", id="ties go by UUID"),
            pytest.param("a10 a9 a2", "", 2, "a2 a9", id="then by number, not by text"),
            pytest.param("a0 a1 b0 b1", "a1", 2, "a1 b0", id="those that must be count for their GPU"),
            pytest.param("a0 a1 b0", "b0 a1", 2, "b0 a1", id="just those that must be"),
            pytest.param("a0 a1 b0", "b0 a1", 1, "b0 a1", id="more that must be than asked for"),
            pytest.param("a0", "b7", 2, "b7 a0", id="one that must be but is not free"),
            pytest.param("a0 a1", "", 5, "a0 a1", id="fewer than asked for"),
            pytest.param("a0 a0 a1", "", 3, "a0 a1", id="one offered twice"),
            pytest.param("a0 a1", "a0 a0", 2, "a0 a1", id="one demanded twice"),
            pytest.param("a0", "", 0, "", id="none asked for"),
            pytest.param("a0", "", -1, "", id="less than none"),
            pytest.param("", "", 3, "", id="none free"),
            pytest.param("a0 a01 ax", "", 3, "a0", id="ids that name no share"),
        ],
    )
    def test_preferred(self, available: str, must_include: str, size: int, chosen: str) -> None:
        """What must be included, then the lowest share of the GPU with most left, again and again."""
        assert preferred(ids(available), ids(must_include), size) == ids(chosen)

    def test_garbage(self) -> None:
        """Ids that name no share are never chosen."""
        assert preferred(["", "::", "GPU-a", "GPU-a::-1", "x::0"], [], 9) == ["x::0"]

    def test_unknown_gpu(self) -> None:
        """Which GPUs there are is not this module's to know: any well-formed id can be chosen."""
        assert preferred(["GPU-gone::3"], [], 1) == ["GPU-gone::3"]

    def test_endless_number(self) -> None:
        """An id whose number is longer than Python converts is no error either."""
        assert preferred([f"GPU-a::{'9' * 5000}", "GPU-a::1"], [], 2)[0] == "GPU-a::1"


#: Gives a test any request that a kubelet could make.
any_request = given(available=st.lists(any_ids, max_size=40), must_include=st.lists(any_ids, max_size=8), size=sizes)
#: Times belong to the machine.
untimed = settings(deadline=None)


class TestAnyRequest:
    """Whatever the kubelet asks; a method raising is a failure of each of these."""

    @untimed
    @any_request
    def test_subset(self, available: list[str], must_include: list[str], size: int) -> None:
        """Only ids that were offered or demanded are chosen, none twice."""
        chosen = preferred(available, must_include, size)
        assert set(chosen) <= {*available, *must_include}
        assert len(chosen) == len(set(chosen))

    @untimed
    @any_request
    def test_must_include(self, available: list[str], must_include: list[str], size: int) -> None:
        """What must be included comes first, all of it, in its order."""
        demanded = list(dict.fromkeys(must_include))
        assert preferred(available, must_include, size)[: len(demanded)] == demanded

    @untimed
    @any_request
    def test_size(self, available: list[str], must_include: list[str], size: int) -> None:
        """As many as asked for, unless more are demanded or fewer are there."""
        demanded = set(must_include)
        free = {share_id for share_id in available if Share.parse(share_id)} - demanded
        expected = max(len(demanded), min(size, len(demanded) + len(free)))
        assert len(preferred(available, must_include, size)) == expected

    @untimed
    @any_request
    def test_spread(self, available: list[str], must_include: list[str], size: int) -> None:
        """Each choice falls on a GPU that no other had more free shares than, and on its lowest one."""
        demanded = set(must_include)
        free = {share: share_id for share_id in available if (share := Share.parse(share_id))}
        free = {share: share_id for share, share_id in free.items() if share_id not in demanded}
        for share_id in preferred(available, must_include, size)[len(demanded) :]:
            left = Counter(share.uuid for share in free)
            share = Share.parse(share_id)
            assert share
            assert left[share.uuid] == max(left.values())
            assert share.number == min(other.number for other in free if other.uuid == share.uuid)
            del free[share]

    @untimed
    @any_request
    def test_order_of_offer(self, available: list[str], must_include: list[str], size: int) -> None:
        """The order in which ids are offered, which kubelets vary, makes no difference."""
        chosen = preferred(available, must_include, size)
        assert preferred(available[::-1], must_include, size) == chosen
        assert preferred(sorted(available), must_include, size) == chosen
