"""NVIDIA's XIDs: what each means, and what becomes of the GPU. Values only: imports nothing of sgpu.

docs/xids.md is this table for people, and says where it comes from and how the classes were chosen.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

import attrs


class XidClass(enum.Enum):
    """The class of an XID: what it means for the GPU."""

    #: The application's fault, or a mere notice: the GPU is as good as before. Ignored.
    APPLICATION = "application"
    #: The GPU recovers by itself: quarantined.
    TRANSIENT = "transient"
    #: Not to be trusted again before a reset of the GPU or a reboot of the node.
    RESET = "reset"


@attrs.frozen
class Xid:
    """One XID. `action` is what NVIDIA says to do about it."""

    number: int
    meaning: str
    xid_class: XidClass
    action: str


def describe(number: int) -> Xid:
    """Return the XID of that number. One that the table lacks is critical, and so is 999, NVML's "unknown"."""
    return XIDS.get(number) or Xid(number, "not in NVIDIA's catalogue", XidClass.RESET, _UNNAMED)


@attrs.frozen
class XidPolicy:
    """The table, and the operator's say over it. Raises ValueError for a number that is to be both."""

    ignored: frozenset[int] = frozenset()
    critical: frozenset[int] = frozenset()

    def __attrs_post_init__(self) -> None:
        if both := self.ignored & self.critical:
            raise ValueError(f"both ignored and critical: {', '.join(map(str, sorted(both)))}")

    def classify(self, number: int) -> XidClass:
        """Ignored ones count as the application's fault; critical ones need a reset, whatever the table says."""
        if number in self.ignored:
            return XidClass.APPLICATION
        if number in self.critical:
            return XidClass.RESET
        return describe(number).xid_class


#: As people write XIDs; `int` takes more (signs, underscores, other scripts' digits).
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")


