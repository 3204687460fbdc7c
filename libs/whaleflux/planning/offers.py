"""Which of the GPUs that are offered to take: each offer's best plan, when it is done, what it costs; then by deadline, budget and objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from whaleflux.fleet.gpu_types import GpuType
from whaleflux.planning.calibration import SOFTWARE, Calibrated
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.emit import can_express
from whaleflux.planning.emit.planned import facts_of
from whaleflux.planning.found import Candidate, PlanFound
from whaleflux.planning.machine import Fabric, Machine, speed_of
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training
from whaleflux.quantities import shown_duration

MOST_OFFERS = 64


class Objective(StrEnum):
    """What is made as small as it can be."""

    TIME = "time"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class Offer:
    """So many GPUs of a type, all of them paid for but with `idle_free`: then a plan leaves those that it does not use to others. `usd_per_gpu_hour` is None where nobody knows it; `price_source` says whose it is, and of when.

    `measured` is what a calibration says of the type, for layers that run as `software` says (`calibration.SOFTWARE`).
    """

    gpu: GpuType
    gpus: int
    usd_per_gpu_hour: float | None = None
    price_source: str = ""
    measured: Calibrated | None = None
    software: str = SOFTWARE[0]
    fabric: Fabric | None = None  # None: what is usual for the type
    place: str = ""  # where they are, for whoever offers GPUs of several
    idle_free: bool = False


@dataclass(frozen=True, slots=True)
class Goal:
    """What training is for: so many tokens (0: no end), by a deadline and within a budget (0: none)."""

    tokens: float = 0.0
    deadline_s: float = 0.0
    budget_usd: float = 0.0
    objective: Objective = Objective.TIME

    def trained(self, tokens_per_step: float) -> float:
        """Tokens that are trained on, where there is an end: a step at least."""
        return max(self.tokens, tokens_per_step) if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """One offer's best plan in time and money. Figures are None where there is no plan, no end (`tokens` of the goal), or no price.

    `mfu` is the share of the data sheet's arithmetic that the model itself needs (`ModelShape.training_flops`). `usd` is of
    all `gpus`, those that the plan leaves idle too.
    `misses` names the deadline or budget that it does not meet. `quicker` is the best plan of all, where the output format cannot express it.
    """

    gpu: str
    gpus: int
    found: PlanFound
    place: str = ""  # the offer's
    step_s: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    mfu: float | None = None
    finish_s: float | None = None
    usd_per_gpu_hour: float | None = None
    price_source: str = ""
    usd: float | None = None
    usd_per_million_tokens: float | None = None
    misses: tuple[str, ...] = ()
    quicker: Candidate | None = None

    @property
    def plan(self) -> Candidate | None:
        return self.found.best

    @property
    def meets(self) -> bool:
        """It fits, by the deadline and within the budget."""
        return self.plan is not None and not self.misses


@dataclass(frozen=True, slots=True)
class Choice:
    """The best offer, the others from the next best on. `chosen` need not meet the goal: then nothing does, and `words` say what would."""

    chosen: Estimate
    others: tuple[Estimate, ...] = ()
    words: str = ""

    @property
    def meets(self) -> bool:
        return self.chosen.meets


def choose(
    shape: ModelShape,
    offers: Sequence[Offer],
    asked: Asked,
    goal: Goal,
    how: Training,
    precision: str = "bf16",
    form: str = "",
) -> Choice:
    """Of at least one offer. `asked.gpus` is each offer's; `form` as in `estimate`. Raises InvalidArgument where a GPU's speed is not known."""
    every = [estimate(shape, one, asked, goal, how, precision, form) for one in offers]
    ranked = sorted(every, key=lambda one: _rank(one, goal))
    return Choice(ranked[0], tuple(ranked[1:]), "" if ranked[0].meets else _unmet(every, goal))


def as_known(offer: Offer, how: Training, precision: str) -> tuple[Machine, Training, Constants]:
    """What an offer's plans are judged by: the data sheet and fitted constants, or its calibration."""
    if offer.measured is None:
        return Machine.of(offer.gpu, precision, offer.fabric), how, FITTED
    how, measured = offer.measured.running(how, offer.software)
    return measured.machine, how, measured.constants


def estimate(
    shape: ModelShape, offer: Offer, asked: Asked, goal: Goal, how: Training, precision: str = "bf16", form: str = ""
) -> Estimate:
    """What one offer comes to. `form`: by a plan that this output format can express; by the best of all where it can express none that fits."""
    machine, how, constants = as_known(offer, how, precision)
    asked = replace(asked, gpus=offer.gpus)
    found, quicker = search(shape, machine, asked, how, constants), None
    if form and found.best is not None:
        found, quicker = _said_by(form, shape, machine, offer, asked, how, constants, found)
    known = Estimate(
        offer.gpu.name,
        offer.gpus,
        found,
        offer.place,
        usd_per_gpu_hour=offer.usd_per_gpu_hour,
        price_source=offer.price_source,
        quicker=quicker,
    )
    if found.best is None:
        return known
    rate, used = found.best.tokens_per_s, found.best.split.gpus
    paid = used if offer.idle_free else offer.gpus
    needed = shape.training_flops(asked.sequence, frozen=bool(np.any(how.frozen)))
    finish_s = goal.trained(found.best.split.tokens_per_step) / rate if goal.tokens else None
    usd_per_s = None if offer.usd_per_gpu_hour is None else offer.usd_per_gpu_hour * paid / 3600
    timed = replace(
        known,
        gpus=paid,
        step_s=found.best.step_s,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / used,
        mfu=rate / used * needed / speed_of(offer.gpu).peak_flops(precision),
        finish_s=finish_s,
        usd=None if finish_s is None or usd_per_s is None else finish_s * usd_per_s,
        usd_per_million_tokens=None if usd_per_s is None else usd_per_s / rate * 1e6,
    )
    return replace(timed, misses=tuple(_misses(timed, goal)))


