"""The page in a real Chromium, where there is one: what its own policy lets through, and that it loads itself again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest
from fake_status import GPU, SNAPSHOT

from sgpu.node.usage import ContainerUse
from sgpu.observe import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Seconds after which something is taken not to happen.
TIMEOUT = 60.0
EVIL = ContainerUse("team", "<img src=x onerror=alert(1)>", "<script>alert(2)</script>", 2, 1 << 30, 7, 1)
SHOWN = attrs.evolve(SNAPSHOT, gpus=(attrs.evolve(GPU, containers=(EVIL,)),))

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium in PATH"),
]


@pytest.fixture
def requests() -> Iterator[list[str]]:
    """Paths that were asked for, behind the address."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            for name, value in {**page.HEADERS, "Content-Type": page.CONTENT_TYPE}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page.render(SHOWN, refresh=not self.path.endswith(page.STILL)))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        asked.append(f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()
        thread.join()


def browser(profile: Path, *flags: str) -> list[str]:
    """Return the start of its command line."""
    return [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *flags]


def test_still(requests: list[str], tmp_path: Path) -> None:
    """Its style gets past its own policy, text of others is text, nothing else is loaded, and it stays as it is."""
    flags = ("--enable-logging=stderr", "--virtual-time-budget=25000", "--dump-dom")  # ms of the browser's own time
    command = browser(tmp_path, *flags, f"{requests[0]}/?{page.STILL}")
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert "CONSOLE" not in seen.stderr
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in seen.stdout
    assert "<meter" in seen.stdout
    assert [path for path in requests[1:] if path != "/favicon.ico"] == [f"/?{page.STILL}"]


def test_refresh(requests: list[str], tmp_path: Path) -> None:
    """It is loaded again by itself."""
    command = browser(tmp_path, "--remote-debugging-port=0", f"{requests[0]}/")  # else it would end with the first page
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        try:
            end = time.monotonic() + TIMEOUT
            while requests[1:].count("/") < 2:
                assert time.monotonic() < end, requests
                time.sleep(0.1)
        finally:
            os.killpg(running.pid, signal.SIGKILL)
