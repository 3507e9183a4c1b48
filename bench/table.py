"""Figures, what is aimed at, and how both are written down."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from sgpu import __version__


@attrs.frozen
class Aim:
    """sgpu's figure is at most this; `of` a plugin: times that one's figure."""

    most: float
    of: str = ""

    def __str__(self) -> str:
        return f"{self.most:g} × {self.of}" if self.of else f"{self.most:g}"

    def is_met(self, values: Mapping[str, float]) -> bool | None:
        """None: there is nothing to compare."""
        if "sgpu" not in values or (self.of and self.of not in values):
            return None
        return values["sgpu"] <= self.most * (values[self.of] if self.of else 1)


@attrs.frozen
class Figure:
    """One figure of each plugin, by its name. Less is better."""

    name: str
    unit: str
    values: Mapping[str, float]
    aim: Aim | None = None

    def ratio(self, plugin: str) -> float | None:
        """sgpu's figure by that plugin's."""
        if "sgpu" not in self.values or not self.values.get(plugin):
            return None
        return self.values["sgpu"] / self.values[plugin]


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


def side_by_side(measured: Iterable[Sequence[Figure]]) -> Iterator[Figure]:
    """One figure of those that were measured of one plugin after the other."""
    for figures in zip(*measured, strict=True):
        yield attrs.evolve(figures[0], values={name: value for each in figures for name, value in each.values.items()})


def median_and(
    name: str,
    samples: Mapping[str, Sequence[float]],
    other: str,
    part: float,
    aims: Sequence[Aim | None] = (None, None),
) -> Iterable[Figure]:
    """Two figures of milliseconds: the median, and `other`, which is a percentile."""
    samples = {plugin: values for plugin, values in samples.items() if values}
    if not samples:
        return
    yield Figure(
        f"{name}, median", "ms", {plugin: statistics.median(each) for plugin, each in samples.items()}, aims[0]
    )
    yield Figure(
        f"{name}, {other}", "ms", {plugin: percentile(each, part) for plugin, each in samples.items()}, aims[1]
    )


def heading(plugins: Sequence[str]) -> str:
    """The first lines of the table: machine, and columns."""
    columns = ["figure", "unit", "sgpu", "aim", *(word for name in plugins[1:] for word in (name, f"sgpu / {name}"))]
    return f"{machine()}\n\n| {' | '.join(columns)} |\n|---|---|{'--:|' * (len(columns) - 2)}"


def row(figure: Figure, plugins: Sequence[str]) -> str:
    """One line of the table."""
    cells = [figure.name, figure.unit, _number(figure.values.get(plugins[0])), _aim(figure)]
    for name in plugins[1:]:
        cells += [_number(figure.values.get(name)), _number(figure.ratio(name))]
    return f"| {' | '.join(cells)} |"


def document(figures: Iterable[Figure], plugins: Sequence[str]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "machine": machine(),
        "plugins": list(plugins),
        "figures": [
            {
                **attrs.asdict(figure, filter=attrs.filters.exclude("aim")),
                "aim": str(figure.aim or ""),
                "met": figure.aim.is_met(figure.values) if figure.aim else None,
                "ratios": {name: figure.ratio(name) for name in plugins[1:]},
            }
            for figure in figures
        ],
    }


def machine() -> str:
    """Return what the figures were measured on, and with."""
    models = [line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    load = " ".join(" ".join(_lines("/proc/loadavg")).split()[:2])
    python = ".".join(map(str, sys.version_info[:3]))
    return (
        f"sgpu {__version__}, Python {python}, Linux {platform.release()}, {len(models)} × "
        f"{models[0] if models else platform.machine()}, load {load} at this time"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _aim(figure: Figure) -> str:
    if figure.aim is None:
        return ""
    return f"{figure.aim}{'' if figure.aim.is_met(figure.values) in (True, None) else ' **missed**'}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
