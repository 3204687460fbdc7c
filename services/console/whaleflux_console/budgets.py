"""What a month may cost: declared, listed with what is spent, and told of once when a threshold is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    StatusError,
    Unavailable,
)
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Entry, Put, Store, Unchanged
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core import budget_rules, price_rules
from whaleflux_console.costs import Costs
from whaleflux_console.forecasts import Forecasts, scope_of
from whaleflux_console.records import Records

MOST_BUDGETS = 1_000
_EVERY_S = 20.0
_STOPPED = ("stopped_month", "stopped_time", "stopped_micros")
_OUTPUT = ("alerted_month", "alerted_percents", *_STOPPED, "forecast", "last_change", "etag")
_log = telemetry.get_logger("whaleflux.console.budgets")


class Budgets:
    """Their records."""

    def __init__(self, store: Store, clock: Clock, queue_access: Callable[[str], Access]) -> None:
        self._store, self._queue_access = store, queue_access
        self._records = Records(store, clock, pb.Budget, keys.BUDGETS, "budget", "whaleflux budget ls")

    async def set(self, request: pb.SetBudgetRequest) -> pb.Budget:
        """Declares or changes one. Raises InvalidArgument naming every field that is wrong."""
        wanted = pb.Budget()
        wanted.CopyFrom(request.budget)
        for field in _OUTPUT:
            wanted.ClearField(field)
        wanted.name = names.join(("budgets", request.budget_id))
        if not wanted.alert_percents:
            wanted.alert_percents.extend(budget_rules.DEFAULT_PERCENTS)
        if problems := list(_problems(wanted)):
            raise InvalidArgument(problems)
        return wanted if request.validate_only else await self._stored(wanted, request.budget.etag)

    async def page(self, request: pb.ListBudgetsRequest, costs: Costs | None) -> pb.ListBudgetsResponse:
        """One page, each with its forecast; without those of queues that the caller may not see."""
        ownership.note_asked()
        page = await self._records.page(request.page_size, request.page_token)
        seen = [one for one in page.items if self._may_see(one.queue)]
        if costs is not None:
            for one in seen:
                one.forecast.CopyFrom(await costs.forecast(scope_of(one)))
        return pb.ListBudgetsResponse(budgets=seen, next_page_token=page.next_page_token, unreadable=page.unreadable)

    async def delete(self, name: str, etag: str) -> None:
        """Forgets it."""
        names.split(name, "budgets")
        await self._records.delete(name, etag)

    def _may_see(self, queue: str) -> bool:
        return not queue or ownership.may_see(auth.principal(), self._queue_access(names.last(queue)))

    async def _stored(self, wanted: pb.Budget, etag: str) -> pb.Budget:
        def edit(there: pb.Budget) -> None:
            was = pb.Budget()
            was.CopyFrom(there)
            there.CopyFrom(wanted)
            there.alerted_month = was.alerted_month
            there.alerted_percents.extend(_still_told(was, wanted))
            if _still_stops(was, wanted):
                _stop(there, was.stopped_month, was.stopped_time, was.stopped_micros)

        try:
            return await self._records.change(wanted.name, etag, edit, "it is set anew")
        except NotFound:
            if etag:
                raise
        if len((await self._store.list(keys.BUDGETS)).entries) >= MOST_BUDGETS:
            raise FailedPrecondition(
                f"there are {MOST_BUDGETS} budgets already; forget some: whaleflux budget rm BUDGET"
            )
        try:
            return await self._records.create(wanted.name, wanted)
        except AlreadyExists:
            raise Aborted(f"{wanted.name} was declared meanwhile; repeat the request", retry_after_s=0.1) from None


@dataclass(frozen=True, slots=True)
class BudgetWatch:
    """Notes in a budget's record what its month has reached, and that it stops new work: so it is told once, whoever leads."""

    store: Store
    forecasts: Forecasts
    clock: Clock

    async def run(self, leader: Leader) -> None:
        """While it leads."""
        while True:
            try:
                await self.round(leader)
            except (Unavailable, DeadlineExceeded) as trouble:
                _log.warning(Event.LEDGER_TROUBLE, reason=str(trouble))
            await self.clock.sleep(_EVERY_S)

    async def round(self, leader: Leader) -> None:
        """Looks at every budget once, also when one of them cannot be looked at.

        As of when all of that is true, which is no later than the ledger, is noted for schedulers: they go on by it while this is away.
        """
        budgets = read_all((await self.store.list(keys.BUDGETS)).entries, _budget).values
        now = self.clock.now()
        as_of_ms = [await self._looked(leader, entry, budget, now) for entry, budget in budgets]
        if all(as_of_ms) and any(budget.stop for _, budget in budgets):
            look = pb.BudgetLook()
            look.time.FromMilliseconds(min(round(now.timestamp() * 1000), *as_of_ms))
            await self.store.commit(Put(keys.BUDGET_LOOK, look.SerializeToString()), when=[leader.held])

    async def _looked(self, leader: Leader, entry: Entry, budget: pb.Budget, now: datetime) -> int:
        """As of when the ledger was, Unix milliseconds; 0: nobody knows. Trouble with one budget keeps no other from being looked at."""
        try:
            return await self._look(leader, entry, budget, now)
        except StatusError as trouble:
            _log.warning(Event.LEDGER_TROUBLE, reason=f"{budget.name}: {trouble}")
            return 0

    async def _look(self, leader: Leader, entry: Entry, budget: pb.Budget, now: datetime) -> int:
        spent = await self.forecasts.spent(scope_of(budget))
        before = budget.SerializeToString(deterministic=True)
        _note_thresholds(budget, spent.micros, f"{now:%Y-%m}")
        _note_stop(budget, spent.micros, now)
        value = budget.SerializeToString(deterministic=True)
        if value == before:
            return spent.as_of_ms
        try:
            await self.store.commit(Put(entry.key, value), when=[leader.held, Unchanged(entry)])
        except ConditionFailed:  # somebody changed it: the next round looks again
            _log.info(Event.LEDGER_TROUBLE, reason=f"{budget.name} changed meanwhile")
        return spent.as_of_ms


