"""Metrics, probes and status: does the daemon serve them, and what does it say. Blocks; knows no gRPC."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Final

from sgpu.commands.doctor.finding import Finding, fail, ok, skip, warn
from sgpu.commands.doctor.peer import failure
from sgpu.config.values import split_address
from sgpu.node.gpu import label
from sgpu.observe.client import NoAnswerError, fetch

#: Seconds for one answer.
TIMEOUT: Final = 2.0
#: What the daemon's first page has, with and without -metrics-page, as no other program's does.
OURS: Final = ("sgpu ", "<title>sgpu")


def check_served(address: str, *, running: bool) -> Finding:
    """Check that the daemon answers the kubelet's probes. `running`: there is one that serves shares."""
    subject = "metrics and probes"
    split = split_address(address)
    if split is None or not split[1]:
        return skip(subject, f"because -metrics-address is {address or 'empty'}")
    host, port = split
    try:
        _, first = _get(host, port, "/")
        if not any(mark in first for mark in OURS):
            return _another(subject, address)
        status, message = _get(host, port, "/readyz")
    except ConnectionRefusedError:
        if running:
            advice = "the daemon's log says why it can't listen there; the kubelet's probes fail until it does"
            return warn(subject, f"nobody listens on {address}", advice)
        return skip(subject, f"because nobody listens on {address}")
    except TimeoutError:
        return fail(subject, f"{address} does not answer within {TIMEOUT:g} s", "restart sgpu's pod, and see its log")
    except http.client.HTTPException:
        return _another(subject, address)
    except OSError as error:
        return warn(subject, f"{address} can't be asked: {failure(error)}", "see -metrics-address")
    if status != http.client.OK:
        return fail(
            subject, f"the daemon is not ready: {' '.join(message.split())}", "see its log, and the lines above"
        )
    return ok(subject, f"the daemon serves them on {address}, and is ready")


def check_gpus(path: str) -> Iterator[Finding]:
    """Check for GPUs that the daemon holds unhealthy: an event that is over, as an XID, only the daemon knows."""
    subject = "daemon's GPUs"
    try:
        snapshot = fetch(path, TIMEOUT)
    except NoAnswerError as error:
        yield skip(subject, f"because {error}")
        return
    if not snapshot.gpus:
        yield skip(subject, "because it has none yet")
        return
    down = [gpu for gpu in snapshot.gpus if not gpu.healthy]
    for gpu in down:
        since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(gpu.since))
        advice = "`python -m sgpu status` says which pods use it; it is offered again by itself when it is well"
        yield fail(f"daemon's {label(gpu.uuid)}", f"all its shares are unhealthy since {since}: {gpu.reason}", advice)
    if not down:
        yield ok(subject, f"it has all {len(snapshot.gpus)} for healthy")


def _another(subject: str, address: str) -> Finding:
    message = f"another program answers on {address}: sgpu's are not served"
    return warn(
        subject, message, "choose another -metrics-address, or stop it; the kubelet's probes fetch the other one"
    )


def _get(host: str, port: int, path: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection(host or "localhost", port, timeout=TIMEOUT)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(1000).decode(errors="replace")
