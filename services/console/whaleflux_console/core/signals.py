"""What counters say of a device: when it was idle, and how much its tensor pipes worked at least."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from whaleflux_console.core.facts import WHOLE_PPM, Sample
from whaleflux_console.core.intervals import disjoint

IDLE_MS = 300_000  # counters at rest for so long mean idle
BUSY_SM_PPM = 10_000  # SMs active for 1 % of the time
JITTER_MS = 1_000  # samples that are no further apart follow each other


def at_rest(sample: Sample) -> bool:
    """Nothing ran: SMs and power are known to be down. Tensor pipes are part of the SMs, and need not be known."""
    quiet = sample.sm_active_ppm is not None and sample.sm_active_ppm < BUSY_SM_PPM
    return quiet and not sample.tensor_ppm and sample.idle_power is True


class Counters:
    """The samples of one device."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = disjoint(samples)
        self._ends = [end for _, end, _ in self._samples]
        self._idle = _runs_at_rest(self._samples)
        self._idle_ends = [end for _, end in self._idle]

    def idle_ms(self, start_ms: int, end_ms: int) -> int:
        """How much of [start_ms, end_ms) the device was idle."""
        total = 0
        for start, end in self._idle[bisect_right(self._idle_ends, start_ms) :]:
            if start >= end_ms:
                break
            total += min(end, end_ms) - max(start, start_ms)
        return total

    def tensor_ms(self, start_ms: int, end_ms: int) -> int:
        """For how much of [start_ms, end_ms) the tensor pipes worked, as at full clock; 0 where nobody looked."""
        return self._weighed(start_ms, end_ms, lambda sample: sample.tensor_ppm or 0)

    def busy_ms(self, start_ms: int, end_ms: int) -> int:
        """How much of [start_ms, end_ms) is in samples that show that something ran."""
        return self._weighed(start_ms, end_ms, lambda sample: WHOLE_PPM * ((sample.sm_active_ppm or 0) >= BUSY_SM_PPM))

    def ran_ms(self, start_ms: int, end_ms: int) -> tuple[int, int]:
        """For how much of [start_ms, end_ms) it is known whether anything ran, and for how much of that something did."""
        return self._weighed(start_ms, end_ms, _seen_ppm), self._weighed(start_ms, end_ms, lambda s: _ran_ppm(s) or 0)

    def _weighed(self, start_ms: int, end_ms: int, share_ppm: Callable[[Sample], int]) -> int:
        total = 0
        for start, end, sample in self._samples[bisect_right(self._ends, start_ms) :]:
            if start >= end_ms:
                break
            total += (min(end, end_ms) - max(start, start_ms)) * share_ppm(sample)
        return total // WHOLE_PPM


def _ran_ppm(sample: Sample) -> int | None:
    """The share of the time in which any kernel ran: what says most of it counts."""
    said = [share for share in (sample.busy_ppm, sample.sm_active_ppm, sample.tensor_ppm) if share is not None]
    return max(said, default=None)


def _seen_ppm(sample: Sample) -> int:
    return WHOLE_PPM if _ran_ppm(sample) is not None else 0


def _runs_at_rest(samples: Sequence[tuple[int, int, Sample]]) -> list[tuple[int, int]]:
    """Stretches of samples at rest that are long enough."""
    runs: list[tuple[int, int]] = []
    for start, end, sample in samples:
        if not at_rest(sample):
            continue
        if runs and start - runs[-1][1] <= JITTER_MS:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [run for run in runs if run[1] - run[0] >= IDLE_MS]
