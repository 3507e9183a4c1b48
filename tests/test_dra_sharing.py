"""What a claim and its device class may say about sharing."""

from __future__ import annotations

import pytest
from dra_claims import sharing

from sgpu.dra.sharing import SharingConfig, SharingConfigError, read_configs
from sgpu.dra.slices import Object

pytestmark = pytest.mark.pure


def test_nothing_said() -> None:
    """Without a configuration for this driver, everything is as the node has it."""
    other = {"source": "FromClaim", "opaque": {"driver": "gpu.nvidia.com", "parameters": {"kind": "GpuConfig"}}}
    assert read_configs([other, {"source": "FromClass"}], "gpu") == SharingConfig()


def test_later_fields_win() -> None:
    """A claim changes single fields and variables of its class."""
    from_class = sharing("FromClass", memoryLimit="Off", frameworkHints=False, environment={"A": "1", "B": "1"})
    from_claim = sharing(frameworkHints=True, environment={"B": "2"})
    assert read_configs([from_class, from_claim], "gpu") == SharingConfig(True, False, {"A": "1", "B": "2"})
    claimed = sharing(memoryLimit="Claimed")
    assert read_configs([from_class, claimed], "gpu").limited


@pytest.mark.parametrize(
    ("requests", "applies"),
    [((), True), (("gpu",), True), (("other",), False), (("gpu/big",), True), (("gpu/small",), False)],
)
def test_requests(requests: tuple[str, ...], applies: bool) -> None:
    """A configuration applies to all requests, or to those it names, or to one alternative of a request."""
    config = read_configs([sharing(requests=requests, environment={"A": "1"})], "gpu/big")
    assert bool(config.environment) is applies


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param(sharing(frameworkHint=True), "no field 'frameworkHint'", id="misspelt"),
        pytest.param(sharing(apiVersion="gpu.deepomatic.com/v9"), "takes gpu.deepomatic.com/v1alpha1", id="version"),
        pytest.param(sharing(kind="GpuConfig"), "kind 'GpuConfig'", id="kind"),
        pytest.param(sharing(frameworkHints="yes"), "'yes' is not true or false", id="hints"),
        pytest.param(sharing(memoryLimit="off"), "'off' is not Claimed or Off", id="limit"),
        pytest.param(sharing(memoryLimit="Off"), "is for a DeviceClass to say", id="limit of a claim"),
        pytest.param(sharing(environment=["A"]), "variables and their values", id="no variables"),
        pytest.param(sharing(environment={"1A": ""}), "'1A' is no name", id="name"),
        pytest.param(sharing(environment={"SGPU_SHARES": "9"}), "'SGPU_SHARES' is no name", id="ours"),
        pytest.param(sharing(environment={"NVIDIA_VISIBLE_DEVICES": "all"}), "is no name", id="another GPU"),
        pytest.param(sharing(environment={"A": 1}), "the value of A is not a text", id="number"),
    ],
)
def test_refused(entry: Object, message: str) -> None:
    """What is not understood is refused, so that nobody believes it is in force."""
    with pytest.raises(SharingConfigError, match=message):
        read_configs([entry], "gpu")


def test_no_object() -> None:
    """Parameters are an object, which the API server does not check."""
    with pytest.raises(SharingConfigError, match="no object"):
        read_configs([{"opaque": {"driver": "gpu.deepomatic.com", "parameters": [1]}}], "gpu")
