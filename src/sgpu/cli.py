"""The command line: what to run, and the only exit codes. Knows neither NVML nor gRPC."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from sgpu import __version__
from sgpu.config.flags import ENVIRONMENT_PREFIX, UsageError, parse_flags
from sgpu.config.settings import SETTINGS
from sgpu.config.values import BOOLEAN, PATH, Kind, choice, seconds
from sgpu.lib.limits import MEMORY
from sgpu.lib.output import OutputError, checked_output

if TYPE_CHECKING:
    from sgpu.config.load import Loaded
    from sgpu.config.settings import Settings

#: Exit codes.
OK, FAILED, USAGE = 0, 1, 2


@attrs.frozen
class Option:
    """A flag of one command, in addition to the settings."""

    kind: Kind
    default: Any
    meaning: str


@attrs.frozen
class Command:
    """Something to run in place of the daemon, with the same settings and options of its own; returns the exit code."""

    summary: str
    run: Callable[[Loaded, Mapping[str, Any]], int]
    options: Mapping[str, Option] = attrs.Factory(dict)
    takes_settings: bool = True
    #: What it takes beside flags, as the help names it; the fewest and the most of them, which `run` gets as the option
    #: `arguments`.
    argument: str = ""
    fewest_arguments: int = 0
    most_arguments: int = 0


def _demo(_: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.demo import demo  # here, because the daemon should not pay for it

    return demo(options["api"])


_DEMO_OPTIONS: Final = {
    "api": Option(choice("device-plugin", "dra"), "device-plugin", "the way to offer GPUs that is shown"),
}


def _doctor(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.doctor import doctor

    return OK if doctor(loaded, options["o"]) else FAILED


def _status(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.status.command import status  # here, because the daemon should not pay for it

    return status(loaded, options)


_STATUS_OPTIONS: Final = {
    "watch": Option(BOOLEAN, False, "show it repeatedly, until Ctrl-C"),
    "interval": Option(seconds(0.1, 3600), 2.0, "with -watch: seconds between refreshes"),
    "o": Option(choice("text", "json"), "text", "a table for people, or all of it for programs"),
    "no-color": Option(BOOLEAN, False, "no colors, as with NO_COLOR"),
}


def _stage(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.stage import stage

    staged = stage(
        Path(options["host-root"]),
        Path(loaded.settings.host_path),
        Path(options["lock-file"]),
        graphics=options["graphics"],
        interval=options["interval"],
    )
    return OK if staged else FAILED


_STAGE_OPTIONS: Final = {
    "host-root": Option(PATH, "/", "where the root of the host's file system is mounted; it may be read-only"),
    "lock-file": Option(
        PATH, "/run/sgpu/stage.lock", "lock held while files are copied; its directory must not be mounted into pods"
    ),
    "graphics": Option(BOOLEAN, False, "stage the graphics libraries, too (OpenGL, Vulkan, OptiX)"),
    "interval": Option(seconds(0, 86400), 0.0, "seconds between looks; 0: look once"),
}


def _limits(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.limits import limits

    return OK if limits(loaded, clear=options["clear"]) else FAILED


_TEXT: Final = Kind("a name", str, bool, "NAME")
_REASON: Final = Kind("a text", str, bool, "TEXT")


def _cordon(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.cordon import cordon

    return cordon(loaded, options)


def _uncordon(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.cordon import uncordon

    return uncordon(loaded, options)


_CORDON_OPTIONS: Final = {
    "reason": Option(_REASON, "", "why, for whoever looks at the node"),
    "wait": Option(BOOLEAN, False, "until no container has a share of it, and sgpu has let go of it for a reset"),
    "timeout": Option(seconds(0, 604800), 0.0, "with -wait: seconds after which to give up; 0: never"),
}


def _import_config(_: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.import_config import import_config

    (file,) = options["arguments"]
    return OK if import_config(file, options["name"]) else FAILED


_IMPORT_OPTIONS: Final = {
    "name": Option(_TEXT, "", "which of several configurations or nodes in the file"),
}


def _cluster(_: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.commands.cluster.command import cluster  # here, because the daemon should not pay for it

    try:
        return cluster(options)
    except UsageError as error:
        return _fail(error, USAGE)


_CLUSTER_OPTIONS: Final = {
    "node": Option(_TEXT, "", "only nodes of this name, or pattern as in gpu-*"),
    "namespace": Option(_TEXT, "", "only pods of this namespace, and GPUs that they use (for pods and gpus)"),
    "o": Option(choice("text", "wide", "json"), "text", "a table, one with more columns, or all of it for programs"),
    "watch": Option(BOOLEAN, False, "show it repeatedly, until Ctrl-C"),
    "interval": Option(seconds(0.1, 3600), 5.0, "with -watch: seconds between refreshes"),
    "no-color": Option(BOOLEAN, False, "no colors, as with NO_COLOR"),
    "agents-namespace": Option(_TEXT, "kube-system", "namespace of sgpu's own pods; *: look for them in all"),
    "selector": Option(_TEXT, "app=sgpu", "labels of sgpu's own pods"),
    "context": Option(_TEXT, "", "context of the kubeconfig file, for kubectl"),
    "kubeconfig": Option(_TEXT, "", "kubeconfig file, for kubectl"),
    "address": Option(
        _TEXT, "", "of a running `kubectl proxy`, in place of one of its own: http://HOST:PORT or unix:PATH"
    ),
}


#: The first word of a command line. Each imports what it needs when it is run.
COMMANDS: Final = {
    "demo": Command(
        "show sgpu working on this machine, without a GPU or a cluster", _demo, _DEMO_OPTIONS, takes_settings=False
    ),
    "doctor": Command(
        "find out why this node offers no shares, or pods can't use them; changes nothing",
        _doctor,
        {"o": Option(choice("text", "json"), "text", "how the findings are printed")},
    ),
    "status": Command("show the GPUs of this node and the pods that use them", _status, _STATUS_OPTIONS),
    "cluster": Command(
        "show all nodes: [nodes|gpus|pods|faults|room [SHARES|20GiB]]; also as `kubectl sgpu`",
        _cluster,
        _CLUSTER_OPTIONS,
        takes_settings=False,
        most_arguments=2,
    ),
    "limits": Command(
        "show the memory limits that sgpu has set on this node",
        _limits,
        {"clear": Option(BOOLEAN, False, "remove them: for a node that sgpu is removed from")},
    ),
    "cordon": Command(
        "give out no more of a GPU (its number in `status`, UUID or PCI address), so that it can be reset",
        _cordon,
        _CORDON_OPTIONS,
        argument="GPU",
        fewest_arguments=1,
        most_arguments=1,
    ),
    "uncordon": Command("give it out again", _uncordon, argument="GPU", fewest_arguments=1, most_arguments=1),
    "import-config": Command(
        "print a -config file for what NVIDIA's plugin or HAMi is configured to; FILE may be their ConfigMap, or -",
        _import_config,
        _IMPORT_OPTIONS,
        takes_settings=False,
        argument="FILE",
        fewest_arguments=1,
        most_arguments=1,
    ),
    "stage": Command("copy the host's driver libraries and tools to -host-path", _stage, _STAGE_OPTIONS),
}


def _usage(name: str, command: Command) -> str:
    return f"{name} {command.argument}".strip()


USAGE_TEXT = f"""\
Offer each NVIDIA GPU of a Kubernetes node as many shared devices.

  sgpu [flags]   run the device plugin
{"".join(f"  sgpu {_usage(name, command):<9} {command.summary}{chr(10)}" for name, command in COMMANDS.items())}
Flags go as `-flag value` or `-flag=value`, with one dash or two. Each can also be set by an environment variable
(-host-path by {ENVIRONMENT_PREFIX}HOST_PATH) and by a key in the -config file; flag beats environment beats file.

