"""The API server as `kubectl proxy` shows it: a list of sgpu's pods, and their status by the pod proxy."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What a path is answered with: an HTTP status and a body; None: nothing, until the client has had enough.
Page = tuple[int, bytes] | None


def pod(node: str, phase: str = "Running", **status: object) -> Mapping[str, Any]:
    """Return sgpu's pod on this node, as the API server has it."""
    return {
        "metadata": {"namespace": "kube-system", "name": f"sgpu-{node}"},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "metrics", "containerPort": 2112}]}]},
        "status": {"phase": phase, "podIP": "10.0.0.1", **status},
    }


def pod_list(*pods: Mapping[str, Any]) -> bytes:
    """Return the list of these pods."""
    return json.dumps({"kind": "PodList", "items": pods}).encode()


def path(node: str) -> str:
    """Return where the status of the node's daemon is."""
    return f"/api/v1/namespaces/kube-system/pods/sgpu-{node}:2112/proxy/status"


@contextmanager
def serving(pages: Mapping[str, Page] | Callable[[str], Page]) -> Iterator[str]:
    """Serve pages by path; `pods` is that of the list. Gives the server's address."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = "pods" if self.path.startswith("/api/v1/namespaces/kube-system/pods?") else self.path
            page = pages(where) if callable(pages) else pages.get(where, (404, b"404 page not found"))
            if page is None:
                ended.wait()
                return
            self.send_response(page[0])
            self.send_header("Content-Length", str(len(page[1])))
            self.end_headers()
            self.wfile.write(page[1])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1000

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            ended.set()
            server.shutdown()
            thread.join()
