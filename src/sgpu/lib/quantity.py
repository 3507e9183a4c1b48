"""Amounts as Kubernetes writes them (`resource.Quantity`). Imports nothing of sgpu."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

_QUANTITY: Final = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{0,30})?)(?:[eE]([+-]?[0-9]{1,2})|([numkMGTPE]?|[KMGTPE]i))")
_FACTORS: Final = (
    {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)}
    | {letter: Decimal(1000**power) for power, letter in enumerate("kMGTPE", 1)}
    | {f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGTPE", 1)}
)


def parse_quantity(text: str) -> int:
    """Return the amount, rounded up to a whole number, as Kubernetes does. Raises ValueError."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not an amount")
    number, exponent, suffix = found.groups()
    value = Decimal(number) * (Decimal(10) ** int(exponent) if exponent else _FACTORS[suffix])
    return int(value.to_integral_value(ROUND_CEILING))
