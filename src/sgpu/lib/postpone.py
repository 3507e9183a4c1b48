"""Modules that libraries import and that nobody here may need: they are imported when something of them is first used.

`importlib.util.LazyLoader` would import them at the next `import` statement.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, ModuleType
from typing import Any, Final

#: What prometheus_client has in the heads of functions: the numbers of `ssl.PROTOCOL_…`.
TLS: Final = {"PROTOCOL_TLS_CLIENT": 16, "PROTOCOL_TLS_SERVER": 17}
_NONE: Mapping[str, object] = MappingProxyType({})


class _Postponed(ModuleType):
    """Stands in for a module."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # anything of the module's
        if name.startswith("__"):
            raise AttributeError(name)  # whoever imports it looks for those, too
        return getattr(_import(self.__name__), name)


def _import(name: str) -> ModuleType:
    """Return the real module, and give the stand-in what it has, for those who imported that."""
    if isinstance(sys.modules.get(name), _Postponed):
        stand_in = sys.modules.pop(name)
        stand_in.__dict__.update(vars(importlib.import_module(name)))
    return importlib.import_module(name)


def postpone(name: str, classes: Iterable[str] = (), values: Mapping[str, object] = _NONE) -> None:
    """Import the module later, if it is not imported yet.

    `classes` and `values` are what those who import it have in the heads of their functions.
    """
    if name not in sys.modules:
        sys.modules[name] = module = _Postponed(name)
        module.__dict__.update({each: _stand_in(name, each) for each in classes}, **values)
        package, _, last = name.rpartition(".")
        if isinstance(above := sys.modules.get(package), _Postponed):
            setattr(above, last, module)


@contextmanager
def postponed(modules: Mapping[str, Iterable[str]]) -> Iterator[None]:
    """Postpone modules, with these classes and functions, for what is imported meanwhile: classes may be derived there
    that nobody makes an object of. Whoever imports such a module later gets the real one.
    """
    for name, classes in modules.items():
        postpone(name, classes)
    try:
        yield
    finally:
        for name in modules:
            if isinstance(sys.modules.get(name), _Postponed):
                del sys.modules[name]


def _stand_in(module: str, name: str) -> type:
    """Return a class whose instances are those of the real one."""
    return type(name, (), {"__new__": lambda _, *values, **named: getattr(_import(module), name)(*values, **named)})


def postpone_unneeded() -> None:
    """Postpone what the daemon's libraries import, and what it uses of them does not need."""
    # TLS in trio, anyio and prometheus_client: 4.7 MB, which only the API server needs.
    postpone("ssl", ("SSLContext", "TLSVersion"), TLS)
    postpone("hmac")
    postpone("hashlib")
    postpone("anyio", ("TASK_STATUS_IGNORED",))  # purerpc's own server and channel: 0.7 MB
    postpone("anyio.abc", ("SocketStream",))
    postpone("anyio.streams.tls", ("TLSListener",))
    # HTTP/2 of h2 below purerpc's own server and channel: 0.6 MB
    postpone("purerpc.grpclib.connection", ("GRPCConfiguration", "GRPCConnection"))
    # ctypes' search for a library with a compiler, and protobuf's dates: 0.7 MB
    for name in ("shutil", "tempfile", "bz2", "lzma", "calendar", "locale", "ipaddress"):
        postpone(name)
    postpone("idna")  # trio's names of hosts beyond ASCII: 0.3 MB
    postpone("google.protobuf.internal.python_message")  # protobuf in Python, which is there in C: 1.5 MB
    postpone("inspect")  # attrs for converters; trio needs it, and not every command needs trio
    postpone("attr.validators")
