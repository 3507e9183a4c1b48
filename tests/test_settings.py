"""Every knob: what it takes, and what it is when nobody says."""

from __future__ import annotations

import attrs
import pytest

from sgpu import settings
from sgpu.settings import (
    ADDRESS,
    BOOLEAN,
    FILE,
    KNOBS,
    NUMBERS,
    PATH,
    RESOURCE,
    Kind,
    Settings,
    choice,
    integer,
    is_extended_resource,
    split_address,
)

pytestmark = pytest.mark.pure

TEN = integer(1, 10)
COLOUR = choice("red", "green")


class TestFromText:
    @pytest.mark.parametrize(
        ("kind", "text", "value"),
        [
            pytest.param(TEN, "1", 1, id="least"),
            pytest.param(TEN, "10", 10, id="most"),
            pytest.param(BOOLEAN, "true", True, id="true"),
            pytest.param(BOOLEAN, "1", True, id="1"),
            pytest.param(BOOLEAN, "TRUE", True, id="true in capitals"),
            pytest.param(BOOLEAN, "false", False, id="false"),
            pytest.param(BOOLEAN, "0", False, id="0"),
            pytest.param(PATH, "/", "/", id="root"),
            pytest.param(PATH, "/a b", "/a b", id="path with a space"),
            pytest.param(FILE, "relative", "relative", id="file"),
            pytest.param(FILE, "", "", id="no file"),
            pytest.param(COLOUR, "green", "green", id="one of the words"),
            pytest.param(RESOURCE, "a.b/c", "a.b/c", id="resource"),
        ],
    )
    def test_taken(self, kind: Kind, text: str, value: object) -> None:
        """The text of a flag becomes a value of the setting's own type."""
        result = kind.from_text(text)
        assert result == value
        assert type(result) is kind.type

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            pytest.param(TEN, "0", id="below the range"),
            pytest.param(TEN, "11", id="above the range"),
            pytest.param(TEN, "", id="empty number"),
            pytest.param(TEN, "x", id="no number"),
            pytest.param(TEN, "1.0", id="fraction"),
            pytest.param(TEN, "9" * 5000, id="more digits than Python converts"),
            pytest.param(BOOLEAN, "", id="empty boolean"),
            pytest.param(BOOLEAN, "yes", id="no boolean"),
            pytest.param(PATH, "", id="empty path"),
            pytest.param(PATH, "a/b", id="relative path"),
            pytest.param(PATH, "/a\0b", id="path with a NUL"),
            pytest.param(FILE, "\0", id="file with a NUL"),
            pytest.param(COLOUR, "", id="empty word"),
            pytest.param(COLOUR, "Red", id="word in capitals"),
            pytest.param(COLOUR, "red or green", id="several words"),
            pytest.param(RESOURCE, "cpu", id="not an extended resource"),
        ],
    )
    def test_refused(self, kind: Kind, text: str) -> None:
        """What is out of range or of another type is a ValueError."""
        with pytest.raises(ValueError):  # noqa: PT011  # its text is not shown; the caller says what the setting takes
            kind.from_text(text)


class TestAddress:
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
    def test_taken(self, text: str, host: str, port: int) -> None:
        """As Go takes it."""
        assert ADDRESS.from_text(text) == text
        assert split_address(text) == (host, port)

    def test_none(self) -> None:
        """Nothing switches it off."""
        assert ADDRESS.from_text("") == ""

    @pytest.mark.parametrize(
        "text",
        ["2112", "host", "host:", ":65536", ":-1", "::1:80", "[::1]", "[]:80", "[host]:80", "a b:80", ":80\n", "/x:1"],
    )
    def test_refused(self, text: str) -> None:
        """What could never be listened on."""
        with pytest.raises(ValueError):  # noqa: PT011  # its text is not shown
            ADDRESS.from_text(text)


