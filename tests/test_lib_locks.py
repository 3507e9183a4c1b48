"""A lock among processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from sgpu.lib import locks
from sgpu.lib.locks import locked


def test_one_at_a_time(tmp_path: Path) -> None:
    """Whoever comes second waits, and gives up in the end."""
    path = tmp_path / "lock"

    async def main() -> None:
        order = []

        async def second() -> None:
            async with locked(path):
                order.append("second")

        async with trio.open_nursery() as nursery:
            async with locked(path):
                nursery.start_soon(second)
                await trio.sleep(1)
                order.append("first")
        assert order == ["first", "second"]
        async with locked(path):
            with pytest.raises(OSError, match="held the lock for 20 s"):
                async with locked(path):
                    pass
        assert trio.current_time() > locks.TIMEOUT

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
