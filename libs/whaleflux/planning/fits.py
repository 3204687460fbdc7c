"""Does it fit? A model on so many GPUs: what each needs by component, what binds, and what would fit instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from whaleflux.fleet.gpu_types import CATALOGUE, GpuType
from whaleflux.planning.calibration import Calibrated
from whaleflux.planning.constants import FITTED
from whaleflux.planning.found import Candidate
from whaleflux.planning.machine import Machine, lacks_precision
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Recompute
from whaleflux.planning.search import search
from whaleflux.planning.space import MOST_GPUS, Asked
from whaleflux.planning.training import Training


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fastest split that fits, or the one that is nearest to it; and then what would fit."""

    picture: Candidate | None  # None: no split of so many GPUs is possible
    rule: str = ""  # then: which rule forbids most of them
    instead: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.picture is not None and self.picture.fits


def verdict(
    shape: ModelShape,
    gpu: GpuType,
    asked: Asked,
    how: Training,
    precision: str = "bf16",
    measured: Calibrated | None = None,
) -> Verdict:
    """On GPUs as they were measured, where they were; how layers run, `how` says then. Raises InvalidArgument where the GPU's speed is not known."""
    machine = measured.machine if measured else Machine.of(gpu, precision)
    found = search(shape, machine, asked, how, measured.constants if measured else FITTED)
    if found.best is not None:
        return Verdict(found.best)
    rule = "" if found.nearest else found.binding.words
    return Verdict(found.nearest, rule, tuple(instead(shape, gpu, asked, how, precision)))


def instead(shape: ModelShape, gpu: GpuType, asked: Asked, how: Training, precision: str) -> list[str]:
    """What would fit: another recomputation or split; where none of these GPUs does, shorter sequences, more GPUs, larger ones, adapters."""
    found = []
    machine = Machine.of(gpu, precision)
    open_split = replace(asked, tp=0, pp=0, cp=0, ep=0, vp=0, zero=-1)

    def fits(what: Asked, on: Machine = machine, trained: Training = how) -> Candidate | None:
        return search(shape, on, what, trained).best

    if (
        asked.recompute is not None
        and asked.recompute != Recompute.FULL
        and fits(replace(asked, recompute=Recompute.FULL))
    ):
        found.append("the same split with full recomputation (--recompute full)")
    if open_split != asked and (other := fits(replace(open_split, recompute=None))):
        return [*found, f"another split: {other.split.words()}"]
    if asked.micro_batch > 1 and (other := fits(replace(open_split, micro_batch=0, recompute=None))):
        return [*found, f"another split: {other.split.words()}, micro-batch {other.split.micro_batch}"]
    shorter = next(
        (one for one in _halves(asked.sequence) if fits(replace(open_split, sequence=one, recompute=None))), 0
    )
    if shorter:
        found.append(f"sequences of {shorter:,} tokens (--sequence {shorter})")
    more = next((one for one in _doubles(asked.gpus) if fits(replace(open_split, gpus=one, recompute=None))), 0)
    if more:
        found.append(f"{more} x {gpu.name} (--gpus {more})")
    larger = [
        other.name
        for other in sorted(CATALOGUE.types.values(), key=lambda one: one.memory_bytes)
        if other.speed
        and other.memory_bytes > gpu.memory_bytes
        and not lacks_precision(other, precision)
        and fits(replace(open_split, recompute=None), Machine.of(other, precision))
    ]
    if larger:
        found.append(f"{asked.gpus} x {larger[0]} (--gpu {larger[0]})")
    if not np.asarray(how.frozen).any() and fits(
        replace(open_split, recompute=None), machine, replace(how, frozen=True)
    ):
        found.append("adapters on frozen weights (--method lora)")
    return found


def _halves(sequence: int) -> list[int]:
    return [sequence >> step for step in range(1, 6) if sequence >> step >= 256]


def _doubles(gpus: int) -> list[int]:
    return [gpus << step for step in range(1, 18) if gpus << step <= MOST_GPUS]
