"""What is usual without topology: the queue's first job that fits starts, on the nodes with most free GPUs (least allocated), wherever they are."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tco_lab.speeds import NODE
from benchmarks.tco_lab.work import Work

DEPTH = 256  # of the queue that is tried at each event


@dataclass(frozen=True, slots=True)
class Ran:
    """Of one job: seconds, and on how many nodes it was."""

    start_s: float
    end_s: float
    nodes: int


def run(work: Sequence[Work], gpus: int) -> list[Ran]:
    """All of them, in the order of `work`; spread ones run longer by what was measured."""
    free, left = [NODE] * (gpus // NODE), gpus
    done: list[Ran | None] = [None] * len(work)
    ends: list[tuple[float, int, dict[int, int]]] = []
    queue: list[int] = []
    coming, now_s = 0, 0.0
    while coming < len(work) or ends or queue:
        due = [work[coming].at_s] if coming < len(work) else []
        now_s = min([*due, *([ends[0][0]] if ends else [])])
        while ends and ends[0][0] <= now_s:
            _, _, held = heapq.heappop(ends)
            for node, count in held.items():
                free[node] += count
                left += count
        while coming < len(work) and work[coming].at_s <= now_s:
            queue.append(coming)
            coming += 1
        for number in queue[:DEPTH]:
            one = work[number]
            if one.gpus > left:
                continue
            held = _taken(free, one.gpus)
            left -= one.gpus
            run_s = one.run_s * one.app.slowdown(one.gpus, len(held)) + one.idle_s
            done[number] = Ran(now_s, now_s + run_s, len(held))
            heapq.heappush(ends, (now_s + run_s, number, held))
            queue.remove(number)
    return [one for one in done if one is not None]


def _taken(free: list[int], gpus: int) -> dict[int, int]:
    """One from the node with most free ones, again and again: as a balancer without gangs places Pods."""
    heap = [(-count, node) for node, count in enumerate(free) if count]
    heapq.heapify(heap)
    held: dict[int, int] = {}
    for _ in range(gpus):
        count, node = heapq.heappop(heap)
        held[node] = held.get(node, 0) + 1
        free[node] -= 1
        if count + 1 < 0:
            heapq.heappush(heap, (count + 1, node))
    return held
