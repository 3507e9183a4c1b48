"""All checks, side by side, in time and in order. Knows what is checked; not how."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from sgpu import simulation
from sgpu.doctor import configured, driver, kubelet, libraries, nodes, served, surroundings
from sgpu.doctor.driver import Answer
from sgpu.doctor.finding import Finding, fail, ok
from sgpu.doctor.host import Host
from sgpu.doctor.kubelet import Daemon
from sgpu.doctor.libraries import Library
from sgpu.doctor.peer import failure
from sgpu.load import Loaded
from sgpu.nurseries import find_error

#: Seconds for all of it. What waits for an answer gives up before: this is for file systems that hang.
DEADLINE: Final = 8.5

Result = TypeVar("Result")
#: Gets each finding as soon as it is there.
Tell = Callable[[Iterable[Finding]], None]


async def examine(loaded: Loaded, host: Host) -> list[Finding]:
    """Every finding, in the order in which an operator should read them."""
    subjects = {"driver": _driver, "kubelet": _kubelet, "node": _node}
    found: dict[str, list[Finding]] = {subject: [] for subject in subjects}
    async with trio.open_nursery() as nursery:
        for subject, check in subjects.items():
            nursery.start_soon(_in_time, subject, found[subject], partial(check, loaded, host))
    return [finding for findings in found.values() for finding in findings]


async def _in_time(subject: str, found: list[Finding], check: Callable[[Tell], Awaitable[None]]) -> None:
    with trio.move_on_after(DEADLINE) as scope:
        try:
            await check(found.extend)
        except Exception as error:  # one error, or several in a group
            flaw = find_error(error, OSError)
            if flaw is None:
                raise
            words = f"looking ended here: {failure(flaw)}: {flaw.filename}"
            found.append(fail(subject, words, "run it as root, in the daemon's pod or on the node; else see `dmesg`"))
    if scope.cancelled_caught:
        words = f"looking did not end within {DEADLINE:g} s; it got as far as the line above"
        found.append(fail(subject, words, "a file system hangs: see `dmesg`, and `ps -eo stat,args` for state D"))


async def _look(check: Callable[[], Result]) -> Result:
    """Run what looks at files, which may block; it is left behind when time is up."""
    return await trio.to_thread.run_sync(check, abandon_on_cancel=True)


async def _driver(loaded: Loaded, host: Host, tell: Tell) -> None:
    settings = loaded.settings
    if settings.simulate:
        tell([ok("driver", f"-simulate {settings.simulate}: the GPUs are not there, and no driver is asked")])
        simulated = simulation.simulated_devices(settings.simulate, settings.gpu_duplication_factor)
        tell(configured.check_rules(loaded, simulated))
        return
    tell(await _look(lambda: list(libraries.check_libraries(settings))))
    library = await _look(partial(libraries.find_library, Path(settings.host_path)))
    answer = await driver.ask(settings) if library else Answer()
    tell(await _look(lambda: list(_driver_answered(loaded, host, library, answer))))


def _driver_answered(loaded: Loaded, host: Host, library: Library | None, answer: Answer) -> Iterator[Finding]:
    dev = Path(loaded.settings.dev_directory)
    gpus = answer.report.gpus if answer.report else None
    yield from driver.check_kernel(host, library, answer)
    yield driver.check_nvml(host, library, answer)
    yield from driver.check_gpus(loaded.settings, host, answer)
    yield from nodes.check_nodes(dev, gpus or ())
    yield nodes.check_uvm(dev, host)
    yield nodes.check_links(dev)
    yield from configured.check_rules(loaded, None if gpus is None else configured.devices(loaded, gpus))


async def _kubelet(loaded: Loaded, host: Host, tell: Tell) -> None:
    directory = Path(loaded.settings.plugin_directory)
    resources = loaded.policy.resources()
    tell([await _look(partial(kubelet.check_directory, directory))])
    paths = await _look(partial(kubelet.other_plugins, directory, resources))
    running: list[Daemon] = []
    checks: list[Callable[[], Awaitable[list[Finding]]]] = [
        partial(_one, partial(kubelet.check_kubelet, directory)),
        *(partial(_daemon, loaded, host, resource, running) for resource in resources),
        partial(_one, partial(kubelet.check_others, directory, paths)),
        partial(_one, partial(kubelet.check_pod_resources, loaded.settings, resources)),
    ]
    found: dict[int, list[Finding]] = {}

    async def put(place: int, check: Callable[[], Awaitable[list[Finding]]]) -> None:
        found[place] = await check()

    async with trio.open_nursery() as nursery:  # each may wait as long as all together
        for place, check in enumerate(checks):
            nursery.start_soon(put, place, check)
    for place in range(len(checks)):
        tell(found[place])
    address = loaded.settings.metrics_address
    tell([await _look(partial(served.check_served, address, running=bool(running)))])
    tell(await _look(lambda: list(served.check_account(loaded.settings.status_socket))))


async def _one(check: Callable[[], Awaitable[Finding]]) -> list[Finding]:
    return [await check()]


async def _daemon(loaded: Loaded, host: Host, resource: str, running: list[Daemon]) -> list[Finding]:
    """The daemon that serves a resource, and what the kubelet has of it. One that serves is added to `running`."""
    directory = Path(loaded.settings.plugin_directory)
    daemon = await kubelet.find_daemon(directory, resource)
    found = [daemon.finding]
    if daemon.serves:
        running.append(daemon)
    if daemon.serves and daemon.peer.pid:
        check = partial(configured.check_daemon_settings, loaded, host.proc, daemon.peer.pid)
        found.append(await _look(check))
    return found + await _look(lambda: list(kubelet.check_registration(directory, daemon)))


async def _node(loaded: Loaded, host: Host, tell: Tell) -> None:
    tell(await _look(lambda: list(configured.check_settings(loaded, host))))
    tell([await _look(partial(surroundings.check_memory, host))])
    if loaded.settings.simulate:  # no process uses what is not there
        return
    tell([await _look(partial(surroundings.check_processes, Path(loaded.settings.proc_directory)))])
    directory = Path(loaded.settings.container_log_directory)
    tell([await _look(partial(surroundings.check_container_logs, directory))])
