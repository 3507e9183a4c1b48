"""The command `status`: fetch, and print it once or again and again. Errors are one line."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import attrs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sgpu.commands.status.view import BAD, DIM, View, render
from sgpu.commands.terminal import Cropped, open_console, print_page
from sgpu.config.load import Loaded
from sgpu.lib.output import checked_output
from sgpu.observe.client import NoAnswerError, fetch
from sgpu.observe.snapshot import Snapshot

Fetch = Callable[[], Snapshot]


def status(loaded: Loaded, options: Mapping[str, Any]) -> int:
    """Show what the daemon of these settings knows. Returns 1 if it does not say."""
    get = partial(fetch, loaded.settings.status_socket)
    console = open_console(no_color=options["no-color"])
    view = View(None, console.options.ascii_only)
    seconds = options["interval"]
    if options["o"] == "json":
        show = partial(_print_json, console, indent=None if options["watch"] else 2)
    else:
        show = partial(_print_table, console, view)
    if options["watch"] and options["o"] == "text" and console.is_terminal and not console.is_dumb_terminal:
        _watch(console, view, get, seconds)
    while True:
        code = _once(get, show)
        if not options["watch"]:
            return code
        time.sleep(seconds)


def _once(get: Fetch, show: Callable[[Snapshot], None]) -> int:
    try:
        snapshot = get()
        with checked_output():
            show(snapshot)
    except NoAnswerError as error:
        print(f"sgpu: {error}", file=sys.stderr)
        return 1
    return 0


def _print_json(console: Console, snapshot: Snapshot, *, indent: int | None) -> None:
    console.out(json.dumps(attrs.asdict(snapshot), indent=indent), highlight=False)


def _print_table(console: Console, view: View, snapshot: Snapshot) -> None:
    print_page(console, lambda width: render(snapshot, time.time(), attrs.evolve(view, width=width)))


def _watch(console: Console, view: View, get: Fetch, seconds: float) -> NoReturn:
    """Draw it on a screen of its own, every so many seconds and when the terminal changes its size.

    Ends by a signal: `__main__` turns Ctrl-C into the end of the process, with code 0.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})  # so that it can be waited for
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            now = time.time()
            top = Text(f"{time.strftime('%H:%M:%SZ', time.gmtime(now))}, every {seconds:g} s; Ctrl-C ends", style=DIM)
            page: RenderableType
            try:
                page = render(get(), now, attrs.evolve(view, width=console.width))
            except NoAnswerError as error:
                page = Text(str(error), style=BAD)
            live.update(Cropped(Group(top, page)), refresh=True)
            signal.sigtimedwait({signal.SIGWINCH}, seconds)
