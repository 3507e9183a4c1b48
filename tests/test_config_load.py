"""argv, environment and file → settings, and the one line for who gets them wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from test_config_settings import EXPECTED

from sgpu.config.flags import Flags, UsageError, parse_flags
from sgpu.config.load import INTERVALS, RULE_KINDS, Loaded, load
from sgpu.config.settings import SETTINGS, Settings, endpoint
from sgpu.config.values import BOOLEAN, seconds
from sgpu.driver.xids import XidPolicy
from sgpu.lib.files import MAX_SOCKET_PATH_BYTES
from sgpu.node.policy import Mig, Policy, Rule

pytestmark = pytest.mark.pure


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a test puts its file."""
    return tmp_path / "config.yaml"


def variable(name: str) -> str:
    return "SGPU_" + name.upper().replace("-", "_")


def load_file(path: Path, content: str) -> Loaded:
    path.write_text(content)
    return load({"config": str(path)}, {})


def assert_refused(use: Callable[[], object], *facts: str) -> None:
    """Assert that this is a UsageError of a single line, in which all these facts are."""
    with pytest.raises(UsageError) as refused:
        use()
    line = str(refused.value)
    assert line.splitlines() == [line]
    assert [fact for fact in facts if fact not in line] == []


def other(name: str) -> str:
    """A value of the setting that is not its default, as text."""
    kind, expected = SETTINGS[name].metadata["kind"], EXPECTED[name]
    return next(text for text in expected.takes if kind.from_text(text) != expected.default)


class TestParseFlags:
    @pytest.mark.parametrize(
        ("line", "values", "actions", "words"),
        [
            ("-host-path /a --dev-directory /b", {"host-path": "/a", "dev-directory": "/b"}, "", ""),
            ("--host-path=/a=b -state-file=", {"host-path": "/a=b", "state-file": ""}, "", ""),
            ("-host-path -v", {"host-path": "-v"}, "", ""),
            ("-v 1 -v=2 -config a.yaml", {"v": "2", "config": "a.yaml"}, "", ""),
            (
                "-logtostderr=false -framework-hints false",
                {"logtostderr": "false", "framework-hints": "true"},
                "",
                "false",
            ),
            ("-help --h --version=1 -print-config -v=1", {"v": "1"}, "help h version print-config", ""),
            ("-version=false -help false", {}, "help", "false"),
            ("demo -v 1 more -", {"v": "1"}, "", "demo more -"),
            ("-- -v --", {}, "", "-v --"),
        ],
        ids=str,
    )
    def test_taken(self, line: str, values: dict[str, str], actions: str, words: str) -> None:
        """Flags go as in Go: one dash or two, the value behind `=` or as the next argument; behind `=` for booleans.

        Some do something. The last one wins. An argument that is no flag is a word, and all behind `--`.
        """
        assert parse_flags(line.split()) == Flags(values, frozenset(actions.split()), tuple(words.split()))

    def test_options(self) -> None:
        """The options of a command are flags beside the settings, and have values of their own types."""
        options = {"watch": BOOLEAN, "interval": seconds(0.1, 60)}
        flags = parse_flags(["-watch", "-interval=2", "-v=1"], options)
        assert flags == Flags({"v": "1"}, frozenset(), (), {"watch": True, "interval": 2.0})
        assert parse_flags([], options).options == {}
        assert_refused(lambda: parse_flags(["-interval", "x"], options), "-interval", "'x'", "command line")

    @pytest.mark.parametrize(
        ("argument", "facts"),
        [
            ("-nope=secret", ["-nope (see"]),
            *((flag, [flag]) for flag in ("--nope", "---v", "-host_path", "-V")),
            ("-=1", [" - "]),
            ("-no\npe", [r"-no\npe"]),
            ("-v", ["-v", "command line", "0", "10"]),
            *((flag, ["-config", "command line"]) for flag in ("-config", "-config=")),
            ("-version=maybe", ["-version", "'maybe'", "command line"]),
        ],
        ids=str,
    )
    def test_refused(self, argument: str, facts: list[str]) -> None:
        """An unknown flag, or one without its value, is named as it was written; its value is not repeated."""
        assert_refused(lambda: parse_flags([argument]), *facts)


