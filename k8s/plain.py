"""Make k8s/daemonset.yaml: the base as one file, which takes nothing but `kubectl apply -f`, of any age."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).parent
PLAIN: Final = DIRECTORY / "daemonset.yaml"
HEADER: Final = """\
# Made from k8s/base by `tox -e generate`: change it there. For Kubernetes 1.9 and later.
# One sgpu on each GKE node that has NVIDIA GPUs and the label deepomatic.com/shared-gpu. The image is built from the
# Dockerfile; say here where your nodes find it. For other nodes, and for those without a driver, see k8s/overlays.
"""


def plain() -> str:
    """The text of the file. The base is a single object, which its kustomization only names."""
    return HEADER + (DIRECTORY / "base" / "daemonset.yaml").read_text()


if __name__ == "__main__":
    PLAIN.write_text(plain())
