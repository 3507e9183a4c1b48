"""Generate every committed generated module of sgpu. Run it from a checkout: `tox -e generate`.

- `proto/sgpu/api/*.proto` → `src/sgpu/api/*_pb2.py` (+ `.pyi`) by protoc, `*_grpc.py` by purerpc's plugin;
- `proto/nvml/nvml.h` → `src/sgpu/driver/nvml/_bindings.py` by cffi (ABI mode, out of line: neither a compiler nor
  pycparser is needed where it runs, and opening a library falls back to no search of its own).
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SOURCE = PROTO.parent / "src"


def generate_api(target: Path) -> None:
    """Compile the protobuf definitions into `target`/sgpu/api."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("sgpu/api/*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={PROTO}",
        f"--plugin=protoc-gen-purerpc={Path(sys.executable).parent / 'protoc-gen-purerpc'}",
        f"--python_out={target}",
        f"--pyi_out={target}",
        f"--purerpc_out={target}",
        *files,
    ]
    if protoc.main(arguments):
        raise SystemExit(f"protoc failed: {' '.join(arguments)}")


def generate_nvml(target: Path) -> None:
    """Compile NVML's declarations into `target`/sgpu/driver/nvml/_bindings.py."""
    ffi = cffi.FFI()
    ffi.set_source("sgpu.driver.nvml._bindings", None)
    ffi.cdef((PROTO / "nvml" / "nvml.h").read_text())
    ffi.emit_python_code(str(target / "sgpu" / "driver" / "nvml" / "_bindings.py"))


def main(target: Path) -> None:
    """Write all generated modules below `target` (a directory like `src`)."""
    for package in ("api", "driver/nvml"):
        (target / "sgpu" / package).mkdir(parents=True, exist_ok=True)
    generate_api(target)
    generate_nvml(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