def _note_thresholds(budget: pb.Budget, spent_micros: int, month: str) -> None:
    told = list(budget.alerted_percents) if budget.alerted_month == month else []
    reached = budget_rules.reached(spent_micros, budget.micros_per_month, budget.alert_percents)
    if not set(reached) <= set(told):
        budget.alerted_month = month
        budget.ClearField("alerted_percents")
        budget.alerted_percents.extend(sorted({*told, *reached}))


def _note_stop(budget: pb.Budget, spent_micros: int, now: datetime) -> None:
    """A stop of another month is over by itself, whatever this clock says: it is left as it is."""
    month = f"{now:%Y-%m}"
    spent = budget.stop and spent_micros >= budget.micros_per_month
    if spent and budget.stopped_month != month:
        at = Timestamp()
        at.FromDatetime(now)
        _stop(budget, month, at, spent_micros)
    elif not spent and budget.stopped_month == month:  # its bill became less
        _clear(budget)


def _stop(budget: pb.Budget, month: str, at: Timestamp, spent_micros: int) -> None:
    budget.stopped_month, budget.stopped_micros = month, spent_micros
    budget.stopped_time.CopyFrom(at)


def _clear(budget: pb.Budget) -> None:
    for field in _STOPPED:
        budget.ClearField(field)


def _budget(entry: Entry) -> pb.Budget:
    return pb.Budget.FromString(entry.value)


def _still_told(was: pb.Budget, wanted: pb.Budget) -> list[int]:
    """Thresholds that need not be told again: what was told of another queue, user or site says nothing of this one's."""
    if scope_of(was) != scope_of(wanted):
        return []
    kept = [percent for percent in was.alerted_percents if percent in wanted.alert_percents]
    return budget_rules.still_reached(kept, was.alerted_percents, was.micros_per_month, wanted.micros_per_month)


def _still_stops(was: pb.Budget, wanted: pb.Budget) -> bool:
    """Whether the stop goes on: for the same work, and the month had cost all of the new amount too."""
    same = wanted.stop and bool(was.stopped_month) and scope_of(was) == scope_of(wanted)
    return same and was.stopped_micros >= wanted.micros_per_month


def _problems(one: pb.Budget) -> Iterator[FieldViolation]:
    scopes = [name for name in ("queue", "user", "site") if getattr(one, name)]
    if len(scopes) > 1:
        yield FieldViolation(
            f"budget.{scopes[1]}", f"is set beside {scopes[0]}; a budget is for one of them, or for all"
        )
    yield from price_rules.resource("budget.queue", one.queue, "queues")
    yield from price_rules.resource("budget.site", one.site, "sites")
    yield from budget_rules.user("budget.user", one.user)
    yield from price_rules.number("budget.micros_per_month", one.micros_per_month, 1, price_rules.MOST_MICROS)
    yield from budget_rules.percents("budget.alert_percents", one.alert_percents)
