"""A table that may have thousands of rows: rich's own takes a millisecond for each. Knows nothing of what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

Cell = str | Text

#: Columns of blanks between two of the table's.
GAP: Final = 2


class Columns:
    """Rows of cells under names; those in `numbers` are aligned to the right. Folded where the screen is narrow."""

    def __init__(self, names: Sequence[str], numbers: frozenset[str]) -> None:
        self._names = names
        self._numbers = [name in numbers for name in names]
        self.rows: list[Sequence[Cell]] = []

    def add_row(self, *cells: Cell) -> None:
        """Add one, with a cell for each name."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max(map(_width, column)) for column in zip(self._names, *self.rows, strict=True)]
        if sum(widths) + GAP * (len(widths) - 1) > options.max_width:
            yield self._folded()
            return
        yield from self._line([Text(name, Style(bold=True)) for name in self._names], widths, console)
        for row in self.rows:
            yield from self._line(row, widths, console)

    def _line(self, cells: Sequence[Cell], widths: Sequence[int], console: Console) -> Iterator[Segment]:
        plain = ""  # what is not yielded yet: few long segments are faster than many short ones
        for cell, width, number in zip(cells, widths, self._numbers, strict=True):
            blank = " " * (width - _width(cell))
            before, after = (blank, " " * GAP) if number else ("", blank + " " * GAP)
            plain += before
            if isinstance(cell, str):
                plain += cell
            else:
                yield Segment(plain)
                yield from Segment.apply_style(cell.render(console), console.get_style(cell.style))
                plain = ""
            plain += after
        yield Segment(plain.rstrip() + "\n")

    def _folded(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for name, number in zip(self._names, self._numbers, strict=True):
            table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def _width(cell: Cell) -> int:
    return cell_len(cell) if isinstance(cell, str) else cell.cell_len
