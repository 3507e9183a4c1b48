"""`kubectl sgpu` against an API server: what it asks, prints and returns, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
from fake_api import Page, path, pod, pod_list, serving
from fake_status import GPU, SNAPSHOT

from sgpu.cli import FAILED, OK, USAGE, main
from sgpu.commands.cluster import ask
from sgpu.commands.cluster.ask import AT_A_TIME
from sgpu.observe.snapshot import encode

#: Stands in for kubectl: notes its arguments, serves on the socket as it is told, and says so.
KUBECTL = """\
#!{python}
import os, socket, sys, urllib.request
print(*sys.argv[1:], sep="\\n", file=open({arguments!r}, "w"))
if {fails!r}:
    sys.exit({fails!r})
path = next(a for a in sys.argv if a.startswith("--unix-socket=")).partition("=")[2]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(100)
print("Starting to serve on", path, flush=True)
while True:
    connection = listener.accept()[0]
    where = connection.recv(65536).split()[1].decode()
    with urllib.request.urlopen({api!r} + where) as answer:
        body = answer.read()
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    connection.close()
"""
WELL = (200, encode(SNAPSHOT))


def pages(**answers: Page) -> Mapping[str, Page]:
    """Return the pages of a cluster with these nodes."""
    return {"pods": (200, pod_list(*map(pod, answers))), **{path(node): page for node, page in answers.items()}}


@pytest.fixture
def api() -> Iterator[str]:
    """The address of an API server with two nodes."""
    with serving(pages(node1=WELL, node2=(200, encode(attrs.evolve(SNAPSHOT, gpus=(GPU, GPU)))))) as address:
        yield address


@pytest.fixture
def kubectl(tmp_path: Path, api: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the arguments of a kubectl in PATH."""
    return make_kubectl(tmp_path, api, monkeypatch)


