"""The types of value: what each takes as text and from YAML, and what it refuses."""

from __future__ import annotations

import pytest

from sgpu.config.values import (
    ADDRESS,
    BOOLEAN,
    FILE,
    MEMORY_LIMITS,
    NAMESPACES,
    NUMBERS,
    PATH,
    RESOURCE,
    SHARES,
    TOLERANCE,
    Kind,
    choice,
    fraction,
    integer,
    is_extended_resource,
    parse_limits,
    parse_tolerance,
    seconds,
    split_address,
    split_names,
)

pytestmark = pytest.mark.pure

KINDS = {
    "integer": integer(-1, 10),
    "seconds": seconds(0.1, 60),
    "fraction": fraction(),
    "boolean": BOOLEAN,
    "choice": choice("red", "green"),
    "path": PATH,
    "file": FILE,
    "numbers": NUMBERS,
    "limits": MEMORY_LIMITS,
    "tolerance": TOLERANCE,
    "namespaces": NAMESPACES,
    "address": ADDRESS,
    "resource": RESOURCE,
}
#: By type, each text that it takes and the value of it.
TEXTS: dict[str, dict[str, object]] = {
    "integer": {"-1": -1, "+0": 0, "10": 10},
    "seconds": {"0.1": 0.1, "5": 5.0, "60": 60.0},
    "fraction": {"0": 0.0, "0.95": 0.95, "1": 1.0},
    "boolean": {"true": True, "T": True, "1": True, "FALSE": False, "f": False, "0": False},
    "choice": {"green": "green"},
    "path": {"/": "/", "/a b": "/a b"},
    "file": {"": "", "relative": "relative"},
    "numbers": {"": "", "13": "13", "79, 13": "79, 13", "999999999": "999999999"},
    "limits": {"off": "off", "fair": "fair", "burst=1": "burst=1", "burst=2.5": "burst=2.5"},
    "tolerance": {"10%+512MiB": "10%+512MiB"},
    "namespaces": {"": "", "a,b-c": "a,b-c"},
    "address": {"": "", ":2112": ":2112"},
    "resource": {"a.b/c": "a.b/c"},
}
REFUSED_TEXTS = {
    "integer": ("-2", "11", "", "x", "1.0", "0x1", "1e1", "+", "1_0", " 1", "1 ", "٣", "9" * 5000),
    "seconds": ("0.09", "61", "", "5s", ".5", "5.", "1e1", "-1", "1_0", "nan", "inf"),
    "fraction": ("1.1", "95", "95%", "-0.5", "nan"),
    "boolean": ("", "yes", "on"),
    "choice": ("", "Red", "red or green"),
    "path": ("", "a/b", "~/x", "/a\0b", "/\ud800"),
    "file": ("/", "\0"),
    "numbers": ("0", "-1", "13;31", "13,", "1.5", "1234567890"),
    "tolerance": ("", "10", "1.5GiB", "+1GiB", "10%1GiB", "1GiB+10%", "10%+", "-1%", "1 GiB", "1TiB", "512MB"),
    "namespaces": ("kube_system", "a,", ",", "a;b"),
    "limits": ("", "on", "fair=2", "burst", "burst=", "burst=0.9", "burst=1001", "burst=x", "burst=-1"),
    "address": ("2112",),
    "resource": ("cpu",),
}
#: By type, each value in a YAML file that it takes and what becomes of it.
FILED: dict[str, list[tuple[object, object]]] = {
    "integer": [(10, 10)],
    "seconds": [(0.5, 0.5), (5, 5.0)],
    "fraction": [(1, 1.0)],
    "boolean": [(False, False)],
    "choice": [("red", "red")],
    "path": [("/a", "/a")],
    "numbers": [("13,31", "13,31"), (79, "79")],
    "limits": [("fair", "fair"), (False, "off")],
}
REFUSED_FILED: dict[str, list[object]] = {
    "integer": [True, "5", 5.0, None, 11],
    "seconds": [True, "5", None, 61],
    "fraction": [True, 2],
    "boolean": [1, "true", None],
    "choice": [{}, True],
    "path": [1, ["/a"], "a"],
    "numbers": [True, -1, 1.5, None],
    "limits": [True, 0, 1.5, None],
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    """Take numbers as people write them, ends of ranges included, and booleans as Go does, in any case.

    Refuse all other text, also what Python alone takes for a number.
    """
    for text, value in TEXTS[name].items():
        assert (KINDS[name].from_text(text), type(KINDS[name].from_text(text))) == (value, KINDS[name].type), text
    for text in REFUSED_TEXTS[name]:
        with pytest.raises(ValueError):  # noqa: PT011  # its text is not shown; the caller says what the setting takes
            pytest.fail(f"{text[:20]!r} is taken for {KINDS[name].from_text(text)!r}")


@pytest.mark.parametrize("name", FILED)
def test_yaml(name: str) -> None:
    """Take a value of the right type as it is, and a whole number where it can mean nothing else.

    Convert nothing else, and check ranges as for text. A boolean is no number, though Python counts it as one.
    """
    for value, taken in FILED[name]:
        assert (KINDS[name].from_file(value), type(KINDS[name].from_file(value))) == (taken, KINDS[name].type), value
    for value in REFUSED_FILED[name]:
        with pytest.raises(ValueError):  # noqa: PT011
            pytest.fail(f"{value!r} is taken for {KINDS[name].from_file(value)!r}")


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        pytest.param(SHARES, ("1", "100000"), id="integer"),
        pytest.param(seconds(0.1, 3600), ("0.1", "3600"), id="seconds"),
        pytest.param(choice("red", "green"), ("red", "green"), id="choice"),
    ],
)
def test_a_kind_names_all_that_it_takes(kind: Kind, facts: tuple[str, ...]) -> None:
    """Show both ends of a range, and every word."""
    assert all(fact in kind.takes for fact in facts)


