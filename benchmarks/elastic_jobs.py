"""Elastic jobs whose speed by number of GPUs was measured: the Pollux workloads and their applications.

A job's work is *progress*: training steps at its smallest batch that are statistically worth as much. With n GPUs it makes
gain(M) / step_time(n, M / n) of it per second, at the batch M that is best for n. `step_time` is measured (consolidated placements, four
GPUs a node; between measured numbers of GPUs it is on a line); `gain(M)` is the mean over a whole measured training: its progress by its
iterations. That gains change while a job trains, as Pollux models them, is left out, for all policies alike.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MOST_GPUS = 64
RESTART_S = {
    "cifar10": 50.0,
    "deepspeech2": 25.0,
    "bert": 120.0,
    "yolov3": 80.0,
    "imagenet": 250.0,
    "ncf": 15.0,
}  # Sia's
OTHERS_RESTART_S = 30.0
_CONSOLIDATED = {1: "1", 2: "2", 3: "3", 4: "4", 8: "44", 12: "444", 16: "4444"}
_BATCHES = 33  # that are tried for each number of GPUs


@dataclass(frozen=True)
class Application:
    """What was measured of one: seconds per step by (GPUs, batch per GPU), progress per step by batch."""

    name: str
    steps: dict[int, list[tuple[int, float]]]
    gains: list[tuple[int, float]]
    work: float  # progress of a whole training

    @property
    def restart_s(self) -> float:
        return RESTART_S.get(self.name, OTHERS_RESTART_S)

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """Progress per second by number of GPUs, from 0 on; more GPUs are never slower, as some may be left idle."""
        found = [0.0]
        for gpus in range(1, MOST_GPUS + 1):
            found.append(max(found[-1], *(self.speed_at(gpus, batch) for batch in self._batches())))
        return tuple(found)

    def _batches(self) -> list[float]:
        low, high = math.log(self.gains[0][0]), math.log(self.gains[-1][0])
        return [math.exp(low + (high - low) * at / (_BATCHES - 1)) for at in range(_BATCHES)]

    def speed_at(self, gpus: int, batch: float) -> float:
        """Progress per second at that batch; 0 where a GPU cannot hold its part of it, or was measured with more only."""
        step_s = self.step_s(gpus, batch / gpus)
        return on_line([(math.log(m), gain) for m, gain in self.gains], math.log(batch)) / step_s if step_s else 0.0

    def step_s(self, gpus: int, local: float) -> float:
        """Seconds per step, 0 where that was not measured. Fewer samples than the least that was measured take as long as that."""
        measured = sorted(self.steps)
        at = min(bisect_left(measured, gpus), len(measured) - 1)
        ends = [gpus] if measured[at] == gpus else [measured[max(0, at - 1)], measured[at]]
        if local > max(m for m, _ in self.steps[1]) * 1.001:
            return 0.0
        found = [(n, on_line([(float(m), s) for m, s in self.steps[n]], local)) for n in dict.fromkeys(ends)]
        return on_line([(float(n), s) for n, s in found], float(gpus))


def on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """On the lines between the points, which are in order; beyond their ends as there."""
    at = bisect_left(points, (x, -math.inf))
    if at == 0:
        return points[0][1]
    if at == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def application(folder: Path) -> Application:
    """What `folder` has of one application."""
    steps: dict[int, list[tuple[int, float]]] = {}
    sizes = {placement: gpus for gpus, placement in _CONSOLIDATED.items()}
    for row in _rows(folder / "placements.csv"):
        if (gpus := sizes.get(row["placement"])) is not None:
            steps.setdefault(gpus, []).append((int(row["local_bsz"]), float(row["step_time"])))
    for row in _rows(folder / "scalability.csv"):
        gpus = int(row["num_replicas"])
        if gpus == 4 * int(row["num_nodes"]) and gpus not in sizes.values():
            steps.setdefault(gpus, []).append((int(row["local_bsz"]), float(row["step_time"])))
    gains, work = [], 0.0
    for path in sorted(folder.glob("validation-*.csv"), key=_batch_of):
        last = list(_rows(path))[-1]
        gains.append((_batch_of(path), float(last["progress"]) / float(last["iteration"])))
        work = work or float(last["progress"])
    return Application(folder.name, {n: sorted(times) for n, times in sorted(steps.items())}, gains, work)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _batch_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


@dataclass(frozen=True, slots=True)
class TracedJob:
    """A job of a workload: when it comes, and what its user tuned it to."""

    name: str
    at_s: float
    app: Application
    gpus: int  # tuned
    batch: int  # tuned

    @property
    def tuned_speed(self) -> float:
        """Progress per second as its user tuned it."""
        return self.app.speed_at(self.gpus, self.batch) or self.app.speeds[self.gpus]


def workload(path: Path, apps: dict[str, Application]) -> list[TracedJob]:
    """The jobs of a file, in the order in which they come."""
    jobs = [
        TracedJob(
            row["name"], float(row["time"]), apps[row["application"]], int(row["num_replicas"]), int(row["batch_size"])
        )
        for row in _rows(path)
    ]
    return sorted(jobs, key=lambda job: (job.at_s, job.name))
