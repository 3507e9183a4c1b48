"""The command line, run in this process: what it prints and its exit codes."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
import yaml

from sgpu import __version__, rpc
from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.listing import TooManySharesError
from sgpu.load import Loaded, load, parse_flags
from sgpu.policy import PolicyConflictError
from sgpu.settings import KNOBS, Settings, endpoint

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Put the process's log back as it was: running the daemon sets it up."""
    root, ours = logging.getLogger(), logging.getLogger("sgpu")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture
def plugin_directory() -> Iterator[Path]:
    """A directory with a path short enough for a socket."""
    with TemporaryDirectory(prefix="sgpu-") as directory:
        yield Path(directory)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], list[Settings]]:
    """Put a stand-in for the daemon, which ends as told; gives the list of the settings it is run with."""

    def install(error: BaseException | None) -> list[Settings]:
        seen: list[Settings] = []

        async def run(loaded: Loaded, reload: Callable[[], Loaded]) -> None:
            assert await trio.to_thread.run_sync(reload) == loaded
            seen.append(loaded.settings)
            await trio.lowlevel.checkpoint()
            if error:
                raise error

        monkeypatch.setattr("sgpu.daemon.run", run)
        return seen

    return install


class TestHelp:
    @pytest.mark.parametrize("flag", ["-help", "--help", "-h", "--h"])
    def test_lists_every_setting(self, capsys: pytest.CaptureFixture[str], flag: str) -> None:
        """Every flag is shown with what it is for and its default; nothing goes to standard error."""
        assert main([flag], {}) == OK
        captured = capsys.readouterr()
        assert captured.err == ""
        for name, field in KNOBS.items():
            assert f"  -{name} {field.metadata['kind'].example}\n" in captured.out
            assert field.metadata["meaning"] in captured.out
        for name in ("config", "print-config", "version", "help"):
            assert re.search(rf"^  .*-{name}\b", captured.out, re.MULTILINE)
        assert "sgpu demo" in captured.out

    @pytest.mark.parametrize(
        ("name", "default"),
        [
            pytest.param("host-path", "/home/kubernetes/bin/nvidia", id="path"),
            pytest.param("gpu-duplication-factor", "100", id="number"),
            pytest.param("simulate", None, id="none for 0"),
            pytest.param("simulate-faults", None, id="none for empty"),
            pytest.param("logtostderr", "true", id="boolean"),
            pytest.param("memory-watermark", "0.95", id="fraction"),
            pytest.param("multi-share", "distinct", id="word"),
        ],
    )
    def test_defaults(self, capsys: pytest.CaptureFixture[str], name: str, default: str | None) -> None:
        """Defaults are shown as one would write them, and left out where they are nothing."""
        main(["-help"], {})
        section = capsys.readouterr().out.partition(f"\n  -{name} ")[2].partition("\n  -")[0]
        match = re.search(r"\(default (.*)\)", section)
        assert (match[1] if match else None) == default

    def test_beats_wrong_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Help is given to who has set something wrong."""
        assert main(["-v", "x", "-help"], {"SGPU_V": "y"}) == OK
        assert "Flags go as" in capsys.readouterr().out


class TestVersion:
    @pytest.mark.parametrize("flag", ["-version", "--version"])
    def test_version(self, capsys: pytest.CaptureFixture[str], flag: str) -> None:
        """The version is one line."""
        assert main([flag], {}) == OK
        assert capsys.readouterr() == (f"sgpu {__version__}\n", "")

    def test_as_go_takes_it(self) -> None:
        """As a boolean flag of Go's it can be given its value."""
        assert main(["-version=true"], {}) == OK


