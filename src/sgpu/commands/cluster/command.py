"""The command `cluster`: ask all daemons, and print a view once or again and again. Errors are one line."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final

import attrs
import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sgpu.commands.cluster.agents import EVERYWHERE, Answer, list_path, on_nodes
from sgpu.commands.cluster.ask import ask_all, list_agents
from sgpu.commands.cluster.facts import Amount, by_node, in_namespace, parse_amount
from sgpu.commands.cluster.proxy import Connect, ProxyError, connector, is_address, open_proxy
from sgpu.commands.cluster.view import VIEWS, Options
from sgpu.commands.status.view import BAD, DIM
from sgpu.commands.terminal import Cropped, open_console, print_page
from sgpu.config.flags import UsageError
from sgpu.lib.concurrency import find_error
from sgpu.lib.output import checked_output

#: What a shell adds to the number of the signal that ended a process.
SIGNALED: Final = 128
#: Views that show pods, or what pods use.
OF_PODS: Final = ("pods", "gpus")

Progress = Callable[[int, int], None]


@attrs.frozen
class Request:
    """What to show of which nodes, and how. `namespace` and `node` may be empty: of all."""

    view: str
    options: Options
    node: str
    namespace: str
    agents_path: str
    agents_place: str
    output: str
    watch: bool
    interval: float


def cluster(options: Mapping[str, Any]) -> int:
    """Show the cluster. Returns 1 if the API server does not list the daemons' pods. Raises UsageError."""
    request = _request(options)
    address = options["address"]
    if address and not is_address(address):
        raise UsageError(f"-address: {address!r} is not http://HOST:PORT or unix:PATH")
    flags = [f"--{name}={options[name]}" for name in ("context", "kubeconfig") if options[name]]
    console = open_console(no_color=options["no-color"])
    try:
        return trio.run(_run, request, console, partial(_known, address) if address else partial(open_proxy, flags))
    except Exception as error:
        if found := find_error(error, ProxyError):
            print(f"sgpu: {found}", file=sys.stderr)
            return 1
        raise


def _request(options: Mapping[str, Any]) -> Request:
    view, amount = (*options["arguments"], "", "")[:2]
    view = view or "nodes"
    if view not in VIEWS:
        raise UsageError(f"cluster: {view!r} is no view; there are {', '.join(VIEWS)}")
    if amount and view != "room":
        raise UsageError(f"cluster: {view} takes nothing after it, and got {amount!r}")
    if options["namespace"] and view not in OF_PODS:
        raise UsageError(f"-namespace goes with {' and '.join(OF_PODS)}, not with {view}")
    try:
        wanted = parse_amount(amount) if amount else Amount()
    except ValueError:
        raise UsageError(f"cluster: room takes a number of shares or memory, as 4 or 20GiB, not {amount!r}") from None
    place = options["agents-namespace"]
    return Request(
        view=view,
        options=Options(options["o"] == "wide", wanted),
        node=options["node"],
        namespace=options["namespace"],
        agents_path=list_path(place, options["selector"]),
        agents_place=f"{'any namespace' if place == EVERYWHERE else place} (label {options['selector']})",
        output=options["o"],
        watch=options["watch"],
        interval=options["interval"],
    )


@asynccontextmanager
async def _known(address: str) -> AsyncIterator[Connect]:
    yield connector(address)


async def _run(request: Request, console: Console, open_connect: Callable[[], Any]) -> int:
    """Return the exit code. A signal ends it in good order: the child and the terminal are put away."""
    ended_by = 0
    code = 0
    # Our own handlers, which end the process at once, would leave kubectl behind.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                nonlocal ended_by
                async for number in signals:
                    ended_by = number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            async with open_connect() as connect:
                code = await _show(request, console, connect)
            nursery.cancel_scope.cancel()
    if ended_by and not request.watch:
        return SIGNALED + ended_by
    return code


async def _show(request: Request, console: Console, connect: Connect) -> int:
    ask = partial(_ask, request, connect)
    if request.watch and request.output != "json" and console.is_terminal and not console.is_dumb_terminal:
        await _watch(request, console, ask)
    while True:
        with _progress_line() as progress:
            try:
                answers, code = await ask(progress), 0
            except ProxyError as error:
                if not request.watch:
                    raise
                answers, code = [], 1
                print(f"sgpu: {error}", file=sys.stderr)
        if not code:
            with checked_output():
                _print(request, console, answers)
        if not request.watch:
            return code
        await trio.sleep(request.interval)


async def _ask(request: Request, connect: Connect, progress: Progress) -> list[Answer]:
    """Return one answer for each node. Raises ProxyError where there is none to ask."""
    agents = await list_agents(connect, request.agents_path)
    if not agents:
        raise ProxyError(f"no sgpu pod in {request.agents_place}; -agents-namespace says where they are, * is all")
    chosen = on_nodes(agents, request.node)
    if not chosen:
        raise ProxyError(f"no sgpu pod runs on a node named {request.node!r}; there are {len(agents)} on others")
    done = 0

    def answered() -> None:
        nonlocal done
        done += 1
        progress(done, len(chosen))

    progress(0, len(chosen))
    answers = by_node(await ask_all(connect, chosen, answered))
    return in_namespace(answers, request.namespace) if request.namespace else answers


def _print(request: Request, console: Console, answers: Sequence[Answer]) -> None:
    if request.output == "json":
        nodes = [attrs.asdict(answer) for answer in answers]
        console.out(json.dumps({"nodes": nodes}, indent=None if request.watch else 2), highlight=False)
        return
    print_page(console, lambda _: VIEWS[request.view](answers, request.options))


@contextmanager
def _progress_line() -> Iterator[Progress]:
    """Show on standard error, if that is a terminal, how many have answered; take it away afterwards."""
    if not sys.stderr.isatty():
        yield lambda done, count: None
        return
    try:
        yield lambda done, count: print(f"\rasking: {done} of {count} ", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def _watch(request: Request, console: Console, ask: Callable[[Progress], Any]) -> None:
    """Draw it on a screen of its own, again and again, with a line that shows how far the asking is."""
    page: RenderableType = ""
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def draw(line: str) -> None:
            live.update(Cropped(Group(Text(line, DIM), page)), refresh=True)

        drawn = 0.0

        def progress(done: int, count: int) -> None:
            nonlocal drawn
            if done == 0 or trio.current_time() - drawn > 0.1:  # drawing 500 nodes takes longer than their answers
                drawn = trio.current_time()
                draw(f"asking: {done} of {count} answered")

        while True:
            try:
                answers = await ask(progress)
                page = VIEWS[request.view](answers, request.options)
            except ProxyError as error:
                page = Text(str(error), BAD)
            now = time.strftime("%H:%M:%SZ", time.gmtime())
            draw(f"{now}, again in {request.interval:g} s; Ctrl-C ends")
            await trio.sleep(request.interval)
