"""proto/nvml/nvml.h against NVIDIA's own nvml.h: cffi's ABI mode checks nothing, so a C compiler does here."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from stub_driver import FUNCTIONS, HEADER

from sgpu.nvml import Code, EventType
from sgpu.nvml._bindings import ffi
from sgpu.nvml.constants import FIELD_RECOVERY_ACTION, TEXT_SIZE, VARIANTS
from sgpu.nvml.processes import COMPUTE, LAYOUTS, NOT_AVAILABLE, OTHERS

PACKAGE = "nvidia-nvml-dev-cu12"
STRUCTURES = [
    "nvmlPciInfo_t",
    "nvmlMemory_t",
    "nvmlMemory_v2_t",
    "nvmlUtilization_t",
    "nvmlValue_t",
    "nvmlFieldValue_t",
    "nvmlGpuFabricInfo_v2_t",
    "nvmlProcessInfo_v1_t",
    "nvmlProcessInfo_v2_t",
    "nvmlProcessUtilizationSample_t",
    "nvmlEventData_t",
]
#: NVIDIA's names of the event types, which follow no rule.
EVENT_TYPES = {
    "DOUBLE_BIT_ECC": "nvmlEventTypeDoubleBitEccError",
    "XID_CRITICAL": "nvmlEventTypeXidCriticalError",
    "NON_FATAL_POISON": "nvmlEventTypeNonFatalPoisonError",
    "FATAL_POISON": "nvmlEventTypeFatalPoisonError",
    "GPU_UNAVAILABLE": "nvmlEventTypeGpuUnavailableError",
    "RECOVERY_ACTION": "nvmlEventTypeGpuRecoveryAction",
}
#: The sizes of the texts that sgpu reads.
TEXT_SIZES = [
    "NVML_DEVICE_NAME_V2_BUFFER_SIZE",
    "NVML_DEVICE_UUID_V2_BUFFER_SIZE",
    "NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE",
]


def values(constants: type) -> dict[str, int]:
    """The constants of a class of such."""
    return {name: value for name, value in vars(constants).items() if not name.startswith("_")}


@pytest.fixture(scope="session")
def real_header() -> Path:
    """NVIDIA's header."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {PACKAGE}")
    return next(Path(str(file.locate())) for file in files if file.name == "nvml.h")


def check(real_header: Path, *lines: str) -> None:
    """Have the compiler accept these lines after NVIDIA's header."""
    # Without this the header turns the old variants' names into the new ones'.
    program = ["#define NVML_NO_UNVERSIONED_FUNC_DEFS", f'#include "{real_header}"', "#include <stddef.h>", *lines, ""]
    command = ["cc", "-fsyntax-only", "-Werror", "-xc", "-"]
    done = subprocess.run(command, input="\n".join(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def is_true(expression: str) -> str:
    return f'_Static_assert({expression}, "NVIDIA has it otherwise");'


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(real_header: Path, structure: str) -> None:
    """A structure has NVIDIA's size, and each field NVIDIA's offset, size and type."""
    here = ffi.typeof(structure)
    facts: list[str | bool] = [f"sizeof({structure}) == {ffi.sizeof(here)}"]
    for name, field in here.fields:
        there = f"(({structure} *)0)->{name}"
        same = f"__builtin_types_compatible_p(__typeof__({there}), __typeof__({field.type.cname}))"
        facts += [
            f"offsetof({structure}, {name}) == {field.offset}",
            f"sizeof({there}) == {ffi.sizeof(field.type)}",
            # An int here may be an enumeration there.
            field.type.cname == "int" or same,
        ]
    check(real_header, *(is_true(fact) for fact in facts if isinstance(fact, str)))


def test_every_structure() -> None:
    """No structure of the header is left out above."""
    assert sorted(re.findall(r"^} (\w+);", HEADER.read_text(), re.MULTILINE)) == sorted(STRUCTURES)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_function(real_header: Path, function: str) -> None:
    """A function is declared by NVIDIA, and declaring it again as it is here is no conflict."""
    declaration = re.search(rf"^.*\b{function}\(.*\);", HEADER.read_text(), re.MULTILINE)
    assert declaration
    check(real_header, f"void *declared = (void *){function};", declaration[0])


def test_enumerations(real_header: Path) -> None:
    """The C ABI passes a code as an int."""
    check(real_header, is_true("sizeof(nvmlReturn_t) == sizeof(int)"))


@pytest.mark.parametrize(("name", "value"), values(Code).items())
def test_code(real_header: Path, name: str, value: int) -> None:
    """A code has NVIDIA's value."""
    check(real_header, is_true(f"NVML_{'' if name == 'SUCCESS' else 'ERROR_'}{name} == {value}"))


@pytest.mark.parametrize(("name", "value"), values(EventType).items())
def test_event_type(real_header: Path, name: str, value: int) -> None:
    """An event type has NVIDIA's value."""
    check(real_header, is_true(f"{EVENT_TYPES[name]} == {value}"))


@pytest.mark.parametrize("size", TEXT_SIZES)
def test_text_size(real_header: Path, size: str) -> None:
    """The buffer for texts is long enough."""
    check(real_header, is_true(f"{size} <= {TEXT_SIZE}"))


@pytest.mark.parametrize("structure", ["nvmlMemory_v2", "nvmlGpuFabricInfo_v2"])
def test_version(real_header: Path, structure: str) -> None:
    """The version that goes into a structure is made of its size and number, as the binding makes it."""
    check(real_header, is_true(f"{structure} == {ffi.sizeof(f'{structure}_t') | 2 << 24}"))


def test_field(real_header: Path) -> None:
    """The number of the field that is read."""
    check(real_header, is_true(f"NVML_FI_DEV_GET_GPU_RECOVERY_ACTION == {FIELD_RECOVERY_ACTION}"))


def test_not_available(real_header: Path) -> None:
    """What stands for a number that is not known."""
    check(real_header, is_true(f"(unsigned long long)NVML_VALUE_NOT_AVAILABLE == {NOT_AVAILABLE}ULL"))


@pytest.mark.parametrize("function", [COMPUTE, *OTHERS])
def test_lists_of_processes(function: str) -> None:
    """All variants are declared, newest first, each with the structure that it is called with."""
    declared = {
        name: layout for name, layout in re.findall(rf"\b({function}\w*)\(.*, (\w+) \*infos\);", HEADER.read_text())
    }
    assert list(declared.items()) == [(function + suffix, layout) for suffix, layout in LAYOUTS]


@pytest.mark.parametrize("function", VARIANTS)
def test_variants(function: str) -> None:
    """All variants of a function are declared, newest first, with the same arguments."""
    variants, header = VARIANTS[function], HEADER.read_text()
    assert sorted(variants, reverse=True) == list(variants)
    assert set(variants) == {name for name in FUNCTIONS if re.fullmatch(rf"{function}(_v\d)?", name)}
    assert len({arguments for name in variants for arguments in re.findall(rf"\b{name}(\(.*\));", header)}) == 1