class TestPrintConfig:
    def test_each_setting_with_its_origin(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Every setting is on a line, with its effective value and where that came from."""
        config = tmp_path / "config.yaml"
        config.write_text("v: 1\ngpu-duplication-factor: 50\n")
        assert main(["-print-config", "-v=2", f"-config={config}"], {"SGPU_LOGTOSTDERR": "0"}) == OK
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        assert [line.partition(":")[0] for line in lines] == list(KNOBS)
        assert "v: 2  # command line" in lines
        assert f"gpu-duplication-factor: 50  # {config}" in lines
        assert "logtostderr: false  # SGPU_LOGTOSTDERR" in lines
        assert re.search(r"^host-path: \S+  # default$", captured.out, re.MULTILINE)

    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param([], id="defaults"),
            pytest.param(
                ["-host-path=/opt/a b", "-simulate=3", "-log-format=json", "-logtostderr=false", "-v=4"], id="others"
            ),
            pytest.param(["-host-path=/opt/é"], id="not ASCII"),
            pytest.param(["-simulate-faults=faults.txt"], id="a file"),
            pytest.param(
                ["-memory-watermark=0", "-multi-share=same", "-sample-interval=7", "-framework-hints=false"],
                id="sharing",
            ),
            pytest.param(["-host-path=/a: b"], id="colon"),
            pytest.param(["-host-path=/a #b"], id="comment sign"),
            pytest.param(["-host-path=/a\nb"], id="newline"),
            pytest.param(["-host-path=/a "], id="space at the end"),
            pytest.param(["-simulate-faults=17"], id="a number's text"),
            pytest.param(["-simulate-faults=no"], id="a boolean's text"),
            pytest.param(["-simulate-faults=[a"], id="YAML's own signs"),
        ],
    )
    def test_loads_back(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> None:
        """What is printed is a file for -config, with the same settings."""
        assert main(["-print-config", *arguments], {}) == OK
        printed = capsys.readouterr().out
        assert list(yaml.safe_load(printed)) == list(KNOBS)
        config = tmp_path / "printed.yaml"
        config.write_text(printed)
        loaded = load({"config": str(config)}, {})
        assert loaded.settings == load(parse_flags(arguments).values, {}).settings
        assert set(loaded.origins.values()) == {str(config)}

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

    def test_wrong_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Settings that can't be used are not printed."""
        assert main(["-print-config", "-v=x"], {}) == USAGE
        assert capsys.readouterr().out == ""


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "environment", "line"),
        [
            pytest.param(["-nope"], {}, "unknown flag -nope (see -help)", id="unknown flag"),
            pytest.param(["nope"], {}, "unknown command 'nope' (see -help)", id="unknown command"),
            pytest.param(["demo", "more"], {}, "unknown command 'demo more' (see -help)", id="more than a command"),
            pytest.param(["a\nb"], {}, r"unknown command 'a\nb' (see -help)", id="command with a newline"),
            pytest.param(
                ["-v"], {}, "-v (command line) needs a value: a whole number from 0 to 10", id="missing value"
            ),
            pytest.param(
                ["-simulate", "65"],
                {},
                "-simulate: '65' (command line) is not a whole number from 0 to 64",
                id="out of range",
            ),
            pytest.param([], {"SGPU_V": "x"}, "-v: 'x' (SGPU_V) is not a whole number from 0 to 10", id="environment"),
            pytest.param(
                ["-config=/missing/x"],
                {},
                "-config /missing/x (command line) can't be read: [Errno 2] No such file or directory: '/missing/x'",
                id="no such file",
            ),
        ],
    )
    def test_one_line(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str], line: str
    ) -> None:
        """What can't be used is one line on standard error, and exit code 2."""
        assert main(arguments, environment) == USAGE
        assert capsys.readouterr() == ("", f"sgpu: {line}\n")

    def test_process(self) -> None:
        """As a process too: exit code 2, one line, no traceback."""
        command = [sys.executable, "-m", "sgpu", "-gpu-duplication-factor=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "sgpu: -gpu-duplication-factor: '0' (command line) is not a whole number from 1 to 100000\n"
        )


class TestDemo:
    @pytest.mark.parametrize("code", [OK, FAILED])
    def test_demo(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        """`demo` runs the demonstration, whose exit code is the command's."""
        monkeypatch.setattr("sgpu.demo.demo", lambda: code)
        assert main(["demo"], {}) == code


Daemon = Callable[[BaseException | None], list[Settings]]


class TestRun:
    def test_stop(self, daemon: Daemon) -> None:
        """The daemon is run with the effective settings; when it was told to stop, all is well."""
        seen = daemon(None)
        assert main(["-v=1", "-host-path=/opt"], {"SGPU_SIMULATE": "2"}) == OK
        assert seen == [Settings(v=1, host_path="/opt", simulate=2)]

    def test_log(self, daemon: Daemon) -> None:
        """The log is as the settings say before the daemon starts."""
        daemon(None)
        main(["-v=1", "-log-format=json"], {})
        assert logging.getLogger("sgpu").level == logging.DEBUG
        main([], {})
        assert logging.getLogger("sgpu").level == logging.INFO

    @pytest.mark.parametrize("depth", [0, 1, 3])
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            pytest.param(TooManySharesError("too many"), USAGE, id="too many shares"),
            pytest.param(PolicyConflictError("claimed twice"), USAGE, id="two rules for a GPU"),
            pytest.param(rpc.AddressInUseError(Path("/x.sock"), 0), FAILED, id="address in use"),
        ],
    )
    def test_for_the_operator(
        self, capsys: pytest.CaptureFixture[str], daemon: Daemon, error: Exception, code: int, depth: int
    ) -> None:
        """What an operator must put right is one line, however deep in the daemon it was found."""
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

    def test_too_many_shares(self, capsys: pytest.CaptureFixture[str], plugin_directory: Path) -> None:
        """The real daemon refuses more shares than a message holds: one line with the largest factor, code 2."""
        arguments = ["-simulate=64", "-gpu-duplication-factor=100000", f"-plugin-directory={plugin_directory}"]
        assert main(arguments, {}) == USAGE
        last = capsys.readouterr().err.splitlines()[-1]
        match = re.fullmatch(
            r"sgpu: 6400000 shares on 64 GPU\(s\) .* -gpu-duplication-factor can be at most (\d+) here", last
        )
        assert match
        assert list(plugin_directory.iterdir()) == []

    def test_address_in_use(self, capsys: pytest.CaptureFixture[str], plugin_directory: Path) -> None:
        """The real daemon does not take a live socket away from another: one line says whose it is, code 1."""
        socket = plugin_directory / endpoint(Settings().resource_name)

        async def listen() -> None:
            with rpc.listen(socket):
                await trio.to_thread.run_sync(check)

        def check() -> None:
            # A process of its own: signals are received in the main thread only, and that one is listening.
            command = [sys.executable, "-m", "sgpu", "-simulate=1", f"-plugin-directory={plugin_directory}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            last = done.stderr.splitlines()[-1]
            assert done.returncode == FAILED
            assert re.fullmatch(rf"sgpu: process \d+ \(.*\) already listens on {socket}", last)
            assert socket.exists()

        trio.run(listen)


@pytest.mark.parametrize("flag", ["-v=5", "-print-config"])
def test_demo_takes_no_flags(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """Better refused than ignored."""
    assert main(["demo", flag], {}) == USAGE
    assert capsys.readouterr() == ("", "sgpu: demo takes no flags\n")
