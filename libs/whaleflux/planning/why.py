"""Why a plan is split as it is, in words: each part of it against the same plan with less of that part, which is really computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.found import PART_WORDS, Candidate, Split, candidate, split_of
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.space import Asked, frames, joined, with_other_ends
from whaleflux.planning.training import Training

_NAMES = {
    "tp": "tensor parallelism",
    "pp": "pipeline stages",
    "cp": "context parallelism",
    "ep": "expert parallelism",
    "vp": "virtual stages",
}
_FREE = ("ep", "vp")  # which take no GPUs from data parallelism
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

    def runnable(self, moved: Split) -> Split:
        """Itself where it can be run, else the best that differs in virtual stages and layers of the ends alone; itself where none can."""
        if np.all(moved.plans().valid(self.shape)):
            return moved
        found = [
            candidate(self.shape, self.machine, one, self.how, self.constants) for one in _staged(self.shape, moved)
        ]
        return min(found, key=lambda one: (not one.fits, one.step_s)).split if found else moved

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
    less = _neighbour(axis, _less(size), judge)
    twice = axis == "tp" and split.dp % 2 == 0
    more = f"; {_neighbour(axis, 2 * size, judge)}" if twice else ""
    return f"{_NAMES[axis]} {size}: {where}; {less}{more}"


def _neighbour(axis: str, size: int, judge: _Judge) -> str:
    """What would be with so many along `axis`, and what else has to change for that."""
    moved = _moved(judge.this.split, axis, size)
    other = moved if axis in _FREE else judge.runnable(moved)
    return f"with {size}{_besides(moved, other)} {judge.against(other)}"


def _besides(moved: Split, other: Split) -> str:
    """What was changed so that it can be run, in words."""
    ends = ((other.first_layers, "first"), (other.last_layers, "last"))
    words = [f"{count} layers {where}" for count, where in ends if count and other != moved]
    if other.vp != moved.vp:
        words.append(f"{other.vp} virtual stages" if other.vp > 1 else "no virtual stages")
    return f" ({', '.join(words)})" if words else ""


def _staged(shape: ModelShape, moved: Split) -> list[Split]:
    """The same along every axis, with each number of virtual stages and layers of the ends that can be run."""
    asked = Asked(moved.gpus, moved.sequence, moved.micro_batch, ep=moved.ep, batch=moved.global_batch)
    cell = replace(moved, first_layers=0, last_layers=0, vp=1).plans()
    some = [frames(shape, asked, cell)]
    if moved.pp > 1:
        some.append(with_other_ends(frames(shape, asked, cell, uneven=True)))
    every = joined(some)
    valid = every.take(every.valid(shape) & (every.sequence_parallel == moved.sequence_parallel))
    return [split_of(valid, number) for number in range(len(valid))]


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
    dp = split.dp if axis in _FREE else split.dp * old // size
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
