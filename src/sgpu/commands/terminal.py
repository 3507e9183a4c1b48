"""Standard output for rich: a terminal or not, with colors or without. Knows nothing of what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import attrs
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

#: Columns for a line that is not to be broken.
ENDLESS: Final = 1 << 16


def open_console(*, no_color: bool) -> Console:
    """Return standard output as it is: a terminal or not, with colors or without (also by NO_COLOR and TERM)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale that lacks a character must not cost the table
    # Rich would take a variable's word for whether it is a terminal.
    terminal = sys.stdout.isatty()
    return Console(force_terminal=terminal, no_color=no_color or None, highlight=False, markup=False, emoji=False)


def print_page(console: Console, render: Callable[[int | None], RenderableType]) -> None:
    """Print as wide as the terminal; without a terminal, unbroken lines without trailing spaces.

    `render` gets the columns there are; None: as many as it takes.
    """
    if console.is_terminal:
        console.print(render(console.width))
        return
    lines = console.render_lines(render(None), console.options.update(width=ENDLESS), pad=False)
    text = "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)
    console.out(text, highlight=False)  # all at once: there may be thousands of lines


@attrs.frozen
class Cropped:
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
