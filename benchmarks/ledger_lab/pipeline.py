"""One step of a pipeline, event by event: an independent truth about how long stages wait for one another."""

from __future__ import annotations

from random import Random


def step(
    stages: int, micro_batches: int, forward_ms: float, jitter: float, random: Random
) -> tuple[float, list[float]]:
    """One forward, one backward (1F1B), a backward twice as long as a forward: how long the step takes, and how long each stage is busy."""
    done: dict[tuple[str, int, int], float] = {}
    free, busy = [0.0] * stages, [0.0] * stages
    waiting = [_order(stage, stages, micro_batches) for stage in range(stages)]
    at = [0] * stages
    while any(at[s] < len(waiting[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(waiting[s]):
                kind, micro = waiting[s][at[s]]
                ready = _ready(done, kind, micro, s, stages)
                if ready is None:
                    break
                took = forward_ms * (1 if kind == "f" else 2) * random.uniform(1 - jitter, 1 + jitter)
                free[s] = max(free[s], ready) + took
                busy[s] += took
                done[kind, micro, s] = free[s]
                at[s] += 1
    return max(free), busy


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    warm = min(stages - stage - 1, micro_batches)
    order = [("f", i) for i in range(warm)]
    for i in range(micro_batches - warm):
        order += [("f", warm + i), ("b", i)]
    return order + [("b", i) for i in range(micro_batches - warm, micro_batches)]


def _ready(done: dict[tuple[str, int, int], float], kind: str, micro: int, stage: int, stages: int) -> float | None:
    """When what it needs is there; None: not yet."""
    if kind == "f":
        return 0.0 if stage == 0 else done.get(("f", micro, stage - 1))
    return done.get(("f", micro, stage)) if stage == stages - 1 else done.get(("b", micro, stage + 1))