class TestSources:
    def test_none(self) -> None:
        """Without any, every setting is its default and says so."""
        loaded = load({}, {})
        assert loaded == Loaded(
            Settings(), dict.fromkeys(SETTINGS, "default"), Policy("deepomatic.com/shared-gpu", 100)
        )

    @pytest.mark.parametrize("name", SETTINGS)
    def test_each(self, config: Path, name: str) -> None:
        """Every setting can come from a flag, a variable or the file, has the same value then, and says which."""
        text = other(name)
        flag = load(parse_flags([f"-{name}={text}"]).values, {})
        environment = load({}, {variable(name): text})
        file = load_file(config, f"{name}: {json.dumps(text) if SETTINGS[name].metadata['kind'].type is str else text}")
        assert flag.settings == environment.settings == file.settings != Settings()
        others = dict.fromkeys(SETTINGS, "default")
        for loaded, origin in ((flag, "command line"), (environment, variable(name)), (file, str(config))):
            assert loaded.origins == {**others, **dict.fromkeys(INTERVALS if name in INTERVALS else [name], origin)}

    @pytest.mark.parametrize(
        ("flag", "environment", "value", "origin"),
        [
            pytest.param("3", "2", 3, "command line", id="flag before environment and file"),
            pytest.param(None, "2", 2, "SGPU_V", id="environment before file"),
            pytest.param(None, "0", 0, "SGPU_V", id="the default is a value like any other"),
            pytest.param(None, None, 1, "config.yaml", id="file before default"),
        ],
    )
    def test_precedence(self, config: Path, flag: str | None, environment: str | None, value: int, origin: str) -> None:
        """Flag beats environment beats file beats default, for each setting by itself."""
        config.write_text("v: 1\nhost-path: /file\n")
        flags = {"config": str(config), **({"v": flag} if flag else {})}
        loaded = load(flags, {"SGPU_V": environment} if environment else {})
        assert loaded.settings == Settings(v=value, host_path="/file")
        assert Path(loaded.origins["v"]).name == origin
        assert loaded.file == str(config)

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("SGPU_GPU_DUPLICATON_FACTOR", "SGPU_GPU_DUPLICATION_FACTOR"),
            ("SGPU_PLACMENT", "SGPU_PLACEMENT"),
            ("SGPU_CONFG", "SGPU_CONFIG"),
            ("SGPU_PORT_80_TCP_ADDR", ""),
            *((name, "") for name in ("SGPU_SERVICE_HOST", "SGPU_PORT", "sgpu_v", "V", "SGPU_VERSION", "SGPU_GPUS")),
        ],
    )
    def test_other_variables(self, name: str, meant: str) -> None:
        """They do not matter: a Service named `sgpu` makes some. Nor can they ask for an action, or give rules.

        One that is nearly a setting is a warning that names both.
        """
        loaded = load({}, {name: "x"})
        assert attrs.evolve(loaded, warnings=()) == load({}, {})
        warned = [(name in warning, meant in warning) for warning in loaded.warnings]
        assert warned == ([(True, True)] if meant else [])

    def test_the_file_s_own_place(self, config: Path) -> None:
        """A variable can name the file, and the flag beats it: of two, one is read. An empty variable names none."""
        config.write_text("v: 1")
        assert load({}, {"SGPU_CONFIG": str(config)}).settings.v == 1
        assert load({"config": str(config)}, {"SGPU_CONFIG": "/missing"}).settings.v == 1
        assert load({}, {"SGPU_CONFIG": ""}) == load({}, {})


@pytest.mark.parametrize(
    ("flags", "environment", "value", "origin", "warned"),
    [
        *(({name: "30"}, {}, 30, "command line", False) for name in INTERVALS),
        ({"sample-interval": "2", "health-interval": "7"}, {}, 2, "command line", True),
        ({"sample-interval": "7", "health-interval": "2"}, {}, 2, "command line", True),
        ({"sample-interval": "7"}, {"SGPU_HEALTH_INTERVAL": "2"}, 2, "SGPU_HEALTH_INTERVAL", True),
        ({"sample-interval": "2"}, {"SGPU_HEALTH_INTERVAL": "2.0"}, 2, "command line", False),
    ],
)
def test_intervals(flags: dict[str, str], environment: dict[str, str], value: int, origin: str, warned: bool) -> None:
    """-sample-interval and -health-interval are two names of one setting: one that is set counts for both.

    Of two, the smaller counts, wherever it comes from, and a warning names both and what counts, unless they are equal.
    """
    loaded = load(flags, environment)
    assert (loaded.settings.sample_interval, loaded.settings.health_interval) == (value, value)
    assert {loaded.origins[name] for name in INTERVALS} == {origin}
    warnings = [fact in warning for warning in loaded.warnings for fact in ("-sample-interval", "-health-interval")]
    assert warnings == ([True, True] if warned else [])


