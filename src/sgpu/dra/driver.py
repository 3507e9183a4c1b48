"""The kubelet's calls: prepare and unprepare claims, and watch the health of devices.

A claim fails by itself: the kubelet tries it again with the pod. Knows nothing of NVML.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from time import time
from typing import Final

import trio

from sgpu.api import dra_health_grpc, dra_health_pb2, dra_v1_grpc, dra_v1_pb2
from sgpu.dra import cdi, slices
from sgpu.dra.claims import ClaimError, Grant, read_claim
from sgpu.dra.prepared import PreparedClaims, device_name
from sgpu.dra.slices import API_VERSION
from sgpu.kubeapi import ApiServer, ApiServerError
from sgpu.lib.concurrency import wait_until
from sgpu.lib.sizes import GIB
from sgpu.node.gpu import Gpu, Health, label, units
from sgpu.node.state import NodeState
from sgpu.pods.gate import wait_limited

logger = logging.getLogger(__name__)

#: Seconds that a claim waits for the driver to list the GPUs. The kubelet gives up after 45.
GPUS_TIMEOUT: Final = 10.0
#: Seconds after which health is sent again. The kubelet takes it for unknown after 30.
HEALTH_INTERVAL: Final = 10.0
#: Characters of a message on health.
MOST_MESSAGE: Final = 1024

_HEALTH: Final = {
    Health.HEALTHY: dra_health_pb2.HealthStatus.HEALTHY,
    Health.UNHEALTHY: dra_health_pb2.HealthStatus.UNHEALTHY,
}


class DRAPlugin(dra_v1_grpc.DRAPluginServicer):
    """`v1.DRAPlugin`, Kubernetes 1.34 and later. `pool` is the name of the node."""

    def __init__(
        self, node: NodeState, api: ApiServer, claims: PreparedClaims, pool: str, *, limits_fail_open: bool
    ) -> None:
        self._node = node
        self._api = api
        self._claims = claims
        self._pool = pool
        self._limits_fail_open = limits_fail_open

    async def NodePrepareResources(
        self, request: dra_v1_pb2.NodePrepareResourcesRequest
    ) -> dra_v1_pb2.NodePrepareResourcesResponse:
        response = dra_v1_pb2.NodePrepareResourcesResponse()

        async def prepare(claim: dra_v1_pb2.Claim) -> None:
            try:
                devices = await self._prepare(claim)
                response.claims[claim.uid].devices.extend(devices)
            except (ClaimError, ApiServerError, OSError) as error:
                logger.warning("cannot prepare claim %s/%s: %s", claim.namespace, claim.name, error)
                response.claims[claim.uid].error = f"claim {claim.namespace}/{claim.name}: {error}"

        async with trio.open_nursery() as nursery:
            for claim in request.claims:
                nursery.start_soon(prepare, claim)
        return response

    async def NodeUnprepareResources(
        self, request: dra_v1_pb2.NodeUnprepareResourcesRequest
    ) -> dra_v1_pb2.NodeUnprepareResourcesResponse:
        response = dra_v1_pb2.NodeUnprepareResourcesResponse()
        for claim in request.claims:
            answer = response.claims[claim.uid]  # it has to be there; a claim that is not known is a success
            try:
                if await self._claims.unprepare(claim.uid):
                    logger.info("unprepared claim %s/%s", claim.namespace, claim.name)
            except OSError as error:
                logger.warning("cannot unprepare claim %s/%s: %s", claim.namespace, claim.name, error)
                answer.error = f"claim {claim.namespace}/{claim.name}: {error}"
        return response

    async def _prepare(self, asked: dra_v1_pb2.Claim) -> list[dra_v1_pb2.Device]:
        """Raises ClaimError, ApiServerError or OSError."""
        try:
            thing = await self._api.get(claim_path(asked.namespace, asked.name))
        except ApiServerError as error:
            if error.not_found:
                raise ClaimError("it does not exist any more") from error
            raise
        claim = read_claim(thing, asked.uid, self._pool)
        with trio.move_on_after(GPUS_TIMEOUT):
            await wait_until(lambda: bool(self._node.gpus), self._node.changed)
        if not self._node.gpus:
            raise ClaimError("the driver has not listed this node's GPUs yet; sgpu's log says why")
        grants = await self._claims.prepare(claim)
        await self._wait_limited(grants, f"{claim.namespace}/{claim.name}")
        logger.info(
            "prepared claim %s/%s: %s", claim.namespace, claim.name, ", ".join(map(_described, grants)) or "nothing"
        )
        return [
            dra_v1_pb2.Device(
                request_names=[each.result.request],
                pool_name=self._pool,
                device_name=each.result.device,
                cdi_device_ids=[cdi.device_id(device_name(claim, each))],
                share_id="" if each.result.admin else each.result.share_id,
            )
            for each in grants
        ]

    async def _wait_limited(self, grants: Iterable[Grant], claim: str) -> None:
        """Return once the claim's pods are limited, or can't be. Raises ClaimError where they must be."""
        problem = await wait_limited(self._node, [share for each in grants for share in each.unit.shares])
        if problem and not self._limits_fail_open:
            raise ClaimError(f"no memory limit: {problem} (-memory-limits-failure closed)")
        if problem:
            logger.warning("no memory limit for claim %s: %s; its pod starts without one", claim, problem)


class ResourceHealth(dra_health_grpc.DRAResourceHealthServicer):
    """`v1alpha1.DRAResourceHealth`: what pods show as `allocatedResourcesStatus`."""

    def __init__(self, node: NodeState, pool: str) -> None:
        self._node = node
        self._pool = pool

    async def NodeWatchResources(  # type: ignore[override]  # purerpc's base declares no generator
        self, _: dra_health_pb2.NodeWatchResourcesRequest
    ) -> AsyncGenerator[dra_health_pb2.NodeWatchResourcesResponse, None]:
        while True:
            gpus = self._node.gpus
            yield health(gpus, self._pool, time())
            with trio.move_on_after(HEALTH_INTERVAL):
                await wait_until(partial(self._differ, gpus), self._node.changed)

    def _differ(self, gpus: tuple[Gpu, ...]) -> bool:
        return self._node.gpus != gpus


def health(gpus: Iterable[Gpu], pool: str, now: float) -> dra_health_pb2.NodeWatchResourcesResponse:
    """Return the health of all devices, as of now (seconds since the epoch)."""
    response = dra_health_pb2.NodeWatchResourcesResponse()
    for gpu in gpus:
        for unit in units(gpu):
            response.devices.add(
                device=dra_health_pb2.DeviceIdentifier(pool_name=pool, device_name=slices.device_name(unit.uuid)),
                health=_HEALTH[unit.health],
                last_updated_time=int(now),
                message=unit.reason[:MOST_MESSAGE],
            )
    return response


def claim_path(namespace: str, name: str) -> str:
    """Return the API server's path of a claim."""
    return f"/apis/{API_VERSION}/namespaces/{namespace}/resourceclaims/{name}"


def _described(grant: Grant) -> str:
    memory = f", {grant.result.memory / GIB:.1f} GiB" if grant.result.memory else ""
    return f"{len(grant.unit.shares)} share(s){memory} of {label(grant.unit.uuid)}"
