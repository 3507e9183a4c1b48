"""What the README says of the settings is what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpu.settings import KNOBS

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", KNOBS)
def test_the_table_of_flags_has_each_setting(name: str) -> None:
    """With its default and what it means, as `-help` has them."""
    row = next(line for line in README.read_text().splitlines() if line.startswith(f"| `-{name}` |"))
    _, _, default, meaning, _ = (cell.strip() for cell in row.split("|"))
    field = KNOBS[name]
    value = field.default
    words = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    assert default.strip("`") == words
    assert meaning == field.metadata["meaning"]