"""


def main(arguments: Sequence[str], environment: Mapping[str, str], alive: int | None = None) -> int:
    """Run the command and return its exit code. Standard output that can't be written to is one line, and FAILED.

    `alive`: where the daemon gives its parent signs of life; None: it has no such parent.
    """
    try:
        return _main(arguments, environment, alive)
    except OutputError as error:
        return _fail(error, FAILED)


def _main(arguments: Sequence[str], environment: Mapping[str, str], alive: int | None) -> int:
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    command = COMMANDS.get(name)
    options = command.options if command else {}
    try:
        flags = parse_flags(arguments[bool(name) :], {name: option.kind for name, option in options.items()})
        if flags.actions & {"help", "h"}:
            with checked_output():
                print(_command_help(name, command) if command else _help(), end="")
            return OK
        if "version" in flags.actions:
            with checked_output():
                print(f"sgpu {__version__}")
            return OK
        fewest, most = (command.fewest_arguments, command.most_arguments) if command else (0, 0)
        if command and command.argument and not fewest <= len(flags.positional) <= most:
            raise UsageError(f"{name} takes one {command.argument} (see {name} -help)")
        if len(flags.positional) > most:
            raise UsageError(f"unknown command {' '.join((name, *flags.positional)).strip()!r} (see -help)")
        if command and not command.takes_settings and (flags.values or flags.actions):
            given = next(iter((*flags.values, *flags.actions)))
            raise UsageError(f"{name} does not take the daemon's flags, as -{given}")
        from sgpu.config.load import load  # here, because `-help` and `-version` should not pay for it

        loaded = load(flags.values, environment if not command or command.takes_settings else {})
    except UsageError as error:
        return _fail(error, USAGE)
    if "print-config" in flags.actions:
        with checked_output():
            print(_effective(loaded), end="")
        return OK
    if command:
        chosen = {name: flags.options.get(name, option.default) for name, option in options.items()}
        if command.most_arguments:
            chosen["arguments"] = flags.positional
        return command.run(loaded, chosen)
    return _run(loaded, partial(load, flags.values, environment), alive)


def _run(loaded: Loaded, reload: Callable[[], Loaded], alive: int | None) -> int:
    import trio

    from sgpu.lib import logs
    from sgpu.start import start

    if (needed_by := _uses_api_server(loaded.settings)) and not loaded.settings.node_name:
        hint = "set SGPU_NODE_NAME from the pod's spec.nodeName"
        return _fail(UsageError(f"{needed_by} needs -node-name: {hint}"), USAGE)
    logs.configure(loaded.settings.log_format, loaded.settings.v)
    try:
        trio.run(start, loaded, reload, alive)
    except Exception as error:
        # These end the daemon from deep inside: they are for the operator to put right, not for us to wait out.
        from sgpu import rpc
        from sgpu.deviceplugin.place import PlaceTakenError
        from sgpu.deviceplugin.session import DirectoryRemovedError
        from sgpu.kubeapi import ApiServerError
        from sgpu.lib.concurrency import find_error
        from sgpu.node.policy import OffersRefusedError

        if refused := find_error(error, OffersRefusedError):
            return _fail(refused, USAGE)
        if find_error(error, MemoryError):
            return _fail(MEMORY, FAILED)
        for kind in (PlaceTakenError, rpc.AddressInUseError, DirectoryRemovedError, ApiServerError):
            if found := find_error(error, kind):
                return _fail(found, FAILED)
        raise
    return OK


def _uses_api_server(settings: Settings) -> str:
    """Return the setting that needs to know which Node this is; empty where none does."""
    needed_by = {
        f"-api {settings.api}": settings.api != "device-plugin",
        "-events": settings.events,
        "-node-labels api": settings.node_labels == "api",
    }
    return next((setting for setting, is_on in needed_by.items() if is_on), "")


def _fail(error: BaseException | str, code: int) -> int:
    print(f"sgpu: {error}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [USAGE_TEXT]
    for name, field in SETTINGS.items():
        lines.append(_flag_help(name, field.metadata["kind"], field.default, field.metadata["meaning"]))
    lines.append("  -config FILE\n        YAML file with the settings above, and with rules per GPU under `gpus`\n")
    lines.append("  -print-config\n        show the effective settings and where each came from\n")
    lines.append("  -version, -help\n        show that, and exit\n")
    return "".join(lines)


def _command_help(name: str, command: Command) -> str:
    lines = [f"sgpu {_usage(name, command)}: {command.summary}.\n"]
    for option, about in command.options.items():
        lines.append(_flag_help(option, about.kind, about.default, about.meaning))
    if command.takes_settings:
        lines.append("\nAnd the settings of the daemon, from the same flags, environment and file (see sgpu -help).\n")
    return "".join(lines)


def _flag_help(name: str, kind: Kind, value: object, meaning: str) -> str:
    words = str(value).lower() if isinstance(value, bool) else value
    default = f" (default {words})" if words not in ("", 0) else ""
    return f"  -{name} {kind.example}\n        {meaning}{default}\n"


def _effective(loaded: Loaded) -> str:
    """Return the settings as a -config file has them, each with its origin."""
    from sgpu.lib.logs import printable

    lines = []
    for name in SETTINGS:
        value = getattr(loaded.settings, name.replace("-", "_"))
        lines.append(f"{name}: {_as_yaml(value)}  # {printable(loaded.origins[name])}\n")
    if loaded.policy.rules:
        lines.append("gpus:\n")
    for rule in loaded.policy.rules:
        fields = {name.replace("_", "-"): value for name, value in attrs.asdict(rule).items() if name != "place"}
        given = {name: value for name, value in fields.items() if value not in ("", None, False)}
        lines.append(f"  - {_as_yaml(given)}  # {printable(rule.place)}\n")
    return "".join(lines)


def _as_yaml(value: object) -> str:
    """JSON, which is YAML too. Characters that YAML would not read back from JSON's escapes are left as they are."""
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")  # no exponent, which YAML takes for text
    import json

    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
