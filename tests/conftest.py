"""Fixtures that several files share."""

from collections.abc import Iterator

import hypothesis
import pytest
from node import Node, new_node

# A busy machine can be slow with any example; what hangs, hangs for longer than any deadline.
hypothesis.settings.register_profile("sgpu", deadline=None)
hypothesis.settings.load_profile("sgpu")


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with a stub driver for one GPU."""
    with new_node() as made:
        yield made
