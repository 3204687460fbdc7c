"""Budgets that stop new work, as the console notes them in their records: followed by schedulers, which go on by what is last known.

The console alone writes these records. Nothing is asked of it, so that a scheduler decides the same while it is away.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.cache import Cache
from whaleflux.v1 import console_pb2 as pb
from whaleflux_scheduler.convert import instant
from whaleflux_scheduler.core import budget_stops
from whaleflux_scheduler.core.budget_stops import Admission, BudgetStop
from whaleflux_scheduler.core.model import Job, JobState, SchedulingDecision
from whaleflux_scheduler.core.wait_reasons import budget_is_spent, closed_by_budget
from whaleflux_scheduler.node_view import NodeView

LOOKS_MAY_TAKE = timedelta(minutes=5)  # between two looks of the console; what is older is said to be


def budget_stop(entry: Entry) -> BudgetStop:
    """Of a budget's record. Raises DecodeError for what is none."""
    one = pb.Budget.FromString(entry.value)
    return BudgetStop(
        budget=names.last(one.name),
        queue=names.last(one.queue) if one.queue else "",
        user=one.user,
        site=names.last(one.site) if one.site else "",
        micros_per_month=one.micros_per_month,
        month=one.stopped_month if one.stop else "",
        spent_micros=one.stopped_micros,
        time=instant(one, "stopped_time"),
    )


class BudgetStops:
    """See the module."""

    def __init__(self, store: Store, nodes: NodeView) -> None:
        self._store, self._nodes = store, nodes
        self.records = Cache(store, keys.BUDGETS, budget_stop)
        self._stops: tuple[BudgetStop, ...] = ()
        self._sites: frozenset[str] = frozenset()  # by which jobs were kept from others

    def changed(self) -> Collection[BudgetStop]:
        """Takes in the records as they are now; returns the stops that came, went or changed since the last call."""
        now = tuple(one for _, one in sorted(self.records.values.items()) if one.month)
        before, self._stops = self._stops, now
        return set(before) ^ set(now)

    def sites_changed(self) -> bool:
        """Whether there are other sites than at the last call, where that makes a difference to those who may not start in some."""
        if not any(stop.site for stop in self._stops):
            return False
        before, self._sites = self._sites, frozenset(self._nodes.sites)
        return before != self._sites

    def admit(self, job: Job, now: datetime) -> Admission:
        """What they leave of the job."""
        if not self._stops or job.state is not JobState.QUEUED:
            return Admission(job)
        return budget_stops.admit(job, self._stops, self._nodes.sites, now)

    def over_at(self, job: Job, now: datetime) -> datetime | None:
        """When the job has to be looked at again because a stop is over; None: none is in its way."""
        found = self.admit(job, now)
        return budget_stops.over_at(now) if found.kept_by or found.closed else None

    def why(self, job: Job, now: datetime) -> SchedulingDecision | None:
        """Why it may not start at all; None: no budget keeps it back."""
        stop = self.admit(job, now).kept_by
        return budget_is_spent(stop, budget_stops.over_at(now), now) if stop else None

    def closed(self, job: Job, now: datetime) -> tuple[str, ...]:
        """Which sites it may not start in, in words."""
        return tuple(closed_by_budget(stop) for stop in self.admit(job, now).closed)

    async def how_sure(self, now: datetime) -> tuple[str, ...]:
        """In words, where the console has not looked lately: what was spent, or changed in a bill, since is not known."""
        entry = await self._store.get(keys.BUDGET_LOOK)
        at = _looked_at(entry)
        if at is not None and now - at <= LOOKS_MAY_TAKE:
            return ()
        since = f"since {at:%Y-%m-%d %H:%M} UTC" if at is not None else "at any time that is known"
        return (f"the console has not held budgets against what is spent {since}: this is what was known last",)


def _looked_at(entry: Entry | None) -> datetime | None:
    """None: at no time that is known."""
    try:
        return instant(pb.BudgetLook.FromString(entry.value), "time") if entry is not None else None
    except DecodeError:
        return None
