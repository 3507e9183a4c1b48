"""The command line, run in this process: what it prints and its exit codes."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import yaml

from sgpu import __version__, rpc
from sgpu.cli import COMMANDS, FAILED, OK, USAGE, main
from sgpu.config.flags import parse_flags
from sgpu.config.load import Loaded, load
from sgpu.config.settings import SETTINGS, Settings
from sgpu.deviceplugin.session import DirectoryRemovedError
from sgpu.kubeapi import ApiServerError
from sgpu.node.policy import OffersRefusedError, PolicyConflictError

Daemon = Callable[[BaseException | None], list[Settings]]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Put the process's log and its garbage collector back as they were: running the daemon sets them up."""
    root, ours = logging.getLogger(), logging.getLogger("sgpu")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    gc.unfreeze()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """Put a stand-in for the daemon, which raises this error, if any; returns the settings of each run."""

    def install(error: BaseException | None) -> list[Settings]:
        seen: list[Settings] = []

        async def run(loaded: Loaded, reload: Callable[[], Loaded], alive: int | None) -> None:
            assert await trio.to_thread.run_sync(reload) == loaded
            seen.append(loaded.settings)
            if error:
                raise error

        monkeypatch.setattr("sgpu.start.start", run)
        return seen

    return install


class TestHelp:
    @pytest.mark.parametrize("flag", ["-help", "-h"])
    def test_lists_every_setting(self, capsys: pytest.CaptureFixture[str], flag: str) -> None:
        """Every flag is shown with what it is for, and every command; nothing goes to standard error."""
        assert main([flag], {}) == OK
        captured = capsys.readouterr()
        assert captured.err == ""
        for name, field in SETTINGS.items():
            assert f"  -{name} {field.metadata['kind'].example}\n" in captured.out
            assert field.metadata["meaning"] in captured.out
        for name in ("config", "print-config", "version", "help"):
            assert re.search(rf"^  .*-{name}\b", captured.out, re.MULTILINE)
        for name, command in COMMANDS.items():
            assert re.search(
                rf"^  sgpu {name}( {command.argument})? +{re.escape(command.summary)}$", captured.out, re.MULTILINE
            )

    @pytest.mark.parametrize(
        ("name", "default"),
        [
            pytest.param("gpu-duplication-factor", "100", id="number"),
            pytest.param("simulate", None, id="none for 0"),
            pytest.param("simulate-faults", None, id="none for empty"),
            pytest.param("logtostderr", "true", id="boolean"),
        ],
    )
    def test_defaults(self, capsys: pytest.CaptureFixture[str], name: str, default: str | None) -> None:
        """Defaults are shown as one would write them, and left out where they are nothing."""
        main(["-help"], {})
        section = capsys.readouterr().out.partition(f"\n  -{name} ")[2].partition("\n  -")[0]
        match = re.search(r"\(default (.*)\)", section)
        assert (match[1] if match else None) == default

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_a_command(self, capsys: pytest.CaptureFixture[str], name: str) -> None:
        """A command shows its own options, and points to the settings where it takes them."""
        assert main([name, "-help"], {}) == OK
        out = capsys.readouterr().out
        command = COMMANDS[name]
        assert command.summary in out
        for option, about in command.options.items():
            assert f"  -{option} {about.kind.example}\n" in out
        assert ("sgpu -help" in out) is command.takes_settings

    def test_beats_wrong_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Help is given to who has set something wrong."""
        assert main(["-v", "x", "-help"], {"SGPU_V": "y"}) == OK
        assert "-host-path" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is one line."""
    assert main(["-version"], {}) == OK
    assert capsys.readouterr() == (f"sgpu {__version__}\n", "")


