"""Budgets that are spent and stop new work: which jobs they keep back, which sites they close, and until when. Pure.

Who keeps the ledger notes in a budget's record that all of it is spent, and in which month. By that month the stop ends, whoever is away. New is
work that was never placed: what has begun goes on, also after a failure, a preemption or a move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from whaleflux import names
from whaleflux_scheduler.core.model import Job


@dataclass(frozen=True, slots=True)
class BudgetStop:
    """A budget and its stop. At most one of `queue` (its id), `user` (role/name) and `site` (its id) is set; none: it is for everything."""

    budget: str  # its id
    queue: str = ""
    user: str = ""
    site: str = ""
    micros_per_month: int = 0
    month: str = ""  # YYYY-MM in which no new work is admitted; "": none
    spent_micros: int = 0  # at `time`
    time: datetime | None = None  # when it was seen that all is spent

    def holds(self, now: datetime) -> bool:
        """Whether its month is that of `now`."""
        return self.month == _month(now)

    def is_for(self, job: Job) -> bool:
        """Whether all that the job does counts for it, wherever it runs."""
        if self.site:
            return False
        return (not self.queue or self.queue == job.queue) and (not self.user or self.user == job.submitter)


@dataclass(frozen=True, slots=True)
class Admission:
    """The job as it may be placed; `kept_by`: not at all. `closed`: stops of sites where it may not start."""

    job: Job
    kept_by: BudgetStop | None = None
    closed: tuple[BudgetStop, ...] = ()


def is_new(job: Job) -> bool:
    """Whether it was never placed."""
    return job.attempt is None and not job.past_attempts


def admit(job: Job, stops: Iterable[BudgetStop], sites: Collection[str], now: datetime) -> Admission:
    """What the stops leave of it. `sites`: ids of all there are; a job that may go to any may go to the others."""
    if not is_new(job):
        return Admission(job)
    holding = [stop for stop in stops if stop.holds(now)]
    if kept := next((stop for stop in holding if stop.is_for(job)), None):
        return Admission(job, kept)
    closed = {stop.site: stop for stop in holding if stop.site}
    allowed = [names.last(site) for site in job.spec.sites] or sorted(sites)
    hit = tuple(closed[site] for site in allowed if site in closed)
    if not hit:
        return Admission(job)
    left = tuple(site for site in allowed if site not in closed)
    if not left:
        return Admission(job, hit[0])
    return Admission(replace(job, spec=replace(job.spec, sites=left)), closed=hit)


def over_at(now: datetime) -> datetime:
    """When stops of this month are over: the beginning of the next, UTC."""
    return datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)


def _month(now: datetime) -> str:
    return f"{now.astimezone(UTC):%Y-%m}"
