"""argv, environment and file → settings, and what is said to who gets them wrong."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest

from sgpu.files import MAX_SOCKET_PATH_BYTES
from sgpu.load import RULE_KINDS, Flags, Loaded, UsageError, load, parse_flags
from sgpu.policy import Policy, Rule
from sgpu.settings import KNOBS, Settings, endpoint
from sgpu.xids import XidPolicy

pytestmark = pytest.mark.pure

#: For each setting, a value that is not its default, as text.
OTHER = {
    "host-path": "/opt/nvidia",
    "container-path": "/usr/nvidia",
    "plugin-directory": "/var/lib/kubelet/device-plugins",
    "gpu-duplication-factor": "7",
    "resource-name": "example.com/gpu",
    "dev-directory": "/host/dev",
    "sysfs-directory": "/host/sys",
    "placement": "pack",
    "multi-share": "strict-distinct",
    "memory-watermark": "0.8",
    "sample-interval": "2.5",
    "pod-resources-socket": "/run/pods.sock",
    "framework-hints": "false",
    "health-interval": "1.5",
    "driver-timeout": "20",
    "ignore-xids": "13, 31",
    "critical-xids": "79,80",
    "state-file": "state.json",
    "status-socket": "status.sock",
    "metrics-address": "127.0.0.1:9400",
    "proc-directory": "/host/proc",
    "container-log-directory": "/host/logs",
    "simulate": "2",
    "simulate-faults": "faults",
    "log-format": "json",
    "v": "3",
    "logtostderr": "false",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a test puts its file."""
    return tmp_path / "config.yaml"


def variable(name: str) -> str:
    return "SGPU_" + name.upper().replace("-", "_")


def load_file(path: Path, content: str | bytes) -> Loaded:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load({"config": str(path)}, {})


def refusal(flags: dict[str, str] | None = None, environment: dict[str, str] | None = None) -> str:
    """What is said about these settings: always a single line."""
    with pytest.raises(UsageError) as refused:
        load(flags or {}, environment or {})
    return one_line(refused.value)


def file_refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(UsageError) as refused:
        load_file(path, content)
    return one_line(refused.value)


def one_line(error: UsageError) -> str:
    line = str(error)
    assert line.splitlines() == [line]
    return line


