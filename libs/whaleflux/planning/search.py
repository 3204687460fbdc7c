"""The fastest split of a model over so many GPUs: all of `space`, those that cannot be faster than the best one left out by a bound.

The bound of a plan is its step without what its data parallelism and recomputation cost (both only add), and before that the arithmetic alone
on the GPUs that it uses. So the best plan is the same as if every plan had been judged; the best of other kinds are nearly always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from whaleflux.planning.arrays import Array, Flags
from whaleflux.planning.binding import binding_of, no_split, nothing_fits, settled_wrong
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.found import Candidate, PlanFound, RunnerUp, Split, candidate, split_of
from whaleflux.planning.layers import head_s, layer_times
from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import least_state_bytes, memory, memory_of_stage
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.space import Asked, cells, frames_in_turn, joined, variants, with_other_ends
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

_BLOCK = 16_384  # plans at once: their arrays stay in the cache
_FIRST, _OF_KIND, _CHUNK = 512, 48, 2048  # frames judged at first, of them for each kind, and then at once
_FULL_GPUS = 0.75  # cells that use so many of the GPUs are looked at first
_MOST_RUNNERS_UP = 4

Can: TypeAlias = Callable[[Plans], Flags]


def search(
    shape: ModelShape,
    machine: Machine,
    asked: Asked,
    how: Training | None = None,
    constants: Constants = FITTED,
    can: Can | None = None,
) -> PlanFound:
    """The fastest plan that fits, the best of other kinds, and what binds. Nothing is checked of `asked` but what `space` does.

    `can`: among those alone that it says it of (what an output format can express).

    Raises InvalidArgument where there are too many (`space.MOST_FRAMES`).
    """
    return _Search(shape, machine, asked, how or Training(), constants, can or _any).run()


def _any(plans: Plans) -> Flags:
    return np.ones(len(plans), dtype=np.bool_)


_Timed: TypeAlias = tuple[float, Split]


@dataclass(slots=True)
class _Search:
    """What is known so far."""

    shape: ModelShape
    machine: Machine
    asked: Asked
    how: Training
    constants: Constants
    can: Can
    best_s: float = np.inf  # seconds per token
    best: dict[int, _Timed] = field(default_factory=dict)  # by kind
    leanest: _Timed | None = None  # by bytes
    near: _Timed | None = None  # the fastest of what would fit with more recomputation or ZeRO
    free: _Timed | None = None  # the fastest of all, whether it fits or not
    looked_at: int = 0

    def run(self) -> PlanFound:
        if wrong := settled_wrong(self.shape, self.asked):
            return PlanFound(self.asked.gpus, None, None, (), wrong)
        island = int(np.asarray(self.machine.fabric.island))
        every = cells(self.shape, island, self.asked)
        uneven = cells(self.shape, island, self.asked, uneven=True)
        if not (np.any(self._has_room(every)) or np.any(self._has_room(uneven))):
            self._look_for_nearest(every, uneven)
            return self._answer(every)
        least = self._ideal_gpu_s() / every.gpus
        full = every.gpus >= _FULL_GPUS * np.max(every.gpus, initial=0)
        self._look(every.take(full))
        self._look(every.take(~full & (least < self.best_s)))
        self._look_at_uneven(uneven.take(self._has_room(uneven)))
        return self._answer(every)

    def _ideal_gpu_s(self) -> float:
        """GPU seconds of a token where nothing but arithmetic counts: no plan needs fewer."""
        size = 1 << 20
        one = Plans.of(micro_batch=size, global_batch=size, sequence=self.asked.sequence)
        layer = layer_times(self.shape, self.machine, one, self.how, self.constants)
        both = self.shape.layers * (layer.forward_s + layer.backward_s)
        return float(both + head_s(self.shape, self.machine, one, self.how, self.constants)) / float(one.tokens)

    def _look(self, some: Plans) -> None:
        """At all frames of these cells."""
        for plans in frames_in_turn(self.shape, self.asked, some):
            self._look_through(plans)

    def _sayable(self, frames: Plans) -> Plans:
        """Those that can be said under one stage of ZeRO at least."""
        said = np.zeros(len(frames), dtype=np.bool_)
        for zero in [self.asked.zero] if self.asked.zero >= 0 else [0, 1, 2, 3]:
            there = ((zero < 2) | (frames.pp == 1)) & ((zero in (self.asked.zero, 0)) | (frames.dp * frames.cp > 1))
            said |= there & self.can(replace(frames, zero=np.full(frames.pp.shape, float(zero))))
        return frames.take(said)

    def _variants(self, plans: Plans) -> Plans:
        ways = variants(self.asked, plans)
        return ways.take(self.can(ways))

    def _has_room(self, some: Plans) -> Flags:
        """Whether state alone, without activations, could fit into so many GPUs."""
        return np.asarray(least_state_bytes(self.shape, some, self.how) <= self.machine.usable_bytes)

    def _look_for_nearest(self, every: Plans, uneven: Plans) -> None:
        """Where nothing can fit: at single samples without virtual stages, than which no others need less."""
        asked = replace(self.asked, micro_batch=self.asked.micro_batch or 1, vp=self.asked.vp or 1)
        for plans in frames_in_turn(self.shape, asked, every):
            self._note_leanest(self._sayable(plans))
        for plans in frames_in_turn(self.shape, asked, uneven, uneven=True):
            self._note_leanest(self._sayable(with_other_ends(plans)))

    def _look_at_uneven(self, some: Plans) -> None:
        """At uneven pipelines. Of those that differ in their ends alone the first has the least bound: where it cannot be better no other can."""
        some = some.take(self._ideal_gpu_s() / some.gpus < self.best_s)
        for plans in frames_in_turn(self.shape, self.asked, some, uneven=True):
            promising = plans.take(self._least_s(plans) < self.best_s) if self.best else plans
            if len(promising):
                self._look_through(with_other_ends(promising))

    def _look_through(self, frames: Plans) -> None:
        """The most promising first, until none can be better."""
        plans = self._sayable(frames)
        self.looked_at += len(plans)
        if not len(plans):
            return
        bound, least = self._least_s(plans), self._note_leanest(plans)
        order = np.argsort(bound, kind="stable")
        self.free = self._unbound(plans, bound, order, self.free, could_fit=False)
        order = order[least[order] <= self.machine.usable_bytes]
        self.near = self._unbound(plans, bound, order, self.near, could_fit=True)
        first = _heads(order, _kinds(plans)[order])
        self._judge(plans.take(first))
        rest = order[~np.isin(order, first)]
        while rest.size and bound[rest[0]] < self.best_s:
            self._judge(plans.take(rest[:_CHUNK]))
            rest = rest[_CHUNK:]

    def _in_blocks(self, of: Callable[[Plans], Array], plans: Plans) -> Array:
        parts = (slice(start, start + _BLOCK) for start in range(0, len(plans), _BLOCK))
        return np.concatenate([of(plans.take(part)) for part in parts])

    def _least_s(self, plans: Plans) -> Array:
        """Seconds per token of each frame, whatever is chosen of the rest."""
        again = np.array(self.asked.recompute if self.asked.recompute is not None else Recompute.NONE)

        def least(some: Plans) -> Array:
            step = step_time(self.shape, self.machine, replace(some, recompute=again), self.how, self.constants)
            return np.asarray((step.total_s - step.dp_s - step.optimizer_s) / some.tokens_per_step)

        return self._in_blocks(least, plans)

    def _least_bytes(self, frames: Plans) -> Array:
        """Of the stages of ZeRO that `variants` offers of each frame, with one replica: what needs least; infinite where it offers none."""
        if self.asked.zero >= 0:
            fixed = self._leanest_bytes(replace(frames, zero=np.full(frames.pp.shape, float(self.asked.zero))))
            return np.where((frames.pp > 1) & (self.asked.zero > 1), np.inf, fixed)
        alone, spread = frames.dp * frames.cp == 1, frames.pp == 1
        bytes_ = self._leanest_bytes(replace(frames, zero=np.where(alone, 0.0, np.where(spread, 2.0, 1.0))))
        whole = np.flatnonzero(spread & ~alone)  # FSDP gathers: with few layers it needs more than it spreads
        fsdp = self._leanest_bytes(replace(frames.take(whole), zero=np.full(whole.size, 3.0)))
        bytes_[whole] = np.minimum(bytes_[whole], fsdp)
        return bytes_

    def _note_leanest(self, plans: Plans) -> Array:
        """The plan that needs least. Returns the least bytes of each."""
        least = self._in_blocks(self._least_bytes, plans) if len(plans) else np.empty(0)
        number = int(np.argmin(least)) if len(plans) else -1
        if number < 0 or not np.isfinite(least[number]) or (self.leanest and least[number] >= self.leanest[0]):
            return least
        ways = self._variants(plans.take(slice(number, number + 1)))
        again = self.asked.recompute if self.asked.recompute is not None else Recompute.FULL
        chosen = replace(ways, recompute=np.full(ways.tp.shape, float(again)))
        self.leanest = (float(least[number]), split_of(chosen, int(np.argmin(self._leanest_bytes(ways)))))
        return least

    def _unbound(
        self, plans: Plans, bound: Array, order: NDArray[np.intp], known: _Timed | None, *, could_fit: bool
    ) -> _Timed | None:
        """What would be fastest if everything fitted, or all that does with full recomputation; `known` where that is faster."""
        while order.size and (known is None or bound[order[0]] < known[0]):
            ways = self._recomputing(self._variants(plans.take(order[:_FIRST])))
            order = order[_FIRST:]
            if could_fit:
                ways = ways.take(self._leanest_bytes(ways) <= self.machine.usable_bytes)
            seconds = self._seconds(ways)
            if len(ways) and (known is None or seconds.min() < known[0]):
                known = (float(seconds.min()), split_of(ways, int(np.argmin(seconds))))
        return known

    def _leanest_bytes(self, plans: Plans) -> Array:
        again = self.asked.recompute if self.asked.recompute is not None else Recompute.FULL
        return memory(self.shape, replace(plans, recompute=np.full(plans.tp.shape, float(again))), self.how).total_bytes

    def _recomputing(self, plans: Plans) -> Plans:
        """As asked for, or without any."""
        again = self.asked.recompute if self.asked.recompute is not None else Recompute.NONE
        return replace(plans, recompute=np.full(plans.tp.shape, float(again)))

    def _seconds(self, plans: Plans) -> Array:
        step = step_time(self.shape, self.machine, plans, self.how, self.constants)
        return np.asarray(step.total_s / plans.tokens_per_step)

    def _judge(self, some: Plans) -> None:
        """Everything that is left to choose of these frames; what is best of each kind is kept."""
        plans = fitting(self.shape, self.machine, self.asked, self.how, self._variants(some), self.can)
        if not len(plans):
            return
        seconds, kinds = self._seconds(plans), _kinds(plans)
        for kind in np.unique(kinds):
            ours = np.flatnonzero(kinds == kind)
            number = int(ours[np.argmin(seconds[ours])])
            if int(kind) not in self.best or seconds[number] < self.best[int(kind)][0]:
                self.best[int(kind)] = (float(seconds[number]), split_of(plans, number))
        self.best_s = min(self.best_s, float(seconds.min()))

    def _answer(self, every: Plans) -> PlanFound:
        gpus = self.asked.gpus
        if self.leanest is None:
            return PlanFound(gpus, None, None, (), no_split(self.shape, self.asked, every), self.looked_at)
        ranked = sorted(self.best.values(), key=lambda one: one[0])
        if not ranked:
            nearest = self._picture(self.leanest[1])
            return PlanFound(gpus, None, nearest, (), nothing_fits(nearest), self.looked_at)
        others = tuple(
            RunnerUp(_kind_words(split), self._picture(split), seconds / self.best_s - 1)
            for seconds, split in ranked[1 : 1 + _MOST_RUNNERS_UP]
        )
        best, free, near = (
            self._picture(one[1]) for one in (ranked[0], self.free or ranked[0], self.near or ranked[0])
        )
        binding = binding_of(best, near, free, None if near.fits else self._eased(near.split))
        return PlanFound(gpus, best, None, others, binding, self.looked_at)

    def _picture(self, split: Split) -> Candidate:
        return candidate(self.shape, self.machine, split, self.how, self.constants)

    def _eased(self, split: Split) -> Candidate | None:
        """The same split with as much recomputation as makes it fit."""
        plans = fitting(
            self.shape, self.machine, replace(self.asked, recompute=None), self.how, split.plans(), self.can
        )
        return self._picture(split_of(plans, int(np.argmin(self._seconds(plans))))) if len(plans) else None


def fitting(shape: ModelShape, machine: Machine, asked: Asked, how: Training, plans: Plans, can: Can = _any) -> Plans:
    """Those that fit, each with the least recomputation with which it does; in all stages, where `can` says that some cannot be."""
    usable = machine.usable_bytes

    def needs(some: Plans) -> Array:
        return memory(shape, some, how).total_bytes

    if asked.recompute is not None:
        fixed = replace(plans, recompute=np.full(plans.tp.shape, float(asked.recompute)))
        return fixed.take(needs(fixed) <= usable)
    plans = replace(plans, recompute=np.zeros(plans.tp.shape))
    whole = needs(plans) <= usable
    found = [plans.take(whole)]
    if not np.all(np.asarray(how.flash, dtype=bool)):  # fused attention keeps no scores that could be computed again
        scores = replace(plans, recompute=np.full(plans.tp.shape, float(Recompute.SELECTIVE)))
        found.append(scores.take(~whole & (needs(scores) <= usable)))
    rest = plans.take(~whole)
    stages = _stages_that_need_it(rest, lambda stage: memory_of_stage(shape, rest, how, stage).total_bytes <= usable)
    layers = replace(rest, recompute=np.full(rest.tp.shape, float(Recompute.FULL)), recomputing=stages)
    layers = replace(layers, recomputing=np.where(can(layers), stages, 0.0))
    layers = layers.take(needs(layers) <= usable)
    return joined([*found, _fewest_layers(shape, layers, lambda some: np.asarray(needs(some) <= usable))])


def _stages_that_need_it(plans: Plans, fits: Callable[[Array], Flags]) -> Array:
    """Of plans that do not fit without recomputation the number of first stages after which all do (0: none does).

    `fits` says of a stage of each whether it does without: of those between the ends no later one needs more.
    """
    last = fits(plans.pp - 1)
    low, high = np.where(last, 0.0, plans.pp - 1), np.where(last, plans.pp - 1, plans.pp)  # too few, enough
    while np.any(high - low > 1):
        middle = np.ceil((low + high) / 2)  # `high` where there is nothing between
        enough = fits(np.minimum(middle, plans.pp - 1)) | (middle == high)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(high < plans.pp, high, 0.0)


def _fewest_layers(shape: ModelShape, plans: Plans, fits: Callable[[Plans], Flags]) -> Plans:
    """Plans that fit where all layers are computed again, with the fewest of each (virtual) stage with which they do."""
    between = plans.between(shape)
    most = np.maximum(np.maximum(plans.first_layers, plans.last_layers), between) / plans.vp
    low, high = np.zeros(len(plans)), most.copy()  # too few, enough
    while np.any(high - low > 1):
        middle = np.ceil((low + high) / 2)  # `high` where there is nothing between
        enough = fits(replace(plans, recomputed=middle / most))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return replace(plans, recomputed=high / most)


def _kinds(plans: Plans) -> NDArray[np.intp]:
    """What tells plans apart in kind, as a number: pipeline, FSDP, context, tensor parallel."""
    code = (plans.pp > 1) + 2 * (plans.zero > 2) + 4 * (plans.cp > 1) + 8 * (plans.tp > 1)
    return np.asarray(np.broadcast_to(code, (len(plans),)), dtype=np.intp)


def _kind_words(split: Split) -> str:
    words = [
        word for degree, word in ((split.tp, "tensor"), (split.cp, "context"), (split.pp, "pipeline")) if degree > 1
    ]
    data = ("HSDP" if split.replicas > 1 else "FSDP") if split.zero > 2 else "data"
    if split.dp > 1 or split.zero > 2 or not words:
        words.append(data)
    return " + ".join(words) + " parallel"


def _heads(order: NDArray[np.intp], kinds: NDArray[np.intp]) -> NDArray[np.intp]:
    """The first of all, and the first of each kind."""
    chosen = [order[:_FIRST], *(order[kinds == kind][:_OF_KIND] for kind in np.unique(kinds))]
    return np.unique(np.concatenate(chosen))
