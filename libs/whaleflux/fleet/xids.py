"""What the driver's error codes (Xid) say about the GPU, and about whose fault the end of a program was.

Source: NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors), immediate action buckets; for Xid 162 to 172, which have none
yet, the two that end all work on the GPU are taken as fatal. A code that is not listed here is the program's own, or harmless.
"""

from __future__ import annotations

from enum import Enum


class XidAction(Enum):
    """What the GPU needs before it may be used again."""

    RESTART_WORK = "restart the work; the GPU itself goes on"
    WATCH_LINK = "restart the work; a link or its far end is at fault, and the driver says whether a reset is needed"
    RESET_GPU = "reset the GPU"
    RESTART_HOST = "restart the host"
    CHECK_HARDWARE = "check power, seating and cables, then restart the host"


# Faults of the machine: whoever ran there did not cause them. 48 is an uncorrectable ECC error, 94 and 95 are memory errors that
# were contained to one program or were not, 79 is a GPU that has fallen off the bus, 119 and 120 are the GPU's own processor.
HARDWARE_FAULTS: dict[int, XidAction] = {
    94: XidAction.RESTART_WORK,
    **dict.fromkeys((74, *range(144, 151)), XidAction.WATCH_LINK),
    **dict.fromkeys((46, 48, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158, 169), XidAction.RESET_GPU),
    **dict.fromkeys((79, 167), XidAction.RESTART_HOST),
    54: XidAction.CHECK_HARDWARE,
}

_GPU_GOES_ON = frozenset({XidAction.RESTART_WORK, XidAction.WATCH_LINK})


def is_hardware_fault(xid: int) -> bool:
    """Whether the machine, not the program, is at fault."""
    return xid in HARDWARE_FAULTS


def action_before_use(xid: int) -> XidAction | None:
    """What must be done before the GPU is given to anybody again; None where it can go on."""
    action = HARDWARE_FAULTS.get(xid)
    return None if action in _GPU_GOES_ON else action