def make_kubectl(directory: Path, api: str, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> Path:
    arguments = directory / "arguments"
    script = directory / "kubectl"
    script.write_text(KUBECTL.format(python=sys.executable, arguments=str(arguments), api=api, fails=fails))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
    return arguments


class TestAnswers:
    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            pytest.param(None, "no answer within 0.3 s: the node, its network or sgpu hangs", id="silent"),
            pytest.param(
                (503, b'{"message": "dial tcp 10.0.0.1:2112: connection refused"}'),
                "dial tcp 10.0.0.1:2112: connection refused (HTTP status 503)",
                id="refused",
            ),
            pytest.param(
                (403, b'{"message": "no access"}'), "no access; k8s/cluster-view has a role for it", id="forbidden"
            ),
            pytest.param((404, b"there is no '/status' here"), "sgpu there is too old to be asked", id="old"),
            pytest.param((500, b""), "no message (HTTP status 500)", id="nothing"),
            pytest.param((200, b'{"version": "9.9"}'), "sgpu 9.9 answers, which sgpu 0.1.0 can't read", id="newer"),
            pytest.param((200, b"<html>"), "another program or version answers", id="another program"),
        ],
    )
    def test_reasons(
        self, page: Page, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A node that does not answer is a row with the reason; the others are there."""
        monkeypatch.setattr(ask, "TIMEOUT", 0.3)
        with serving(pages(node1=page, node2=WELL)) as address:
            assert main(["cluster", f"-address={address}"], {}) == OK
        lines = capsys.readouterr().out.splitlines()
        assert re.match(r"node1 +- +- +- +-  ", lines[1])
        assert reason in lines[1]
        assert lines[2].startswith("node2     1        3/100")

    def test_at_a_time(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Ask at most so many at a time; silent ones cost their time once in so many, not each."""
        monkeypatch.setattr(ask, "TIMEOUT", 0.5)
        nodes: dict[str, Page] = {f"node{number}": None for number in range(2 * AT_A_TIME)}
        with serving(pages(**nodes)) as address:
            begun = time.monotonic()
            assert main(["cluster", "-o=json", f"-address={address}"], {}) == OK
            assert 1 <= time.monotonic() - begun < 10
        assert len(json.loads(capsys.readouterr().out)["nodes"]) == 2 * AT_A_TIME

    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            pytest.param((403, b'{"message": "pods is forbidden"}'), "forbidden; k8s/cluster-view", id="denied"),
            pytest.param((200, b"{}"), "no API server", id="another program"),
            pytest.param((200, pod_list()), "no sgpu pod in kube-system (label app=sgpu)", id="none"),
            pytest.param((200, pod_list(pod("x"))), "no sgpu pod runs on a node named 'gpu-*'; there are 1", id="node"),
        ],
    )
    def test_no_list(self, page: Page, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Print one line, and exit with 1, where there is nobody to ask."""
        with serving({"pods": page}) as address:
            assert main(["cluster", f"-address={address}", "-node=gpu-*"], {}) == FAILED
        captured = capsys.readouterr()
        assert captured.out == ""
        assert reason in captured.err
        assert captured.err.count("\n") == 1

    def test_nobody_listens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["cluster", "-address=unix:/nonexistent"], {}) == FAILED
        assert "sgpu: cannot ask the API server" in capsys.readouterr().err


class TestOptions:
    def test_node_and_namespace(self, api: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Ask only these nodes; show only what these pods have."""
        assert main(["cluster", "gpus", "-node=node2", "-namespace=team", f"-address={api}"], {}) == OK
        assert "\n1 of 1 node answered; 0 GPUs" in capsys.readouterr().out

    def test_json(self, api: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Print all of it for programs."""
        assert main(["cluster", "-o", "json", f"-address={api}"], {}) == OK
        nodes = json.loads(capsys.readouterr().out)["nodes"]
        assert [node["node"] for node in nodes] == ["node1", "node2"]
        assert nodes[0]["snapshot"] == json.loads(encode(SNAPSHOT))

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["cards"], "'cards' is no view; there are nodes, gpus, pods, faults, room"),
            (["gpus", "4"], "gpus takes nothing after it, and got '4'"),
            (["room", "4TB"], "not '4TB'"),
            (["room", "4", "5"], "unknown command"),
            (["faults", "-namespace=x"], "-namespace goes with pods and gpus"),
            (["-address=ftp://x"], "is not http://HOST:PORT or unix:PATH"),
            (["-simulate=2"], "cluster does not take the daemon's flags, as -simulate"),
            (["-o=yaml"], "-o"),
        ],
        ids=" ".join,
    )
    def test_usage(self, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Print one line about a wrong command line, and exit with 2."""
        assert main(["cluster", *words], {}) == USAGE
        captured = capsys.readouterr()
        assert reason in captured.err
        assert captured.err.count("\n") == 1


class TestKubectl:
    def test_child(self, kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Run kubectl with a private socket, which lets nothing else through; take the socket away afterwards."""
        assert main(["cluster", "-context=prod", "-kubeconfig=/k"], {}) == OK
        assert "2 of 2 nodes answered" in capsys.readouterr().out
        command, listen, accept, reject, *rest = kubectl.read_text().splitlines()
        assert (command, rest) == ("proxy", ["--context=prod", "--kubeconfig=/k"])
        directory = Path(listen.partition("=")[2]).parent
        assert not directory.exists()
        patterns = accept.partition("=")[2].split(",")
        for where, allowed in ((path("n"), True), ("/api/v1/pods", True), ("/api/v1/secrets", False)):
            assert any(re.search(pattern, where) for pattern in patterns) is allowed
        assert re.search(reject.partition("=")[2], "POST")

    def test_fails(
        self, tmp_path: Path, api: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Repeat what kubectl says."""
        make_kubectl(tmp_path, api, monkeypatch, fails='error: context "prod" does not exist')
        assert main(["cluster"], {}) == FAILED
        assert 'kubectl proxy has ended: error: context "prod" does not exist;' in capsys.readouterr().err

    def test_missing(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Say how to do without."""
        monkeypatch.setenv("PATH", "/nonexistent")
        assert main(["cluster"], {}) == FAILED
        assert "cannot run kubectl: it is not in PATH" in capsys.readouterr().err

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal(self, kubectl: Path, number: signal.Signals) -> None:
        """End in good order with -watch: code 0, and kubectl is gone with its socket."""
        command = [sys.executable, "-c", "import sys; from sgpu.__main__ import kubectl_sgpu as run; run()"]
        with subprocess.Popen([*command, "-watch", "-interval=60"], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout
            while "nodes answered" not in running.stdout.readline():
                pass
            running.send_signal(number)
            assert running.wait() == 0
        assert not Path(kubectl.read_text().splitlines()[1].partition("=")[2]).parent.exists()


def test_watch_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    """Print a table for each refresh, also after one for which nobody answered."""
    lists = iter([(200, pod_list(pod("n"))), (503, b'{"message": "etcd is away"}'), (200, pod_list(pod("n")))])

    def page(where: str) -> Page:
        return next(lists, None) if where == "pods" else WELL

    with serving(page) as address:
        command = [sys.executable, "-m", "sgpu", "cluster", "-watch", "-interval=0.1", f"-address={address}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout
            seen = 0
            while seen < 2:
                seen += "1 of 1 node answered" in running.stdout.readline()
            running.terminate()
            assert running.wait() == 0
    assert "etcd is away" in capfd.readouterr().err


def test_watch_on_a_terminal(api: str) -> None:
    """Draw on a screen of its own, with a line that shows how far the asking is; put the screen away at the end."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "sgpu", "cluster", "-watch", f"-address={api}"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as running:
        os.close(slave)
        seen = b""
        while b"again in 5 s" not in seen:
            seen += os.read(master, 65536)
        running.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal's other end is closed
            while chunk := os.read(master, 65536):
                seen += chunk
        assert running.wait() == 0
    os.close(master)
    for part in (b"\x1b[?1049h", b"asking: 0 of 2 answered", b"2 of 2 nodes answered", b"\x1b[?1049l"):
        assert part in seen
