"""The command `status`: fetch, and print it once or again and again. Errors are one line."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NoReturn

import attrs
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from sgpu.commands.status.view import BAD, DIM, View, render
from sgpu.config.load import Loaded
from sgpu.config.settings import Settings
from sgpu.lib.output import checked_output
from sgpu.node.usage import STALE_AFTER
from sgpu.observe.client import NoAnswerError, fetch
from sgpu.observe.snapshot import Snapshot

#: Columns for a line that is not to be broken.
ENDLESS: Final = 1 << 16

Fetch = Callable[[], Snapshot]


def status(loaded: Loaded, options: Mapping[str, Any]) -> int:
    """Show what the daemon of these settings knows. Returns 1 if it does not say."""
    get = partial(fetch, loaded.settings.status_socket)
    console = _console(no_color=options["no-color"])
    view = View(None, console.options.ascii_only, _stale_after(loaded.settings))
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
    """Print as wide as the terminal; without a terminal, unbroken lines without trailing spaces."""
    now = time.time()
    if console.is_terminal:
        console.print(render(snapshot, now, attrs.evolve(view, width=console.width)))
        return
    for line in console.render_lines(render(snapshot, now, view), console.options.update(width=ENDLESS), pad=False):
        console.out("".join(segment.text for segment in line).rstrip(), highlight=False)


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
            live.update(_Cropped(Group(top, page)), refresh=True)
            signal.sigtimedwait({signal.SIGWINCH}, seconds)


@attrs.frozen
class _Cropped:
    """As much as fits on the screen, and how much does not."""

    page: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.page, options.update(height=None), pad=False)
        if len(lines) > options.max_height:
            shown = options.max_height - 1
            lines[shown:] = [[Segment(f"... and {len(lines) - shown} more lines, for a higher window")]]
        for line in lines:
            yield from line
            yield Segment.line()


def _console(*, no_color: bool) -> Console:
    """Standard output as it is: a terminal or not, with colors or without (also by NO_COLOR and TERM)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale that lacks a character must not cost the table
    # Rich would take a variable's word for whether it is a terminal.
    terminal = sys.stdout.isatty()
    return Console(force_terminal=terminal, no_color=no_color or None, highlight=False, markup=False, emoji=False)


def _stale_after(settings: Settings) -> float:
    """Return the seconds after which a sample is old: several were missed, not only delayed by a slow call."""
    return STALE_AFTER * settings.sample_interval + settings.driver_timeout