class TestRefused:
    def test_text(self) -> None:
        """A wrong value is refused with the setting, the value, where it came from, and what the setting takes."""
        takes = SETTINGS["simulate"].metadata["kind"].takes
        assert_refused(lambda: load({"simulate": "65"}, {}), "-simulate", "'65'", "command line", takes)
        assert_refused(lambda: load({}, {"SGPU_SIMULATE": "a\nb"}), "-simulate", r"'a\nb'", "SGPU_SIMULATE", takes)
        # Also where a higher source sets the same.
        assert_refused(lambda: load({"v": "1"}, {"SGPU_V": "x"}), "-v", "'x'", "SGPU_V")

    @pytest.mark.parametrize(
        ("content", "value"), [("v: '1'", "'1'"), ("v: 11", "11"), ("v:", "None"), ("v: [1, 2]", "[1, 2]")]
    )
    def test_value_in_the_file(self, config: Path, content: str, value: str) -> None:
        """It is refused with its line."""
        takes = SETTINGS["v"].metadata["kind"].takes
        assert_refused(lambda: load_file(config, f"# a comment\n{content}"), f"-v: {value} ", f"{config}:2", takes)

    @pytest.mark.parametrize("key", ["nope", "host_path", "config", "version", "1", '"a\\nb"'])
    def test_key_in_the_file(self, config: Path, key: str) -> None:
        """An unknown key is refused with its line and the keys there are. A file can't name a file, or do something."""
        assert_refused(
            lambda: load_file(config, f"v: 1\n\n{key}: 1"), key.strip('"'), f"{config}:3", ", ".join(SETTINGS), "gpus"
        )

    def test_file(self) -> None:
        """A file that can't be used is named with who named it. What is wrong with it is test_config_file's."""
        path, facts = "/missing/a\nb", ("-config", r"/missing/a\nb", "Errno 2")
        assert_refused(lambda: load({"config": path}, {}), "command line", *facts)
        assert_refused(lambda: load({}, {"SGPU_CONFIG": path}), "SGPU_CONFIG", *facts)

    def test_quoted_values_are_cut(self, config: Path) -> None:
        """A message stays a line, whatever the file has."""
        with pytest.raises(UsageError) as refused:
            load_file(config, f"placement: {'x' * 100_000}\n")
        assert len(str(refused.value)) < 500


