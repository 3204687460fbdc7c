"""Does it fit? A model on so many GPUs: what each needs by component, what binds, and what would fit instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from whaleflux.fleet.gpu_types import CATALOGUE, GpuType
from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import Memory, memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

MOST_GPUS = 131_072
PART_WORDS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activations_bytes": "activations",
    "working_bytes": "working set of a layer",
    "logits_bytes": "logits",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants to train. 0 leaves a part of the split open."""

    gpus: int
    sequence: int
    micro_batch: int = 1
    tp: int = 0
    pp: int = 0
    cp: int = 0
    ep: int = 0
    zero: int = -1
    recompute: Recompute | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """One split's memory on its fullest GPU against what there is. `split` is by name; `binding` is the component that needs most."""

    split: dict[str, int]
    recompute: Recompute
    parts_bytes: dict[str, float]
    usable_bytes: float
    step_s: float

    @property
    def total_bytes(self) -> float:
        return sum(self.parts_bytes.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes

    @property
    def binding(self) -> str:
        """In words."""
        return PART_WORDS[max(self.parts_bytes, key=lambda part: self.parts_bytes[part])]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fastest split that fits, or the one that is nearest to it; and then what would fit."""

    picture: Picture | None  # None: no split of so many GPUs is possible
    rule: str = ""  # then: which rule forbids most of them
    instead: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.picture is not None and self.picture.fits


def verdict(shape: ModelShape, gpu: GpuType, asked: Asked, how: Training, precision: str = "bf16") -> Verdict:
    """Raises InvalidArgument where the GPU's speed is not known."""
    machine = Machine.of(gpu, precision)
    picture, rule = _best(shape, machine, asked, how)
    if picture is not None and picture.fits:
        return Verdict(picture)
    return Verdict(picture, rule, tuple(_instead(shape, gpu, asked, how, precision, picture)))


def splits(shape: ModelShape, machine: Machine, asked: Asked) -> Plans:
    """All that are worth a look: every tensor and expert parallelism within an island, every pipeline that the layers allow."""
    island = int(np.asarray(machine.fabric.island))
    heads = [one for one in range(1, min(island, asked.gpus) + 1) if shape.heads % one == 0]
    axes = (
        [asked.tp] if asked.tp else heads,
        [asked.pp] if asked.pp else [one for one in _divisors(shape.layers) if one <= asked.gpus],
        [asked.cp] if asked.cp else [one for one in (1, 2, 4, 8) if one <= asked.gpus],
        [asked.ep]
        if asked.ep
        else [one for one in _divisors(shape.experts) if one <= asked.gpus]
        if shape.experts
        else [1],
        [asked.zero] if asked.zero >= 0 else [1, 3],
        [asked.recompute] if asked.recompute is not None else [Recompute.NONE, Recompute.FULL],
    )
    tp, pp, cp, ep, zero, again = (one.ravel().astype(np.float64) for one in np.meshgrid(*axes, indexing="ij"))
    data = asked.gpus / (tp * pp * cp)
    whole = data % 1 == 0
    tp, pp, cp, ep, zero, again, data = (one[whole] for one in (tp, pp, cp, ep, zero, again, data))
    return Plans.of(
        tp=tp, pp=pp, dp=data, cp=cp, ep=ep, zero=zero, recompute=again, micro_batch=asked.micro_batch, sequence=asked.sequence,
        global_batch=asked.micro_batch * data * np.where(pp > 1, 4 * pp, 1), sequence_parallel=tp > 1,
    )  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _best(shape: ModelShape, machine: Machine, asked: Asked, how: Training) -> tuple[Picture | None, str]:
    """The fastest that fits, else the smallest; with the rule that forbids most where none is possible."""
    plans = splits(shape, machine, asked)
    if not plans.tp.size:
        return None, f"tp x pp x cp must divide the {asked.gpus} GPUs"
    possible = plans.valid(shape)
    if not possible.any():
        faults = plans.faults(shape)
        return None, max(faults, key=lambda rule: int(faults[rule].sum()))
    plans = plans.take(possible)
    needed = memory(shape, plans, how)
    seconds = step_time(shape, machine, plans, how).total_s / plans.tokens_per_step
    fitting = needed.total_bytes <= machine.usable_bytes
    chosen = int(np.argmin(np.where(fitting, seconds, np.inf)) if fitting.any() else np.argmin(needed.total_bytes))
    return _picture(shape, machine, plans.take(slice(chosen, chosen + 1)), how, needed, chosen), ""


def _picture(shape: ModelShape, machine: Machine, plan: Plans, how: Training, needed: Memory, number: int) -> Picture:
    names = ("tp", "pp", "dp", "cp", "ep", "zero", "micro_batch", "sequence")
    split = {name: int(getattr(plan, name)[0]) for name in names}
    step_s = float(np.ravel(step_time(shape, machine, plan, how).total_s)[0])
    usable = float(machine.usable_bytes)
    return Picture(split, Recompute(int(plan.recompute[0])), needed.of(number), usable, step_s)


def _instead(
    shape: ModelShape, gpu: GpuType, asked: Asked, how: Training, precision: str, picture: Picture | None
) -> list[str]:
    """What would fit: another recomputation or split; where none of these GPUs does, shorter sequences, more GPUs, larger ones, adapters."""
    found = []
    machine = Machine.of(gpu, precision)
    open_split = replace(asked, tp=0, pp=0, ep=0, zero=-1)

    def fits(what: Asked, on: Machine = machine, trained: Training = how) -> Picture | None:
        best, _ = _best(shape, on, what, trained)
        return best if best is not None and best.fits else None

    if (
        asked.recompute is not None
        and asked.recompute != Recompute.FULL
        and fits(replace(asked, recompute=Recompute.FULL))
    ):
        found.append("the same split with full recomputation (--recompute full)")
    if open_split != asked and (other := fits(replace(open_split, recompute=None))):
        return [*found, f"another split: {words_of(other)}"]
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


def words_of(picture: Picture) -> str:
    """As people say it: tp 8, pp 4, dp 4, ZeRO-1, full recomputation."""
    split = picture.split
    parts = [f"{name} {split[name]}" for name in ("tp", "pp", "cp", "ep", "dp") if split[name] > 1] or ["one GPU"]
    if split["zero"] and split["dp"] * split["cp"] > 1:
        parts.append("FSDP (ZeRO-3)" if split["zero"] > 2 else f"ZeRO-{split['zero']}")
    parts.append({0: "no recomputation", 1: "selective recomputation", 2: "full recomputation"}[picture.recompute])
    return ", ".join(parts)
