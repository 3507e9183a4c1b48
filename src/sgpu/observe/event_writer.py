"""Writes Kubernetes Events of GPUs and pods, as far as the service account may. Imported only with `-events`.

Decides nothing: `events` says which there are. The API server may be away for as long as it likes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

from sgpu.kubeapi import ApiServer, ApiServerError, find_access, open_api_server
from sgpu.lib.concurrency import race
from sgpu.lib.logs import OnChange
from sgpu.lib.retry import growing_delays, jittered
from sgpu.lib.threads import run_in_thread
from sgpu.node.state import NodeState
from sgpu.observe.events import PER_MINUTE, GpuChanges, Occurrences, Outbox, event
from sgpu.pods.log_links import pod_uid

logger = logging.getLogger(__name__)

MANIFEST: Final = "k8s/components/events"
#: Seconds between attempts, growing from the first to the last.
DELAYS: Final = (1.0, 60.0)
#: The number is not said: it would be a line for each.
TOO_MANY: Final = f"more Events than {PER_MINUTE} a minute: the oldest that wait are left out, and are in the log alone"


async def write_events(
    node: NodeState,
    node_name: str,
    proxy: str,
    container_logs: Path,
    since: float,
    in_place: trio.Event,
    standby: Callable[[], bool],
) -> None:
    """Write what has happened since then, or since this daemon took over: until that, another one did.

    Without access to an API server, say so and return.
    """
    if standby():
        await in_place.wait()
        since = time.time()
        node.notices.take()
    await in_place.wait()
    try:
        access = find_access(proxy, os.environ, "-events", MANIFEST)
    except ApiServerError as error:
        logger.error("no Events are written: %s", error)
        return
    async with open_api_server(access) as api:
        await _write_all(api, node, GpuChanges(since), node_name, container_logs)


async def _write_all(
    api: ApiServer, node: NodeState, gpu_changes: GpuChanges, node_name: str, container_logs: Path
) -> None:
    outbox = Outbox()
    problem = OnChange(logger, logging.WARNING)
    too_many = OnChange(logger, logging.WARNING)
    refused = 0  # the status of the last answer, where it was a refusal: its text differs for each namespace
    delays = growing_delays(*DELAYS)
    while True:
        changes = (node.changed.next, node.notices.changed.next)
        for notice in (*gpu_changes.take(node.gpus, partial(_pods, node)), *node.notices.take()):
            outbox.add(notice, time.time())
        too_many.update(TOO_MANY if outbox.left_out else "")
        due, seconds = outbox.due(trio.current_time())
        if due is None:
            with trio.move_on_after(seconds):
                await race(*(change.wait for change in changes))
            continue
        try:
            await _write(api, due, node_name, container_logs)
        except ApiServerError as error:
            if error.passing:
                problem.report(f"cannot write Events, trying again: {error}")
                await trio.sleep(max(jittered(next(delays)), error.retry_after))
                continue
            if error.status != refused:
                logger.warning("cannot write Events, leaving out those that are refused: %s", error)
            refused = error.status
        else:
            refused = 0
        problem.clear()
        delays = growing_delays(*DELAYS)
        outbox.done(due, trio.current_time())


async def _write(api: ApiServer, due: Occurrences, node_name: str, container_logs: Path) -> None:
    uid = await run_in_thread(pod_uid, container_logs, due.notice.pod) if due.notice.pod else ""
    thing = event(due, node_name, uid)
    try:
        await api.create(f"/api/v1/namespaces/{thing['metadata']['namespace']}/events", thing)
    except ApiServerError as error:
        if not error.conflict:  # else it was written, and the answer got lost
            raise


def _pods(node: NodeState, uuid: str) -> int | None:
    return None if node.usage.holders is None else sum(1 for pod in node.usage.pods(uuid) if pod)
