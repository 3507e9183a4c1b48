"""NVML's constants, and which functions are variants of one another. The signatures are in `proto/nvml/nvml.h`."""

from typing import Final

#: Newest variant first. Drivers before the newer one existed lack its symbol; the arguments are the same.
#: (`nvmlDeviceGetMemoryInfo_v2` takes another structure, so it has code of its own; so have the lists of processes.)
VARIANTS: Final = {
    "nvmlInit": ("nvmlInit_v2", "nvmlInit"),
    "nvmlDeviceGetCount": ("nvmlDeviceGetCount_v2", "nvmlDeviceGetCount"),
    "nvmlDeviceGetHandleByIndex": ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex"),
    "nvmlDeviceGetPciInfo": ("nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo_v2", "nvmlDeviceGetPciInfo"),
    "nvmlEventSetWait": ("nvmlEventSetWait_v2", "nvmlEventSetWait"),
}


class Code:
    """The `nvmlReturn_t` values that sgpu distinguishes."""

    SUCCESS: Final = 0
    INVALID_ARGUMENT: Final = 2
    NOT_SUPPORTED: Final = 3
    NO_PERMISSION: Final = 4
    NOT_FOUND: Final = 6
    INSUFFICIENT_SIZE: Final = 7
    DRIVER_NOT_LOADED: Final = 9
    TIMEOUT: Final = 10
    FUNCTION_NOT_FOUND: Final = 13
    GPU_IS_LOST: Final = 15
    RESET_REQUIRED: Final = 16
    OPERATING_SYSTEM: Final = 17
    LIB_RM_VERSION_MISMATCH: Final = 18
    NO_DATA: Final = 21
    ARGUMENT_VERSION_MISMATCH: Final = 25
    UNKNOWN: Final = 999


#: A question that a GPU or a driver does not know is no fault of either.
NO_ANSWER: Final = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_SUPPORTED,
        Code.NO_PERMISSION,
        Code.FUNCTION_NOT_FOUND,
        Code.NO_DATA,
        Code.ARGUMENT_VERSION_MISMATCH,
    }
)
#: Errors that say that the GPU itself is gone or unusable, whichever call answers them.
GPU_LOST: Final = frozenset({Code.GPU_IS_LOST, Code.RESET_REQUIRED})
#: What NVML answers in the ordinary course of things.
EXPECTED: Final = NO_ANSWER | {Code.TIMEOUT, Code.NOT_FOUND, Code.INSUFFICIENT_SIZE}


class EventType:
    """The bits of an event mask that sgpu may ask for (`nvmlEventType…`)."""

    DOUBLE_BIT_ECC: Final = 0x2
    XID_CRITICAL: Final = 0x8
    MIG_CONFIG_CHANGE: Final = 0x100
    NON_FATAL_POISON: Final = 0x1000
    FATAL_POISON: Final = 0x2000
    GPU_UNAVAILABLE: Final = 0x4000
    RECOVERY_ACTION: Final = 0x8000


#: `NVML_DEVICE_MIG_ENABLE`.
MIG_ENABLED: Final = 1
#: The instance in an event that belongs to none.
NO_INSTANCE: Final = 0xFFFFFFFF

#: `NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`.
FIELD_RECOVERY_ACTION: Final = 230

#: `NVML_DEVICE_MEMORY_LIMIT_MAX`: a hard limit that is none.
NO_LIMIT: Final = (1 << 64) - 1

#: NVML_DEVICE_NAME_V2_BUFFER_SIZE, the largest text any of the functions above fills (bytes).
TEXT_SIZE: Final = 96
