"""Fixtures that several files share."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
from fake_kubelet import FakeKubelet
from fake_pod_resources import FakePodResources
from node import Node, new_node

#: Examples of each property in `tox -e fuzz`.
EXAMPLES = int(os.environ.get("SGPU_FUZZ_EXAMPLES", "5000"))

# No deadline: a busy machine can be slow with any example. The same examples each time, so that what fails was broken
# by a change; `tox -e fuzz` looks for others.
hypothesis.settings.register_profile("sgpu", deadline=None, derandomize=True, database=None)
# For an interpreter beside the one that runs all tests.
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("sgpu"), max_examples=25)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, max_examples=EXAMPLES, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sgpu"))


#: Tests that take up to twice as long with coverage, and add nothing to that of pure modules: by mark, and by file.
NOT_COVERING = ("soak", "process", "static", "hypothesis")
NOT_COVERING_FILES = ("test_commands_import", "test_commands_stage", "test_lib", "test_rpc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each worker begin with long tests, as the others would wait for them at the end."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if "soak" in item.keywords]
    short = [item for item in items if "soak" not in item.keywords]
    # `worksteal` gives each worker an equal part of the list.
    size = len(short) // workers + 1
    items[:] = [item for n in range(workers) for item in (*long[n::workers], *short[n * size : (n + 1) * size])]
    for item in items:
        unneeded = item.path.stem.startswith(NOT_COVERING_FILES) or any(mark in item.keywords for mark in NOT_COVERING)
        if unneeded and "pure" not in item.keywords:
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Leave modules and items to no garbage collection: to go through them takes longer than most tests."""
    gc.freeze()


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with a stub driver for one GPU."""
    with new_node() as made:
        yield made


@pytest.fixture
def kubelet(node: Node) -> Iterator[FakeKubelet]:
    """A kubelet of the node, which runs already."""
    with FakeKubelet(node.plugins) as running:
        yield running


@pytest.fixture
def pods(node: Node) -> Iterator[FakePodResources]:
    """The kubelet's PodResources, without pods."""
    with FakePodResources(node.pods) as serving:
        yield serving
