"""Who works on what when, in a pipeline: 1F1B and its interleaved form, as Megatron-Core orders them (Narayanan et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.layers import head_s, layer_times
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import stage_s, step_time
from whaleflux.planning.training import Training

_LEAST_DRAWN = 8  # micro-batches
MOST_WORKS = 20_000  # of a timeline: a picture of more is no picture


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """Seconds of one micro-batch in one virtual stage of each stage; `head_s` is what the last one has more, a third of it forward; `send_s` to a neighbour."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    head_s: float = 0.0
    send_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """One pass of one micro-batch through a virtual stage (`chunk`) of a stage, seconds from the step's begin. All are counted from 0."""

    stage: int
    micro_batch: int
    chunk: int
    backward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Of `drawn` micro-batches, where a step has `micro_batches`: a step repeats the middle of it. 0: so many stages are not drawn."""

    works: tuple[Work, ...]
    stages: int
    virtual: int
    drawn: int
    micro_batches: int

    @property
    def span_s(self) -> float:
        return max((work.end_s for work in self.works), default=0.0)

    @property
    def idle_share(self) -> float:
        """Of all stages' time, as drawn."""
        busy = sum(work.end_s - work.start_s for work in self.works)
        return 1.0 - busy / (self.span_s * self.stages)


def timeline(
    shape: ModelShape, machine: Machine, plan: Plans, how: Training, constants: Constants = FITTED
) -> Timeline:
    """Of one plan (`plan` has length 1): as many micro-batches as show how it begins and ends, in at most MOST_WORKS passes."""
    stages, virtual, count = (int(np.ravel(one)[0]) for one in (plan.pp, plan.vp, plan.micro_batches))
    some = MOST_WORKS // (2 * stages * virtual)
    some -= some % stages if virtual > 1 else 0  # interleaved, they go in groups of as many as there are stages
    drawn = min(count, some, 2 * stages if virtual > 1 else max(2 * stages, _LEAST_DRAWN))
    times = chunk_times(shape, machine, plan, how, constants)
    return Timeline(tuple(scheduled(times, stages, virtual, drawn)), stages, virtual, drawn, count)


def chunk_times(
    shape: ModelShape, machine: Machine, plan: Plans, how: Training, constants: Constants = FITTED
) -> ChunkTimes:
    """The cost model's step, taken apart: what each stage does for one micro-batch, communication that nothing hides in it."""
    took, layer = step_time(shape, machine, plan, how, constants), layer_times(shape, machine, plan, how, constants)
    count, virtual = _one(plan.micro_batches), _one(plan.vp)
    stages = np.arange(_one(plan.pp))
    each = stage_s(shape, machine, plan, how, constants, stages) / virtual
    again = plan.again_layers(shape, stages) / plan.stage_layers(shape, stages)
    forward, backward = _one(layer.forward_s), _one(layer.backward_s)
    share = np.broadcast_to(forward / ((1 + again) * forward + backward), stages.shape)
    return ChunkTimes(
        tuple((each * share).tolist()),
        tuple((each * (1 - share)).tolist()),
        _one(head_s(shape, machine, plan, how, constants)),
        _one(took.pp_s) / count / (1 if stages.size == 2 and virtual == 1 else 2) / virtual,
    )


def _one(value: object) -> float:
    return float(np.ravel(np.asarray(value))[0])


def scheduled(times: ChunkTimes, stages: int, virtual: int, micro_batches: int) -> list[Work]:
    """All of a step, each as early as its stage's order and what it waits for allow. Interleaved: `micro_batches` is a multiple of `stages`."""
    orders = [_order(stage, stages, virtual, micro_batches) for stage in range(stages)]
    ended: dict[tuple[int, int, int, bool], float] = {}
    position, free_s = [0] * stages, [0.0] * stages
    found: list[Work] = []
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        before = len(found)
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                micro_batch, chunk, backward = orders[stage][position[stage]]
                ready_s = _ready_s(stage, micro_batch, chunk, backward, stages, virtual, ended, times.send_s)
                if ready_s is None:
                    break
                start_s = max(ready_s, free_s[stage])
                last = stage == stages - 1 and chunk == virtual - 1
                free_s[stage] = start_s + _took_s(times, stage, backward=backward, last=last)
                ended[stage, micro_batch, chunk, backward] = free_s[stage]
                found.append(Work(stage, micro_batch, chunk, backward, start_s, free_s[stage]))
                position[stage] += 1
        assert len(found) > before, "an order that waits for itself"
    return found


def _took_s(times: ChunkTimes, stage: int, *, backward: bool, last: bool) -> float:
    head = times.head_s * (2 if backward else 1) / 3 if last else 0.0
    return (times.backward_s if backward else times.forward_s)[stage] + head


def _order(stage: int, stages: int, virtual: int, micro_batches: int) -> list[tuple[int, int, bool]]:
    """(micro-batch, chunk, backward) in the order in which a stage does them: forward passes to fill the pipeline, then one of each."""
    count = micro_batches * virtual
    ahead = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    ahead = min(ahead, count)
    forward = [(*_nth(number, stages, virtual), False) for number in range(count)]
    backward = [
        (mb, virtual - 1 - chunk, True) for mb, chunk in (_nth(number, stages, virtual) for number in range(count))
    ]
    order = forward[:ahead]
    for number in range(count - ahead):
        order += [forward[ahead + number], backward[number]]
    return order + backward[count - ahead :]


def _nth(number: int, stages: int, virtual: int) -> tuple[int, int]:
    """(micro-batch, chunk) of a stage's pass: interleaved, `stages` micro-batches go through a chunk before the next chunk."""
    if virtual == 1:
        return number, 0
    group, within = divmod(number, stages * virtual)
    return group * stages + within % stages, within // stages


def _ready_s(
    stage: int,
    micro_batch: int,
    chunk: int,
    backward: bool,
    stages: int,
    virtual: int,
    ended: dict[tuple[int, int, int, bool], float],
    send_s: float,
) -> float | None:
    """When what a pass needs is there; None: it is not known yet."""
    if backward:
        after = (stage + 1, chunk) if stage < stages - 1 else (0, chunk + 1)
        if after[1] >= virtual:
            return ended.get((stage, micro_batch, chunk, False))
    else:
        after = (stage - 1, chunk) if stage > 0 else (stages - 1, chunk - 1)
        if after[1] < 0:
            return 0.0
    came_s = ended.get((after[0], micro_batch, after[1], backward))
    return None if came_s is None else came_s + (send_s if stages > 1 else 0.0)
