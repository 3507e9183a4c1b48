"""A container of a pod. A value."""

from __future__ import annotations

from typing import Final

import attrs


@attrs.frozen(cache_hash=True)
class Container:
    """A container that has a share, or uses a GPU without one."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}" if self.namespace else self.pod


#: Stands for all processes that belong to no pod.
NO_CONTAINER: Final = Container("", "", "")
#: What the log calls them.
NO_POD: Final = "processes of no pod"
