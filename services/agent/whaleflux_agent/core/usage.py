"""What a device did in an interval, as numbers: counters to amounts, percentages to millionths, what idles. Pure.

What is not known is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PPM = 1_000_000
_IDLE_ABOVE = 1.15  # of the power that a GPU draws without work
_NO_KERNEL_PPM = 1_000  # counters have noise
_MOST_PPM = 2 * PPM  # usage_checks.MOST_PPM, which a core does not reach


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """One device in one interval; the fields are those of the contract's `GpuUsage`."""

    device: str
    source: str  # "gpm", "dcgm", "nvml", "simulated"
    tensor_ppm: int | None = None
    sm_active_ppm: int | None = None
    dram_active_ppm: int | None = None
    busy_ppm: int | None = None
    clock_ppm: int | None = None
    power_mw: int | None = None
    idle_power: bool | None = None
    memory_used_bytes: int | None = None
    nvlink_sent_bytes: int | None = None
    nvlink_received_bytes: int | None = None
    pcie_sent_bytes: int | None = None
    pcie_received_bytes: int | None = None


def grown(before: int | None, now: int | None) -> int | None:
    """How much a cumulative counter has grown; None where it is not known, or began anew."""
    return now - before if before is not None and now is not None and now >= before else None


def ppm(share: float | None) -> int | None:
    """Millionths of a share (1.0 is all); None for what is no share."""
    if share is None or not math.isfinite(share) or share < 0:
        return None
    return min(_MOST_PPM, round(share * PPM))


def times(ppm_of: int | None, by_ppm: int | None) -> int | None:
    """The product of two shares, both in millionths."""
    return ppm_of * by_ppm // PPM if ppm_of is not None and by_ppm is not None else None


def amount(per_s: float | None, interval_s: float) -> int | None:
    """What a rate moved in an interval."""
    if per_s is None or not math.isfinite(per_s) or per_s < 0:
        return None
    return round(per_s * interval_s)


def mean(seen: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(seen) / len(seen) if seen else None


class IdlePower:
    """What a GPU draws without work, learned while no kernel ran: the mean of the intervals in which none did.

    With processes that wait on it a GPU keeps its clocks up and draws more than an empty one, so that the most that was seen without a
    kernel counts, not the least.
    """

    def __init__(self) -> None:
        self._idle_mw: int | None = None

    def judged(self, power_mw: int | None, busy_ppm: int | None) -> bool | None:
        """Whether it drew no more than 15 % above that; None while that is not known."""
        if power_mw is None:
            return None
        if busy_ppm is not None and busy_ppm < _NO_KERNEL_PPM:
            self._idle_mw = max(power_mw, self._idle_mw or 0)
        return None if self._idle_mw is None else power_mw <= self._idle_mw * _IDLE_ABOVE
