"""When to rent machines for jobs that wait, and when to give them back. Pure.

Renting is worth it when the waiting that it saves is worth more than it costs: `wait saved x GPUs x value > price x (boot + run)`, rounded up
to what is billed; or when a deadline would be missed otherwise. Jobs that a machine could take together are counted together. What boots
already, or is idle, is given to who waits first, so that nobody rents for what is on its way.

When machines are given back says `give_back`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from whaleflux import names
from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import give_back
from whaleflux_scheduler.core.give_back import End
from whaleflux_scheduler.core.idle_times import IdleTimes
from whaleflux_scheduler.core.offered import (
    HOUR_S,
    Kind,
    Offered,
    Rented,
    Waiting,
    billed_usd,
    fits,
    gpus_on,
    machines_for,
)
from whaleflux_scheduler.core.spare_machines import Spare

TRUSTED = 0.5  # offers that refused a machine lately are left alone until they are believed again
MOST_OFFERS = 8  # that a lease names
ENDS_WITHIN_S = 10.0  # from the wish to give a machine back until its provider is told
FLEET = ""  # the budget of everything together


@dataclass(frozen=True, slots=True)
class BurstRules:
    """`usd_per_gpu_hour`: what an hour that a job waits for a GPU is worth to spare. `budgets_usd`: of a day, by queues/q, sites/s, or "" for all.

    `after_s`: nobody is rented for who has waited for less. `unknown_wait_s`: what a wait counts of which no end is in sight. `lease_s`: the longest.
    """

    usd_per_gpu_hour: float = 2.0
    budgets_usd: Mapping[str, float] = field(default_factory=dict)
    after_s: float = 30.0
    unknown_wait_s: float = 24 * HOUR_S
    lease_s: float = 24 * HOUR_S
    lead_s: float = 20.0  # from the look at which a machine is given back until it is told to end


@dataclass(frozen=True, slots=True)
class Rent:
    """Machines to rent for a job and those that fit beside it. `usd`: expected, all machines; `worth_usd`: what the waiting saved is worth."""

    job: str
    queue: str
    offers: tuple[str, ...]
    machines: int
    usd: float
    worth_usd: float
    cap_usd: float  # of each machine
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """A job for which nothing is rented, and why."""

    job: str
    why: str


@dataclass(frozen=True, slots=True)
class BurstPlan:
    """One look. `left_usd`: of each budget of the day, before what is proposed."""

    rents: tuple[Rent, ...] = ()
    ends: tuple[End, ...] = ()
    waits: tuple[Wait, ...] = ()
    left_usd: Mapping[str, float] = field(default_factory=dict)


def decide(
    waiting: Sequence[Waiting],
    offers: Sequence[Offered],
    rented: Sequence[Rented],
    spent_usd: Mapping[str, float],
    rules: BurstRules,
    times: Mapping[Kind, IdleTimes],
    now_s: float,
) -> BurstPlan:
    """What to rent and what to give back now.

    `waiting` in the order in which they would start; `spent_usd` of this day, by budget; `times` as of now (`give_back.seen`); Unix `now_s`.
    """
    spare = Spare(rented)
    left = {scope: usd - spent_usd.get(scope, 0.0) for scope, usd in rules.budgets_usd.items()}
    look = _Look(list(waiting), list(offers), spare, dict(left), rules)
    look.take()
    ends = give_back.ends(rented, times, spare.is_taken, rules.lead_s, now_s)
    return BurstPlan(tuple(look.rents), ends, tuple(look.waits), left)


def ever(job: Waiting, offers: Sequence[Offered], rules: BurstRules) -> Rent | str:
    """What would be rented for a job that the fleet's own nodes can never hold, if nothing else were rented; or the limit that forbids it.

    `offers` with all the machines that they have.
    """
    patient = replace(job, wait_s=None, waited_s=math.inf)
    look = _Look([patient], [replace(one, trust=1.0) for one in offers], Spare(()), dict(rules.budgets_usd), rules)
    look.take()
    return look.rents[0] if look.rents else look.waits[0].why


@dataclass(frozen=True, slots=True)
class _Judged:
    """An offer that is worth it: machines to rent beside `part`, which are there; `gpus`: that they serve, of those `together`."""

    offer: Offered
    machines: int
    usd: float
    worth_usd: float
    why: str
    together: set[str]
    gpus: float
    part: tuple[str, ...]


@dataclass
class _Look:
    """One pass over those who wait."""

    waiting: list[Waiting]
    offers: list[Offered]
    spare: Spare
    left_usd: dict[str, float]
    rules: BurstRules
    rents: list[Rent] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)

    def take(self) -> None:
        served = set[str]()
        for at, job in enumerate(self.waiting):
            if job.name in served:
                continue
            if self.spare.give(job):
                self.waits.append(Wait(job.name, "a rented machine that comes, or is idle, has room for it"))
                continue
            if lease := self.spare.passed_by(job):
                asks = f"whaleflux explain {job.name}"
                self.waits.append(
                    Wait(job.name, f"{lease} seemed to fit it and stands idle; see what it waits for: {asks}")
                )
                continue
            beside = [other for other in self.waiting[at + 1 :] if other.name not in served]
            found = self._for(job, beside)
            if isinstance(found, str):
                self.waits.append(Wait(job.name, found))
                continue
            rent, together = found
            served |= together
            self.rents.append(rent)

    def _for(self, job: Waiting, beside: Sequence[Waiting]) -> tuple[Rent, set[str]] | str:
        """What to rent for it, and who is served by that; or why nothing is."""
        if job.waited_s < self.rules.after_s:
            return f"it has waited for less than {self.rules.after_s:.0f} s"
        fitting = [offer for offer in self.offers if fits(job, offer)]
        if not fitting:
            return "no offer has GPUs that it could use"
        reasons, found = list[str](), list[_Judged]()
        for offer in sorted(fitting, key=lambda one: (one.usd_per_hour / one.gpus, one.boot_s, one.name)):
            judged = self._judge(job, offer, beside)
            if isinstance(judged, str):
                reasons.append(judged)
            else:
                found.append(judged)
        if not found:
            return reasons[0]
        found.sort(key=lambda one: one.usd / one.gpus)  # a large machine for a small job alone is no bargain
        first = found[0]
        usd = self._cap_usd(job, first)
        tried = [first, *self._behind(job, first, found[1:], usd)]
        self._book(job, tried, usd)
        offers, each_usd = tuple(one.offer.name for one in tried), usd / first.machines
        rent = Rent(job.name, job.queue, offers, first.machines, first.usd, first.worth_usd, each_usd, first.why)
        return rent, first.together

    def _judge(self, job: Waiting, offer: Offered, beside: Sequence[Waiting]) -> _Judged | str:
        """What this offer would be taken for; or why it is not taken."""
        part = self.spare.part(job, offer)
        whole = machines_for(job, offer)
        machines = whole - len(part)
        if offer.trust < TRUSTED:
            return f"{offer.name} had no machine a moment ago"
        if machines > offer.left:
            return f"{offer.name} has {offer.left} machine(s) left of its `max`, and {machines} are needed"
        group = [job, *_companions(beside, offer, whole * offer.gpus - gpus_on(job, offer))]
        run_s = max(one.run_s for one in group)
        usd = machines * billed_usd(offer, offer.boot_s + run_s)
        worth_usd = sum(self._worth_usd(one, offer) for one in group)
        deadline = _saves_deadline(job, offer, self._wait_s(job))
        if not deadline and worth_usd <= usd:
            worth = f"the waiting that it saves is worth {worth_usd:.2f} USD (burst_usd_per_gpu_hour)"
            return f"renting costs {usd:.2f} USD by {offer.name}, and {worth}"
        for scope in self._scopes(job, offer):
            if usd > self.left_usd[scope]:
                has = f"the budget of {scope or 'all renting'} (burst_budgets) has {max(0.0, self.left_usd[scope]):.2f} USD left today"
                return f"{has}, and {usd:.2f} are needed"
        why = (
            f"its deadline would be missed otherwise; {usd:.2f} USD"
            if deadline
            else f"it would wait {shown_duration(self._wait_s(job))} more: {worth_usd:.2f} USD of waiting for {usd:.2f} USD"
        )
        gpus, together = sum(gpus_on(one, offer) for one in group), {one.name for one in group}
        return _Judged(offer, machines, usd, worth_usd, why, together, gpus, part)

    def _cap_usd(self, job: Waiting, one: _Judged) -> float:
        """Most that the machines may cost: twice what is expected where a budget has to be kept, else all of the longest lease."""
        if not (left := self._lefts(job, one.offer)):
            return one.machines * one.offer.usd_per_hour * self.rules.lease_s / HOUR_S
        return min(2 * one.usd, *left)

    def _behind(self, job: Waiting, first: _Judged, others: Sequence[_Judged], cap_usd: float) -> list[_Judged]:
        """Who may give the machine instead: for no more than the cap, and whose budgets have that."""
        if first.machines > 1 or first.part:  # a gang is of one kind
            return []
        alone = (one for one in others if one.machines == 1 and not one.part and one.usd <= cap_usd)
        return [one for one in alone if all(left >= cap_usd for left in self._lefts(job, one.offer))][: MOST_OFFERS - 1]

    def _worth_usd(self, job: Waiting, offer: Offered) -> float:
        saved_s = max(0.0, self._wait_s(job) - offer.boot_s)
        return saved_s / HOUR_S * gpus_on(job, offer) * self.rules.usd_per_gpu_hour

    def _wait_s(self, job: Waiting) -> float:
        return self.rules.unknown_wait_s if job.wait_s is None else min(job.wait_s, self.rules.unknown_wait_s)

    def _scopes(self, job: Waiting, offer: Offered) -> list[str]:
        return [scope for scope in (FLEET, names.queue(job.queue), names.site(offer.site)) if scope in self.left_usd]

    def _lefts(self, job: Waiting, offer: Offered) -> list[float]:
        return [self.left_usd[scope] for scope in self._scopes(job, offer)]

    def _book(self, job: Waiting, tried: Sequence[_Judged], usd: float) -> None:
        """No budget that it may come from has that any more."""
        for scope in {scope for one in tried for scope in self._scopes(job, one.offer)}:
            self.left_usd[scope] -= usd
        first = tried[0]
        self.spare.keep(first.part)
        name, machines = first.offer.name, first.machines
        self.offers = [replace(one, left=one.left - machines) if one.name == name else one for one in self.offers]


def _companions(beside: Sequence[Waiting], offer: Offered, free: float) -> list[Waiting]:
    """Others that fit on what a job leaves of its machines."""
    found = []
    for other in beside:
        if other.min_nodes <= 1 and gpus_on(other, offer) <= free + 1e-9 and fits(other, offer):
            found.append(other)
            free -= gpus_on(other, offer)
    return found


def _saves_deadline(job: Waiting, offer: Offered, wait_s: float) -> bool:
    """Whether it ends in time there, and would not here."""
    return job.late_s is not None and offer.boot_s + job.run_s <= job.late_s < wait_s + job.run_s