class TestFromFile:
    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            pytest.param(TEN, 10, id="number"),
            pytest.param(BOOLEAN, False, id="boolean"),
            pytest.param(PATH, "/a", id="path"),
            pytest.param(COLOUR, "red", id="word"),
        ],
    )
    def test_taken(self, kind: Kind, value: object) -> None:
        """A value of the right type is taken as it is."""
        assert kind.from_file(value) is value

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            pytest.param(TEN, True, id="boolean for a number"),
            pytest.param(TEN, "5", id="quoted number"),
            pytest.param(TEN, 5.0, id="fraction for a number"),
            pytest.param(TEN, None, id="nothing for a number"),
            pytest.param(TEN, 11, id="number out of range"),
            pytest.param(BOOLEAN, 1, id="number for a boolean"),
            pytest.param(BOOLEAN, "true", id="quoted boolean"),
            pytest.param(PATH, 1, id="number for a path"),
            pytest.param(PATH, ["/a"], id="list for a path"),
            pytest.param(PATH, "a", id="relative path"),
            pytest.param(COLOUR, {}, id="mapping for a word"),
            pytest.param(COLOUR, True, id="boolean for a word"),
        ],
    )
    def test_refused(self, kind: Kind, value: object) -> None:
        """In a file values have a type of their own: another one is refused, not converted."""
        with pytest.raises(ValueError):  # noqa: PT011
            kind.from_file(value)


class TestExtendedResource:
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("deepomatic.com/shared-gpu", id="the default"),
            pytest.param("nvidia.com/gpu", id="NVIDIA's"),
            pytest.param("a/b", id="shortest"),
            pytest.param("1.2/3", id="digits"),
            pytest.param("example.com/Shared_GPU.v1-x", id="all that a name may have"),
            pytest.param("a-b.c--d/x", id="dashes inside labels"),
            pytest.param("example.com/" + "x" * 63, id="longest name"),
            pytest.param("x" * 244 + "/a", id="longest domain: 253 less requests."),
            pytest.param("xkubernetes.io.com/a", id="kubernetes.io without the slash behind it"),
            pytest.param("requestsx.com/a", id="requests without the dot behind it"),
            pytest.param("limits.example.com/a", id="limits. is no prefix of Kubernetes"),
        ],
    )
    def test_taken(self, name: str) -> None:
        """Names that Kubernetes takes for extended resources."""
        assert is_extended_resource(name)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("", id="empty"),
            pytest.param("gpu", id="no domain"),
            pytest.param("/gpu", id="empty domain"),
            pytest.param("example.com/", id="empty name"),
            pytest.param("/", id="slash alone"),
            pytest.param("example.com/a/b", id="two slashes"),
            pytest.param("kubernetes.io/gpu", id="native"),
            pytest.param("gpu.kubernetes.io/x", id="a subdomain of kubernetes.io"),
            pytest.param("mykubernetes.io/x", id="ends in kubernetes.io: Kubernetes looks for the text"),
            pytest.param("example.com/kubernetes.io/x", id="kubernetes.io/ anywhere"),
            pytest.param("requests.example.com/gpu", id="the prefix of quotas"),
            pytest.param("Example.com/gpu", id="capital in the domain"),
            pytest.param("example_a.com/gpu", id="underscore in the domain"),
            pytest.param("-example.com/gpu", id="domain starts with a dash"),
            pytest.param("example-.com/gpu", id="label ends with a dash"),
            pytest.param(".example.com/gpu", id="domain starts with a dot"),
            pytest.param("example.com./gpu", id="domain ends with a dot"),
            pytest.param("example..com/gpu", id="empty label"),
            pytest.param("example.com/-gpu", id="name starts with a dash"),
            pytest.param("example.com/gpu-", id="name ends with a dash"),
            pytest.param("example.com/.gpu", id="name starts with a dot"),
            pytest.param("example.com/gpu_", id="name ends with an underscore"),
            pytest.param("example.com/g pu", id="space"),
            pytest.param("example.com/gpu\n", id="newline"),
            pytest.param("example.com\n/gpu", id="newline in the domain"),
            pytest.param("example.com/gpü", id="not ASCII"),
            pytest.param("exämple.com/gpu", id="domain not ASCII"),
            pytest.param("example.com/" + "x" * 64, id="name too long"),
            pytest.param("x" * 245 + "/a", id="domain too long with requests."),
        ],
    )
    def test_refused(self, name: str) -> None:
        """Names that Kubernetes does not: the kubelet would refuse the registration."""
        assert not is_extended_resource(name)