class TestParseFlags:
    @pytest.mark.parametrize(
        ("arguments", "values"),
        [
            pytest.param([], {}, id="none"),
            pytest.param(["-host-path", "/a"], {"host-path": "/a"}, id="value behind a space"),
            pytest.param(["-host-path=/a"], {"host-path": "/a"}, id="value behind ="),
            pytest.param(["--host-path", "/a"], {"host-path": "/a"}, id="two dashes"),
            pytest.param(["--host-path=/a"], {"host-path": "/a"}, id="two dashes and ="),
            pytest.param(["-host-path=/a=b"], {"host-path": "/a=b"}, id="= in the value"),
            pytest.param(["-host-path="], {"host-path": ""}, id="nothing behind ="),
            pytest.param(["-host-path", "-v"], {"host-path": "-v"}, id="what follows is the value"),
            pytest.param(["-v", "1", "-v=2"], {"v": "2"}, id="the last one wins"),
            pytest.param(["-v", "-1"], {"v": "-1"}, id="negative"),
            pytest.param(["-logtostderr"], {"logtostderr": "true"}, id="boolean"),
            pytest.param(["--logtostderr"], {"logtostderr": "true"}, id="boolean with two dashes"),
            pytest.param(["-logtostderr=false"], {"logtostderr": "false"}, id="boolean behind ="),
            pytest.param(["-logtostderr", "-v", "1"], {"logtostderr": "true", "v": "1"}, id="boolean takes no word"),
            pytest.param(["-config", "a.yaml"], {"config": "a.yaml"}, id="config"),
        ],
    )
    def test_values(self, arguments: list[str], values: dict[str, str]) -> None:
        """Flags go as in Go: one dash or two, the value behind `=` or as the next argument."""
        assert parse_flags(arguments) == Flags(values, frozenset(), ())

    @pytest.mark.parametrize("name", KNOBS)
    @pytest.mark.parametrize("dashes", ["-", "--"])
    def test_every_setting(self, name: str, dashes: str) -> None:
        """Every setting has a flag."""
        assert parse_flags([f"{dashes}{name}={OTHER[name]}"]).values == {name: OTHER[name]}

    @pytest.mark.parametrize("name", ["help", "h", "version", "print-config"])
    @pytest.mark.parametrize("dashes", ["-", "--"])
    def test_actions(self, name: str, dashes: str) -> None:
        """Some flags do something, and take nothing."""
        assert parse_flags([dashes + name, "word"]) == Flags({}, frozenset({name}), ("word",))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param(["demo"], ("demo",), id="a word"),
            pytest.param(["demo", "-v", "1", "more"], ("demo", "more"), id="around flags"),
            pytest.param(["--", "-v", "--"], ("-v", "--"), id="all behind --"),
            pytest.param(["-"], ("-",), id="a dash alone"),
            pytest.param(["-logtostderr", "false"], ("false",), id="behind a boolean"),
            pytest.param([""], ("",), id="an empty one"),
        ],
    )
    def test_words(self, arguments: list[str], words: tuple[str, ...]) -> None:
        """What is no flag is a word."""
        assert parse_flags(arguments).words == words

    @pytest.mark.parametrize(
        ("argument", "named"),
        [
            pytest.param("-nope", "-nope", id="one dash"),
            pytest.param("--nope", "--nope", id="two dashes"),
            pytest.param("-nope=secret", "-nope", id="without its value"),
            pytest.param("---v", "---v", id="three dashes"),
            pytest.param("-=1", "-", id="no name"),
            pytest.param("-host_path=/a", "-host_path", id="underscore"),
            pytest.param("-V", "-V", id="capital"),
        ],
    )
    def test_unknown(self, argument: str, named: str) -> None:
        """An unknown flag is refused as it was written, with where to find the others."""
        with pytest.raises(UsageError) as refused:
            parse_flags([argument])
        assert one_line(refused.value) == f"unknown flag {named} (see -help)"

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            pytest.param(
                ["-v"], "-v (command line) needs a value: a whole number from 0 to 10", id="at the end of the line"
            ),
            pytest.param(["--host-path", ""], "-host-path (command line) needs a value: an absolute path", id="empty"),
            pytest.param(["-config"], "-config (command line) needs a value: the path of a YAML file", id="config"),
        ],
    )
    def test_no_value(self, arguments: list[str], line: str) -> None:
        """A flag without its value is refused with what it takes."""
        with pytest.raises(UsageError) as refused:
            parse_flags(arguments)
        assert one_line(refused.value) == line

    def test_unknown_is_one_line(self) -> None:
        """Whatever an unknown flag has in it, one line says so."""
        with pytest.raises(UsageError) as refused:
            parse_flags(["-no\npe"])
        one_line(refused.value)


class TestPrecedence:
    def test_nothing(self) -> None:
        """Without any of the three, every setting is its default and says so."""
        loaded = load({}, {})
        assert loaded.settings == Settings()
        assert loaded.origins == dict.fromkeys(KNOBS, "default")

    @pytest.mark.parametrize("name", KNOBS)
    def test_each_place(self, config: Path, name: str) -> None:
        """Every setting can come from a flag, a variable or the file, has the same value then, and says which."""
        from_flag = load({name: OTHER[name]}, {})
        from_environment = load({}, {variable(name): OTHER[name]})
        from_file = load_file(config, f"{name}: {OTHER[name]}")
        assert from_flag.settings == from_environment.settings == from_file.settings != Settings()
        assert from_flag.origins == {**dict.fromkeys(KNOBS, "default"), name: "command line"}
        assert from_environment.origins == {**dict.fromkeys(KNOBS, "default"), name: variable(name)}
        assert from_file.origins == {**dict.fromkeys(KNOBS, "default"), name: str(config)}

    @pytest.mark.parametrize(
        ("flag", "environment", "value", "origin"),
        [
            pytest.param("3", "2", 3, "command line", id="all three: flag"),
            pytest.param("3", None, 3, "command line", id="flag and file: flag"),
            pytest.param(None, "2", 2, "SGPU_V", id="environment and file: environment"),
            pytest.param(None, None, 1, "config.yaml", id="file alone"),
        ],
    )
    def test_order(self, config: Path, flag: str | None, environment: str | None, value: int, origin: str) -> None:
        """Flag beats environment beats file beats default."""
        config.write_text("v: 1")
        loaded = load(
            {"config": str(config), **({"v": flag} if flag else {})}, {"SGPU_V": environment} if environment else {}
        )
        assert loaded.settings.v == value
        assert Path(loaded.origins["v"]).name == origin

    def test_the_default_can_be_set(self, config: Path) -> None:
        """A place that sets the default value beats the ones below it like any other."""
        config.write_text("v: 1\nlogtostderr: false")
        loaded = load({"config": str(config), "v": "0"}, {"SGPU_LOGTOSTDERR": "true"})
        assert loaded.settings == Settings()
        assert loaded.origins["v"] == "command line"
        assert loaded.origins["logtostderr"] == "SGPU_LOGTOSTDERR"

    def test_settings_are_independent(self, config: Path) -> None:
        """Each setting comes from the highest place that has it, not all of them from one."""
        config.write_text("v: 1\nsimulate: 1\nhost-path: /file")
        loaded = load({"config": str(config), "v": "3"}, {"SGPU_SIMULATE": "2", "SGPU_V": "2"})
        expected = Settings(v=3, simulate=2, host_path="/file")
        assert loaded.settings == expected

    def test_wrong_value_that_is_beaten(self) -> None:
        """A wrong value is told of even where a higher place sets the same."""
        assert "SGPU_V" in refusal({"v": "1"}, {"SGPU_V": "x"})


