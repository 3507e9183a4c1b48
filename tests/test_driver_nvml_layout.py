"""proto/nvml/nvml.h against NVIDIA's own nvml.h: cffi's ABI mode checks nothing, so a C compiler does here, once."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from stub_driver import FUNCTIONS, HEADER

from sgpu.driver.health import FABRIC_COMPLETE, FABRIC_NOT_READY
from sgpu.driver.nvml import Code, EventType
from sgpu.driver.nvml._bindings import ffi
from sgpu.driver.nvml.constants import FIELD_RECOVERY_ACTION, MIG_ENABLED, NO_LIMIT, TEXT_SIZE, VARIANTS
from sgpu.driver.nvml.processes import COMPUTE, GRAPHICS, LAYOUTS, MPS, NOT_AVAILABLE

pytestmark = pytest.mark.static

PACKAGE = "nvidia-nvml-dev"
DECLARATIONS = HEADER.read_text()
STRUCTURES = [name for name in ffi.list_types()[0] if ffi.typeof(name).kind in ("struct", "union")]
#: NVIDIA's names of the event types, which follow no rule.
EVENT_TYPES = {
    "DOUBLE_BIT_ECC": "nvmlEventTypeDoubleBitEccError",
    "XID_CRITICAL": "nvmlEventTypeXidCriticalError",
    "MIG_CONFIG_CHANGE": "nvmlEventMigConfigChange",
    "NON_FATAL_POISON": "nvmlEventTypeNonFatalPoisonError",
    "FATAL_POISON": "nvmlEventTypeFatalPoisonError",
    "GPU_UNAVAILABLE": "nvmlEventTypeGpuUnavailableError",
    "RECOVERY_ACTION": "nvmlEventTypeGpuRecoveryAction",
}


def values(constants: type) -> dict[str, int]:
    """The constants of a class of such."""
    return {name: value for name, value in vars(constants).items() if not name.startswith("_")}


def structure(name: str) -> Iterator[str]:
    """A structure has NVIDIA's size, and each field NVIDIA's offset, size and type."""
    here = ffi.typeof(name)
    yield f"sizeof({name}) == {ffi.sizeof(here)}"
    for field_name, field in here.fields:
        there = f"(({name} *)0)->{field_name}"
        yield f"offsetof({name}, {field_name}) == {field.offset}"
        yield f"sizeof({there}) == {ffi.sizeof(field.type)}"
        if field.type.cname != "int":  # which may be an enumeration there
            kind = field.type.cname.replace("char *", "const char *")  # cffi's name leaves that word out
            yield f"__builtin_types_compatible_p(__typeof__({there}), __typeof__({kind}))"


def facts() -> Iterator[str]:
    """Assertions to compile after NVIDIA's header: structures, constants, and sizes of texts."""
    for name in STRUCTURES:
        yield from structure(name)
    yield "sizeof(nvmlReturn_t) == sizeof(int)"  # the C ABI passes an enumeration as one
    for name, value in values(Code).items():
        yield f"NVML_{'' if name == 'SUCCESS' else 'ERROR_'}{name} == {value}"
    for name, value in values(EventType).items():
        yield f"{EVENT_TYPES[name]} == {value}"
    for text in ("DEVICE_NAME_V2", "DEVICE_UUID_V2", "SYSTEM_DRIVER_VERSION"):
        yield f"NVML_{text}_BUFFER_SIZE <= {TEXT_SIZE}"
    for name in ("nvmlMemory_v2", "nvmlGpuFabricInfo_v2"):  # a structure's version, as the binding makes it
        yield f"{name} == {ffi.sizeof(f'{name}_t') | 2 << 24}"
    yield f"NVML_DEVICE_MEMORY_LIMIT_MAX == {NO_LIMIT}ULL"
    yield f"NVML_FI_DEV_GET_GPU_RECOVERY_ACTION == {FIELD_RECOVERY_ACTION}"
    yield f"NVML_DEVICE_MIG_ENABLE == {MIG_ENABLED}"
    yield f"(unsigned long long)NVML_VALUE_NOT_AVAILABLE == {NOT_AVAILABLE}ULL"
    for state, value in zip(
        ("NOT_STARTED", "IN_PROGRESS", "COMPLETED"), (*FABRIC_NOT_READY, FABRIC_COMPLETE), strict=True
    ):
        yield f"NVML_GPU_FABRIC_STATE_{state} == {value}"


def real_header() -> Path:
    """NVIDIA's header. Skips the test where there is none."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {PACKAGE}")
    return next(Path(str(file.locate())) for file in files if file.name == "nvml.h")


def test_layout() -> None:
    """Declare structures and functions, and define constants, as NVIDIA does."""
    assert len(STRUCTURES) == len(re.findall("^} nvml", DECLARATIONS, re.MULTILINE))
    # Without this the header turns the old variants' names into the new ones'.
    lines = ["#define NVML_NO_UNVERSIONED_FUNC_DEFS", f'#include "{real_header()}"', "#include <stddef.h>"]
    lines += [f'_Static_assert({fact}, "{fact}");' for fact in facts()]
    for function in FUNCTIONS:
        declaration = re.search(rf"^.*\b{function}\(.*\);", DECLARATIONS, re.MULTILINE)
        assert declaration
        # NVIDIA declares it, and to declare it again as it is here is no conflict. This one takes every version of its
        # structure, and NVIDIA's name for it is that of the newest.
        again = declaration[0].replace("FabricInfo_v2_t *", "FabricInfoV_t *")
        lines += [f"void *declared_{function} = (void *){function};", again]
    command = ["cc", "-fsyntax-only", "-Werror", "-xc", "-"]
    done = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("function", [COMPUTE, GRAPHICS, MPS])
def test_lists_of_processes(function: str) -> None:
    """Declare all variants, newest first, each with the structure that it is called with."""
    declared = re.findall(rf"\b({function}\w*)\(.*, (\w+) \*infos\);", DECLARATIONS)
    assert declared == [(function + suffix, layout) for suffix, layout in LAYOUTS]


@pytest.mark.parametrize("function", VARIANTS)
def test_variants(function: str) -> None:
    """Declare all variants of a function, newest first, with the same arguments."""
    variants = VARIANTS[function]
    assert sorted(variants, reverse=True) == list(variants)
    assert set(variants) == {name for name in FUNCTIONS if re.fullmatch(rf"{function}(_v\d)?", name)}
    assert len({arguments for name in variants for arguments in re.findall(rf"\b{name}(\(.*\));", DECLARATIONS)}) == 1
