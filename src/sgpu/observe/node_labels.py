"""Labels the Node through the API server, as far as the service account may. Imported only with `-node-labels api`.

Does not know what the labels say. An annotation of the Node names those that are ours, so that the next daemon removes
what one that was killed has left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import trio

from sgpu.kubeapi import ApiServer, ApiServerError, find_access, open_api_server
from sgpu.kubeapi.client import Object
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays, jittered

logger = logging.getLogger(__name__)

MANIFEST: Final = "k8s/components/node-labels-api"
ANNOTATION: Final = "deepomatic.com/gpu-labels"
#: What the names of our labels begin with. The admission policy of the component allows no others.
OURS: Final = ("deepomatic.com/gpu.", "deepomatic.com/mig-")
#: Seconds between looks at what the labels should be.
INTERVAL: Final = 5.0
#: Seconds between writes: whether limits are enforced can change for a moment with each container that starts.
WRITE_INTERVAL: Final = 30.0
#: Seconds between looks at what the Node has. A kubelet reads its Node every 10 s.
CHECK_INTERVAL: Final = 60.0
#: Seconds between attempts that fail, growing from the first to the last.
DELAYS: Final = (INTERVAL, 60.0)
#: Seconds for the labels to be removed at the end. Kubernetes kills the container after 10.
REMOVAL_TIMEOUT: Final = 3.0
#: From the server's cache, as the kubelet asks: what somebody changed a moment ago is seen the next time.
_CACHED: Final = {"resourceVersion": "0"}


async def keep_node_labels(
    node_name: str,
    proxy: str,
    labels: Callable[[], Mapping[str, str]],
    in_place: trio.Event,
    has_successor: Callable[[], bool],
) -> None:
    """Keep these labels on the Node as long as this daemon serves, and remove them at the end.

    Those of an earlier daemon stay until there are labels. At the end all stay, if this one `has_successor`.
    Without access to an API server, say so and return.
    """
    await in_place.wait()
    try:
        access = find_access(proxy, os.environ, "-node-labels api", MANIFEST)
    except ApiServerError as error:
        logger.error("the Node is not labeled: %s", error)
        return
    async with open_api_server(access) as api:
        node_labels = _NodeLabels(api, f"/api/v1/nodes/{node_name}")
        try:
            await node_labels.keep(labels)
        finally:
            if not has_successor():
                with trio.CancelScope(shield=True):
                    await node_labels.remove()


class _NodeLabels:
    def __init__(self, api: ApiServer, path: str) -> None:
        self._api = api
        self._path = path
        self._written: Mapping[str, str] = {}
        self._checked_at = float("-inf")

    async def keep(self, labels: Callable[[], Mapping[str, str]]) -> NoReturn:
        problem = OnChange(logger, logging.WARNING)
        delays = growing_delays(*DELAYS)
        while True:
            pause = INTERVAL
            wanted = labels()
            due = self._checked_at + (CHECK_INTERVAL if wanted == self._written else WRITE_INTERVAL)
            if (wanted or self._written) and trio.current_time() >= due:
                try:
                    await self._write(wanted)
                    problem.clear()
                    delays = growing_delays(*DELAYS)
                except ApiServerError as error:
                    problem.report(f"cannot label the Node, trying again: {error}")
                    pause = max(jittered(next(delays)), error.retry_after)
            await trio.sleep(pause)

    async def _write(self, wanted: Mapping[str, str]) -> None:
        node = await self._api.get(self._path, _CACHED)
        if change := changes(node, wanted):
            # Before the answer, which can get lost: what may be there is looked at again, and removed at the end.
            self._written, self._checked_at = {**self._written, **wanted}, float("-inf")
            await self._api.patch(self._path, change)
            logger.info("labeled the Node: %s", ", ".join(f"{key}={value}" for key, value in wanted.items()) or "none")
        self._written, self._checked_at = wanted, trio.current_time()

    async def remove(self) -> None:
        if not self._written:
            return
        change = {"labels": dict.fromkeys(self._written), "annotations": {ANNOTATION: None}}
        try:
            with trio.fail_after(REMOVAL_TIMEOUT):
                await self._api.patch(self._path, {"metadata": change})
        except (ApiServerError, trio.TooSlowError) as error:
            logger.warning("the Node keeps its labels: %s", str(error) or f"no answer within {REMOVAL_TIMEOUT:g} s")


def changes(node: Object, wanted: Mapping[str, str]) -> Object:
    """Return what to merge into a Node for it to have these labels, and no others of ours; empty where it has them."""
    metadata = node.get("metadata", {})
    has, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    noted = annotations.get(ANNOTATION, "")
    ours = {key for key in noted.split(",") if key.startswith(OURS)}
    labels: dict[str, str | None] = {key: None for key in sorted(ours) if key in has and key not in wanted}
    labels |= {key: value for key, value in wanted.items() if has.get(key) != value}
    note = ",".join(sorted(wanted))
    if not labels and note == noted:
        return {}
    return {"metadata": {"labels": labels, "annotations": {ANNOTATION: note or None}}}