class TestEnvironment:
    def test_others_are_ignored(self) -> None:
        """Variables with our prefix that are no settings do not matter: a Service named `sgpu` makes some."""
        environment = {
            "SGPU_SERVICE_HOST": "10.0.0.1",
            "SGPU_PORT": "tcp://10.0.0.1:80",
            "SGPU_PORT_80_TCP_ADDR": "10.0.0.1",
            "SGPU_": "x",
            "SGPU_HOST-PATH": "relative",
            "sgpu_v": "x",
            "V": "x",
        }
        assert load({}, environment) == load({}, {})

    def test_actions_are_no_settings(self) -> None:
        """What a flag does can't be asked for by a variable."""
        assert load({}, {"SGPU_VERSION": "1", "SGPU_PRINT_CONFIG": "x"}) == load({}, {})

    def test_config(self, config: Path) -> None:
        """The file too can be named by a variable, and the flag beats it."""
        other = config.with_name("other.yaml")
        config.write_text("v: 1")
        other.write_text("v: 2")
        assert load({}, {"SGPU_CONFIG": str(config)}).settings.v == 1
        assert load({"config": str(other)}, {"SGPU_CONFIG": str(config)}).settings.v == 2

    def test_config_that_is_beaten(self, config: Path) -> None:
        """Of two files named only one is read."""
        config.write_text("v: 1")
        assert load({"config": str(config)}, {"SGPU_CONFIG": "/missing"}).settings.v == 1


