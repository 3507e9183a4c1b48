"""The types of value that settings take, from text and from YAML. Imports nothing of sgpu."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Final

import attrs

#: DNS-1123 subdomain and qualified name, as `k8s.io/apimachinery/pkg/util/validation` has them.
_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NAME: Final = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
#: Characters. The kubelet also checks `requests.` + the name, which must be a subdomain as well.
_DOMAIN_LENGTH: Final = 253 - len("requests.")
_NAME_LENGTH: Final = 63
_NODE_LENGTH: Final = 253
#: As people write numbers; `int` takes more (underscores, blanks, other scripts' digits).
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_DECIMAL: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
#: Parts of the memory that limits can be named by.
_LIMITS: Final = {"off": 0.0, "fair": 1.0}
MOST_BURST: Final = 1000
#: A percentage, an amount, or both.
_TOLERANCE: Final = re.compile(
    r"((?P<percent>[0-9]{1,4}(\.[0-9]{1,4})?)%)?((^|(?<=%)\+)(?P<number>[0-9]{1,6})(?P<unit>[MG])iB?)?"
)
_UNITS: Final = {"M": 1 << 20, "G": 1 << 30}
_ADDRESS: Final = re.compile(
    r"(\[(?P<v6>[0-9a-fA-F:.]+(%[\w.-]+)?)\]|(?P<host>[\w.-]*)):(?P<port>[0-9]{1,5})", re.ASCII
)
_MAX_PORT: Final = 65535
#: What Go's flag package takes, in any case.
_BOOLEANS: Final = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@attrs.frozen
class Kind:
    """A type of value. `takes` describes it; `check` says whether a value of the right type is in range."""

    takes: str
    type: type
    check: Callable[[Any], bool]
    example: str = "VALUE"
    #: A type that YAML may give the same thing in a file: `5` for seconds, `79` for a list of one number.
    also: object = None

    def from_text(self, text: str) -> object:
        """Return the value of a flag or an environment variable. Raises ValueError."""
        value: object = text
        if self.type is int:
            value = int(text) if _INTEGER.fullmatch(text) else text
        elif self.type is float:
            value = float(text) if _DECIMAL.fullmatch(text) else text
        elif self.type is bool:
            value = _BOOLEANS.get(text.lower())
        return self.from_file(value)

    def from_file(self, value: object) -> object:
        """Return the value of a key in the file, which has a type already. Raises ValueError."""
        if type(value) is self.also:
            value = self.type(value)
        if value is False and self.type is str and self.check("off"):  # YAML reads the word so
            value = "off"
        if type(value) is not self.type or not self.check(value):
            raise ValueError(value)
        return value


def integer(low: int, high: int) -> Kind:
    """Take a whole number in a range, both ends included."""
    return Kind(f"a whole number from {low} to {high}", int, lambda value: low <= value <= high, "N")


def choice(*words: str) -> Kind:
    """Take one of a few words."""
    return Kind(" or ".join(words), str, lambda value: value in words, "|".join(words))


def is_extended_resource(name: str) -> bool:
    """Return whether Kubernetes takes `name` for an extended resource (`IsExtendedResourceName`)."""
    domain, _, rest = name.partition("/")
    return (
        "kubernetes.io/" not in name
        and not name.startswith("requests.")
        and len(domain) <= _DOMAIN_LENGTH
        and len(rest) <= _NAME_LENGTH
        and _DOMAIN.fullmatch(domain) is not None
        and _NAME.fullmatch(rest) is not None
    )


def seconds(low: float, high: float) -> Kind:
    """Take a number of seconds in a range, both ends included."""
    return Kind(
        f"a number of seconds from {low:g} to {high:g}", float, lambda value: low <= value <= high, "SECONDS", int
    )


def fraction() -> Kind:
    """Take a part of a whole, from 0 to 1."""
    return Kind("a number from 0 to 1", float, lambda value: 0 <= value <= 1, "PART", int)


def parse_limits(text: str) -> float:
    """Return how many times its fair part of the memory a container may use; 0 for `off`. Raises ValueError."""
    named = _LIMITS.get(text)
    if named is not None:
        return named
    word, _, factor = text.partition("=")
    if word != "burst" or not _DECIMAL.fullmatch(factor) or not 1 <= float(factor) <= MOST_BURST:
        raise ValueError(text)
    return float(factor)


def parse_tolerance(text: str) -> tuple[float, int]:
    """Return the part and the bytes of a tolerance: 0.1 and 536870912 for `10%+512MiB`. Raises ValueError."""
    found = _TOLERANCE.fullmatch(text)
    if not text or found is None:
        raise ValueError(text)
    return float(found["percent"] or 0) / 100, int(found["number"] or 0) * _UNITS[found["unit"] or "M"]


def _parses(parse: Callable[[str], object]) -> Callable[[str], bool]:
    """Return whether that takes a text without ValueError, as a function of the text."""

    def check(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return check


def split_address(text: str) -> tuple[str, int] | None:
    """Host (empty: all interfaces) and port (0: any free one) of an address; None if it is none."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > _MAX_PORT:
        return None
    return found["v6"] or found["host"], int(found["port"])


