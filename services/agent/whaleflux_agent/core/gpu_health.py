"""Which GPUs of this machine may be used, from what the driver answers, what it reported, and what was there before. Pure.

A part that cannot be read is unhealthy alone: it keeps its place and its name, and says why. Nothing that was there is dropped
without a word, and no old reading counts as a good one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from whaleflux.fleet.model import Gpu
from whaleflux.fleet.xids import action_before_use
from whaleflux.reasons import NodeReason
from whaleflux_agent.core import mig

UNKNOWN_MODEL = "UNKNOWN"
MOST_GPUS = 64
_SETTLING_S = 5.0  # the driver sums up the recovery action of an Xid shortly after it


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as it answers now. `recovery_action` is the driver's own (0: none needed), None where it does not say.

    `instances` are its MIG instances, when it is cut into some.
    """

    gpu: Gpu
    recovery_action: int | None = None
    instances: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class _Mark:
    """An Xid after which the GPU must not be used before something was done."""

    reason: str
    at_s: float


class GpuHealth:
    """What is known of one machine's GPUs while its agent runs. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: dict[str, Gpu] = {}  # by UUID, as last read in full
        self._marks: dict[str, _Mark] = {}  # by UUID
        self._instances: dict[str, tuple[Gpu, ...]] = {}  # MIG, by the UUID of their GPU, as last read

    def xid(self, index: int, xid: int, now_s: float) -> bool:
        """The driver reported `xid` of the GPU at `index`; returns whether that takes it out of use."""
        action = action_before_use(xid)
        uuid = next((gpu.uuid for gpu in self._known.values() if gpu.index == index), "")
        if action is None or not uuid:
            return False
        self._marks[uuid] = _Mark(f"XID_{xid}: {action.value}", now_s)
        return True

    def judged(self, readings: Sequence[GpuReading], now_s: float) -> tuple[Gpu, ...]:
        """The machine's devices, healthy or not, by index: MIG instances in place of the GPU that they are cut from."""
        read = {reading.gpu.uuid for reading in readings}
        gpus = [self._judged(reading, read, now_s) for reading in readings]
        gpus += self._missing(gpus)
        self._known.update({gpu.uuid: gpu for gpu in gpus if gpu.uuid})
        self._remember_instances(readings)
        return mig.devices(sorted(gpus, key=lambda gpu: gpu.index), self._instances)

    def unreadable(self, reason: str) -> tuple[Gpu, ...]:
        """What was there, while the driver answers nothing."""
        gone = (replace(gpu, healthy=False, unhealthy_reason=reason) for gpu in self._known.values())
        return mig.devices(sorted(gone, key=lambda gpu: gpu.index), self._instances)

    def _remember_instances(self, readings: Iterable[GpuReading]) -> None:
        """A GPU that fails may not list its instances any more: those that it had are what fails."""
        for reading in readings:
            if reading.instances or reading.gpu.healthy or _has_none(reading.gpu):
                self._instances[reading.gpu.uuid] = reading.instances

    def _judged(self, reading: GpuReading, read: set[str], now_s: float) -> Gpu:
        gpu = self._identified(reading.gpu, read)
        self._clear(gpu.uuid, reading.recovery_action, now_s)
        mark = self._marks.get(gpu.uuid)
        if gpu.healthy and mark is not None:
            return replace(gpu, healthy=False, unhealthy_reason=mark.reason)
        return gpu

    def _identified(self, gpu: Gpu, read: set[str]) -> Gpu:
        """What a GPU no longer says of itself, from when it still did."""
        if gpu.healthy:
            return gpu
        before = self._known.get(gpu.uuid) or self._known_at(gpu.index, read)
        if before is None:
            return gpu
        return replace(before, index=gpu.index, healthy=False, unhealthy_reason=gpu.unhealthy_reason)

    def _known_at(self, index: int, read: set[str]) -> Gpu | None:
        return next((gpu for gpu in self._known.values() if gpu.index == index and gpu.uuid not in read), None)

    def _clear(self, uuid: str, recovery_action: int | None, now_s: float) -> None:
        """The driver itself says that nothing is left to do."""
        mark = self._marks.get(uuid)
        if mark is not None and recovery_action == 0 and now_s - mark.at_s >= _SETTLING_S:
            del self._marks[uuid]

    def _missing(self, gpus: Iterable[Gpu]) -> list[Gpu]:
        """GPUs that the driver lists no more, at their own index where nobody else has it."""
        present, taken = {gpu.uuid for gpu in gpus}, {gpu.index for gpu in gpus}
        missing = []
        for gpu in self._known.values():
            if gpu.uuid in present or len(taken) >= MOST_GPUS:
                continue
            index = gpu.index if gpu.index not in taken else next(i for i in range(MOST_GPUS) if i not in taken)
            taken.add(index)
            reason = "GPU_LOST: the driver does not list it any more"
            missing.append(replace(gpu, index=index, healthy=False, unhealthy_reason=reason))
        return missing


def _has_none(gpu: Gpu) -> bool:
    """Whether it says itself that MIG is on without an instance."""
    return gpu.unhealthy_reason.startswith(NodeReason.NO_MIG_INSTANCE)
