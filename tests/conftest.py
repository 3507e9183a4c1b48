"""Fixtures that several files share."""

from collections.abc import Iterator

import pytest
from node import Node, new_node


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with a stub driver for one GPU."""
    with new_node() as made:
        yield made
