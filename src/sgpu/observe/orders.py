"""What `sgpu cordon` and `uncordon` send to the daemon, and what it answers: values and their form as JSON. Pure."""

from __future__ import annotations

import json
from typing import Final

import attrs

from sgpu.lib.logs import printable

#: Characters of a reason: it goes to logs, pages and taints.
MOST_REASON: Final = 200


class BadOrderError(Exception):
    """An order is not understood. The message says why."""


@attrs.frozen
class Order:
    """To cordon a GPU, of which an operator gave this name, and why; or to uncordon it."""

    gpu: str
    reason: str = ""


@attrs.frozen
class Done:
    """The GPU that an order was about. `changed`: it was not so before."""

    uuid: str
    name: str
    pci_bus_id: str
    changed: bool

    def __str__(self) -> str:
        return f"GPU {self.uuid} ({self.name} at {self.pci_bus_id})"


def encode(value: Order | Done) -> bytes:
    """Return the value as JSON."""
    return json.dumps(attrs.asdict(value)).encode()


def decode_order(text: bytes) -> Order:
    """Return the order in a request: an object with `gpu` and optionally `reason`, and nothing else.

    Raises BadOrderError.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadOrderError(f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict) or "gpu" not in fields or fields.keys() - {"gpu", "reason"}:
        raise BadOrderError("the body has to be an object with gpu, and maybe reason, and nothing else")
    gpu, reason = fields["gpu"], fields.get("reason", "")
    if not (isinstance(gpu, str) and isinstance(reason, str)):
        raise BadOrderError("gpu and reason have to be texts")
    if len(reason) > MOST_REASON or printable(reason) != reason:
        raise BadOrderError(f"the reason has to be one line of at most {MOST_REASON} characters that can be printed")
    return Order(gpu, reason)


def decode_done(text: bytes) -> Done:
    """Return what `encode` was given. Raises ValueError for anything else."""
    try:
        fields = json.loads(text)
        uuid, name, pci_bus_id = (str(fields[key]) for key in ("uuid", "name", "pci_bus_id"))
        return Done(uuid, name, pci_bus_id, changed=fields["changed"] is True)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not what a daemon of this version says: {error}") from error
