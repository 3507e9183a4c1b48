"""Slices: what is published of each unit, within the API's limits; and the plan that keeps them so."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sgpu.dra.plan import Plan, differences, new_faults, plan, unshared, untainted
from sgpu.dra.slices import (
    DRIVER,
    MemoryDefault,
    Object,
    SliceOptions,
    device_name,
    label_value,
    slice_name,
    slices,
    unit_uuid,
)
from sgpu.lib.sizes import GIB, MIB
from sgpu.node.gpu import Cordon, Gpu, Health, MigInstance, units
from sgpu.node.offers import Offer, Offers
from sgpu.node.policy import OffersRefusedError
from sgpu.node.rank import Placement

pytestmark = pytest.mark.pure

RESOURCE = "deepomatic.com/shared-gpu"
OPTIONS = SliceOptions("node-a")
T4 = Gpu(
    "GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c",
    "Tesla T4",
    "00000000:3B:00.0",
    ("nvidia0",),
    memory_bytes=15 * GIB + MIB // 2,
    numa_node=0,
)


def offer(gpu: Gpu = T4, shares: int = 100, **fields: Any) -> Offer:  # noqa: ANN401  # any of its fields
    return Offer(units(gpu)[0], shares, **fields)


def many(count: int, **fields: Any) -> Offers:  # noqa: ANN401  # any of a GPU's fields
    gpus = [attrs.evolve(T4, uuid=f"GPU-{number:08x}", **fields) for number in range(count)]
    return {RESOURCE: tuple(offer(gpu) for gpu in gpus)}


def devices(made: Sequence[Object]) -> list[Object]:
    return list(chain.from_iterable(thing["spec"]["devices"] for thing in made))


def only(one: Offer, options: SliceOptions = OPTIONS) -> Object:
    (made,) = devices(slices({RESOURCE: (one,)}, {}, options))
    return made


def stored(made: Sequence[Object], generation: int = 1) -> dict[str, Object]:
    """The slices as a server has them."""
    current = {}
    for thing in copy.deepcopy(list(made)):
        thing["spec"]["pool"]["generation"] = generation
        thing["metadata"].update(resourceVersion="7", ownerReferences=[{"uid": "u"}])
        current[thing["metadata"]["name"]] = thing
    return current


def apply(todo: Plan, current: Mapping[str, Object]) -> dict[str, Object]:
    """The slices after all of the plan."""
    written = {thing["metadata"]["name"]: thing for thing in (*todo.create, *todo.replace)}
    return {name: thing for name, thing in {**current, **written}.items() if name not in todo.delete}


class TestDevice:
    def test_all_of_it(self) -> None:
        """A healthy unit, with all that is known of it."""
        options = attrs.evolve(OPTIONS, driver_version="580.95.05", pcie_roots={T4.pci_bus_id: "pci0000:3a"})
        assert only(offer(limit_factor=1.0), options) == {
            "name": "gpu-4404041a-04cf-1ccf-9e70-f139a9b1e23c",
            "allowMultipleAllocations": True,
            "attributes": {
                "type": {"string": "shared-gpu"},
                "resource": {"string": RESOURCE},
                "uuid": {"string": T4.uuid},
                "gpuUUID": {"string": T4.uuid},
                "productName": {"string": "Tesla T4"},
                "memoryLimits": {"bool": True},
                "numaNode": {"int": 0},
                "resource.kubernetes.io/pciBusID": {"string": "0000:3b:00.0"},
                "resource.kubernetes.io/pcieRoot": {"string": "pci0000:3a"},
                "driverVersion": {"version": "580.95.5"},
                "driverBranch": {"int": 580},
            },
            "capacity": {
                "shares": {"value": "100", "requestPolicy": {"default": "1", "validRange": {"min": "1", "step": "1"}}},
                "memory": {
                    "value": "15360Mi",
                    "requestPolicy": {"default": "0", "validRange": {"min": "0", "step": "1Mi"}},
                },
            },
        }

    def test_instance(self) -> None:
        """One of MIG is a device by its own UUID, with its profile, its memory, and the card that it is part of."""
        instance = MigInstance("MIG-a1", "A100 MIG 1g.5gb", "1g.5gb", 4 * GIB)
        made = only(offer(attrs.evolve(T4, mig_mode=True, instances=(instance,)), 10))
        found = {name: made["attributes"][name]["string"] for name in ("uuid", "gpuUUID", "productName", "migProfile")}
        assert list(found.values()) == ["MIG-a1", T4.uuid, "A100 MIG 1g.5gb", "1g.5gb"]
        assert (made["name"], made["capacity"]["memory"]["value"]) == ("mig-a1", "4096Mi")

    def test_what_is_unknown_is_left_out(self) -> None:
        """Memory above all: a capacity of 0 would say that there is none."""
        made = only(offer(attrs.evolve(T4, memory_bytes=None, numa_node=None, pci_bus_id="")))
        assert set(made["capacity"]) == {"shares"}
        assert set(made["attributes"]) == {"type", "resource", "uuid", "gpuUUID", "productName", "memoryLimits"}

    @pytest.mark.parametrize(("shares", "default"), [(100, "153Mi"), (1, "15360Mi"), (10**6, "1Mi")])
    def test_the_fair_part_is_the_default(self, shares: int, default: str) -> None:
        """As many as there are shares fit; and nobody takes none."""
        made = only(offer(shares=shares), attrs.evolve(OPTIONS, memory_default=MemoryDefault.FAIR))
        assert made["capacity"]["memory"]["requestPolicy"] == {
            "default": default,
            "validRange": {"min": "1Mi", "step": "1Mi"},
        }

    @pytest.mark.parametrize(("needs_reset", "evict"), [*product([False, True], repeat=2)])
    def test_a_fault(self, needs_reset: bool, evict: bool) -> None:
        """It keeps pods away, and ends those that are there only where that was asked for and a reset is needed."""
        gpu = attrs.evolve(
            T4, health=Health.UNHEALTHY, reason="XID 79: off the bus", needs_reset=needs_reset, since=1700000000.5
        )
        effect = "NoExecute" if needs_reset and evict else "NoSchedule"
        taint = {"key": f"{DRIVER}/unhealthy", "value": "XID-79-off-the-bus", "effect": effect}
        made = only(offer(gpu), attrs.evolve(OPTIONS, evict=evict))
        assert made["taints"] == [{**taint, "timeAdded": "2023-11-14T22:13:20Z"}]

    @pytest.mark.parametrize(("reason", "more"), [("bad row", {"value": "bad-row"}), ("", {})])
    def test_a_cordon(self, reason: str, more: Mapping[str, str]) -> None:
        """It keeps pods away with its reason, also from a device whose free shares are withheld because of it."""
        gpu = attrs.evolve(T4, cordon=Cordon(reason, 1700000000.5))
        taint = {"key": f"{DRIVER}/cordoned", "effect": "NoSchedule", "timeAdded": "2023-11-14T22:13:20Z", **more}
        assert only(offer(gpu, withheld=frozenset({1})))["taints"] == [taint]
        again = only(offer(attrs.evolve(T4, left_alone=True)))
        assert again["taints"] == [{"key": f"{DRIVER}/cordoned", "effect": "NoSchedule"}]

    def test_full_memory(self) -> None:
        """The watermark keeps pods away too, and takes nothing from the capacity."""
        made = only(offer(withheld=frozenset({1, 2})))
        assert made["taints"] == [{"key": f"{DRIVER}/memory-full", "effect": "NoSchedule"}]
        assert made["capacity"] == only(offer())["capacity"]

    def test_a_long_resource_name(self) -> None:
        """No attribute can hold it, so that no device class could select by it."""
        with pytest.raises(OffersRefusedError, match="64 characters"):
            slices({f"example.com/{'a' * 60}": (offer(),)}, {}, OPTIONS)

    @given(st.sampled_from(["GPU", "MIG"]), st.uuids())
    def test_names_of_devices_lead_back(self, kind: str, number: object) -> None:
        """They are DNS labels, and say which unit it is."""
        uuid = f"{kind}-{number}"
        assert unit_uuid(device_name(uuid)) == uuid
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", device_name(uuid))

    @given(st.text(max_size=200))
    def test_any_reason_makes_a_value_of_a_taint(self, reason: str) -> None:
        """By the API's rule for labels."""
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", label_value(reason))