class TestRules:
    """The file's key `gpus`: what each GPU is offered as."""

    def test_policy(self, config: Path) -> None:
        """Each entry is a rule that knows its line; without one, all GPUs are offered as the settings say."""
        content = """\
gpu-duplication-factor: 7
gpus:
  - uuid: gpu-1D6f
    shares: 1
    resource: example.com/whole-gpu
  - name: "*A100*"
    shares: 40

  - {exclude: true, pci-bus-id: 05:00.0}
  - {name: L4, memory-limits: burst=1.5}
  - {name: L40S, memory-limits: off}
"""
        policy = load_file(config, content).policy
        rules = (
            Rule("", uuid="gpu-1D6f", shares=1, resource="example.com/whole-gpu"),
            Rule("", name="*A100*", shares=40),
            Rule("", pci_bus_id="05:00.0", exclude=True),
            Rule("", name="L4", limit_factor=1.5),
            Rule("", name="L40S", limit_factor=0),
        )
        assert policy == Policy("deepomatic.com/shared-gpu", 7, rules)
        assert [rule.place for rule in policy.rules] == [f"{config}:{line}" for line in (3, 6, 9, 10, 11)]
        assert load_file(config, "gpus: []").policy == load({}, {}).policy
        flags = {"resource-name": "example.com/gpu", "gpu-duplication-factor": "7"}
        assert load(flags, {}).policy == Policy("example.com/gpu", 7)

    @pytest.mark.parametrize(
        ("content", "mig", "resource"),
        [
            ("mig: off", Mig.OFF, ""),  # which is false to YAML
            ("mig: profile", Mig.PROFILE, "deepomatic.com/mig-{profile}"),
            ("mig: profile\nresource-name: a.b/c", Mig.PROFILE, "a.b/mig-{profile}"),
            ("mig: profile\nmig-resource-name: x.y/mig-{profile}", Mig.PROFILE, "x.y/mig-{profile}"),
        ],
    )
    def test_mig(self, config: Path, content: str, mig: Mig, resource: str) -> None:
        """MIG instances are offered as the settings say, without a warning about another plugin."""
        loaded = load_file(config, content)
        assert (loaded.policy.mig, loaded.policy.mig_resource, loaded.warnings) == (mig, resource, ())

    @pytest.mark.parametrize(
        ("entry", "rule"),
        [
            ("{uuid: gpu-A, shares: 1}", Rule("", uuid="gpu-A", shares=1)),
            ("{uuid: mig-A, exclude: true}", Rule("", uuid="mig-A", exclude=True)),
            ("{mig-profile: 1g.5gb+me, shares: 3}", Rule("", mig_profile="1g.5gb+me", shares=3)),
            ("{pci-bus-id: '3B:00.0', shares: 1}", Rule("", pci_bus_id="3B:00.0", shares=1)),
            ("{exclude: false, shares: 2, name: T4}", Rule("", name="T4", shares=2)),
        ],
        ids=str,
    )
    def test_taken(self, config: Path, entry: str, rule: Rule) -> None:
        """All that an entry can say."""
        assert load_file(config, f"gpus: [{entry}]").policy.rules == (rule,)

    def test_of_another_plugin(self, config: Path) -> None:
        """NVIDIA's resource in a rule is a warning."""
        (warning,) = load_file(config, "gpus:\n- name: '*'\n  resource: nvidia.com/gpu\n").warnings
        assert "nvidia.com/gpu" in warning

    @pytest.mark.parametrize("value", ["", "GPU-a", "{uuid: GPU-a, shares: 1}"], ids=["nothing", "word", "mapping"])
    def test_not_a_list(self, config: Path, value: str) -> None:
        """It takes a list."""
        assert_refused(lambda: load_file(config, f"v: 1\ngpus: {value}\n"), "gpus", f"{config}:2")

    @pytest.mark.parametrize(
        ("entry", "facts"),
        [
            ("", ()),
            ("GPU-a", ()),
            ("{shares: 1}", ("uuid", "pci-bus-id", "name")),
            ("{uuid: GPU-a, name: T4, shares: 1}", ("uuid", "pci-bus-id", "name")),
            ("{uuuid: GPU-a, shares: 1}", ("'uuuid'", *RULE_KINDS)),
            ("{name: T4, 1: 1}", ("1", *RULE_KINDS)),
            ("{name: T4}", ("shares", "resource", "exclude")),
            ("{name: T4, exclude: true, shares: 1}", ("exclude", "shares")),
            ("{name: T4, exclude: true, resource: a.b/c}", ("resource",)),
            ("{uuid: T4, shares: 1}", ("uuid", "'T4'")),
            ("{uuid: MIG-GPU-a/1/0, shares: 1}", ("uuid", "R470")),
            ("{mig-profile: 1g, shares: 1}", ("mig-profile", "'1g'")),
            ("{mig-profile: 1g.5gb, name: T4, shares: 1}", ("exactly one",)),
            ("{uuid: 17, shares: 1}", ("uuid", "17")),
            ("{pci-bus-id: '3b:00', shares: 1}", ("pci-bus-id", "'3b:00'")),
            ("{name: '', shares: 1}", ("name", "''")),
            ("{name: T4, shares: 0}", ("shares", " 0 ")),
            ("{name: T4, resource: gpu}", ("resource", "'gpu'")),
            ("{name: T4, memory-limits: some}", ("memory-limits", "some")),
            ("{name: T4, exclude: 1}", ("exclude", " 1 ")),
        ],
        ids=str,
    )
    def test_refused(self, config: Path, entry: str, facts: tuple[str, ...]) -> None:
        """An error in an entry is one line with its place."""
        content = f"gpus:\n# first\n- {{name: V100, shares: 1}}\n- {entry}\n"
        assert_refused(lambda: load_file(config, content), "gpus", f"{config}:4", *facts)

    @pytest.mark.parametrize("selector", ["uuid: GPU-a", "pci-bus-id: '3b:00.0'", "name: '*'"])
    def test_the_same_twice(self, config: Path, selector: str) -> None:
        """Two entries with the same selector are refused, whatever GPUs there are, with both places."""
        content = f"gpus:\n- {{name: T4, shares: 1}}\n- {{{selector}, shares: 1}}\n- {{{selector}, exclude: true}}\n"
        fact = selector.replace("'", "")
        assert_refused(lambda: load_file(config, content), f"`{fact}` ({config}:3)", f"`{fact}` ({config}:4)")

    def test_thousands(self, config: Path) -> None:
        """Take time by their number, and not by its square: four times as many take less than eight times as long."""

        def seconds_for(number: int) -> float:
            content = "gpus:\n" + "".join(f"- {{uuid: GPU-{index}, shares: 1}}\n" for index in range(number))
            began = time.process_time()
            assert len(load_file(config, content).policy.rules) == number
            return time.process_time() - began

        assert seconds_for(2000) < 8 * seconds_for(500)


