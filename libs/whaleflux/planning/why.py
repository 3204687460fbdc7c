"""Why a plan is split as it is, in words: each part of it against the same plan with less of that part, which is really computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.found import PART_WORDS, Candidate, Split, candidate
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.training import Training

_NAMES = {
    "tp": "tensor parallelism",
    "pp": "pipeline stages",
    "cp": "context parallelism",
    "ep": "expert parallelism",
    "vp": "virtual stages",
}
_WHAT = {
    "tp": "split each layer",
    "pp": "hold some layers each",
    "cp": "share each sequence",
    "ep": "hold some experts each",
    "vp": "shorten the pipeline's bubble",
}


@dataclass(frozen=True, slots=True)
class _Judge:
    """Splits of one model on one machine against the one that is explained."""

    shape: ModelShape
    machine: Machine
    how: Training
    constants: Constants
    this: Candidate

    def against(self, other: Split) -> str:
        """What would be with another split, in a few words."""
        broken = [rule for rule, there in other.plans().faults(self.shape).items() if bool(np.ravel(there)[0])]
        if broken:
            return f"it cannot be run ({broken[0]})"
        there = candidate(self.shape, self.machine, other, self.how, self.constants)
        if not there.fits:
            sizes = f"{there.total_bytes / 1e9:.0f} GB of {there.usable_bytes / 1e9:.0f}"
            return f"it does not fit ({sizes}, most of it {there.binding})"
        slower = self.this.tokens_per_s / there.tokens_per_s - 1
        if abs(slower) < 0.0005:
            return "it is as fast"
        return f"a step is {abs(slower):.1%} {'slower' if slower > 0 else 'faster'}"


def reasons(
    shape: ModelShape, machine: Machine, split: Split, how: Training, constants: Constants = FITTED
) -> tuple[str, ...]:
    """One sentence for each part of the split. Seconds and bytes are the cost model's, over ranks that lie in order."""
    judge = _Judge(shape, machine, how, constants, candidate(shape, machine, split, how, constants))
    found = [_of_axis(axis, judge) for axis in _NAMES if getattr(split, axis) > 1]
    found += [f"{words} {judge.against(other)}" for words, other in _without(split)]
    return (*found, _fullest(judge.this))


def _without(split: Split) -> list[tuple[str, Split]]:
    """What is no axis: in words, and the split without it."""
    found = []
    if split.zero:
        found.append(
            (f"ZeRO-{split.zero}: with ZeRO-{split.zero - 1}", replace(split, zero=split.zero - 1, replicas=1))
        )
    if split.replicas > 1:
        found.append((f"{split.replicas} replicas of shards: with one", replace(split, replicas=1)))
    if split.recomputing:
        found.append(
            (
                f"recomputation in the first {split.recomputing} of {split.pp} stages: in all",
                replace(split, recomputing=0),
            )
        )
    if split.first_layers or split.last_layers:
        ends = f"{split.first_layers or 'as many'} layers in the first stage and {split.last_layers or 'as many'} in the last"
        found.append((f"{ends}: with as many in each", replace(split, first_layers=0, last_layers=0)))
    if split.recompute != "none":
        found.append(
            (
                f"{split.recompute} recomputation: without",
                replace(split, recompute="none", recomputed=1.0, recomputing=0),
            )
        )
    return found


def _of_axis(axis: str, judge: _Judge) -> str:
    split, size = judge.this.split, getattr(judge.this.split, axis)
    where = _where(size, judge.machine) if axis == "tp" else _WHAT[axis]
    less = f"with {_less(size)} {judge.against(_moved(split, axis, _less(size)))}"
    twice = axis == "tp" and split.dp % 2 == 0
    more = f"; with {2 * size} {judge.against(_moved(split, axis, 2 * size))}" if twice else ""
    return f"{_NAMES[axis]} {size}: {where}; {less}{more}"


def _where(size: int, machine: Machine) -> str:
    island, inside = (
        int(np.ravel(machine.fabric.island)[0]),
        float(np.ravel(machine.fabric.island_bytes_per_s)[0]) / 1e9,
    )
    if not machine.fabric.tiers:
        return f"within the {island} GPUs of an island, {inside:.0f} GB/s"
    outside = float(np.ravel(machine.fabric.tiers[0].bytes_per_s)[0]) / 1e9
    place = "within" if size <= island else "across"
    return f"{place} the {island} GPUs of a node, {inside:.0f} GB/s there and {outside:.0f} GB/s for each GPU between nodes"


def _less(size: int) -> int:
    return size // next(factor for factor in range(2, size + 1) if size % factor == 0)


def _moved(split: Split, axis: str, size: int) -> Split:
    """So many GPUs along `axis`; the others go to, or come from, data parallelism (which those of experts and virtual stages are not taken from)."""
    old = getattr(split, axis)
    free = axis in ("ep", "vp")
    dp = split.dp if free else split.dp * old // size
    changed: dict[str, Any] = {axis: size, "dp": dp}
    if axis == "tp":
        changed["sequence_parallel"] = split.sequence_parallel and size > 1
    if axis == "pp":
        changed |= {"first_layers": 0, "last_layers": 0, "recomputing": min(split.recomputing, size - 1)}
        changed["vp"] = 1 if size == 1 else split.vp
    return replace(split, **changed)


def _fullest(this: Candidate) -> str:
    part = max(this.parts_bytes, key=lambda one: this.parts_bytes[one])
    where = f"stage {this.fullest}" if len(this.stages_bytes) > 1 else "each GPU"
    return (
        f"memory: {where} holds most, {this.total_bytes / 1e9:.0f} GB of {this.usable_bytes / 1e9:.0f}; "
        f"{this.parts_bytes[part] / 1e9:.0f} GB of it {PART_WORDS[part]}"
    )