class TestSlices:
    def test_no_units(self) -> None:
        """One empty slice says that the driver is there."""
        (made,) = slices({RESOURCE: ()}, {}, OPTIONS)
        assert made["metadata"] == {"name": f"00000-{DRIVER}-node-a"}
        assert made["spec"] == {
            "driver": DRIVER,
            "nodeName": "node-a",
            "pool": {"name": "node-a", "generation": 0, "resourceSliceCount": 1},
            "devices": [],
        }

    @pytest.mark.parametrize(
        ("placement", "order"),
        [(Placement.SPREAD, [1, 3, 0, 2]), (Placement.PACK, [2, 0, 1, 3])],
        ids=lambda value: getattr(value, "value", ""),
    )
    def test_order(self, placement: Placement, order: list[int]) -> None:
        """The scheduler takes the first that fits; equals stay as they are."""
        used = {"GPU-00000000": 0.5, "GPU-00000002": 0.75}
        made = slices(many(4), used, attrs.evolve(OPTIONS, placement=placement))
        assert [each["name"] for each in devices(made)] == [f"gpu-{number:08x}" for number in order]

    def test_without_taints_faulty_units_are_left_out(self) -> None:
        """Where the server does not keep taints."""
        offers = {RESOURCE: (offer(), offer(attrs.evolve(T4, uuid="GPU-b", health=Health.UNHEALTHY)))}
        made = slices(offers, {}, attrs.evolve(OPTIONS, taints=False))
        assert [each["name"] for each in devices(made)] == [device_name(T4.uuid)]

    @given(st.integers(0, 200), st.dictionaries(st.integers(0, 199), st.floats(0, 1)), st.sampled_from(Placement))
    def test_the_limits_of_the_api(self, count: int, used: Mapping[int, float], placement: Placement) -> None:
        """Every device once, none too many in a slice, and each slice knows how many there are."""
        options = attrs.evolve(OPTIONS, placement=placement)
        made = slices(many(count), {f"GPU-{number:08x}": part for number, part in used.items()}, options)
        assert sorted(each["name"] for each in devices(made)) == [f"gpu-{number:08x}" for number in range(count)]
        assert all(len(thing["spec"]["devices"]) <= 64 for thing in made)
        assert {thing["spec"]["pool"]["resourceSliceCount"] for thing in made} == {len(made)}
        names = [thing["metadata"]["name"] for thing in made]
        assert names == sorted(set(names))

    @example("a" * 253, 0)
    @given(st.text("abc.-", min_size=1, max_size=253), st.integers(0, 99))
    def test_names_fit(self, node: str, index: int) -> None:
        """Even that of a node whose own name fills what a name can have."""
        assert len(slice_name(index, node)) <= 253
        assert slice_name(index, node).startswith(f"{index:05x}-{DRIVER}-")


