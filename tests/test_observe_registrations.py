"""Registrations with the kubelet."""

from __future__ import annotations

import pytest

from sgpu.observe.counters import Counters
from sgpu.observe.registrations import Registrations

pytestmark = pytest.mark.pure

RESOURCE, OTHER = "example.com/gpu", "example.com/other"


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def registrations(counters: Counters) -> Registrations:
    return Registrations(counters)


def test_attempts(registrations: Registrations, counters: Counters) -> None:
    """Be registered by the last attempt, until the session ends; count each attempt, and go on in the next session."""
    for _ in range(2):
        with registrations.session(RESOURCE) as registration:
            for success in (False, True, False, True):
                registrations.attempted(RESOURCE, "kubelet", success)
                assert registration.registered is success
        assert registrations.by_resource == {RESOURCE: registration}
        assert not registration.registered
    assert counters.registrations == {(RESOURCE, True): 4, (RESOURCE, False): 4}


def test_serves(registrations: Registrations) -> None:
    """Serve a resource that is registered and has a stream, and say that something changed."""
    changed = registrations.changed.next
    assert not registrations.serves(RESOURCE)
    with registrations.session(RESOURCE) as registration:
        registrations.attempted(RESOURCE, "kubelet", success=True)
        assert changed.is_set()
        assert not registrations.serves(RESOURCE)
        registration.streams = 1
        assert registrations.serves(RESOURCE)
    assert not registrations.serves(RESOURCE)


def test_a_session_that_fails(registrations: Registrations) -> None:
    """End with an error, too."""

    def fail() -> None:
        with registrations.session(RESOURCE):
            registrations.attempted(RESOURCE, "kubelet", success=True)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert not registrations.by_resource[RESOURCE].registered


def test_kubelet_restarts(registrations: Registrations, counters: Counters) -> None:
    """Count each kubelet that took a registration once, however many resources meet it, but not the first."""
    with registrations.session(RESOURCE), registrations.session(OTHER):
        for kubelet, restarts in (("one", 0), ("one", 0), ("two", 1), ("three", 2)):
            for resource in (RESOURCE, OTHER):
                registrations.attempted(resource, kubelet, success=True)
            assert counters.kubelet_restarts == restarts
        registrations.attempted(RESOURCE, "four", success=False)
    assert counters.kubelet_restarts == 2


def test_remove(registrations: Registrations, counters: Counters) -> None:
    """Keep nothing of a resource that is no longer offered."""
    with registrations.session(RESOURCE), registrations.session(OTHER):
        for resource in (RESOURCE, OTHER):
            for success in (True, False):
                registrations.attempted(resource, "kubelet", success)
    registrations.remove(RESOURCE)
    registrations.remove(RESOURCE)
    assert registrations.by_resource.keys() == {OTHER}
    assert counters.registrations.keys() == {(OTHER, True), (OTHER, False)}