class TestFile:
    @pytest.mark.parametrize(
        "content",
        [
            pytest.param("", id="empty"),
            pytest.param("# nothing yet\n", id="a comment"),
            pytest.param("---\n", id="a document mark"),
            pytest.param("{}", id="an empty mapping"),
        ],
    )
    def test_nothing_in_it(self, config: Path, content: str) -> None:
        """A file that sets nothing is a file."""
        assert load_file(config, content) == attrs.evolve(load({}, {}), file=str(config))

    def test_as_in_a_config_map(self, config: Path) -> None:
        """Several settings with their types, comments between them."""
        loaded = load_file(
            config,
            """
            # what the T4 nodes have
            gpu-duplication-factor: 50
            resource-name: "example.com/t4"
            host-path: /opt/é
            logtostderr: false
            """,
        )
        assert loaded.settings == Settings(
            gpu_duplication_factor=50, resource_name="example.com/t4", host_path="/opt/é", logtostderr=False
        )

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            pytest.param("v: true", "-v: True ({}) is not a whole number from 0 to 10", id="boolean for a number"),
            pytest.param("v: '1'", "-v: '1' ({}) is not a whole number from 0 to 10", id="quoted number"),
            pytest.param("v: 1.0", "-v: 1.0 ({}) is not a whole number from 0 to 10", id="fraction"),
            pytest.param("v: 11", "-v: 11 ({}) is not a whole number from 0 to 10", id="out of range"),
            pytest.param("v:", "-v: None ({}) is not a whole number from 0 to 10", id="nothing"),
            pytest.param("host-path: 1", "-host-path: 1 ({}) is not an absolute path", id="number for a path"),
            pytest.param("host-path: [/a]", "-host-path: ['/a'] ({}) is not an absolute path", id="list for a path"),
            pytest.param("host-path: a", "-host-path: 'a' ({}) is not an absolute path", id="relative path"),
            pytest.param('host-path: "a\\nb"', "-host-path: 'a\\nb' ({}) is not an absolute path", id="newline"),
            pytest.param("logtostderr: 1", "-logtostderr: 1 ({}) is not true or false", id="number for a boolean"),
            pytest.param("log-format: yaml", "-log-format: 'yaml' ({}) is not text or json", id="another word"),
            pytest.param(
                "resource-name: kubernetes.io/gpu",
                "-resource-name: 'kubernetes.io/gpu' ({}) is not the name of an extended resource, "
                "as in example.com/name (not kubernetes.io)",
                id="native resource",
            ),
        ],
    )
    def test_wrong_value(self, config: Path, content: str, line: str) -> None:
        """A wrong type or value is told with the setting, the place in the file and what it takes."""
        assert file_refusal(config, f"# a comment\n{content}") == line.format(f"{config}:2")

    @pytest.mark.parametrize(
        ("content", "key"),
        [
            pytest.param("nope: 1", "'nope'", id="unknown"),
            pytest.param("host_path: /a", "'host_path'", id="underscore for a dash"),
            pytest.param("config: other.yaml", "'config'", id="a file that names a file"),
            pytest.param("version: true", "'version'", id="an action"),
            pytest.param("1: 1", "'1'", id="a number"),
            pytest.param("on: 1", "'True'", id="a word that is a boolean in YAML"),
            pytest.param('"a\\nb": 1', "'a\\nb'", id="newline"),
        ],
    )
    def test_unknown_key(self, config: Path, content: str, key: str) -> None:
        """An unknown key is told with its place and the keys there are."""
        line = file_refusal(config, f"v: 1\n\n{content}")
        assert line == f"unknown key {key} ({config}:3); the file takes: {', '.join(KNOBS)}, gpus"

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param("- v: 1", id="list"),
            pytest.param("v", id="word"),
            pytest.param("17", id="number"),
            pytest.param("false", id="boolean"),
        ],
    )
    def test_not_a_mapping(self, config: Path, content: str) -> None:
        """A file that is YAML but no mapping is told what is expected."""
        assert file_refusal(config, content) == (
            f"-config {config} (command line) takes a mapping of settings, as in `gpu-duplication-factor: 50`"
        )

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param("v: [1", id="unclosed list"),
            pytest.param("v: 1\n  host-path: /a\n", id="wrong indent"),
            pytest.param("\tv: 1", id="tab"),
            pytest.param("v: 1\0", id="NUL"),
            pytest.param("v: 1\n---\nv: 2\n", id="two documents"),
            pytest.param("v: !!python/object:object {}", id="a tag for Python"),
            pytest.param("? [v]\n: 1", id="a list for a key"),
            pytest.param("v: *other", id="unknown alias"),
            pytest.param("v: 2020-99-99", id="no such day"),
            pytest.param("v: !!int x", id="a tag that does not hold"),
            pytest.param("v: !!bool x", id="no such boolean"),
            pytest.param("v: " + "9" * 5000, id="endless number"),
            pytest.param("[" * 3000, id="endless nesting"),
        ],
    )
    def test_not_yaml(self, config: Path, content: str) -> None:
        """What the parser complains of is told in one line with the file."""
        assert file_refusal(config, content).startswith(f"-config {config} (command line) is not YAML: ")

    def test_not_utf8(self, config: Path) -> None:
        """A file in another encoding can't be read."""
        line = file_refusal(config, b"host-path: /\xff")
        assert line.startswith(f"-config {config} (command line) can't be read: 'utf-8' codec can't decode byte 0xff")

    @pytest.mark.parametrize(
        ("flags", "environment", "origin"),
        [
            pytest.param({"config": "/missing/sgpu.yaml"}, {}, "command line", id="flag"),
            pytest.param({}, {"SGPU_CONFIG": "/missing/sgpu.yaml"}, "SGPU_CONFIG", id="environment"),
        ],
    )
    def test_missing(self, flags: dict[str, str], environment: dict[str, str], origin: str) -> None:
        """A file that is not there is told with who named it."""
        assert refusal(flags, environment) == (
            f"-config /missing/sgpu.yaml ({origin}) can't be read: "
            "[Errno 2] No such file or directory: '/missing/sgpu.yaml'"
        )

    def test_directory(self, tmp_path: Path) -> None:
        """A directory is no file."""
        assert "Is a directory" in refusal({"config": str(tmp_path)})

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_forbidden(self, config: Path) -> None:
        """A file that may not be read can't be."""
        config.touch(mode=0o000)
        assert "Permission denied" in refusal({"config": str(config)})

    def test_path_is_one_line(self) -> None:
        """Whatever the path of the file has in it, one line says so."""
        assert "can't be read" in refusal({"config": "/missing/a\nb"})


