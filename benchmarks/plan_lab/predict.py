"""Predictions for many runs at once: those of one model are one call of the cost model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.plan_lab.tables import Run
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.arrays import Value
from whaleflux.planning.constants import Constants
from whaleflux.planning.machine import Fabric, Machine, Tier, fabric_of, speed_of
from whaleflux.planning.memory import memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import StepTime, step_time
from whaleflux.planning.training import Training

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of one model: where each candidate's run stands in the list, and what the cost model takes. A run has several where parts are open."""

    rows: NDArray[np.intp]
    shape: ModelShape
    machine: Machine
    plans: Plans
    training: Training


def batches(runs: Sequence[Run]) -> list[Batch]:
    grouped: dict[ModelShape, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        grouped[run.shape].append(number)
    return [_fitting(_batch(shape, *_candidates(runs, numbers))) for shape, numbers in grouped.items()]


def _candidates(runs: Sequence[Run], numbers: Sequence[int]) -> tuple[list[Run], NDArray[np.intp]]:
    """Each run as often as there are choices for what it leaves open, with the run's number."""
    found = [(choice, number) for number in numbers for choice in _choices(runs[number])]
    return [choice for choice, _ in found], np.array([number for _, number in found])


def _choices(run: Run) -> list[Run]:
    split = run.split
    per_rank = split["global_batch"] / split["dp"]
    layers = math.ceil(run.shape.layers / split["pp"])
    options = {
        "micro_batch": [b for b in (1.0, 2.0, 4.0, 8.0, 16.0) if per_rank % b == 0],
        "vp": [float(v) for v in range(1, layers + 1) if split["pp"] > 1 and layers % v == 0] or [1.0],
        "recomputed": [one / 8 for one in range(9)],
    }
    choices: list[dict[str, float]] = [dict(split)]
    for name in run.open:
        choices = [choice | {name: value} for choice in choices for value in options[name]]
    return [replace(run, split=choice) for choice in choices]


def _fitting(batch: Batch) -> Batch:
    """Without candidates that do not fit, but for runs of which none does: they keep the smallest."""
    needed = np.ravel(memory(batch.shape, batch.plans, batch.training).total_bytes)
    spare = np.broadcast_to(batch.machine.usable_bytes, needed.shape) - needed
    kept = spare >= 0
    for number in set(batch.rows[~kept]) - set(batch.rows[kept]):
        its = np.flatnonzero(batch.rows == number)
        kept[its[np.argmax(spare[its])]] = True
    machine = batch.machine
    fabric = machine.fabric
    tier = fabric.tiers[0]

    def some(value: Value) -> Array:
        return np.broadcast_to(value, needed.shape)[kept]

    links = Fabric(
        some(fabric.island), some(fabric.island_bytes_per_s), (Tier(some(tier.gpus), some(tier.bytes_per_s), some(tier.hop_s)),),
        some(fabric.switch_bytes_per_s), some(fabric.hop_s),
    )  # fmt: skip
    smaller = Machine(
        machine.name, some(machine.flops), some(machine.attention_flops), some(machine.memory_bytes_per_s), some(machine.memory_bytes), links,
        some(machine.reserved_bytes),
    )  # fmt: skip
    how = Training(**{one.name: some(getattr(batch.training, one.name)) for one in fields(Training)})
    return Batch(batch.rows[kept], batch.shape, smaller, batch.plans.take(kept), how)


def _batch(shape: ModelShape, runs: Sequence[Run], rows: NDArray[np.intp]) -> Batch:
    machines = [
        Machine.of(CATALOGUE.types[run.gpu], run.precision, _fabric(run), old_attention=bool(run.about.get("sharding")))
        for run in runs
    ]

    def of(name: str) -> Array:
        return np.array([float(getattr(one, name)) for one in machines])

    stacked = Machine(
        "several",
        of("flops"),
        of("attention_flops"),
        of("memory_bytes_per_s"),
        of("memory_bytes"),
        _stacked([one.fabric for one in machines]),
        of("reserved_bytes"),
    )
    split = {name: [run.split[name] for run in runs] for name in runs[0].split}
    flags = {name: np.array([run.flags[name] for run in runs]) for name in runs[0].flags}
    return Batch(rows, shape, stacked, Plans.of(**split), Training(**flags))


def _fabric(run: Run) -> Fabric:
    """What the table says of the network, where it does: otherwise what is usual for the GPU."""
    speed = speed_of(CATALOGUE.types[run.gpu])
    if run.gpu == "A100-40GB" and run.about.get("sharding"):
        return fabric_of(speed, 25e9)  # 1600 Gb/s per node (README of the tables)
    return fabric_of(speed)


def _stacked(fabrics: Sequence[Fabric]) -> Fabric:
    def of(name: str) -> Array:
        return np.array([float(getattr(one, name)) for one in fabrics])

    tier = Tier(
        *(
            np.array([float(getattr(one.tiers[0], name)) for one in fabrics])
            for name in ("gpus", "bytes_per_s", "hop_s")
        )
    )
    return Fabric(of("island"), of("island_bytes_per_s"), (tier,), of("switch_bytes_per_s"), of("hop_s"))


def step_times(made: Sequence[Batch], constants: Constants) -> list[StepTime]:
    return [step_time(one.shape, one.machine, one.plans, one.training, constants) for one in made]


def seconds(made: Sequence[Batch], constants: Constants) -> Array:
    """The predicted step of each run, in the order of the list."""
    result = np.full(1 + max(int(one.rows.max()) for one in made), np.inf)
    for batch, step in zip(made, step_times(made, constants), strict=True):
        np.minimum.at(result, batch.rows, step.total_s)
    return result