def parse_numbers(text: str) -> frozenset[int]:
    """`13, 31` → 13 and 31; nothing, or blanks → none. Raises ValueError, naming what is no XID."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    for word in words:
        if not _NUMBER.fullmatch(word):
            raise ValueError(f"{word!r} is not the number of an XID")
    return frozenset(map(int, words))


_APP: Final = XidClass.APPLICATION
_TRANSIENT: Final = XidClass.TRANSIENT
_RESET: Final = XidClass.RESET

_CHECK: Final = "restart the application and look for the fault in it"
_RESTART: Final = "restart the application; contact support if it recurs"
_NOTHING: Final = "nothing; contact support if it recurs"
_RESET_GPU: Final = "reset the GPU; contact support if it recurs"
_LINK: Final = "check the NVLinks and reset the GPU"
_SUPPORT: Final = "contact support"
#: Where the catalogue names no action, or knows no such XID.
_UNNAMED: Final = "reset the GPU and look it up in NVIDIA's newest catalogue"

#: By number.
XIDS: Final[Mapping[int, Xid]] = {
    xid.number: xid
    for xid in (
        Xid(1, "bad command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(2, "bad command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(3, "bad command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(4, "bad command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(5, "unused", _RESET, _SUPPORT),
        Xid(6, "bad command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(7, "bad command stream address (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(8, "channel idle timeout: the GPU stopped working on it", _APP, _RESTART),
        Xid(9, "graphics engine wrongly programmed (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(10, "unused", _RESET, _SUPPORT),
        Xid(11, "bad command stream", _APP, _CHECK),
        Xid(12, "graphics engine exception badly handled (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(13, "graphics engine exception", _APP, _CHECK),
        Xid(14, "simulated channel error", _APP, _NOTHING),
        Xid(15, "unused", _RESET, _SUPPORT),
        Xid(16, "display engine hung (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(17, "unused", _RESET, _SUPPORT),
        Xid(18, "PCI bus mastering is off (older GPUs)", _RESET, _SUPPORT),
        Xid(19, "display engine error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(20, "bad MPEG command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(21, "bad motion estimation command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(22, "bad video command stream (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(23, "unused", _RESET, _SUPPORT),
        Xid(24, "semaphore timeout (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(25, "illegal command stream", _APP, _CHECK),
        Xid(26, "framebuffer timeout (older GPUs)", _RESET, _SUPPORT),
        Xid(27, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(28, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(29, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(30, "semaphore access error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(31, "GPU memory page fault", _APP, _CHECK),
        Xid(32, "bad command stream (PBDMA)", _APP, _CHECK),
        Xid(33, "microcontroller error (older GPUs)", _RESET, _SUPPORT),
        Xid(34, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(35, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(36, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(37, "context switch firmware: unknown method", _APP, _NOTHING),
        Xid(38, "context switch firmware: watchdog", _APP, _NOTHING),
        Xid(39, "copy engine 0 exception", _TRANSIENT, _RESTART),
        Xid(40, "copy engine 1 exception", _TRANSIENT, _RESTART),
        Xid(41, "copy engine 2 exception", _TRANSIENT, _RESTART),
        Xid(42, "video processor exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(43, "an application's channel was reset", _APP, _NOTHING),
        Xid(44, "graphics engine fault during a context switch", _APP, _NOTHING),
        Xid(45, "channels removed after an earlier error", _APP, "see the XID beside it, or the fabric manager"),
        Xid(46, "GPU stopped processing", _RESET, _RESET_GPU),
        Xid(47, "video encoder 0 exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(48, "double-bit ECC error", _RESET, _RESET_GPU),
        Xid(49, "unused", _RESET, _SUPPORT),
        Xid(50, "unused", _RESET, _SUPPORT),
        Xid(51, "unused", _RESET, _SUPPORT),
        Xid(52, "unused", _RESET, _SUPPORT),
        Xid(53, "unused", _RESET, _SUPPORT),
        Xid(54, "auxiliary power is not connected", _RESET, "check the power cables"),
        Xid(55, "unused", _RESET, _SUPPORT),
        Xid(56, "display engine error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(57, "memory interface failed to train (older GPUs)", _RESET, _SUPPORT),
        Xid(58, "memory interface is unstable (older GPUs)", _RESET, _SUPPORT),
        Xid(59, "microcontroller error (older drivers)", _RESET, _SUPPORT),
        Xid(60, "video processor exception (SEC2)", _APP, _CHECK),
        Xid(61, "microcontroller breakpoint", _RESET, _SUPPORT),
        Xid(62, "microcontroller halted", _RESET, _RESET_GPU),
        Xid(63, "memory row remapped or page retired at the next reset", _TRANSIENT, "reset the GPU when convenient"),
        Xid(64, "memory row remapping or page retirement failed", _RESET, _RESET_GPU),
        Xid(65, "video encoder 1 exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(66, "illegal register access", _APP, _NOTHING),
        Xid(67, "illegal access", _APP, _NOTHING),
        Xid(68, "video decoder 0 exception", _APP, _RESTART),
        Xid(69, "graphics engine class error", _APP, _CHECK),
        Xid(70, "copy engine 3 exception", _TRANSIENT, _RESTART),
        Xid(71, "copy engine 4 exception", _TRANSIENT, _RESTART),
        Xid(72, "copy engine 5 exception", _TRANSIENT, _RESTART),
        Xid(73, "video encoder 2 exception (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(74, "NVLink error", _RESET, _LINK),
        Xid(75, "copy engine 6 exception", _TRANSIENT, _RESTART),
        Xid(76, "copy engine 7 exception", _TRANSIENT, _RESTART),
        Xid(77, "copy engine 8 exception", _TRANSIENT, _RESTART),
        Xid(78, "vGPU failed to start", _TRANSIENT, "update driver and firmware"),
        Xid(79, "GPU has fallen off the bus", _RESET, "reboot the node; contact support if it recurs"),
        Xid(80, "corrupted data sent to the GPU", _APP, _CHECK),
        Xid(81, "VGA subsystem error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(82, "JPEG engine 0 exception", _APP, _RESTART),
        Xid(83, "video decoder 1 exception", _APP, _RESTART),
        Xid(84, "video decoder 2 exception", _APP, _RESTART),
        Xid(85, "copy engine 9 exception", _TRANSIENT, _RESTART),
        Xid(86, "optical flow engine 0 exception", _APP, _RESTART),
        Xid(87, "unused", _RESET, _SUPPORT),
        Xid(88, "video decoder 3 exception", _APP, _RESTART),
        Xid(89, "video decoder 4 exception", _APP, _RESTART),
        Xid(90, "L2 cache error (unused)", _RESET, _SUPPORT),
        Xid(91, "unused", _RESET, _SUPPORT),
        Xid(92, "many single-bit ECC errors, all corrected", _APP, "nothing; run field diagnostics if it recurs"),
        Xid(93, "InfoROM written more often than provisioned", _APP, _NOTHING),
        Xid(94, "uncorrectable memory error, contained", _TRANSIENT, "restart the application; reset when convenient"),
        Xid(95, "uncorrectable memory error, not contained", _RESET, _RESET_GPU),
        Xid(96, "video decoder 5 exception", _APP, _RESTART),
        Xid(97, "video decoder 6 exception", _APP, _RESTART),
        Xid(98, "video decoder 7 exception", _APP, _RESTART),
        Xid(99, "JPEG engine 1 exception", _APP, _RESTART),
        Xid(100, "JPEG engine 2 exception", _APP, _RESTART),
        Xid(101, "JPEG engine 3 exception", _APP, _RESTART),
        Xid(102, "JPEG engine 4 exception", _APP, _RESTART),
        Xid(103, "JPEG engine 5 exception", _APP, _RESTART),
        Xid(104, "JPEG engine 6 exception", _APP, _RESTART),
        Xid(105, "JPEG engine 7 exception", _APP, _RESTART),
        Xid(106, "management bus test message", _APP, _NOTHING),
        Xid(107, "management bus test message, silent", _APP, _NOTHING),
        Xid(108, "NVLink remote translation error", _APP, _NOTHING),
        Xid(109, "context switch timeout", _APP, "restart the application; reset the GPU if it recurs"),
        Xid(110, "security fault", _RESET, _RESET_GPU),
        Xid(111, "display bundle error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(112, "display supervisor error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(113, "DisplayPort link failed to train (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(114, "display pipeline underflow (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(115, "display core channel error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(116, "display window channel error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(117, "display cursor channel error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(118, "display head error (older GPUs)", _TRANSIENT, _SUPPORT),
        Xid(119, "GSP firmware does not answer", _RESET, _RESET_GPU),
        Xid(120, "GSP firmware error", _RESET, _RESET_GPU),
        Xid(121, "CPU–GPU (C2C) link errors, all corrected", _APP, "nothing; reset the GPU when convenient"),
        Xid(122, "board flash: read failed", _RESET, _SUPPORT),
        Xid(123, "board flash: write failed", _RESET, _RESET_GPU),
        Xid(124, "board flash: erase failed", _RESET, _SUPPORT),
        Xid(125, "InfoROM file system error", _RESET, _SUPPORT),
        Xid(126, "copy engine 10 exception", _TRANSIENT, _RESTART),
        Xid(127, "copy engine 11 exception", _TRANSIENT, _RESTART),
        Xid(128, "copy engine 12 exception", _TRANSIENT, _RESTART),
        Xid(129, "copy engine 13 exception", _TRANSIENT, _RESTART),
        Xid(130, "copy engine 14 exception", _TRANSIENT, _RESTART),
        Xid(131, "copy engine 15 exception", _TRANSIENT, _RESTART),
        Xid(132, "copy engine 16 exception", _TRANSIENT, _RESTART),
        Xid(133, "copy engine 17 exception", _TRANSIENT, _RESTART),
        Xid(134, "copy engine 18 exception", _TRANSIENT, _RESTART),
        Xid(135, "copy engine 19 exception", _TRANSIENT, _RESTART),
        Xid(136, "NVLink failed to train", _RESET, _RESET_GPU),
        Xid(137, "NVLink access without privilege, by an application", _APP, _NOTHING),
        Xid(138, "deep learning accelerator error (unused)", _TRANSIENT, _SUPPORT),
        Xid(139, "optical flow engine 1 exception", _APP, _RESTART),
        Xid(140, "ECC error that recovery missed", _RESET, _RESET_GPU),
        Xid(141, "CUDA fast path error", _APP, _NOTHING),
        Xid(142, "video encoder 3 exception", _TRANSIENT, _SUPPORT),
        Xid(143, "GPU failed to initialize", _RESET, _RESET_GPU),
        Xid(144, "NVLink 5: SAW error", _RESET, _LINK),
        Xid(145, "NVLink 5: RLW error", _RESET, _LINK),
        Xid(146, "NVLink 5: TLW error", _RESET, _LINK),
        Xid(147, "NVLink 5: TREX error, never fatal", _TRANSIENT, _LINK),
        Xid(148, "NVLink 5: NVLPW control error, never fatal", _TRANSIENT, _LINK),
        Xid(149, "NVLink 5: NETIR error", _RESET, _LINK),
        Xid(150, "NVLink 5: MSE error", _RESET, _LINK),
        Xid(151, "encryption key rotation failed", _RESET, "restart the virtual machine"),
        Xid(152, "deep learning accelerator: SMMU error", _APP, _NOTHING),
        Xid(153, "deep learning accelerator: timeout", _APP, _NOTHING),
        Xid(154, "the driver's recovery action changed", _RESET, "do what the recovery action says (NVML field 230)"),
        Xid(155, "NVLink error defined by software", _RESET, _RESET_GPU),
        Xid(156, "a faulty resource is retired at the next reset", _RESET, _RESET_GPU),
        Xid(157, "a resource could not be retired", _APP, _NOTHING),
        Xid(158, "fatal timeout", _RESET, _RESET_GPU),
        Xid(159, "CHI bus error other than of data", _RESET, "see the kernel log for UVM errors"),
        Xid(160, "memory channel marked for repair", _APP, _NOTHING),
        Xid(161, "memory channel could not be marked for repair", _APP, _NOTHING),
        Xid(162, "power smoothing is on again", _APP, _NOTHING),
        Xid(163, "power smoothing is off", _APP, "reload the driver or reset the GPU to have it on"),
        Xid(164, "power smoothing circuit is worn", _APP, _NOTHING),
        Xid(165, "power smoothing circuit is worn out", _APP, _NOTHING),
        Xid(166, "NVLink: traffic before encryption was set up", _RESET, _UNNAMED),
        Xid(167, "PCIe: fatal timeout", _RESET, _UNNAMED),
        Xid(168, "faults in the firmware's memory, which was moved", _RESET, _UNNAMED),
        Xid(169, "security microcontroller halted", _RESET, _UNNAMED),
        Xid(170, "NVLink: error in confidential computing", _RESET, _UNNAMED),
        Xid(171, "uncorrectable error in DRAM (beside XID 48)", _RESET, _RESET_GPU),
        Xid(172, "uncorrectable error in SRAM (beside XID 48)", _RESET, _RESET_GPU),
        Xid(173, "CPU–GPU (C2C) link failed", _RESET, _UNNAMED),
        Xid(175, "memory subsystem timeout", _RESET, _UNNAMED),
        Xid(176, "PCIe: too many corrected errors", _RESET, _UNNAMED),
    )
}