class TestPlan:
    def test_the_first_time(self) -> None:
        """All are created, of one generation, and belong to the Node."""
        todo = plan(slices(many(65), {}, OPTIONS), {}, [{"uid": "u"}])
        assert [thing["spec"]["pool"]["generation"] for thing in todo.create] == [1, 1]
        assert {thing["metadata"]["ownerReferences"][0]["uid"] for thing in todo.create} == {"u"}
        assert (todo.replace, todo.delete) == ((), ())

    def test_a_single_slice_is_changed_in_place(self) -> None:
        """Another generation would make consumers wait for nothing."""
        todo = plan(slices(many(3), {}, OPTIONS), stored(slices(many(2), {}, OPTIONS), 5))
        (thing,) = todo.replace
        assert thing["spec"]["pool"]["generation"] == 5
        assert thing["metadata"]["resourceVersion"] == "7"
        assert thing["metadata"]["ownerReferences"] == [{"uid": "u"}]

    @pytest.mark.parametrize(("before", "after"), [(130, 131), (1, 65), (65, 1), (130, 65), (65, 0)])
    def test_of_several_all_get_the_next_generation(self, before: int, after: int) -> None:
        """So that nobody mixes old ones with new ones; those that are too many go last."""
        wanted, current = slices(many(after), {}, OPTIONS), stored(slices(many(before), {}, OPTIONS), 5)
        done = apply(plan(wanted, current), current)
        assert {thing["spec"]["pool"]["generation"] for thing in done.values()} == {6}
        assert len(done) == len(wanted)

    def test_what_a_server_writes_otherwise_is_the_same(self) -> None:
        """Amounts in their shortest form, times that it adds, fields that a newer one has."""
        wanted = slices({RESOURCE: (offer(shares=1000, withheld=frozenset({1})),)}, {}, OPTIONS)
        current = stored(wanted)
        (thing,) = current.values()
        (device,) = thing["spec"]["devices"]
        device["capacity"]["memory"]["value"], device["capacity"]["shares"]["value"] = "15Gi", "1k"
        device["taints"][0]["timeAdded"] = "2026-01-01T00:00:00Z"
        device["newer"] = thing["spec"]["newer"] = "x"
        assert not plan(wanted, current)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("allowMultipleAllocations",), None),
            (("capacity", "memory", "requestPolicy"), None),
            (("capacity", "memory", "value"), "16Gi"),
            (("capacity", "other"), {"value": "1"}),
            (("attributes", "other"), {"int": 1}),
            (("attributes", "numaNode", "int"), 1),
            (("taints",), [{"key": "a/b", "effect": "NoSchedule"}]),
        ],
        ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
    )
    def test_what_somebody_changed_is_put_right(self, path: Sequence[str], value: object) -> None:
        """Whatever is not as it should be."""
        wanted = slices(many(1), {}, OPTIONS)
        current = stored(wanted)
        (thing,) = current.values()
        place = thing["spec"]["devices"][0]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert list(differences(wanted[0], thing)) == [f"spec.devices[0].{'.'.join(path)}"]
        assert plan(wanted, current).replace

    @given(st.integers(0, 140), st.lists(st.integers(1, 9), max_size=4), st.integers(0, 140))
    def test_it_ends_at_what_is_wanted(self, before: int, generations: list[int], after: int) -> None:
        """From any mix of slices, after one plan there is nothing left to do."""
        wanted = slices(many(after), {}, OPTIONS)
        current: dict[str, Object] = {}
        for made, generation in zip(slices(many(before), {}, OPTIONS), generations, strict=False):
            current.update(stored([made], generation))
        assert not plan(wanted, apply(plan(wanted, current), current))

    def test_new_faults(self) -> None:
        """A fault can't wait; one that is over can, and so can a device that is new."""
        well, ill = slices(many(2), {}, OPTIONS), slices(many(2, health=Health.UNHEALTHY), {}, OPTIONS)
        assert new_faults(ill, stored(well))
        assert not new_faults(well, stored(ill))
        assert not new_faults(slices(many(3), {}, OPTIONS), stored(well))

    @pytest.mark.parametrize(
        ("paths", "expected"),
        [
            (["spec.devices[0].allowMultipleAllocations", "spec.devices[0].taints"], (True, False)),
            (["spec.devices[0].capacity.memory.requestPolicy"], (True, False)),
            (["spec.devices[0].taints"], (False, True)),
            (["spec.devices[0].attributes.uuid"], (False, False)),
            ([], (False, False)),
        ],
    )
    def test_what_was_dropped(self, paths: list[str], expected: tuple[bool, bool]) -> None:
        """Whether a shared GPU is still one, and whether taints are all that is missing."""
        assert (unshared(paths), untainted(paths)) == expected
