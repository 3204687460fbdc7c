"""What console publishes: prices and adjustments coming, changing and going, and what is decided about recommendations."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.reasons import What
from whaleflux.v1 import console_pb2 as pb

SOURCE = "console"
Describe = Callable[[EntryChange, datetime], OutgoingEvent | None]


def of_price(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED, DELETED."""
    return _told(change, now, pb.GpuPrice, lambda _: "has another end")


def of_adjustment(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED (how far it is), DELETED."""
    return _told(change, now, pb.Adjustment, _how_far)


def of_budget(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED, DELETED; BUDGET_REACHED when the month's spending came over a threshold."""
    new = pb.Budget.FromString(change.new.value) if change.new else None
    old = pb.Budget.FromString(change.old.value) if change.old else None
    if new is None or old is None:
        return _told(change, now, pb.Budget, str)
    told = set(old.alerted_percents) if old.alerted_month == new.alerted_month else set()
    reached = set(new.alerted_percents) - told
    stops = new.stopped_month if new.stopped_month != old.stopped_month else ""
    if not reached and not stops:
        lifted = old.stopped_month and not new.stopped_month
        return _told(change, now, pb.Budget, lambda _: "admits new work again" if lifted else "is changed")
    percents, month = sorted({*reached, *({100} if stops else ())}), stops or new.alerted_month
    *below, percent = percents  # what is reached between two looks is one event
    more = f" (and so {', '.join(map(str, below))} %)" if below else ""
    more += "; no new work of it is started until the month is over" if stops else ""
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=new.name,
        what=What.BUDGET_REACHED,
        message=f"{month} has cost {percent} % of {new.name}{more}: whaleflux budget ls",
        attributes={"percent": str(percent), "month": month, "stops": "true" if stops else "false"},
    )


def of_recommendation(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED: it is accepted or dismissed; one that is forgotten for a newer one is no news."""
    if change.new is None:
        return None
    new = pb.Recommendation.FromString(change.new.value)
    old = pb.Recommendation.FromString(change.old.value) if change.old else None
    word = "accepted" if new.state == pb.RECOMMENDATION_STATE_ACCEPTED else "dismissed"
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=new.name,
        what=What.CHANGED if old else What.CREATED,
        message=f"{new.name}, about {new.subject}, is {word}",
        asked=asked_for(old, new),
    )


def _how_far(one: pb.Adjustment) -> str:
    return f"is {pb.AdjustmentState.Name(one.state).removeprefix('ADJUSTMENT_STATE_').lower().replace('_', ' ')}"


def _told(change: EntryChange, now: datetime, kind: Any, changed: Callable[[Any], str]) -> OutgoingEvent | None:
    new = kind.FromString(change.new.value) if change.new else None
    old = kind.FromString(change.old.value) if change.old else None
    if new is not None and new.last_change.what == What.DELETED:
        return None  # about to go
    what = What.DELETED if new is None else What.CREATED if old is None else What.CHANGED
    record = new or old or kind()
    words = {What.DELETED: "is forgotten", What.CREATED: "is declared", What.CHANGED: changed(record)}
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=record.name,
        what=what,
        message=f"{record.name} {words[what]}",
        asked=asked_for(old, new),
    )
