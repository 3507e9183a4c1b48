"""Asks daemons for their status through the API server, many at a time. Knows HTTP, and not how the answers look."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final

import h11
import trio

from sgpu import __version__
from sgpu.commands.cluster.agents import Agent, Answer, parse_agents
from sgpu.commands.cluster.proxy import Connect, ProxyError
from sgpu.lib.logs import cut, printable
from sgpu.observe.snapshot import Snapshot, decode, program

#: Daemons that are asked at a time: a connection each, at the proxy and at the API server.
AT_A_TIME: Final = 50
#: Seconds for a daemon to answer. It answers from memory.
TIMEOUT: Final = 2.0
#: Seconds for the list of pods. That of 5000 nodes has some 50 MB.
LIST_TIMEOUT: Final = 30.0
#: Bytes of an answer, at most: a node's status with 10,000 containers has 3 MB, the pods of 5000 nodes 50 MB.
MOST_BYTES: Final = 256 << 20
RECEIVE_BYTES: Final = 1 << 16
#: Characters of a reason, which is in a column.
MOST_REASON: Final = 300
OK, FORBIDDEN, NOT_FOUND = 200, 403, 404


async def list_agents(connect: Connect, path: str) -> tuple[Agent, ...]:
    """Return the daemons whose pods are listed at this path. Raises ProxyError."""
    try:
        with trio.fail_after(LIST_TIMEOUT):
            status, body = await _get(connect, path)
    except trio.TooSlowError:
        raise ProxyError(f"the API server does not list sgpu's pods within {LIST_TIMEOUT:g} s") from None
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise ProxyError(f"cannot ask the API server for sgpu's pods: {error}; does `kubectl get` work?") from error
    if status != OK:
        raise ProxyError(f"the API server does not list sgpu's pods: {_reason(status, body)}")
    try:
        return parse_agents(body)
    except ValueError as error:
        raise ProxyError(f"what listens there is no API server ({error})") from error


async def ask_all(connect: Connect, agents: Sequence[Agent], answered: Callable[[], None]) -> list[Answer]:
    """Return each daemon's answer, in order. `answered` is called as they come."""
    answers: dict[Agent, Answer] = {}
    limiter = trio.CapacityLimiter(AT_A_TIME)

    async def ask(agent: Agent) -> None:
        async with limiter:
            answers[agent] = await _ask(connect, agent)
        answered()

    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(ask, agent)
    return [answers[agent] for agent in agents]


async def _ask(connect: Connect, agent: Agent) -> Answer:
    snapshot = None
    problem = agent.problem
    if not problem:
        try:
            with trio.fail_after(TIMEOUT):
                snapshot, problem = _read(*await _get(connect, agent.path))
        except trio.TooSlowError:
            problem = f"no answer within {TIMEOUT:g} s: the node, its network or sgpu hangs"
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            problem = f"the connection to the API server is lost: {error}"
    return Answer(agent.node, agent.namespace, agent.pod, cut(printable(problem), MOST_REASON), snapshot)


def _read(status: int, body: bytes) -> tuple[Snapshot | None, str]:
    if status != OK:
        return None, _reason(status, body)
    try:
        return decode(body), ""
    except ValueError:
        return None, f"{program(body)} answers, which sgpu {__version__} can't read: install the version of the nodes"


async def _get(connect: Connect, path: str) -> tuple[int, bytes]:
    """Return the status and the body of a page. Raises OSError, BrokenResourceError and RemoteProtocolError."""
    client = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Accept", "application/json"), ("Connection", "close")]
    async with await connect() as stream:
        await stream.send_all(client.send(h11.Request(method="GET", target=path, headers=headers)) or b"")
        await stream.send_all(client.send(h11.EndOfMessage()) or b"")
        status, body = 0, bytearray()
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                client.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MOST_BYTES:
                    raise OSError(f"it sends more than {MOST_BYTES >> 20} MiB")
        return status, bytes(body)


def _reason(status: int, body: bytes) -> str:
    """Return why there is no answer: the message of a Kubernetes Status, or what the page says."""
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        message = body.decode("utf-8", "replace").strip() or "no message"
        if status == NOT_FOUND:
            message = "sgpu there is too old to be asked: update it"
    if status == FORBIDDEN:
        message += "; k8s/cluster-view has a role for it"
    return f"{message} (HTTP status {status})"
