"""WSL: the driver is Windows', and Linux has one device node for all GPUs. Imports nothing of sgpu."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: Whatever uses a GPU in WSL opens this one, of whichever GPU. No other Linux has it.
_NODE: Final = "dxg"
#: What people are told, after what was found.
UNSUPPORTED: Final = (
    "this node is WSL (/dev/dxg), which sgpu does not support: its driver has no device node for each GPU "
    "(/dev/nvidiaN) that a container could be given"
)


def is_wsl(dev: Path) -> bool:
    """Return whether these device nodes are those of WSL."""
    return (dev / _NODE).exists() and not (dev / "nvidiactl").exists()