class TestXids:
    def test_policy(self) -> None:
        """The operator's say over XIDs comes as numbers."""
        xids = load({"ignore-xids": "13, 31", "critical-xids": "79"}, {}).xids
        assert xids == XidPolicy(frozenset({13, 31}), frozenset({79}))

    def test_both(self) -> None:
        """A number in both lists is refused, with where each list came from."""
        assert_refused(
            lambda: load({"ignore-xids": "13,79,48"}, {"SGPU_CRITICAL_XIDS": "79, 48"}),
            *("-ignore-xids (command line)", "-critical-xids (SGPU_CRITICAL_XIDS)", "48", "79"),
        )


class TestSocketPath:
    @staticmethod
    def directory(surplus: int) -> str:
        """A plugin directory that makes the socket's path this many bytes longer than it may be."""
        return "/" + "d" * (MAX_SOCKET_PATH_BYTES + surplus - len(endpoint(Settings().resource_name)) - len("//"))

    @pytest.mark.parametrize("directory", [directory(0), directory(0) + "///", "/a\udcff"])
    def test_taken(self, directory: str) -> None:
        """Every path that a socket can have is taken; slashes make no difference, and argv need not be UTF-8."""
        assert load({"plugin-directory": directory}, {}).settings == Settings(plugin_directory=directory)

    @pytest.mark.parametrize("directory", [directory(1), directory(0)[:-1] + "é"], ids=["longer", "more bytes"])
    def test_too_long(self, directory: str) -> None:
        """A byte more is refused, with both settings that make the path, where they came from, and the limit."""
        assert_refused(
            lambda: load({}, {"SGPU_PLUGIN_DIRECTORY": directory}),
            *("-plugin-directory (SGPU_PLUGIN_DIRECTORY)", "-resource-name (default)", str(MAX_SOCKET_PATH_BYTES)),
            f"{directory}/{endpoint(Settings().resource_name)}",
        )

    def test_a_long_name(self, config: Path) -> None:
        """A name that Kubernetes takes can be too long for a socket's; each rule's resource has a socket of its own."""
        name = "y" * 40 + ".example.com/" + "x" * 63
        assert_refused(lambda: load({"resource-name": name}, {}), "-plugin-directory", "-resource-name (command line)")
        content = f"gpus:\n- name: '*'\n  resource: {name}\n"
        assert_refused(lambda: load_file(config, content), "-plugin-directory", f"resource ({config}:2)")

    def test_the_kubelet_s_path(self) -> None:
        """The kubelet connects to the socket by the path of the host, which may be longer than the mount's."""
        flags = {"plugin-directory": "/p", "resource-name": "y" * 20 + ".example.com/" + "x" * 40}
        assert_refused(lambda: load(flags, {}), "-resource-name (command line)", "/var/lib/kubelet/device-plugins/")

    def test_profile(self) -> None:
        """The longest resource of a MIG profile must fit as well, where there are such."""
        pattern = "x" * 43 + "-{profile}"
        directory = self.directory(-30)
        load({"plugin-directory": directory, "mig-resource-name": pattern}, {})
        flags = {"plugin-directory": directory, "mig-resource-name": pattern, "mig": "profile"}
        assert_refused(lambda: load(flags, {}), "-plugin-directory", "-mig-resource-name (command line)")


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("ignore-xids", "[13, 31]", "13,31"),
        ("ignore-xids", "[13]", "13"),
        ("ignore-xids", "13", "13"),
        ("memory-guard-exempt-namespaces", "[kube-system, monitoring]", "kube-system,monitoring"),
    ],
)
def test_lists(config: Path, name: str, written: str, value: str) -> None:
    """YAML's own list is taken where a flag has commas."""
    assert getattr(load_file(config, f"{name}: {written}\n").settings, name.replace("-", "_")) == value
