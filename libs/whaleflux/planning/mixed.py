"""One training over several pools of GPUs that differ: who computes what, so that nobody waits longer than need be; and who is left out.

Two ways to mix are looked at beside each pool alone. *Replicas*: data parallelism over pools, each replica within one, with as many samples as it
is fast (`whaleflux.sdk.Balance` makes that of a script). *Stages*: a pipeline through the pools, each stage with as many layers as it is
fast and its memory holds. Which pools take part is tried out; shares are dealt exactly (`whole_shares`), for the best shapes of an enumeration that is
judged by the cost model with shares in parts, which no whole ones are faster than.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.mixed_plan import MixedFound, MixedPlan, alone
from whaleflux.planning.mixed_replicas import best_replicas
from whaleflux.planning.mixed_stages import best_stages
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.pools import Pool
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

MOST_POOLS = 4
MOST_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class MixedAsked:
    """`batch` in samples of a step, `sequence` in tokens. `runnable`: among plans over several pools alone that an output format runs."""

    batch: int
    sequence: int
    runnable: bool = False


def mixed_search(
    shape: ModelShape,
    pools: Sequence[Pool],
    asked: MixedAsked,
    how: Training | None = None,
    constants: Constants = FITTED,
) -> MixedFound:
    """The fastest way that fits, never slower than the best pool alone. Raises InvalidArgument for no pools, too many, or a batch that is none."""
    _check(pools, asked)
    trained = how or Training()
    singles = {} if asked.runnable else {pool.name: _alone(shape, pool, asked, trained, constants) for pool in pools}
    found = [one for one in singles.values() if one is not None]
    for some in _sets(pools):
        replicas = best_replicas(shape, some, asked.batch, asked.sequence, trained, constants, runnable=asked.runnable)
        stages = None if asked.runnable else best_stages(shape, some, asked.batch, asked.sequence, trained, constants)
        found += [plan for plan in (replicas, stages) if plan is not None]
    best = min(found, key=lambda plan: plan.step_s, default=None)
    ranked = sorted({plan.words(): plan for plan in found}.values(), key=lambda plan: plan.step_s)
    return MixedFound(
        best,
        tuple(plan for plan in ranked if plan is not best),
        {name: plan.step_s if plan else None for name, plan in singles.items()},
    )


def _sets(pools: Sequence[Pool]) -> list[tuple[Pool, ...]]:
    return [some for size in range(2, len(pools) + 1) for some in combinations(pools, size)]


def _alone(shape: ModelShape, pool: Pool, asked: MixedAsked, how: Training, constants: Constants) -> MixedPlan | None:
    found = search(
        shape, pool.machine, Asked(gpus=pool.gpus, sequence=asked.sequence, batch=asked.batch), how, constants
    )
    return alone(pool, found.best, shape) if found.best is not None else None


def _check(pools: Sequence[Pool], asked: MixedAsked) -> None:
    if not 1 <= len(pools) <= MOST_POOLS:
        raise InvalidArgument(FieldViolation("gpu", f"{len(pools)} kinds of GPUs were given; take 1 to {MOST_POOLS}"))
    names = [pool.name for pool in pools]
    if len(set(names)) < len(names):
        raise InvalidArgument(
            FieldViolation(
                "gpu", f"{max(names, key=names.count)} was given twice; give each kind once, with all of its GPUs"
            )
        )
    if not 1 <= asked.batch <= MOST_BATCH:
        raise InvalidArgument(FieldViolation("batch", f"{asked.batch} samples a step; take 1 to {MOST_BATCH}"))