class TestPrintConfig:
    def test_each_setting_with_its_origin(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Every setting is on a line, with its effective value and where that came from."""
        config = tmp_path / "config.yaml"
        config.write_text("v: 1\ngpu-duplication-factor: 50\n")
        assert main(["-print-config", "-v=2", f"-config={config}"], {"SGPU_LOGTOSTDERR": "0"}) == OK
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        assert [line.partition(":")[0] for line in lines] == list(SETTINGS)
        assert {
            "v: 2  # command line",
            f"gpu-duplication-factor: 50  # {config}",
            "logtostderr: false  # SGPU_LOGTOSTDERR",
            'placement: "spread"  # default',
        } <= set(lines)

    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param([], id="defaults"),
            pytest.param(["-simulate=3", "-log-format=json", "-logtostderr=false"], id="others"),
            pytest.param(["-memory-watermark=0.00001", "-sample-interval=7"], id="fractions"),
            pytest.param(["-host-path=/opt/é"], id="not ASCII"),
            pytest.param(["-host-path=/a: b"], id="colon"),
            pytest.param(["-host-path=/a #b"], id="comment sign"),
            pytest.param(["-host-path=/a\n\x85b "], id="newlines and a space"),
            pytest.param(["-simulate-faults=17"], id="a number's text"),
            pytest.param(["-simulate-faults=no"], id="a boolean's text"),
            pytest.param(["-simulate-faults=[a"], id="YAML's own signs"),
        ],
    )
    def test_loads_back(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> None:
        """The output is a file for -config, with the same settings."""
        assert main(["-print-config", *arguments], {}) == OK
        printed = capsys.readouterr().out
        assert list(yaml.safe_load(printed)) == list(SETTINGS)
        config = tmp_path / "printed.yaml"
        config.write_text(printed)
        loaded = load({"config": str(config)}, {})
        assert loaded.settings == load(parse_flags(arguments).values, {}).settings
        assert loaded.warnings == ()

    def test_rules(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """The rules per GPU are printed as well, each with its place, and load back."""
        config, printed = tmp_path / "config.yaml", tmp_path / "printed.yaml"
        config.write_text(
            "gpus:\n"
            "- {uuid: GPU-a, shares: 1, resource: example.com/whole-gpu}\n"
            "- {pci-bus-id: 0000:05:00.0, exclude: true}\n"
            "- {name: '*é: #[A]', shares: 3, exclude: false}\n"
        )
        assert main(["-print-config", f"-config={config}"], {}) == OK
        printed.write_text(capsys.readouterr().out)
        assert printed.read_text().splitlines()[-3].endswith(f"# {config}:2")
        assert load({"config": str(printed)}, {}).policy == load({"config": str(config)}, {}).policy

    def test_not_utf8(self) -> None:
        """A path that is not UTF-8 is printed in some way, on a terminal as strict as can be."""
        command: list[str | bytes] = [sys.executable, "-m", "sgpu", "-print-config", b"-host-path=/a\xff"]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        printed = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert (printed.returncode, printed.stderr) == (OK, b"")


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "environment", "facts"),
        [
            pytest.param(["-nope"], {}, ["-nope"], id="unknown flag"),
            pytest.param(["nope"], {}, ["'nope'"], id="unknown command"),
            pytest.param(["demo", "more"], {}, ["'demo more'"], id="more than a command"),
            pytest.param(["a\nb"], {}, [r"'a\nb'"], id="command with a newline"),
            pytest.param(["-print-config", "-v=x"], {}, ["-v", "'x'"], id="nothing to print"),
            pytest.param(["-api=dra"], {}, ["-node-name", "SGPU_NODE_NAME"], id="no name of the node"),
            pytest.param(["-events"], {}, ["-events", "-node-name"], id="events of no node"),
            pytest.param(["doctor"], {"SGPU_V": "x"}, ["-v", "'x'", "SGPU_V"], id="environment"),
            pytest.param(["demo", "-v=5"], {}, ["demo"], id="setting of a command that takes none"),
            pytest.param(["demo", "-print-config"], {}, ["demo"], id="action of a command that takes none"),
        ],
    )
    def test_one_line(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str], facts: list[str]
    ) -> None:
        """A bad setting is one line on standard error, and exit code 2."""
        assert main(arguments, environment) == USAGE
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("sgpu: ")
        assert [fact for fact in facts if fact not in line] == []


def stand_in(monkeypatch: pytest.MonkeyPatch, function: str, result: object) -> list[object]:
    """Put something that returns this in a function's place; gives the list of the arguments of each call."""
    calls: list[object] = []

    def called(*arguments: object, **named: object) -> object:
        calls.append((arguments, named))
        return result

    monkeypatch.setattr(function, called)
    return calls


class TestCommands:
    @pytest.mark.parametrize("code", [OK, FAILED])
    def test_demo(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        """`demo` exits with the demonstration's code, whatever the environment sets."""
        stand_in(monkeypatch, "sgpu.commands.demo.demo", code)
        assert main(["demo"], {"SGPU_V": "x"}) == code

    @pytest.mark.parametrize("well", [True, False])
    def test_doctor(self, monkeypatch: pytest.MonkeyPatch, well: bool) -> None:
        """`doctor` gets the settings and how to print, and exits with 1 where something is wrong."""
        seen = stand_in(monkeypatch, "sgpu.commands.doctor.doctor", well)
        assert main(["doctor", "-o=json", "-v=1"], {}) == (OK if well else FAILED)
        assert seen == [((load({"v": "1"}, {}), "json"), {})]

    @pytest.mark.parametrize("staged", [True, False])
    def test_stage(self, monkeypatch: pytest.MonkeyPatch, staged: bool) -> None:
        """`stage` gets where, how often and what, by default or by its options, and exits with 1 where it fails."""
        seen = stand_in(monkeypatch, "sgpu.commands.stage.stage", staged)
        assert main(["stage"], {"SGPU_HOST_PATH": "/opt"}) == (OK if staged else FAILED)
        main(["stage", "-host-root=/host", "-lock-file=/l", "-graphics", "-interval=60"], {})
        assert seen == [
            ((Path("/"), Path("/opt"), Path("/run/sgpu/stage.lock")), {"graphics": False, "interval": 0.0}),
            ((Path("/host"), Path(Settings().host_path), Path("/l")), {"graphics": True, "interval": 60.0}),
        ]

    def test_status(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`status` gets the settings and all of its options, and its exit code is the command's."""
        seen = stand_in(monkeypatch, "sgpu.commands.status.command.status", 7)
        assert main(["status", "-watch"], {}) == 7
        options = {"watch": True, "interval": 2.0, "o": "text", "no-color": False}
        assert seen == [((load({}, {}), options), {})]


class TestRun:
    def test_stop(self, daemon: Daemon) -> None:
        """The daemon is run with the effective settings and the log they ask for; a stop is a success."""
        seen = daemon(None)
        assert main(["-v=1", "-host-path=/opt"], {"SGPU_SIMULATE": "2"}) == OK
        assert seen == [Settings(v=1, host_path="/opt", simulate=2)]
        assert logging.getLogger("sgpu").level == logging.DEBUG
        main(["-log-format=json"], {})
        assert logging.getLogger("sgpu").level == logging.INFO
        assert type(logging.getLogger().handlers[0].formatter).__name__ == "JsonFormatter"

    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            pytest.param(OffersRefusedError("too many"), USAGE, id="too many shares"),
            pytest.param(PolicyConflictError("matched twice"), USAGE, id="two rules for a GPU"),
            pytest.param(rpc.AddressInUseError(Path("/x.sock"), 0), FAILED, id="address in use"),
            pytest.param(DirectoryRemovedError(Path("/x")), FAILED, id="directory removed"),
            pytest.param(ApiServerError("needs a pod"), FAILED, id="no API server"),
        ],
    )
    def test_for_the_operator(
        self, capsys: pytest.CaptureFixture[str], daemon: Daemon, error: Exception, code: int, depth: int
    ) -> None:
        """An operator's mistake is one line, however deep in the daemon it was found."""
        raised = error
        for _ in range(depth):
            raised = ExceptionGroup("tasks", [raised])
        daemon(raised)
        assert main([], {}) == code
        assert capsys.readouterr() == ("", f"sgpu: {error}\n")

    def test_crash(self, daemon: Daemon) -> None:
        """Any other error is a bug: it ends the process with its traceback."""
        daemon(ExceptionGroup("tasks", [KeyError("bug")]))
        with pytest.raises(ExceptionGroup):
            main([], {})