@pytest.mark.parametrize(("text", "factor"), [("off", 0), ("fair", 1), ("burst=2.5", 2.5)])
def test_limits_are_a_factor(text: str, factor: float) -> None:
    """Limits are so many times the fair part of the memory."""
    assert parse_limits(text) == factor


@pytest.mark.parametrize(
    ("text", "part", "fixed"),
    [
        ("10%+512MiB", 0.1, 512 << 20),
        ("2.5%", 0.025, 0),
        ("0%", 0, 0),
        ("1GiB", 0, 1 << 30),
        ("512Mi", 0, 512 << 20),
        ("1000%+1Gi", 10, 1 << 30),
    ],
)
def test_a_tolerance_is_a_part_and_an_amount(text: str, part: float, fixed: int) -> None:
    """Take a percentage and binary units, as NVIDIA's tools and Kubernetes write them."""
    assert TOLERANCE.from_text(text) == text
    assert parse_tolerance(text) == (part, fixed)


@pytest.mark.parametrize(("text", "names"), [("", []), ("a", ["a"]), ("a, b", ["a", "b"])])
def test_names_are_split(text: str, names: list[str]) -> None:
    """Take blanks after a comma, too."""
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        (":2112", "", 2112),
        ("0.0.0.0:80", "0.0.0.0", 80),
        ("gpu-node.example:0", "gpu-node.example", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0.1]:1", "fe80::1%eth0.1", 1),
    ],
)
def test_an_address_is_split(text: str, host: str, port: int) -> None:
    """Take the notation of Go, with brackets around an IPv6 address."""
    assert ADDRESS.from_text(text) == text
    assert split_address(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["host", "host:", ":65536", ":-1", "::1:80", "[::1]", "[]:80", "[host]:80", "a b:80", ":80\n", "/x:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """Refuse what could never be listened on."""
    assert split_address(text) is None
    with pytest.raises(ValueError):  # noqa: PT011
        ADDRESS.from_text(text)


@pytest.mark.parametrize(
    "name",
    [
        *("deepomatic.com/shared-gpu", "a/b", "1.2/3", "a-b.c--d/Shared_GPU.v1-x"),
        *("xkubernetes.io.com/a", "requestsx.com/a"),  # without the slash, and the dot, behind it
        pytest.param("example.com/" + "x" * 63, id="longest name"),
        pytest.param("x" * 244 + "/a", id="longest domain: 253 less requests."),
    ],
)
def test_names_of_extended_resources(name: str) -> None:
    """Take what Kubernetes takes for an extended resource."""
    assert is_extended_resource(name)


@pytest.mark.parametrize(
    "name",
    [
        *("gpu", "/gpu", "example.com/", "example.com/a/b"),
        *("gpu.kubernetes.io/x", "mykubernetes.io/x", "example.com/kubernetes.io/x"),  # Kubernetes looks for the text
        "requests.example.com/gpu",  # the prefix of quotas
        *("Example.com/gpu", "example_a.com/gpu", "-example.com/gpu", "example-.com/gpu", ".example.com/gpu"),
        *("example.com./gpu", "example..com/gpu", "example.com\n/gpu", "exämple.com/gpu"),
        *("example.com/-gpu", "example.com/gpu_", "example.com/g pu", "example.com/gpu\n", "example.com/gpü"),
        pytest.param("example.com/" + "x" * 64, id="name too long"),
        pytest.param("x" * 245 + "/a", id="domain too long with requests."),
    ],
)
def test_other_names(name: str) -> None:
    """Refuse what the kubelet would refuse to register."""
    assert not is_extended_resource(name)
