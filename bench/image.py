"""Measures the memory that a node would get back, as the image runs: without docstrings, in each mode of offering.

Each is scraped once, and has pods with shares where there is a device plugin.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import attrs
from daemon_process import COMMAND, LoggedProcess, short_directory
from fake_api_server import FakeApiServer, serving
from fake_plugin_manager import FakePluginManager
from limits import cgroup_tree
from node import Node
from plugins import Plugin, Size, running, sgpu
from rest import settle
from table import Aim, Figure

from sgpu.dra.slices import DRIVER

#: As the Dockerfile has it, where packages are found by PYTHONPATH, too.
PYTHON: Final = (sys.executable, "-S")
DOCKERFILE: Final = (Path(__file__).parents[1] / "Dockerfile").read_text()
SETTINGS: Final = " ".join(re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)).split()
IMAGE: Final = {
    **dict(setting.split("=") for setting in SETTINGS),
    "PYTHONPATH": os.pathsep.join(sys.path),
}
#: The daemon in a pod whose service account is elsewhere. It is said in the child: the parent imports nothing.
IN_POD: Final = """
from sgpu import __main__, parent

def start(alive):
    from pathlib import Path
    from sgpu.kubeapi import access
    access.in_cluster.__defaults__ = (Path({account!r}),)
    return begin(alive)

def run_in_child(function):
    global begin
    begin = function
    return fork(start)

fork, parent.run_in_child = parent.run_in_child, run_in_child
__main__.main()
"""
NODE: Final = "node"
NAME: Final = "memory if nothing else ran Python, as in the image"


def memory(standard: Size, huge: Size, seconds: float) -> Iterator[Figure]:
    """In each mode. `seconds`: until whatever a start has left to do is done."""
    with cgroup_tree(None) as tree:
        limits = ("-memory-limits", "fair", "-cgroup-directory", str(tree))
        modes = {
            f"{standard}": (partial(_device_plugin, standard), 41),
            "with memory limits": (partial(_device_plugin, standard, *limits), 42),
            "as a DRA driver": (partial(_dra, standard), 50),
            f"{huge}": (partial(_device_plugin, huge), 46),
        }
        for what, (measure, aim) in modes.items():
            measure(seconds=0)  # which compiles what the image has compiled
            yield Figure(f"{NAME}, {what}", "MB", {"sgpu": measure(seconds=seconds) / 1e6}, Aim(aim))


def in_image(*flags: str, command: tuple[str, ...] = ("-m", "sgpu"), env: Mapping[str, str] | None = None) -> Plugin:
    """sgpu as the image runs it, with these flags as well. `command`: what Python runs."""
    plain = sgpu()

    def start(node: Node, size: Size) -> LoggedProcess:
        process = plain.start(node, size)
        process.arguments = [*PYTHON, *command, *process.arguments[len(COMMAND) :], *flags]
        process.env |= {**IMAGE, **(env or {})}
        return process

    return attrs.evolve(plain, start=start)


def _device_plugin(size: Size, *flags: str, seconds: float) -> int:
    with running(in_image(*flags), size) as run:
        run.node.driver.set(limits="misc")
        run.wait_listed()
        settle(run, seconds)
        return run.process.memory().alone


def _dra(size: Size, *, seconds: float) -> int:
    with ExitStack() as stack:
        root = stack.enter_context(short_directory())
        for name in ("cdi", "registry", "account"):
            (root / name).mkdir()
        server = FakeApiServer()
        server.objects[f"/api/v1/nodes/{NODE}"] = {"metadata": {"name": NODE, "uid": "n"}, "status": {}}
        access = stack.enter_context(serving(server, root / "account"))
        kubelet = stack.enter_context(FakePluginManager(root / "registry"))
        host, _, port = access.url.removeprefix("https://").rpartition(":")
        places = (("plugin", "plugins"), ("registry", "registry"))
        directories = [word for flag, name in places for word in (f"-dra-{flag}-directory", str(root / name))]
        plugin = in_image(
            *("-api", "dra", "-node-name", NODE, "-cdi-directory", str(root / "cdi"), *directories),
            command=("-c", IN_POD.format(account=str(root / "account"))),
            env={"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port},
        )
        run = stack.enter_context(running(plugin, size))
        kubelet.wait_for(lambda: DRIVER in kubelet.plugins)
        run.scrape()
        time.sleep(seconds)
        return run.process.memory().alone