class TestPolicy:
    """The file's key `gpus`: what each GPU is offered as."""

    def test_none(self) -> None:
        """Without rules, all GPUs are offered as the settings say."""
        loaded = load({"resource-name": "example.com/gpu"}, {"SGPU_GPU_DUPLICATION_FACTOR": "7"})
        assert loaded.policy == Policy("example.com/gpu", 7)
        assert loaded.file == ""

    def test_rules(self, config: Path) -> None:
        """Each entry is a rule that knows its place; what an entry does not say is left open."""
        loaded = load_file(
            config,
            """\
gpu-duplication-factor: 7
gpus:
  - uuid: GPU-1d6f6dfc-1f2a-4b7e-a9d1-6e1f4a3b2c1d
    shares: 1
    resource: example.com/whole-gpu
  - name: "*A100*"
    shares: 40

  - {pci-bus-id: 0000:05:00.0, exclude: true}
""",
        )
        rules = loaded.policy.rules
        assert loaded.policy == Policy("deepomatic.com/shared-gpu", 7, rules)
        assert rules == (
            Rule("", uuid="GPU-1d6f6dfc-1f2a-4b7e-a9d1-6e1f4a3b2c1d", shares=1, resource="example.com/whole-gpu"),
            Rule("", name="*A100*", shares=40),
            Rule("", pci_bus_id="0000:05:00.0", exclude=True),
        )
        assert [rule.place for rule in rules] == [f"{config}:{line}" for line in (3, 6, 9)]
        assert loaded.file == str(config)

    @pytest.mark.parametrize(
        ("entry", "rule"),
        [
            pytest.param("{uuid: gpu-A, shares: 1}", Rule("", uuid="gpu-A", shares=1), id="uuid in small letters"),
            pytest.param("{pci-bus-id: '3B:00.0', shares: 1}", Rule("", pci_bus_id="3B:00.0", shares=1), id="bus id"),
            pytest.param("{name: T4, shares: 100000}", Rule("", name="T4", shares=100_000), id="most shares"),
            pytest.param("{exclude: false, shares: 2, name: T4}", Rule("", name="T4", shares=2), id="in any order"),
        ],
    )
    def test_taken(self, config: Path, entry: str, rule: Rule) -> None:
        """All that an entry can say."""
        assert load_file(config, f"gpus: [{entry}]").policy.rules == (rule,)

    def test_no_rules(self, config: Path) -> None:
        """An empty list is one."""
        assert load_file(config, "gpus: []").policy == load({}, {}).policy

    @pytest.mark.parametrize(
        ("value", "place"),
        [
            pytest.param("", 2, id="nothing"),
            pytest.param("GPU-a", 2, id="word"),
            pytest.param("{uuid: GPU-a, shares: 1}", 2, id="mapping"),
        ],
    )
    def test_not_a_list(self, config: Path, value: str, place: int) -> None:
        """It takes a list."""
        assert file_refusal(config, f"v: 1\ngpus: {value}\n") == (
            f"gpus ({config}:{place}) takes a list of entries, as in `- uuid: …`"
        )

    @pytest.mark.parametrize("item", ["", "GPU-a", "[uuid, GPU-a]", "1"], ids=["nothing", "word", "list", "number"])
    def test_not_a_mapping(self, config: Path, item: str) -> None:
        """An entry that is no mapping is told with its own place."""
        line = file_refusal(config, f"gpus:\n- {{name: T4, shares: 1}}\n- {item}\n")
        assert line == f"gpus: an entry ({config}:3) is a mapping, as in `uuid: …`"

    @pytest.mark.parametrize(
        ("entry", "line"),
        [
            pytest.param("{shares: 1}", "an entry ({}) takes exactly one of uuid, pci-bus-id, name", id="no selector"),
            pytest.param("{}", "an entry ({}) takes exactly one of uuid, pci-bus-id, name", id="nothing in it"),
            pytest.param(
                "{uuid: GPU-a, name: T4, shares: 1}",
                "an entry ({}) takes exactly one of uuid, pci-bus-id, name",
                id="two selectors",
            ),
            pytest.param(
                "{uuuid: GPU-a, shares: 1}",
                f"unknown key 'uuuid' ({{}}); an entry takes {', '.join(RULE_KINDS)}",
                id="unknown key",
            ),
            pytest.param(
                "{name: T4, 1: 1}",
                f"unknown key 1 ({{}}); an entry takes {', '.join(RULE_KINDS)}",
                id="no text for a key",
            ),
            pytest.param(
                '{name: T4, "a\\nb": 1}',
                rf"unknown key 'a\nb' ({{}}); an entry takes {', '.join(RULE_KINDS)}",
                id="newline",
            ),
            pytest.param(
                "{name: T4}", "an entry ({}) says nothing: it takes shares, resource or exclude too", id="says nothing"
            ),
            pytest.param(
                "{name: T4, exclude: false}",
                "an entry ({}) says nothing: it takes shares, resource or exclude too",
                id="says as much as nothing",
            ),
            pytest.param(
                "{name: T4, exclude: true, shares: 1}",
                "an entry ({}) that excludes takes neither shares nor resource",
                id="excluded, with shares",
            ),
            pytest.param(
                "{name: T4, exclude: true, resource: a.b/c}",
                "an entry ({}) that excludes takes neither shares nor resource",
                id="excluded, with a resource",
            ),
            pytest.param(
                "{uuid: MIG-a, shares: 1}",
                "uuid: 'MIG-a' ({}) is not a GPU's UUID, as `nvidia-smi -L` shows it",
                id="no GPU's UUID",
            ),
            pytest.param(
                "{uuid: 17, shares: 1}",
                "uuid: 17 ({}) is not a GPU's UUID, as `nvidia-smi -L` shows it",
                id="number for a UUID",
            ),
            pytest.param(
                "{pci-bus-id: '3b:00', shares: 1}",
                "pci-bus-id: '3b:00' ({}) is not a PCI bus id, as in 0000:3b:00.0",
                id="no bus id",
            ),
            pytest.param(
                "{name: '', shares: 1}",
                "name: '' ({}) is not a pattern of product names, as in *A100*",
                id="empty name",
            ),
            pytest.param(
                "{name: [T4], shares: 1}",
                "name: ['T4'] ({}) is not a pattern of product names, as in *A100*",
                id="list for a name",
            ),
            pytest.param(
                "{name: T4, shares: 0}", "shares: 0 ({}) is not a whole number from 1 to 100000", id="too few shares"
            ),
            pytest.param(
                "{name: T4, shares: 100001}",
                "shares: 100001 ({}) is not a whole number from 1 to 100000",
                id="too many shares",
            ),
            pytest.param(
                "{name: T4, shares: '1'}", "shares: '1' ({}) is not a whole number from 1 to 100000", id="quoted number"
            ),
            pytest.param(
                "{name: T4, shares: true}", "shares: True ({}) is not a whole number from 1 to 100000", id="boolean"
            ),
            pytest.param(
                "{name: T4, shares: }", "shares: None ({}) is not a whole number from 1 to 100000", id="empty"
            ),
            pytest.param(
                "{name: T4, resource: gpu}",
                "resource: 'gpu' ({}) is not the name of an extended resource, "
                "as in example.com/name (not kubernetes.io)",
                id="bad resource name",
            ),
            pytest.param("{name: T4, exclude: 1}", "exclude: 1 ({}) is not true or false", id="number for a boolean"),
        ],
    )
    def test_refused(self, config: Path, entry: str, line: str) -> None:
        """What is wrong with an entry is told in one line with its place."""
        told = file_refusal(config, f"gpus:\n# first\n- {{name: V100, shares: 1}}\n- {entry}\n")
        assert told == f"gpus: {line.format(f'{config}:4')}"

    @pytest.mark.parametrize("selector", ["uuid: GPU-a", "pci-bus-id: '3b:00.0'", "name: '*'"])
    def test_the_same_twice(self, config: Path, selector: str) -> None:
        """Two entries for the same GPUs are refused, whatever GPUs there are, with both places."""
        told = file_refusal(
            config, f"gpus:\n- {{name: T4, shares: 1}}\n- {{{selector}, shares: 1}}\n- {{{selector}, exclude: true}}\n"
        )
        rule = selector.replace("'", "")
        assert told == f"gpus: `{rule}` ({config}:3) and `{rule}` ({config}:4) are about the same GPUs"

    def test_key_twice(self, config: Path) -> None:
        """A key that stands twice in an entry is refused with its line."""
        assert file_refusal(config, "gpus:\n- name: T4\n  shares: 1\n  shares: 2\n") == (
            f"-config {config} (command line) has 'shares' twice, the second time in line 4"
        )

    def test_not_by_a_variable(self) -> None:
        """Rules come from the file alone."""
        assert load({}, {"SGPU_GPUS": "x"}) == load({}, {})


