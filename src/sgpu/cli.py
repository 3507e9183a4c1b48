"""The command line: what to run, and the only exit codes. Knows neither NVML nor gRPC."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

from sgpu import __version__
from sgpu.load import ENVIRONMENT_PREFIX, Loaded, UsageError, load, parse_flags
from sgpu.logs import printable
from sgpu.settings import BOOLEAN, KNOBS, PATH, Kind, choice, seconds

#: Exit codes.
OK, FAILED, USAGE = 0, 1, 2


@attrs.frozen
class Option:
    """A flag that one command takes beside the settings."""

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


def _demo(_: Loaded, __: Mapping[str, Any]) -> int:
    from sgpu.demo import demo  # here, because the daemon should not pay for it

    return demo()


def _doctor(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.doctor import doctor

    return OK if doctor(loaded, options["o"]) else FAILED


def _status(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.status.command import status  # here, because the daemon should not pay for it

    return status(loaded, options)


_STATUS_OPTIONS: Final = {
    "watch": Option(BOOLEAN, False, "show it again and again, until Ctrl-C"),
    "interval": Option(seconds(0.1, 3600), 2.0, "with -watch: seconds from one time to the next"),
    "o": Option(choice("text", "json"), "text", "a table for people, or all of it for programs"),
    "no-color": Option(BOOLEAN, False, "no colours, as where NO_COLOR is set"),
}


def _stage(loaded: Loaded, options: Mapping[str, Any]) -> int:
    from sgpu.stage import stage

    staged = stage(
        Path(options["host-root"]),
        Path(loaded.settings.host_path),
        Path(options["lock-file"]),
        graphics=options["graphics"],
        interval=options["interval"],
    )
    return OK if staged else FAILED


_STAGE_OPTIONS: Final = {
    "host-root": Option(PATH, "/", "where the root of the host's file system is seen; it may be read-only"),
    "lock-file": Option(
        PATH, "/run/sgpu/stage.lock", "held while files are copied; in a directory that pods are not given"
    ),
    "graphics": Option(BOOLEAN, False, "stage the libraries that draw, too (OpenGL, Vulkan, OptiX)"),
    "interval": Option(seconds(0, 86400), 0.0, "seconds until it looks again, for ever; 0: once"),
}

#: The first word of a command line. Each imports what it needs when it is run.
COMMANDS: Final = {
    "demo": Command("show it working on this machine, without a GPU or a cluster", _demo, takes_settings=False),
    "doctor": Command(
        "say why this node offers no shares, or pods can't use them; changes nothing",
        _doctor,
        {"o": Option(choice("text", "json"), "text", "how the findings are printed")},
    ),
    "status": Command("show the GPUs of this node and who uses them, as its daemon knows it", _status, _STATUS_OPTIONS),
    "stage": Command("copy the host's driver libraries and tools to -host-path", _stage, _STAGE_OPTIONS),
}

USAGE_TEXT = f"""\
Offer each NVIDIA GPU of a Kubernetes node as many shared devices.

  sgpu [flags]   run the device plugin
{"".join(f"  sgpu {name:<9} {command.summary}{chr(10)}" for name, command in COMMANDS.items())}
Flags go as `-flag value` or `-flag=value`, with one dash or two. Each can also be set by an environment variable
(-host-path by {ENVIRONMENT_PREFIX}HOST_PATH) and by a key in the -config file; flag beats environment beats file.

"""


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command and return its exit code."""
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    command = COMMANDS.get(name)
    options = command.options if command else {}
    try:
        flags = parse_flags(arguments[bool(name) :], {name: option.kind for name, option in options.items()})
        if flags.actions & {"help", "h"}:
            print(_command_help(name, command) if command else _help(), end="")
            return OK
        if "version" in flags.actions:
            print(f"sgpu {__version__}")
            return OK
        if flags.words:
            raise UsageError(f"unknown command {' '.join((name, *flags.words)).strip()!r} (see -help)")
        if command and not command.takes_settings and (flags.values or flags.actions):
            raise UsageError(f"{name} takes no flags")
        loaded = load(flags.values, environment if not command or command.takes_settings else {})
    except UsageError as error:
        return _fail(error, USAGE)
    if "print-config" in flags.actions:
        print(_effective(loaded), end="")
        return OK
    if command:
        return command.run(loaded, {name: flags.options.get(name, option.default) for name, option in options.items()})
    return _run(loaded, partial(load, flags.values, environment))


def _run(loaded: Loaded, reload: Callable[[], Loaded]) -> int:
    import trio

    from sgpu import daemon, listing, logs, rpc
    from sgpu.nurseries import find_error
    from sgpu.policy import PolicyConflictError

    logs.configure(loaded.settings.log_format, loaded.settings.v)
    gc.freeze()  # modules are no garbage: to look through them takes 5 ms each time, in which the kubelet would wait
    try:
        trio.run(daemon.run, loaded, reload)
    except Exception as error:
        # These end the daemon from deep inside: they are for the operator to put right, not for us to wait out.
        if too_many := find_error(error, listing.TooManySharesError):
            return _fail(too_many, USAGE)
        if conflict := find_error(error, PolicyConflictError):
            return _fail(conflict, USAGE)
        if in_use := find_error(error, rpc.AddressInUseError):
            return _fail(in_use, FAILED)
        raise
    return OK


def _fail(error: BaseException, code: int) -> int:
    print(f"sgpu: {error}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [USAGE_TEXT]
    for name, field in KNOBS.items():
        lines.append(_flag_help(name, field.metadata["kind"], field.default, field.metadata["meaning"]))
    lines.append("  -config FILE\n        YAML file with the settings above, and with rules per GPU under `gpus`\n")
    lines.append("  -print-config\n        show the effective settings and where each came from\n")
    lines.append("  -version, -help\n        show that, and exit\n")
    return "".join(lines)


def _command_help(name: str, command: Command) -> str:
    lines = [f"sgpu {name}: {command.summary}.\n"]
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
    """The settings as a -config file would have them, each with its origin."""
    lines = []
    for name in KNOBS:
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
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
