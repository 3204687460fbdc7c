"""How fast trainings run by where they are: measured on 16 nodes of 4 T4 for Pollux, seconds per step and seconds of it in synchronisation."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NODE = 4  # GPUs of a node there
NEAR = 0.02  # of a batch: as good as the same


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds; `sync_s` of them synchronise gradients."""

    step_s: float
    sync_s: float


class App:
    """One application: mean of the measured steps of a local batch, by (GPUs, nodes). `tuned`: local batches that its users chose."""

    def __init__(
        self, name: str, measured: dict[tuple[int, int], dict[int, Step]], tuned: Sequence[float] = ()
    ) -> None:
        self.name, self._measured, self.tuned = name, measured, tuple(tuned)
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

    def doubled(self, gpus: int, nodes: int, batch: int) -> int | None:
        """Twice the batch, as it was measured there: sizes are powers of the square root of 2, rounded. None: memory does not hold it, or nobody tried."""
        found = min(self.batches(gpus, nodes), key=lambda size: abs(size - 2 * batch), default=0)
        return found if abs(found - 2 * batch) <= NEAR * 2 * batch else None

    def slowdown(self, gpus: int, nodes: int, batch: int) -> float:
        """A step on so many nodes over one on the fewest; never below 1: what is measured faster is noise."""
        best = -(-gpus // NODE)
        if nodes <= best:
            return 1.0
        return max(1.0, self.step(gpus, nodes, batch).step_s / self.step(gpus, best, batch).step_s)

    def drawn(self, gpus: int, lot: random.Random, *, tuned: bool) -> int:
        """A batch of a job of that size: one that its users chose, or any that was measured."""
        near = min(self._measured, key=lambda one: (abs(one[0] - gpus), abs(one[1] - -(-gpus // NODE))))
        sizes = sorted(self._measured[near])
        wanted = lot.choice(self.tuned) if tuned else lot.choice(sizes)
        return min(sizes, key=lambda size: abs(size - wanted))

    def middle(self, gpus: int) -> int:
        """The middle of the measured local batches."""
        near = min(self._measured, key=lambda one: abs(one[0] - gpus))
        sizes = sorted(self._measured[near])
        return sizes[len(sizes) // 2]


def apps(folder: Path, network: float = 1.0) -> list[App]:
    """Those of `pollux/throughput`, with the batches of `pollux/workloads`. `network`: synchronisation takes so many times less than on T4s."""
    tuned = _tuned(folder.parent / "workloads")
    return [_app(one, tuned[one.name], network) for one in sorted(folder.iterdir()) if one.is_dir()]


def _tuned(folder: Path) -> dict[str, list[float]]:
    """Of each application the local batches of its jobs: what Pollux' authors tuned for a user who knows what he does."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted(folder.glob("workload-*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                found[row["application"]].append(int(row["batch_size"]) / int(row["num_replicas"]))
    return found


def _app(folder: Path, tuned: Sequence[float], network: float) -> App:
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
                found[key][int(row["local_bsz"])].append(_step(row, network))
    means = {key: {size: _mean(steps) for size, steps in by_size.items()} for key, by_size in found.items()}
    return App(folder.name, means, tuned)


def _step(row: dict[str, str], network: float) -> Step:
    sync_s = float(row["sync_time"])
    return Step(float(row["step_time"]) - sync_s * (1 - 1 / network), sync_s / network)


def _mean(steps: list[Step]) -> Step:
    return Step(sum(one.step_s for one in steps) / len(steps), sum(one.sync_s for one in steps) / len(steps))