class TestWrongText:
    @pytest.mark.parametrize(
        ("name", "text", "takes"),
        [
            pytest.param("gpu-duplication-factor", "0", "a whole number from 1 to 100000", id="factor too small"),
            pytest.param("gpu-duplication-factor", "100001", "a whole number from 1 to 100000", id="factor too large"),
            pytest.param("gpu-duplication-factor", "many", "a whole number from 1 to 100000", id="factor no number"),
            pytest.param("gpu-duplication-factor", "1e3", "a whole number from 1 to 100000", id="exponent"),
            pytest.param("simulate", "-1", "a whole number from 0 to 64", id="negative"),
            pytest.param("simulate", "65", "a whole number from 0 to 64", id="too many simulated"),
            pytest.param("v", "", "a whole number from 0 to 10", id="empty number"),
            pytest.param("host-path", "nvidia", "an absolute path", id="relative path"),
            pytest.param("host-path", "", "an absolute path", id="empty path"),
            pytest.param("container-path", "a\nb", "an absolute path", id="newline"),
            pytest.param("plugin-directory", "~/x", "an absolute path", id="home"),
            pytest.param("dev-directory", "dev", "an absolute path", id="relative dev"),
            pytest.param("sysfs-directory", "./sys", "an absolute path", id="relative sys"),
            pytest.param("log-format", "JSON", "text or json", id="capitals"),
            pytest.param("placement", "binpack", "spread or pack", id="another word"),
            pytest.param("multi-share", "strict", "distinct or same or strict-distinct", id="half a word"),
            pytest.param("memory-watermark", "95", "a number from 0 to 1", id="percent"),
            pytest.param("memory-watermark", "95%", "a number from 0 to 1", id="percent sign"),
            pytest.param("memory-watermark", "-0.5", "a number from 0 to 1", id="negative part"),
            pytest.param("memory-watermark", "nan", "a number from 0 to 1", id="not a number"),
            pytest.param("sample-interval", "0", "a number of seconds from 0.1 to 3600", id="no interval"),
            pytest.param("sample-interval", "5s", "a number of seconds from 0.1 to 3600", id="unit"),
            pytest.param("pod-resources-socket", "kubelet.sock", "an absolute path", id="relative socket"),
            pytest.param("framework-hints", "off", "true or false", id="off"),
            pytest.param("ignore-xids", "13;31", "numbers with commas between, as in 13,31", id="no comma"),
            pytest.param("logtostderr", "maybe", "true or false", id="no boolean"),
            pytest.param("simulate-faults", "\0", "the path of a file", id="NUL"),
            pytest.param(
                "resource-name",
                "gpu",
                "the name of an extended resource, as in example.com/name (not kubernetes.io)",
                id="no domain",
            ),
        ],
    )
    def test_refused(self, name: str, text: str, takes: str) -> None:
        """A wrong value is told with the setting, what was given, where, and what the setting takes."""
        assert refusal({name: text}) == f"-{name}: {text!r} (command line) is not {takes}"
        assert refusal({}, {variable(name): text}) == f"-{name}: {text!r} ({variable(name)}) is not {takes}"


