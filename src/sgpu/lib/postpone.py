"""Modules that libraries import and that nobody here may need: they are imported when something of them is first used.

`importlib.util.LazyLoader` would import them at the next `import` statement.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Postponed(ModuleType):
    """Stands in for a module."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # anything of the module's
        if name.startswith("__"):
            raise AttributeError(name)  # whoever imports it looks for those, too
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def postpone(name: str, *annotations: str) -> None:
    """Import the module later, if it is not imported yet. `annotations`: what is imported of it to annotate with."""
    if name not in sys.modules:
        sys.modules[name] = module = _Postponed(name)
        module.__dict__.update({each: type(each, (), {}) for each in annotations})
