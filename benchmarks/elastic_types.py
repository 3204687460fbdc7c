"""Elastic jobs on three GPU types: speeds measured for Gavel, arrivals and lengths of the Pollux workloads.

Gavel's table has steps per second on 1, 2, 4 and 8 K80, P100 or V100 GPUs; between these a job is on the line, and more GPUs are never
slower, as some may be left idle. Some job types were measured with one GPU only: these choose a type and no number. Each job of a workload
becomes one of Gavel's (drawn by the seed), with as many GPU-hours at its tuned size, on P100s, as it had on the T4s of its trace.
"""

from __future__ import annotations

import ast
import gzip
import json
import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.elastic_jobs import TracedJob

TYPES = ("V100-16GB", "P100-16GB", "K80-12GB")  # fastest first, as a user would name them
_COLUMN = {"V100-16GB": "v100", "P100-16GB": "p100", "K80-12GB": "k80"}
MIDDLE = "P100-16GB"
SIZES = (1, 2, 4, 8)
MOST = SIZES[-1]
# Seconds, by the family of the job: what Sia states for a training of that kind.
RESTART_S = {"ResNet-18": 50.0, "ResNet-50": 250.0, "Transformer": 120.0, "LM": 80.0, "Recommendation": 25.0}
_OTHERS_S = 30.0


@dataclass(frozen=True)
class TypedApp:
    """Steps per second by GPU type and number of GPUs, from 0 on. A type on which it cannot run is left out."""

    name: str
    speeds: Mapping[str, tuple[float, ...]]

    @property
    def most(self) -> int:
        """GPUs that it can use."""
        return len(next(iter(self.speeds.values()))) - 1

    @property
    def restart_s(self) -> float:
        return RESTART_S.get(self.name.split(" (")[0], _OTHERS_S)

    def speed(self, model: str, gpus: int) -> float:
        """0 for a type on which it cannot run."""
        known = self.speeds.get(model)
        return known[min(gpus, self.most)] if known else 0.0

    def throughputs(self) -> dict[str, float]:
        """Of each type against the first that it runs on: one figure for all numbers of GPUs, as a job file has it."""
        first = next(iter(self.speeds))
        sizes = [size for size in SIZES if size <= self.most]
        return {model: _mean([self.speed(model, n) / self.speed(first, n) for n in sizes]) for model in self.speeds}

    def by_count(self) -> tuple[tuple[int, float], ...]:
        """Of each number of GPUs against one: one figure for all types, as a job file has it."""
        sizes = [size for size in SIZES if size <= self.most]
        return tuple((n, _mean([self.speed(model, n) / self.speed(model, 1) for model in self.speeds])) for n in sizes)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def typed_apps(path: Path) -> list[TypedApp]:
    """The job types of Gavel's file."""
    table = json.loads(gzip.decompress(path.read_bytes()))
    steps: dict[str, dict[str, dict[int, float]]] = {}
    for model, column in _COLUMN.items():
        for key, rates in table[column].items():
            name, gpus = ast.literal_eval(key)
            steps.setdefault(name, {}).setdefault(model, {})[gpus] = float(rates["null"])
    return [TypedApp(name, {model: _filled(known) for model, known in by_model.items() if all(known.values())})
            for name, by_model in sorted(steps.items())]  # fmt: skip


def _filled(known: Mapping[int, float]) -> tuple[float, ...]:
    sizes = sorted(known)
    found = [0.0]
    for gpus in range(1, sizes[-1] + 1):
        at = bisect_left(sizes, gpus)
        above = sizes[at]
        below = sizes[at - 1] if above != gpus else above
        part = (gpus - below) / (above - below) if above != below else 0.0
        found.append(max(found[-1], known[below] + (known[above] - known[below]) * part))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class TypedJob:
    """A job of a workload; `work` in steps."""

    name: str
    at_s: float
    app: TypedApp
    gpus: int  # as its user tuned it
    work: float


def typed(jobs: Sequence[TracedJob], apps: Sequence[TypedApp], seed: int) -> list[TypedJob]:
    """Each job with the speeds of one of the applications."""
    drawn = random.Random(seed)
    return [_typed(job, drawn.choice(apps)) for job in jobs]


def _typed(job: TracedJob, app: TypedApp) -> TypedJob:
    gpus = max(size for size in SIZES if size <= min(job.gpus, app.most) or size == 1)
    gpu_s = job.gpus * job.app.work / job.tuned_speed
    return TypedJob(job.name, job.at_s, app, gpus, gpu_s / gpus * app.speed(MIDDLE, gpus))
