"""What is usual without topology: the queue's first job that fits starts, wherever its Pods find room, and stays there.

Three ways that clusters really run, so that no rung is held against a weaker one than it has to be.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tco_lab.speeds import NODE
from benchmarks.tco_lab.work import Work

DEPTH = 256  # of the queue that is tried at each event


@dataclass(frozen=True, slots=True)
class Way:
    """`pod`: GPUs of a Pod at most. `packed`: on the fullest node that has room (most allocated), else on the emptiest (least allocated)."""

    name: str
    pod: int
    packed: bool


SCATTERED = Way("a Pod a GPU, least allocated", 1, packed=False)
SPREAD = Way("whole Pods, least allocated", NODE, packed=False)
PACKED = Way("whole Pods, most allocated", NODE, packed=True)
WAYS = (SCATTERED, SPREAD, PACKED)


@dataclass(frozen=True, slots=True)
class Ran:
    """Of one job: seconds, and on how many nodes it was."""

    start_s: float
    end_s: float
    nodes: int


class Free:
    """Nodes by how many of their GPUs are free."""

    def __init__(self, gpus: int) -> None:
        self._nodes: list[dict[int, None]] = [{} for _ in range(NODE + 1)]
        self._nodes[NODE] = dict.fromkeys(range(gpus // NODE))
        self._free = [NODE] * (gpus // NODE)
        self.left = gpus

    def take(self, gpus: int, way: Way) -> dict[int, int] | None:
        """GPUs by node, of a gang; None where not all of its Pods find room."""
        if gpus > self.left or (way.pod == NODE and gpus // NODE > len(self._nodes[NODE])):
            return None
        held: dict[int, int] = {}
        for size in [way.pod] * (gpus // way.pod) + [gpus % way.pod] * bool(gpus % way.pod):
            node = self._of(size, way)
            if node is None:
                self.give_back(held)
                return None
            held[node] = held.get(node, 0) + size
            self._change(node, -size)
        return held

    def give_back(self, held: dict[int, int]) -> None:
        for node, count in held.items():
            self._change(node, count)

    def _of(self, size: int, way: Way) -> int | None:
        levels = range(size, NODE + 1) if way.packed else range(NODE, size - 1, -1)
        return next((next(iter(self._nodes[free])) for free in levels if self._nodes[free]), None)

    def _change(self, node: int, by: int) -> None:
        del self._nodes[self._free[node]][node]
        self._free[node] += by
        self._nodes[self._free[node]][node] = None
        self.left += by


def run(work: Sequence[Work], gpus: int, way: Way = SCATTERED) -> list[Ran]:
    """All of them, in the order of `work`; spread ones run longer by what was measured."""
    free = Free(gpus)
    done: list[Ran | None] = [None] * len(work)
    ends: list[tuple[float, int, dict[int, int]]] = []
    queue: list[int] = []
    coming, now_s = 0, 0.0
    while coming < len(work) or ends or queue:
        due = [work[coming].at_s] if coming < len(work) else []
        now_s = min([*due, *([ends[0][0]] if ends else [])])
        while ends and ends[0][0] <= now_s:
            free.give_back(heapq.heappop(ends)[2])
        while coming < len(work) and work[coming].at_s <= now_s:
            queue.append(coming)
            coming += 1
        for number in queue[:DEPTH]:
            one = work[number]
            held = free.take(one.gpus, way)
            if held is None:
                continue
            run_s = one.run_s * one.slowdown(len(held)) + one.idle_s
            done[number] = Ran(now_s, now_s + run_s, len(held))
            heapq.heappush(ends, (now_s + run_s, number, held))
            queue.remove(number)
    return [one for one in done if one is not None]
