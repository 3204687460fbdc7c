"""The same training on other GPUs than it was planned for: after a resize, or a failure that left fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from whaleflux.errors import InvalidArgument
from whaleflux.planning.arrays import Flags
from whaleflux.planning.constants import Constants
from whaleflux.planning.emit import can_express
from whaleflux.planning.emit.mesh import fsdp2
from whaleflux.planning.emit.planned import Planned, facts_of
from whaleflux.planning.found import Candidate, Split
from whaleflux.planning.known_models import model_said
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.offers import Offer, as_known
from whaleflux.planning.plans import Plans
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training
from whaleflux.planning.wish import Kept, Wish

_SLACK = (0.0, 0.05, 0.25)  # how far the batch may be from the planned one, the nearest first


@dataclass(frozen=True, slots=True)
class Replan:
    """A plan of exactly as many ranks as there are, and its mesh's file (JSON)."""

    split: Split
    tokens_per_s: float
    mesh: str


def replanned(wish: Wish, ranks: int, gpu: Offer, keep: Kept | None = None) -> Replan | None:
    """The fastest that fits; None: there is none. Of `gpu` its type and what was measured of that count. `keep`: what has to stay.

    Without `keep` each of tensor, pipeline and context parallelism is searched that the first plan used: of the others nobody knows whether the
    program has them. Takes about 60 ms.
    """
    shape, how = model_said(wish.model), Training(frozen=wish.adapters, fp8=float(wish.fp8))
    if keep is not None and ranks % (keep.tp * keep.pp * keep.cp):
        return None
    tp, pp, cp = keep[:3] if keep else (int(one == 1) for one in (wish.tp, wish.pp, wish.cp))  # 0: any
    for slack in _SLACK:
        asked = Asked(
            ranks, wish.sequence, tp=tp, pp=pp, cp=cp, ep=1, vp=keep.vp if keep else 0, batch=wish.batch, batch_slack=slack
        )  # fmt: skip
        judged = as_known(gpu, how, "fp8" if wish.fp8 else "bf16")
        for plan in _best(shape, judged, asked, _can(shape, how, keep)):
            return Replan(plan.split, plan.tokens_per_s, fsdp2(Planned.of(shape, plan.split.plans(), how)).text)
    return None


def _best(
    shape: ModelShape, judged: tuple[Machine, Training, Constants], asked: Asked, can: Callable[[Plans], Flags]
) -> Iterator[Candidate]:
    """Those that use all ranks, the fastest first."""
    machine, how, constants = judged
    try:
        found = search(shape, machine, asked, how, constants, can=can)
    except InvalidArgument:  # more ways than are looked at
        return
    plans = (found.best, *(other.plan for other in found.runners_up))
    yield from (plan for plan in plans if plan is not None and plan.split.gpus == asked.gpus)


def _can(shape: ModelShape, how: Training, keep: Kept | None) -> Callable[[Plans], Flags]:
    """What a mesh can say, with the stages that have to stay."""
    said = can_express("fsdp2", facts_of(shape, how))

    def can(plans: Plans) -> Flags:
        able = said(plans) if said is not None else np.ones(len(plans), dtype=bool)
        if keep is None:
            return able
        return np.asarray(
            able & (plans.first_layers == keep.first_layers) & (plans.last_layers == keep.last_layers), dtype=bool
        )

    return can
