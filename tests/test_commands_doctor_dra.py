"""The doctor with `-api dra`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from daemon_process import short_directory
from dra_claims import NODE, RESOURCE
from fake_api_server import FakeApiServer, serving
from fake_status import SNAPSHOT, answering, http
from virtual_clock import real

from sgpu import kubeapi
from sgpu.commands.doctor import dra
from sgpu.commands.doctor.checks import checks
from sgpu.commands.doctor.finding import Finding, Level
from sgpu.config.load import load
from sgpu.config.settings import Settings
from sgpu.dra.registrar import sockets, stay_registered
from sgpu.dra.slices import DRIVER, PATH
from sgpu.lib.inotify import open_directory
from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations
from sgpu.observe.snapshot import encode

DEVICE = {"name": "gpu-a", "allowMultipleAllocations": True}


def slices(*devices: dict[str, Any]) -> dict[str, Any]:
    return {"items": [{"spec": {"devices": list(devices)}}, {"spec": {}}]}


@pytest.mark.parametrize(
    ("allocatable", "listed", "level", "fact"),
    [
        pytest.param({}, slices(DEVICE), Level.OK, "1 device", id="published"),
        pytest.param({RESOURCE: "0"}, slices(DEVICE), Level.OK, "1 device", id="device plugin of before"),
        pytest.param({RESOURCE: "100"}, slices(DEVICE), Level.FAIL, "a device plugin offers", id="device plugin"),
        pytest.param({}, {}, Level.FAIL, "no ResourceSlice", id="nothing published"),
        pytest.param({}, slices(DEVICE, {"name": "gpu-b"}), Level.FAIL, "all of gpu-b to one", id="exclusive"),
        pytest.param({}, slices({**DEVICE, "taints": [{}]}), Level.WARN, "taints: gpu-a", id="tainted"),
    ],
)
def test_judge(allocatable: dict[str, str], listed: dict[str, Any], level: Level, fact: str) -> None:
    """What the API server has of the node decides."""
    finding = dra.judge({"status": {"allocatable": allocatable}}, listed, [RESOURCE])
    assert finding.level is level
    assert fact in finding.message


def api_server(settings: Settings, environment: dict[str, str] | None = None) -> Finding:
    return trio.run(dra.check_api_server, settings, environment or {}, [RESOURCE])


def test_api_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a node's name or a pod there is nothing to ask; else the answer counts, or why there is none."""
    settings = Settings(node_name=NODE)
    assert api_server(Settings()).level is Level.SKIP
    assert "sgpu to run in a pod" in api_server(settings).message
    server = FakeApiServer()
    with serving(server, tmp_path) as access:
        monkeypatch.setattr(kubeapi, "find_access", lambda *_: access)
        assert "404" in api_server(settings).message
        server.put(f"/api/v1/nodes/{NODE}", {"metadata": {"name": NODE}})
        server.put(f"{PATH}/s", {"metadata": {}, "spec": {"driver": DRIVER, "nodeName": NODE, "devices": [DEVICE]}})
        assert api_server(settings).level is Level.OK
        monkeypatch.setattr(dra, "TIMEOUT", 0)
        assert "did not answer" in api_server(settings).message


@real
async def test_auto(tmp_path: Path) -> None:
    """The daemon says how it offers GPUs and why; where none answers, it is what it would choose."""
    path = tmp_path / "status.sock"
    loaded = load({"api": "auto", "status-socket": str(path), "pod-resources-socket": "/nowhere"}, {})
    said = attrs.evolve(SNAPSHOT, api="dra", api_reason="2 claims")
    with answering(path, lambda _: http(encode(said))):
        chosen = await dra.find_chosen(loaded)
    assert (chosen.api, chosen.finding.level, "2 claims" in chosen.finding.message) == ("dra", Level.OK, True)
    chosen = await dra.find_chosen(loaded)
    assert (chosen.api, chosen.finding.level) == ("device-plugin", Level.WARN)
    assert "/nowhere" in chosen.finding.advice
    subjects = [check.subject for check in checks(loaded, chosen)]
    assert dra.CHOICE_SUBJECT in subjects
    assert dra.API_SUBJECT not in subjects


@real
async def test_driver() -> None:
    """The daemon is found by its socket."""
    with short_directory() as root:
        settings = Settings(dra_plugin_directory=str(root), dra_registry_directory=str(root))
        assert "no daemon serves" in (await dra.find_driver(settings)).finding.message
        paths = sockets(root, root)
        first = paths[0].registration
        first.write_text("no socket")
        assert (await dra.find_driver(settings)).finding.level is Level.FAIL
        first.unlink()
        with open_directory(root) as directory, trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(directory.watch)
                nursery.start_soon(stay_registered, paths, {}, Registrations(Counters()), Counters())
                await directory.wait_until(first.is_socket)
                assert (await dra.find_driver(settings)).finding.level is Level.OK
                nursery.cancel_scope.cancel()


def test_cdi(tmp_path: Path) -> None:
    """CDI files have to go somewhere."""
    assert dra.check_cdi(tmp_path).level is Level.OK
    assert "it is not there" in dra.check_cdi(tmp_path / "none").message


def test_checks() -> None:
    """With DRA there is one driver, and no daemon for each resource."""
    subjects = [check.subject for check in checks(load({"api": "dra"}, {}))]
    assert {dra.DRIVER_SUBJECT, dra.CDI_SUBJECT, dra.API_SUBJECT} <= set(subjects)
    assert not [subject for subject in subjects if subject.startswith("daemon for")]
