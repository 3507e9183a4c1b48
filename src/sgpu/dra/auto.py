"""Finds the facts for `-api auto`: once, when sgpu starts. Knows what to ask whom; `choice` decides."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import trio

from sgpu.config.settings import Settings
from sgpu.dra import checkpoint
from sgpu.dra.choice import Choice, Facts, choose, unfit
from sgpu.dra.publisher import SlicesRefusedError, check_server, server_version
from sgpu.dra.slices import DRIVER, MANIFEST
from sgpu.driver.fault_file import read_boot_id
from sgpu.kubeapi import ApiServerError, find_access, open_api_server
from sgpu.lib.logs import OnChange
from sgpu.lib.threads import run_in_thread
from sgpu.node.policy import Policy
from sgpu.pods.held import OtherDevice
from sgpu.pods.holders import PodResourcesError, open_lister

logger = logging.getLogger(__name__)

#: Seconds for what may still come: an API server or a kubelet that starts at the same time.
PATIENCE: Final = 60.0
#: Seconds between looks meanwhile.
INTERVAL: Final = 2.0


async def decide(settings: Settings, policy: Policy, patience: float = PATIENCE) -> Choice:
    """Return how this node offers its GPUs. What can't be known at once is waited for, if it may come."""
    end = trio.current_time() + patience
    waiting = OnChange(logger, logging.INFO)
    while True:
        choice = choose(await find_facts(settings, policy))
        if choice.settled or trio.current_time() >= end:
            return choice
        waiting.report(f"-api auto: waiting for up to {patience:g} s, as {choice.reason}")
        await trio.sleep(INTERVAL)


async def find_facts(settings: Settings, policy: Policy) -> Facts:
    """Return what is known now. Local facts come first, because they decide without the API server."""
    facts = await run_in_thread(_read_claims, Path(settings.dra_plugin_directory) / DRIVER)
    if choose(facts).dra:
        return facts
    try:
        holders = await _find_holders(settings, policy)
    except PodResourcesError as error:
        reason = f"it is unknown which pods have shares: {error}"
        return attrs.evolve(facts, holders=None, problem=reason, passing=True)
    facts = attrs.evolve(facts, holders=holders)
    return facts if holders else await _ask_server(facts, settings)


def _read_claims(directory: Path) -> Facts:
    try:
        return Facts(len(checkpoint.read(directory, read_boot_id())), prepared_before=True)
    except FileNotFoundError:
        return Facts()
    except (OSError, ValueError):
        return Facts(None, prepared_before=True)


async def _find_holders(settings: Settings, policy: Policy) -> Sequence[str]:
    """Return the containers with shares by a device plugin. The kubelet's checkpoint also names pods that are gone."""
    async with open_lister(Path(settings.pod_resources_socket)) as lister:
        held = await lister.list_holders(policy.resources())
    devices = [(resource, container) for resource, each in held.shares.items() for container in each.values()]
    devices += [(OtherDevice(*device).resource, container) for device, container in held.others.items()]
    return sorted({str(container) for resource, container in devices if policy.may_offer(resource)})


async def _ask_server(facts: Facts, settings: Settings) -> Facts:
    try:
        access = find_access(settings.api_server, os.environ, "-api auto", MANIFEST)
    except ApiServerError as error:
        return attrs.evolve(facts, problem=str(error))
    async with open_api_server(access) as api:
        try:
            facts = attrs.evolve(facts, server=await server_version(api))
            node = await api.get(f"/api/v1/nodes/{settings.node_name}")
            facts = attrs.evolve(facts, kubelet=str(node["status"]["nodeInfo"]["kubeletVersion"]))
            if not (unfit(facts.server) or unfit(facts.kubelet)):
                await check_server(api, settings.node_name)
        except SlicesRefusedError as error:
            return attrs.evolve(facts, refused=str(error))
        except (KeyError, TypeError) as error:
            return attrs.evolve(
                facts, problem=f"the Node {settings.node_name} does not say its kubelet's version: {error}"
            )
        except ApiServerError as error:
            return attrs.evolve(facts, problem=str(error), passing=error.passing)
    return facts
