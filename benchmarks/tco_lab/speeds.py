"""How fast trainings run by where they are: measured on 16 nodes of 4 T4 for Pollux, seconds per step and seconds of it in synchronisation."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

NODE = 4  # GPUs of a node there


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds; `sync_s` of them synchronise gradients."""

    step_s: float
    sync_s: float


class App:
    """One application: mean of the measured steps of a local batch, by (GPUs, nodes)."""

    def __init__(self, name: str, measured: dict[tuple[int, int], dict[int, Step]]) -> None:
        self.name, self._measured = name, measured
        self._most = max(gpus for gpus, _ in measured)

    def step(self, gpus: int, nodes: int, batch: int) -> Step:
        """The nearest that was measured: more GPUs than 64 as 64, so many nodes for each GPU, the nearest batch that is not smaller."""
        if gpus > self._most:
            nodes, gpus = max(1, round(nodes * self._most / gpus)), self._most
        key = min(self._measured, key=lambda one: (abs(one[0] - gpus), abs(one[1] - nodes)))
        known = self._measured[key]
        return known[min(known, key=lambda size: abs(size - batch))]

    def batches(self, gpus: int, nodes: int) -> list[int]:
        """Local batches that were measured there."""
        return sorted(self._measured.get((gpus, nodes), {}))

    def slowdown(self, gpus: int, nodes: int) -> float:
        """A step on so many nodes over one on the fewest; never below 1: what is measured faster is noise."""
        best = -(-gpus // NODE)
        if nodes <= best:
            return 1.0
        batch = self.middle(gpus)
        return max(1.0, self.step(gpus, nodes, batch).step_s / self.step(gpus, best, batch).step_s)

    def middle(self, gpus: int) -> int:
        """The middle of the measured local batches."""
        near = min(self._measured, key=lambda one: abs(one[0] - gpus))
        sizes = sorted(self._measured[near])
        return sizes[len(sizes) // 2]


def apps(folder: Path) -> list[App]:
    """Those of `pollux/throughput`."""
    return [_app(one) for one in sorted(folder.iterdir()) if one.is_dir()]


def _app(folder: Path) -> App:
    found: dict[tuple[int, int], dict[int, list[Step]]] = defaultdict(lambda: defaultdict(list))
    for name in ("placements.csv", "scalability.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                placed = row.get("placement")
                key = (
                    (sum(map(int, placed)), len(placed))
                    if placed
                    else (int(row["num_replicas"]), int(row["num_nodes"]))
                )
                found[key][int(row["local_bsz"])].append(Step(float(row["step_time"]), float(row["sync_time"])))
    means = {key: {size: _mean(steps) for size, steps in by_size.items()} for key, by_size in found.items()}
    return App(folder.name, means)


def _mean(steps: list[Step]) -> Step:
    return Step(sum(one.step_s for one in steps) / len(steps), sum(one.sync_s for one in steps) / len(steps))
