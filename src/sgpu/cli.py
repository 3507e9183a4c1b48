"""The command line: what to run, and the only exit codes. Knows neither NVML nor gRPC."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import attrs

from sgpu import __version__
from sgpu.load import ENVIRONMENT_PREFIX, Loaded, UsageError, load, parse_flags
from sgpu.logs import printable
from sgpu.settings import KNOBS

#: Exit codes.
OK, FAILED, USAGE = 0, 1, 2

USAGE_TEXT = f"""\
Offer each NVIDIA GPU of a Kubernetes node as many shared devices.

  sgpu [flags]   run the device plugin
  sgpu demo      show it working on this machine, without a GPU or a cluster

Flags go as `-flag value` or `-flag=value`, with one dash or two. Each can also be set by an environment variable
(-host-path by {ENVIRONMENT_PREFIX}HOST_PATH) and by a key in the -config file; flag beats environment beats file.

"""


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command and return its exit code."""
    try:
        flags = parse_flags(arguments)
        if flags.actions & {"help", "h"}:
            print(_help(), end="")
            return OK
        if "version" in flags.actions:
            print(f"sgpu {__version__}")
            return OK
        if flags.words == ("demo",):
            if flags.values or flags.actions:
                raise UsageError("demo takes no flags")
            from sgpu.demo import demo  # here, because the daemon should not pay for it

            return demo()
        if flags.words:
            raise UsageError(f"unknown command {' '.join(flags.words)!r} (see -help)")
        loaded = load(flags.values, environment)
    except UsageError as error:
        return _fail(error, USAGE)
    if "print-config" in flags.actions:
        print(_effective(loaded), end="")
        return OK
    return _run(loaded, partial(load, flags.values, environment))


def _run(loaded: Loaded, reload: Callable[[], Loaded]) -> int:
    import trio

    from sgpu import daemon, listing, logs, rpc
    from sgpu.nurseries import find_error
    from sgpu.policy import PolicyConflictError

    logs.configure(loaded.settings.log_format, loaded.settings.v)
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
        kind = field.metadata["kind"]
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = f" (default {value})" if value not in ("", 0) else ""
        lines.append(f"  -{name} {kind.example}\n        {field.metadata['meaning']}{default}\n")
    lines.append("  -config FILE\n        YAML file with the settings above, and with rules per GPU under `gpus`\n")
    lines.append("  -print-config\n        show the effective settings and where each came from\n")
    lines.append("  -version, -help\n        show that, and exit\n")
    return "".join(lines)


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
