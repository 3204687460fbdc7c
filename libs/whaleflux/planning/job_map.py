"""The rank map of a job of which no more is known than its split, and perhaps its model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.group_links import Split
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.rank_map import Price, best_map, priced
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

# What a job sends that does not say which model it trains: dense, or with experts where it spreads some.
_USUAL, _USUAL_EXPERTS = "llama-3.1-70b", "mixtral-8x22b"
_SEQUENCE, _MICRO_BATCHES_PER_STAGE = 8192, 4
_NAMES = {"tp": "tensor", "cp": "context", "ep": "expert", "dp": "data", "pp": "pipeline"}
_WORTH_SAYING = 0.005


@dataclass(frozen=True, slots=True)
class Trained:
    """What a job says of the model that it trains; 0: nothing."""

    shape: ModelShape
    batch: int = 0
    sequence: int = 0
    how: Training = field(default_factory=Training)


@dataclass(frozen=True, slots=True)
class JobMap:
    """`gpus`: of each rank the GPU's number in the cluster. `words`: how it was laid, for people."""

    gpus: Ints
    words: str


def map_of_job(
    cluster: Cluster, split: Split, machine: Machine, model: str = "", trained: Trained | None = None
) -> JobMap:
    """The best map for what is trained, for `model` (a known name), or for a usual one. Raises InvalidArgument as `best_map` does."""
    known = trained or Trained(model_named(model or (_USUAL_EXPERTS if split.ep > 1 else _USUAL)))
    price = price_of(known.shape, machine, usual_plan(split, known.shape, known), known.how)
    found = best_map(cluster, split, price)
    given = np.argsort(cluster.position)[None]  # rank after rank as the GPUs were given
    before = float(priced(cluster, split, price, given)[0])
    return JobMap(found.gpus, _words(found.order, 1 - found.cost / before))


def price_of(shape: ModelShape, machine: Machine, plan: Plans, how: Training | None = None) -> Price:
    """Seconds of a step of one plan."""
    return lambda groups: step_time(shape, machine, plan, how or Training(), groups=groups).total_s


def usual_plan(split: Split, shape: ModelShape, trained: Trained | None = None) -> Plans:
    """With single samples, ZeRO-1 and the batch that is said, where the ranks divide it; else four micro-batches for each stage."""
    micro_batches = _MICRO_BATCHES_PER_STAGE * split.pp if split.pp > 1 else 1
    if trained and trained.batch and trained.batch % split.dp == 0:
        micro_batches = trained.batch // split.dp
    sequence = (trained.sequence if trained else 0) or min(_SEQUENCE, shape.sequence)
    return Plans.of(
        tp=split.tp, cp=split.cp, dp=split.dp, pp=split.pp, ep=split.ep, replicas=split.replicas, micro_batch=1, zero=1,
        global_batch=split.dp * micro_batches, sequence=sequence, sequence_parallel=split.tp > 1,
    )  # fmt: skip


def _words(order: tuple[str, ...], gain: float) -> str:
    along = ", then ".join(_NAMES[name] for name in order) or "one rank"
    more = f": a step takes {gain:.0%} less than with ranks counted node by node" if gain > _WORTH_SAYING else ""
    return f"ranks lie along the links, {along}{more}"