def _said_by(
    form: str,
    shape: ModelShape,
    machine: Machine,
    offer: Offer,
    asked: Asked,
    how: Training,
    constants: Constants,
    found: PlanFound,
) -> tuple[PlanFound, Candidate | None]:
    """(what is found among plans that the format can express, the best of all where that is another); `found` where it can express none that fits."""
    can = can_express(form, facts_of(shape, how, capability=offer.gpu.compute_capability))
    if can is None or found.best is None or can(found.best.split.plans()).all():
        return found, None
    said = search(shape, machine, asked, how, constants, can)
    return (said, found.best) if said.best is not None else (found, None)


def _misses(one: Estimate, goal: Goal) -> list[str]:
    missed = []
    if goal.deadline_s and one.finish_s is not None and one.finish_s > goal.deadline_s:
        missed.append(f"deadline {shown_duration(goal.deadline_s)}: done after {shown_duration(one.finish_s)}")
    if goal.budget_usd and one.usd is None:
        missed.append(f"budget ${goal.budget_usd:,.0f}: the price is not known (--price)")
    elif goal.budget_usd and one.usd is not None and one.usd > goal.budget_usd:
        missed.append(f"budget ${goal.budget_usd:,.0f}: costs ${one.usd:,.0f}")
    return missed


def _exceeds(one: Estimate, goal: Goal) -> float:
    """How many times the deadline or the budget, whichever is exceeded more, it takes: infinite where that is not known. 1 where it meets both."""
    if one.meets:
        return 1.0
    time = (np.inf if one.finish_s is None else one.finish_s) / goal.deadline_s if goal.deadline_s else 1.0
    money = (np.inf if one.usd is None else one.usd) / goal.budget_usd if goal.budget_usd else 1.0
    return max(time, money, 1.0)


def _rank(one: Estimate, goal: Goal) -> tuple[bool, bool, float, float]:
    """What meets the goal first, by the objective; then what fits, the nearest to the goal first."""
    by_cost = np.inf if one.usd_per_million_tokens is None else one.usd_per_million_tokens
    by_time = 1 / one.tokens_per_s if one.tokens_per_s else np.inf
    objective = by_cost if goal.objective is Objective.COST else by_time
    return not one.meets, one.plan is None, _exceeds(one, goal), objective


def _unmet(every: Sequence[Estimate], goal: Goal) -> str:
    """Why nothing meets the goal, with what comes nearest."""
    fitting = [one for one in every if one.plan is not None]
    if not fitting:
        return "the model fits into none of what is offered"
    words = []
    if goal.deadline_s and all(one.finish_s is not None and one.finish_s > goal.deadline_s for one in fitting):
        fastest = min(fitting, key=lambda one: one.finish_s or np.inf)
        more = fastest.gpus * (fastest.finish_s or 0) / goal.deadline_s
        words.append(
            f"the deadline of {shown_duration(goal.deadline_s)} is too near: the fastest, {fastest.gpus} x {fastest.gpu}, takes "
            f"{shown_duration(fastest.finish_s or 0)}; at that speed {more:,.0f} GPUs would do"
        )
    priced = [one for one in fitting if one.usd is not None]
    if goal.budget_usd and not priced:
        words.append("what it costs is not known: give --price")
    elif goal.budget_usd and all((one.usd or 0) > goal.budget_usd for one in priced):
        cheapest = min(priced, key=lambda one: one.usd or np.inf)
        affordable = goal.tokens * goal.budget_usd / (cheapest.usd or 1)
        words.append(
            f"the budget of ${goal.budget_usd:,.0f} is too small: the cheapest, {cheapest.gpus} x {cheapest.gpu}, costs ${cheapest.usd:,.0f}; "
            f"it pays for {affordable / 1e9:,.3g} B tokens"
        )
    return (
        "; ".join(words)
        or "no offer meets both: what is done by the deadline costs more than the budget; offer other numbers or types"
    )


def numbers_between(low: int, high: int, node_gpus: int) -> list[int]:
    """Numbers of GPUs worth offering in a range: its ends, powers of two within a node, whole nodes beyond it; where these are many, fewer."""
    small = [1 << step for step in range(node_gpus.bit_length()) if low <= 1 << step <= min(high, node_gpus)]
    nodes = range(-(-max(low, node_gpus) // node_gpus), high // node_gpus + 1)
    if len(nodes) > MOST_OFFERS // 2:
        spread = np.geomspace(nodes[0], nodes[-1], MOST_OFFERS // 2)
        return sorted({low, *small, *(round(one) * node_gpus for one in spread.tolist()), high})
    return sorted({low, *small, *(one * node_gpus for one in nodes), high})
