"""Predictions for many runs at once: those of one model are one call of the cost model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.plan_lab.tables import Run
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.constants import Constants
from whaleflux.planning.machine import Fabric, Machine, Tier, fabric_of, speed_of
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import StepTime, step_time
from whaleflux.planning.training import Training

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of one model: where they stand in the list, and what the cost model takes."""

    rows: NDArray[np.intp]
    shape: ModelShape
    machine: Machine
    plans: Plans
    training: Training


def batches(runs: Sequence[Run]) -> list[Batch]:
    grouped: dict[ModelShape, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        grouped[run.shape].append(number)
    return [_batch(shape, [runs[n] for n in numbers], np.array(numbers)) for shape, numbers in grouped.items()]


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
    return Fabric(
        of("island"), of("island_bytes_per_s"), (tier,), of("switch_bytes_per_s"), of("p2p_bytes_per_s"), of("hop_s")
    )


def step_times(made: Sequence[Batch], constants: Constants) -> list[StepTime]:
    return [step_time(one.shape, one.machine, one.plans, one.training, constants) for one in made]


def seconds(made: Sequence[Batch], constants: Constants) -> Array:
    """The predicted step of each run, in the order of the list."""
    result = np.empty(sum(len(one.rows) for one in made))
    for batch, step in zip(made, step_times(made, constants), strict=True):
        result[batch.rows] = step.total_s
    return result
