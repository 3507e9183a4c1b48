"""Imports of the daemon and its driver's process: every node pays for each, in memory and at a start.

A module that is missed here was loaded only since; one that is named in vain has gone. Both are to be put right here.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
from fake_kubelet import FakeKubelet
from node import Node

from sgpu.driver.messages import WorkerConfig, encode_config

#: Third parties' packages, by who asks for them.
WORKER = {"attr", "attrs", "_cffi_backend"}
TRIO = {"trio", "outcome", "sniffio", "sortedcontainers"}
PURERPC = {"purerpc", "async_generator", "google", "hpack"}
CLI = {"attr", "attrs"}
DAEMON = {*CLI, *TRIO, *PURERPC, "inotify_simple"}
SERVED = {*DAEMON, "h11"}
SCRAPED = {*SERVED, "prometheus_client"}
API_SERVER = {*CLI, *TRIO, "certifi", "h11", "httpcore"}
CONFIGURED = {*DAEMON, "yaml"}
OURS = {"sgpu", "__main__", "__mp_main__"}
#: What makes an environment what it is, and what Cython makes of YAML's parser.
NOBODYS = ("_distutils_hack", "_virtualenv", "_cython_", "cython_runtime")

#: Never: what is for developers, for other commands, or has a smaller counterpart.
HEAVY = {
    *("argparse", "asyncio", "concurrent", "multiprocessing", "unittest", "doctest", "pdb", "pydoc", "xml", "sqlite3"),
    *("curses", "tkinter", "setuptools", "pkg_resources", "zoneinfo", "tomllib", "cffi", "pycparser"),
    *("rich", "pygments", "grpc", "exceptiongroup", "sgpu.commands"),
}
#: Only where there are metrics to be made.
METRICS = {"prometheus_client", "socketserver", "gzip", "sgpu.observe.metrics"}
#: Only where something is served for others than the kubelet.
WEB = {*METRICS, "h11", "http", "sgpu.observe.endpoints", "sgpu.observe.http"}
#: Only where something speaks TLS, and only where libraries are used in another way than here. What stands in for a
#: module has its name.
UNUSED = {
    *("_ssl", "_hashlib", "anyio", "typing_extensions", "google.protobuf.internal.python_message"),
    *("h2", "idna", "email", "html", "http.server", "wsgiref"),
}
#: Only in the daemon itself.
NOT_IN_WORKER = {*HEAVY, *WEB, "logging", "queue", "socket", "ssl", "trio", "google", "yaml"}

#: Not for `-help` and `-version`.
UNREAD = {
    *(*HEAVY, *WEB, *UNUSED, "yaml", "json", "logging", "ast", "dis"),
    *("sgpu.config.load", "sgpu.node", "sgpu.driver"),
}

#: Says what was imported, without what stands in for it.
SAY = """
import sys
loaded = [name for name, module in sys.modules.items() if type(module).__name__ != "_Postponed"]
print("loaded:", *loaded, file=sys.stderr, flush=True)
"""
#: Says so at its end.
LOADED = f"""
from {{module}} import main
try:
    main()
finally:
    exec({SAY!r})
"""
#: Imports a module as the daemon does.
IMPORT = f"""
from sgpu.lib.postpone import postpone_unneeded
postpone_unneeded()
import {{module}}
{SAY}
"""


def python(code: str, *arguments: str) -> set[str]:
    """The modules that a program says it has loaded."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return modules(done.stderr)


def modules(text: str) -> set[str]:
    return set(text.rpartition("loaded:")[2].split())


def check(loaded: set[str], third_parties: set[str], never: Iterable[str], most: int) -> None:
    """That third parties' packages are these, none of those is there, and that there are not too many in all."""
    packages = {name.partition(".")[0] for name in loaded} - {*sys.stdlib_module_names, *OURS}
    assert {package for package in packages if not package.startswith(NOBODYS)} == third_parties
    assert loaded & set(never) == set()
    assert len(loaded) <= most, (len(loaded), sorted(loaded))


@pytest.mark.parametrize(
    ("module", "third_parties", "never", "most"),
    [
        pytest.param("sgpu.cli", CLI, UNREAD, 110, id="command line"),
        pytest.param("sgpu.daemon", DAEMON, {*HEAVY, *WEB, *UNUSED, "yaml"}, 400, id="daemon"),
        pytest.param(
            "sgpu.kubeapi", API_SERVER, {*HEAVY, *UNUSED, "urllib.request", "http.client"}, 300, id="API server"
        ),
        pytest.param("sgpu.driver.worker", WORKER, {*NOT_IN_WORKER, "ast", "dis"}, 145, id="driver's process"),
        pytest.param(
            "sgpu.parent", set(), {*NOT_IN_WORKER, "typing", "re", "threading", "sgpu.lib", "sgpu.cli"}, 50, id="parent"
        ),
    ],
)
def test_what_an_import_brings_along(module: str, third_parties: set[str], never: set[str], most: int) -> None:
    """At the start, which is waited for."""
    check(
        python(IMPORT.format(module=module) if third_parties else f"import {module}\n{SAY}"), third_parties, never, most
    )


@pytest.mark.parametrize("module", sorted(name for name in {*HEAVY, *WEB} if name.startswith("sgpu.")))
def test_what_is_forbidden_exists(module: str) -> None:
    """A name that no module has any more would forbid nothing."""
    __import__(module)


@pytest.mark.soak
class TestRunning:
    def daemon(self, node: Node, *flags: str | float, scrape: bool = False) -> set[str]:
        """Return its modules at the end, after everything was used."""
        command = (sys.executable, "-c", LOADED.format(module="sgpu.__main__"))
        with FakeKubelet(node.plugins) as kubelet, node.daemon(*flags, command=command) as daemon:
            share = next(iter(kubelet.wait_devices(100)))
            kubelet.preferred([share])
            kubelet.allocate([share])
            if scrape:
                page = "http://" + daemon.wait_log(" http://").text.partition(" http://")[2].split(",")[0]
                urllib.request.urlopen(f"{page}/metrics").close()
            daemon.terminate()
            return modules(daemon.wait_log("loaded:").text)

    def test_plain(self, node: Node) -> None:
        """No more than was loaded at first."""
        check(self.daemon(node), DAEMON, {*HEAVY, *WEB, *UNUSED, "yaml"}, 400)

    def test_scraped(self, node: Node) -> None:
        """The metrics library is loaded at the first scrape."""
        address = ("-metrics-address", "127.0.0.1:0")
        check(self.daemon(node, *address), SERVED, {*HEAVY, *METRICS, *UNUSED, "yaml"}, 420)
        check(self.daemon(node, *address, scrape=True), SCRAPED, {*HEAVY, *UNUSED, "yaml"}, 445)

    def test_configured(self, node: Node, tmp_path: Path) -> None:
        """YAML comes with a file."""
        file = tmp_path / "config.yaml"
        file.write_text("gpu-duplication-factor: 100\n")
        check(self.daemon(node, "-config", str(file)), CONFIGURED, {*HEAVY, *WEB, *UNUSED}, 425)

    def test_driver(self, node: Node) -> None:
        """It has asked the driver everything once."""
        config = WorkerConfig(
            host_path=str(node.host), dev_directory=str(node.dev), sysfs_directory=str(node.sys), interval=1, once=True
        )
        check(
            python(LOADED.format(module="sgpu.driver.__main__"), encode_config(config)),
            WORKER,
            {*NOT_IN_WORKER, "ast", "dis"},
            145,
        )
