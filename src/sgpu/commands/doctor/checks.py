"""The list of checks, and how they run: side by side, in time, reported in order. Knows what is checked; not how."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio

from sgpu.commands.doctor import (
    configured,
    dra,
    driver,
    guard,
    kubelet,
    libraries,
    limits,
    mig,
    nodes,
    rights,
    served,
    surroundings,
)
from sgpu.commands.doctor.driver import Answer
from sgpu.commands.doctor.finding import Finding, fail, ok, skip
from sgpu.commands.doctor.host import Host
from sgpu.commands.doctor.kubelet import Daemon
from sgpu.commands.doctor.libraries import Library
from sgpu.commands.doctor.peer import failure
from sgpu.config.load import Loaded
from sgpu.driver import simulated
from sgpu.driver.instances import unit_figures
from sgpu.lib.concurrency import find_error
from sgpu.node.gpu import Gpu
from sgpu.node.offers import offers
from sgpu.node.policy import Mig, OffersRefusedError
from sgpu.pods.held import Held
from sgpu.pods.processes import Places
from sgpu.pods.unlisted import Unlisted

#: Seconds for all checks. What waits for an answer gives up before: this is for file systems that hang.
DEADLINE: Final = 8.5

Result = TypeVar("Result")


@attrs.define
class Facts:
    """Inputs of the checks, and results that later checks need."""

    loaded: Loaded
    host: Host
    library: Library | None = None
    answer: Answer = attrs.Factory(Answer)
    gpus: Sequence[Gpu] | None = None  # None: unknown
    gpus_asked: trio.Event = attrs.Factory(trio.Event)
    held: Held | None = None
    daemons: list[Daemon] = attrs.Factory(list)  # those that serve a resource


@attrs.frozen
class Check:
    """One subject. It runs once the subjects in `needs` are done, and returns its findings."""

    subject: str
    run: Callable[[Facts], Awaitable[Iterable[Finding]]]
    needs: tuple[str, ...] = ()


def checks(loaded: Loaded, chosen: dra.Chosen | None = None) -> list[Check]:
    """Return the checks for these settings, in the order in which an operator should read their findings.

    `chosen`: how GPUs are offered, with `-api auto`.
    """
    api = chosen.api if chosen else loaded.settings.api
    of_choice = [Check(chosen.finding.subject, _found(chosen.finding))] if chosen else []
    daemons: dict[str, Callable[[Facts], Awaitable[Iterable[Finding]]]] = {
        f"daemon for {resource}": partial(_daemon, resource) for resource in loaded.policy.resources() if api != "dra"
    }
    of_claims = []
    if api == "dra":
        daemons[dra.DRIVER_SUBJECT] = _dra_driver
        of_claims = [
            Check(dra.CDI_SUBJECT, _blocking(lambda facts: [dra.check_cdi(Path(facts.loaded.settings.cdi_directory))])),
            Check(dra.API_SUBJECT, _api_server),
        ]
    # Which profiles there are, only the GPUs say.
    after_gpus = ("driver",) if loaded.policy.mig is Mig.PROFILE else ()
    of_profiles = [Check("daemons for MIG profiles", _profile_daemons, after_gpus)] if after_gpus else []
    of_driver = (
        [Check("driver", _simulated)]
        if loaded.settings.simulate
        else [
            Check("WSL", _blocking(lambda facts: driver.check_wsl(_dev(facts)))),
            Check("libraries", _libraries),
            Check("driver", _driver, ("libraries",)),
            Check("device nodes", _nodes, ("driver",)),
            Check("MIG", _mig, ("driver",)),
            Check("rules per GPU", _rules, ("driver",)),
        ]
    )
    of_containers = (  # simulated GPUs have no processes and no device nodes
        []
        if loaded.settings.simulate
        else [
            Check("host's processes", _processes, ("driver",)),
            Check("container logs", _blocking(lambda facts: [surroundings.check_container_logs(_logs(facts))])),
            Check(limits.SUBJECT, _limits, ("driver",)),
            Check("stored answers", _held, ("driver", "PodResources")),
        ]
    )
    if loaded.settings.memory_guard != "off" and not loaded.settings.simulate:
        of_containers.append(Check(guard.SUBJECT, _guard, ("driver", "PodResources")))
    return [
        Check("open files", _blocking(lambda facts: surroundings.check_open_files())),
        *of_driver,
        Check("daemon's GPUs", _blocking(lambda facts: served.check_gpus(facts.loaded.settings.status_socket))),
        Check("plugin directory", _blocking(lambda facts: [kubelet.check_directory(_plugins(facts))])),
        Check("kubelet.sock", _kubelet),
        *of_choice,
        *(Check(subject, check) for subject, check in daemons.items()),
        *of_profiles,
        *of_claims,
        *(Check(needs.setting, partial(_rights, needs)) for needs in rights.needed(loaded.settings)),
        Check("other plugins", _others, after_gpus),
        Check("PodResources", _pod_resources, after_gpus),
        Check("metrics and probes", _served, (*daemons, *(check.subject for check in of_profiles))),
        Check("settings", _blocking(lambda facts: configured.check_settings(facts.loaded, facts.host))),
        Check("inotify", _blocking(lambda facts: surroundings.check_inotify())),
        Check("memory limit", _blocking(lambda facts: [surroundings.check_memory(facts.host)])),
        *of_containers,
    ]


async def examine(loaded: Loaded, host: Host) -> list[Finding]:
    """Run all checks and return their findings in order."""
    facts = Facts(loaded, host)
    chosen = await dra.find_chosen(loaded) if loaded.settings.api == "auto" else None
    todo = checks(loaded, chosen)
    done = {check.subject: trio.Event() for check in todo}
    found: dict[str, list[Finding]] = {}

    async def run(check: Check) -> None:
        with trio.move_on_at(deadline) as waiting:
            for subject in check.needs:
                await done[subject].wait()
        if waiting.cancelled_caught:
            found[check.subject] = [skip(check.subject, f"because the check of {', '.join(check.needs)} did not end")]
        else:
            found[check.subject] = await _in_time(check, facts, deadline)
            done[check.subject].set()

    deadline = trio.current_time() + DEADLINE
    async with trio.open_nursery() as nursery:
        for check in todo:
            nursery.start_soon(run, check)
    return [finding for check in todo for finding in found[check.subject]]


async def _in_time(check: Check, facts: Facts, deadline: float) -> list[Finding]:
    with trio.move_on_at(deadline):
        try:
            return list(await check.run(facts))
        except Exception as error:  # one error, or several in a group
            problem = find_error(error, OSError)
            if problem is None:
                raise
            message = f"the check ended with {failure(problem)}: {problem.filename}"
            advice = "run the doctor as root, in the daemon's pod or on the node; else see `dmesg`"
            return [fail(check.subject, message, advice)]
    message = f"the check did not end within {DEADLINE:g} s"
    return [fail(check.subject, message, "a file system hangs: see `dmesg`, and `ps -eo stat,args` for state D")]


async def _look(look: Callable[[], Result]) -> Result:
    """Run what looks at files, which may block; it is left behind when time is up."""
    return await trio.to_thread.run_sync(look, abandon_on_cancel=True)


def _blocking(look: Callable[[Facts], Iterable[Finding]]) -> Callable[[Facts], Awaitable[Iterable[Finding]]]:
    async def run(facts: Facts) -> Iterable[Finding]:
        return await _look(lambda: list(look(facts)))

    return run


def _found(finding: Finding) -> Callable[[Facts], Awaitable[Iterable[Finding]]]:
    async def run(_: Facts) -> Iterable[Finding]:
        return [finding]

    return run


def _plugins(facts: Facts) -> Path:
    return Path(facts.loaded.settings.plugin_directory)


def _proc(facts: Facts) -> Path:
    return Path(facts.loaded.settings.proc_directory)


def _dev(facts: Facts) -> Path:
    return Path(facts.loaded.settings.dev_directory)


def _logs(facts: Facts) -> Path:
    return Path(facts.loaded.settings.container_log_directory)


# The driver and its GPUs


async def _simulated(facts: Facts) -> Iterable[Finding]:
    count = facts.loaded.settings.simulate
    finding = ok("driver", f"-simulate {count}: the GPUs are simulated, and no driver is asked")
    facts.gpus = simulated.simulated_gpus(count, profiles=facts.loaded.settings.simulate_mig)
    facts.gpus_asked.set()
    return [finding, *configured.check_rules(facts.loaded, facts.gpus)]


async def _libraries(facts: Facts) -> Iterable[Finding]:
    settings = facts.loaded.settings
    findings = await _look(lambda: list(libraries.check_libraries(settings)))
    facts.library = await _look(partial(libraries.find_library, Path(settings.host_path)))
    return findings


async def _driver(facts: Facts) -> Iterable[Finding]:
    settings = facts.loaded.settings
    if facts.library:
        facts.answer = await driver.ask(settings)
    report = facts.answer.report
    facts.gpus = configured.gpus(report.gpus) if report else None
    facts.gpus_asked.set()

    def look() -> Iterator[Finding]:
        yield from driver.check_kernel(facts.host, facts.library, facts.answer)
        yield driver.check_nvml(facts.host, facts.library, facts.answer)
        yield from driver.check_gpus(settings, facts.host, facts.answer)

    return await _look(lambda: list(look()))


async def _nodes(facts: Facts) -> Iterable[Finding]:
    dev = _dev(facts)
    report = facts.answer.report

    def look() -> Iterator[Finding]:
        yield from nodes.check_nodes(dev, report.gpus if report else ())
        yield nodes.check_uvm(dev, facts.host)
        yield nodes.check_links(dev)

    return await _look(lambda: list(look()))


async def _mig(facts: Facts) -> Iterable[Finding]:
    report = facts.answer.report
    gpus = report.gpus if report else None
    return await _look(lambda: list(mig.check_mig(facts.loaded.policy, _dev(facts), facts.host, gpus)))


async def _rules(facts: Facts) -> Iterable[Finding]:
    return configured.check_rules(facts.loaded, facts.gpus)


async def _processes(facts: Facts) -> Iterable[Finding]:
    report = facts.answer.report
    known = [figures for gpu in (report.gpus if report else ()) for figures in unit_figures(gpu).values()]
    pids = {process.pid for figures in known for process in figures.processes or ()}
    places = Places(_proc(facts), _logs(facts))
    return [await _look(lambda: surroundings.check_processes(places, pids))]


def _resources(facts: Facts) -> tuple[str, ...]:
    """Return the names of all resources: those of the policy, and of MIG profiles as far as the GPUs are known."""
    policy = facts.loaded.policy
    with suppress(OffersRefusedError):  # the check of the rules says so
        return tuple(offers(policy, facts.gpus or (), {}))
    return policy.resources()


# The kubelet and the daemon


async def _kubelet(facts: Facts) -> Iterable[Finding]:
    return [await kubelet.check_kubelet(_plugins(facts))]


async def _daemon(resource: str, facts: Facts) -> Iterable[Finding]:
    """Check the daemon that serves a resource, and what the kubelet has of it."""
    directory = _plugins(facts)
    daemon = await kubelet.find_daemon(directory, resource, facts.host.proc)
    if daemon.peer.absent and not await _may_be_offered(facts, resource):
        return [skip(f"daemon for {resource}", "because no GPU of this node is offered as it")]
    findings = [daemon.finding]
    if daemon.serves:
        facts.daemons.append(daemon)
        if pid := daemon.peer.pid:
            check = partial(configured.check_daemon_settings, facts.loaded, facts.host.proc, pid)
            findings.append(await _look(check))
    return findings + await _look(lambda: list(kubelet.check_registration(directory, daemon)))


async def _dra_driver(facts: Facts) -> Iterable[Finding]:
    daemon = await dra.find_driver(facts.loaded.settings)
    if daemon.serves:
        facts.daemons.append(daemon)
    return [daemon.finding]


async def _api_server(facts: Facts) -> Iterable[Finding]:
    loaded = facts.loaded
    return [await dra.check_api_server(loaded.settings, os.environ, loaded.policy.resources())]


async def _rights(needs: rights.Needs, facts: Facts) -> Iterable[Finding]:
    return [await rights.check_rights(needs, facts.loaded.settings.api_server, os.environ)]


async def _may_be_offered(facts: Facts, resource: str) -> bool:
    """Return whether the rules offer a GPU as this resource: the daemon registers no others."""
    policy = facts.loaded.policy
    if len(policy.resources()) > 1 or policy.mig is Mig.PROFILE:
        with trio.move_on_after(driver.DEADLINE + driver.REAP_TIMEOUT):
            await facts.gpus_asked.wait()
    return facts.gpus is None or configured.is_offered(policy, facts.gpus, resource)


async def _profile_daemons(facts: Facts) -> Iterable[Finding]:
    """Check the daemon that serves each resource of a MIG profile."""
    resources = [resource for resource in _resources(facts) if resource not in facts.loaded.policy.resources()]
    return [finding for resource in resources for finding in await _daemon(resource, facts)]


async def _others(facts: Facts) -> Iterable[Finding]:
    directory = _plugins(facts)
    if not await _look(directory.is_dir):
        return [skip("other plugins", "because the plugin directory is not there")]
    paths = await _look(partial(kubelet.other_plugins, directory, _resources(facts)))
    return [await kubelet.check_others(directory, paths)]


async def _pod_resources(facts: Facts) -> Iterable[Finding]:
    finding, facts.held = await kubelet.check_pod_resources(facts.loaded.settings, _resources(facts))
    return [finding]


async def _held(facts: Facts) -> Iterable[Finding]:
    gpus = facts.gpus
    if gpus is None:
        return [skip("stored answers", "because the driver lists no GPUs")]
    unlisted = Unlisted(_plugins(facts), Places(_proc(facts), _logs(facts)))
    return await _look(lambda: list(kubelet.check_held(facts.held, unlisted, gpus)))


async def _limits(facts: Facts) -> Iterable[Finding]:
    return await _look(lambda: list(limits.check_limits(facts.loaded, facts.answer.report)))


async def _guard(facts: Facts) -> Iterable[Finding]:
    report = facts.answer.report
    gpus = report.gpus if report else None
    return await _look(
        partial(guard.check_guard, facts.loaded.settings, facts.host, gpus, listed=facts.held is not None)
    )


async def _served(facts: Facts) -> Iterable[Finding]:
    check = partial(served.check_served, facts.loaded.settings.metrics_address, running=bool(facts.daemons))
    return [await _look(check)]
