"""Modules that are imported when something of them is used."""

from __future__ import annotations

import ssl
import subprocess
import sys

import pytest

from sgpu.lib.postpone import TLS

#: Modules: one that is postponed, and one that shows whether it was imported after all.
MODULE, INNER = "ssl", "_ssl"


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        pytest.param("import ssl", False, id="imported"),
        pytest.param("import ssl; from ssl import SSLContext", False, id="named in an annotation"),
        pytest.param("import ssl; ssl.PROTOCOL_TLS_CLIENT", False, id="in the head of a function"),
        pytest.param("import ssl; ssl.create_default_context()", True, id="used"),
        pytest.param(
            "import ssl as early; tls = early.SSLContext(early.PROTOCOL_TLS_CLIENT); import ssl; "
            "assert isinstance(tls, ssl.SSLContext) and isinstance(tls, early.SSLContext)",
            True,
            id="made by what was named in an annotation",
        ),
        pytest.param("from ssl import SSLObject", True, id="taken from"),
        pytest.param("import ssl as early; early.CERT_NONE; import ssl; assert ssl.CERT_NONE is early.CERT_NONE", True),
    ],
)
def test_postponed(code: str, imported: bool) -> None:
    """Import the module only for what is of use, and then the real one, wherever it was imported before."""
    program = (
        f"import sys; from sgpu.lib.postpone import postpone; postpone({MODULE!r}, ['SSLContext'], {TLS}); {code};"
        f"assert ({INNER!r} in sys.modules) is {imported}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_numbers() -> None:
    """Give the numbers of protocols that `ssl` has."""
    assert {name: getattr(ssl, name) for name in TLS} == TLS


def test_imported_already() -> None:
    """Leave a module that is imported already."""
    subprocess.run(
        [sys.executable, "-c", "import ssl; from sgpu.lib.postpone import postpone; postpone('ssl'); ssl.CERT_NONE"],
        check=True,
    )


def test_meanwhile() -> None:
    """Only what is imported meanwhile gets the stand-in, and may derive classes from those of the module."""
    program = f"""
import sys
from sgpu.lib.postpone import postponed
with postponed({{{MODULE!r}: ["SSLContext"]}}):
    from {MODULE} import SSLContext
    class Derived(SSLContext): pass
assert {INNER!r} not in sys.modules
import {MODULE}
assert {MODULE}.SSLContext is not SSLContext and {MODULE}.create_default_context()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