def split_names(text: str) -> list[str]:
    """Return the names of a list with commas between; none for an empty text."""
    return [name.strip() for name in text.split(",")] if text else []


def _are_namespaces(text: str) -> bool:
    return all(re.fullmatch(_LABEL, name) for name in split_names(text))


def _is_node_name(text: str) -> bool:
    return not text or (len(text) <= _NODE_LENGTH and _DOMAIN.fullmatch(text) is not None)


def _is_path(text: str) -> bool:
    """Return whether a file could have this path: YAML knows characters that no name of a file has."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _are_numbers(text: str) -> bool:
    return not text or all(_NUMBER.fullmatch(number.strip()) for number in text.split(","))


MEMORY_LIMITS: Final = Kind(
    f"off, fair, or burst=N with a number from 1 to {MOST_BURST}", str, _parses(parse_limits), "off|fair|burst=N"
)
TOLERANCE: Final = Kind(
    "a percentage, MiB or GiB, or both, as in 10%+512MiB, 25% or 1GiB", str, _parses(parse_tolerance), "N%+NMiB"
)
BOOLEAN: Final = Kind("true or false", bool, lambda value: True, "true|false")
PATH: Final = Kind(
    "an absolute path", str, lambda value: _is_path(value) and PurePosixPath(value).is_absolute(), "PATH"
)
FILE: Final = Kind(
    "the path of a file",
    str,
    lambda value: _is_path(value) and (not value or bool(PurePosixPath(value).name)),
    "FILE",
)
ADDRESS: Final = Kind(
    "an address as in :2112, 127.0.0.1:2112 or [::1]:2112, or nothing",
    str,
    lambda value: not value or split_address(value) is not None,
    "HOST:PORT",
)
SHARES: Final = integer(1, 100_000)
NUMBERS: Final = Kind("numbers with commas between, as in 13,31", str, _are_numbers, "N,N", int)
NAMESPACES: Final = Kind("names of namespaces with commas between, or nothing", str, _are_namespaces, "NAME,NAME")
NODE_NAME: Final = Kind("the name of a Node", str, _is_node_name, "NAME")
RESOURCE: Final = Kind(
    "the name of an extended resource, as in example.com/name (not kubernetes.io)", str, is_extended_resource, "NAME"
)
#: As NVIDIA names the sizes of MIG instances: slices, memory, and what else they have (`+me`, `-me`, `+gfx`).
_PROFILE: Final = re.compile(r"([1-9]c\.)?[1-9][0-9]?g\.[1-9][0-9]{0,3}gb([+-][a-z0-9]+([.+-][a-z0-9]+)*)?")
#: What stands for a profile in the name of a resource, and the longest that there is.
_PLACE: Final = "{profile}"
LONGEST_PROFILE: Final = "1c.7g.141gb.me"


def _is_profile_resource(text: str) -> bool:
    name = text.replace(_PLACE, LONGEST_PROFILE)
    return text.count(_PLACE) == 1 and is_extended_resource(name if "/" in name else f"example.com/{name}")


MIG: Final = choice("shared", "profile", "off")
MIG_RESOURCE: Final = Kind(
    f"the name of an extended resource with {_PLACE} in it, as in nvidia.com/mig-{_PLACE}; without a domain, it has "
    f"that of -resource-name",
    str,
    _is_profile_resource,
    "NAME",
)
MIG_PROFILE: Final = Kind(
    "a MIG profile, as in 1g.10gb or 1g.10gb+me", str, lambda value: _PROFILE.fullmatch(value) is not None
)
MIG_PROFILES: Final = Kind(
    "MIG profiles with commas between, as in 1g.10gb,2g.20gb",
    str,
    lambda value: not value or all(map(_PROFILE.fullmatch, value.split(","))),
    "PROFILE,PROFILE",
)