class TestSettings:
    def test_defaults(self) -> None:
        """What manifests and scripts count on when they set nothing."""
        assert attrs.asdict(Settings()) == {
            "host_path": "/home/kubernetes/bin/nvidia",
            "container_path": "/usr/local/nvidia",
            "plugin_directory": "/device-plugin",
            "gpu_duplication_factor": 100,
            "resource_name": "deepomatic.com/shared-gpu",
            "dev_directory": "/dev",
            "sysfs_directory": "/sys",
            "proc_directory": "/proc",
            "container_log_directory": "/var/log/containers",
            "placement": "spread",
            "multi_share": "distinct",
            "memory_watermark": 0.95,
            "sample_interval": 5.0,
            "pod_resources_socket": "/var/lib/kubelet/pod-resources/kubelet.sock",
            "framework_hints": True,
            "health_interval": 5.0,
            "driver_timeout": 10.0,
            "ignore_xids": "",
            "critical_xids": "",
            "state_file": "/run/sgpu/state.json",
            "metrics_address": ":2112",
            "status_socket": "/run/sgpu/status.sock",
            "simulate": 0,
            "simulate_faults": "",
            "log_format": "text",
            "v": 0,
            "logtostderr": True,
        }

    @pytest.mark.parametrize("name", KNOBS)
    def test_defaults_are_valid(self, name: str) -> None:
        """Every default is a value that its own setting takes, and every setting says what it is for."""
        field = KNOBS[name]
        assert field.metadata["kind"].from_file(field.default) == field.default
        assert field.metadata["meaning"]
        assert field.metadata["kind"].example

    def test_knobs(self) -> None:
        """Every field can be set, by its name with dashes."""
        assert [name.replace("-", "_") for name in KNOBS] == [field.name for field in attrs.fields(Settings)]

    @pytest.mark.parametrize(
        ("kind", "takes"),
        [
            pytest.param(TEN, "a whole number from 1 to 10", id="integer"),
            pytest.param(COLOUR, "red or green", id="choice"),
            pytest.param(BOOLEAN, "true or false", id="boolean"),
        ],
    )
    def test_takes(self, kind: Kind, takes: str) -> None:
        """A kind says in words what it takes, ends of ranges included."""
        assert kind.takes == takes

    @pytest.mark.parametrize(
        ("resource", "endpoint"),
        [
            pytest.param("deepomatic.com/shared-gpu", "sgpu-deepomatic.com_shared-gpu.sock", id="default"),
            pytest.param("a.b/c_d", "sgpu-a.b_c_d.sock", id="underscore in the name"),
        ],
    )
    def test_endpoint(self, resource: str, endpoint: str) -> None:
        """The socket is named after the resource, in a name without a slash. A domain has no underscore: no clash."""
        assert settings.endpoint(resource) == endpoint


@pytest.mark.parametrize("text", ["1_0", " 1", "1 ", "٣", "0x10", "1e1", "", "+", "9" * 5000])
def test_what_only_python_takes_for_a_number_is_refused(text: str) -> None:
    """As people write numbers, and no other way."""
    with pytest.raises(ValueError):  # noqa: PT011  # it has the value for a message
        integer(0, 100).from_text(text)


@pytest.mark.parametrize(("text", "value"), [("T", True), ("t", True), ("F", False), ("FALSE", False)])
def test_booleans_as_go_takes_them(text: str, value: bool) -> None:
    """Existing manifests have them."""
    assert BOOLEAN.from_text(text) is value


def test_a_single_number_of_a_list_can_be_one_to_yaml() -> None:
    """`critical-xids: 79` means the list of it. `true` is none, though Python counts it as 1."""
    assert NUMBERS.from_file(79) == "79"
    assert NUMBERS.from_text("79, 13") == "79, 13"
    for value in (True, -1, 1.5, None):
        with pytest.raises(ValueError):  # noqa: PT011  # it has the value for a message
            NUMBERS.from_file(value)