class TestXids:
    def test_policy(self) -> None:
        """The operator's say over XIDs comes as numbers."""
        assert load({"ignore-xids": "13, 31", "critical-xids": "79"}, {}).xids == XidPolicy(
            frozenset({13, 31}), frozenset({79})
        )

    def test_both(self) -> None:
        """A number that is to be both is refused, with where each list came from."""
        assert refusal({"ignore-xids": "13,79,48"}, {"SGPU_CRITICAL_XIDS": "79, 48"}) == (
            "-ignore-xids (command line) and -critical-xids (SGPU_CRITICAL_XIDS) contradict each other: "
            "both ignored and critical: 48, 79"
        )


class TestSocketPath:
    @staticmethod
    def directory(settings: Settings, surplus: int) -> str:
        """A plugin directory that makes the socket's path this many bytes longer than it may be."""
        return "/" + "d" * (MAX_SOCKET_PATH_BYTES + surplus - len(endpoint(settings.resource_name)) - len("//"))

    def test_longest(self) -> None:
        """The longest path that a socket can have is taken."""
        directory = self.directory(Settings(), 0)
        assert load({"plugin-directory": directory}, {}).settings == Settings(plugin_directory=directory)

    def test_too_long(self) -> None:
        """One byte more is refused, with both settings that make the path, where they came from, and the limit."""
        directory = self.directory(Settings(), 1)
        assert refusal({}, {"SGPU_PLUGIN_DIRECTORY": directory}) == (
            "-plugin-directory (SGPU_PLUGIN_DIRECTORY) and -resource-name (default) are too long together: "
            f"{directory}/{endpoint(Settings().resource_name)} is the path of a socket, "
            f"which takes at most {MAX_SOCKET_PATH_BYTES} bytes"
        )

    def test_bytes_count(self) -> None:
        """Bytes count, not characters."""
        directory = self.directory(Settings(), 0)
        assert "too long" in refusal({"plugin-directory": directory[:-1] + "é"})

    def test_long_resource_name(self) -> None:
        """A name that Kubernetes takes can be too long for a socket's."""
        name = "example.com/" + "x" * 63
        load({"resource-name": name}, {})
        line = refusal({"resource-name": "y" * 40 + "." + name})
        assert line.startswith("-plugin-directory (default) and -resource-name (command line) are too long together")

    def test_of_a_rule(self, config: Path) -> None:
        """Each resource has a socket of its own: one that a rule names is told with its place."""
        name = "y" * 60 + ".example.com/" + "x" * 40
        assert file_refusal(config, f"gpus:\n- name: '*'\n  resource: {name}\n") == (
            f"-plugin-directory (default) and gpus: resource ({config}:2) are too long together: "
            f"/device-plugin/{endpoint(name)} is the path of a socket, "
            f"which takes at most {MAX_SOCKET_PATH_BYTES} bytes"
        )

    def test_trailing_slash(self) -> None:
        """Slashes that make no difference to the path do not count."""
        directory = self.directory(Settings(), 0)
        load({"plugin-directory": directory + "///"}, {})

    def test_not_utf8(self) -> None:
        """A directory whose name is not UTF-8, as Python gets it from argv, has a length as well."""
        directory = "/a\udcff"
        assert load({"plugin-directory": directory}, {}).settings.plugin_directory == directory

    def test_is_one_line(self) -> None:
        """Whatever the path has in it, one line says so."""
        assert "too long" in refusal({"plugin-directory": "/a\n" + "b" * MAX_SOCKET_PATH_BYTES})


def test_loaded_is_a_value() -> None:
    """Settings do not change once they are loaded."""
    loaded = load({}, {})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        loaded.settings.v = 1  # type: ignore[misc]


class TestActions:
    """Flags that do something take a value as Go's booleans do."""

    @pytest.mark.parametrize(
        ("argument", "asked"),
        [("-version", True), ("--version=true", True), ("-version=1", True), ("-version=false", False)],
    )
    def test_value(self, argument: str, asked: bool) -> None:
        """Without one it is true."""
        assert ("version" in parse_flags([argument]).actions) is asked

    def test_no_boolean(self) -> None:
        """Refused as for a setting."""
        with pytest.raises(UsageError, match=r"^-version: 'maybe' \(command line\) is not true or false$"):
            parse_flags(["-version=maybe"])
