"""Which events somebody asks for: subjects for the server to search by its index, and the exact rest. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.names import collections, split

KINDS: dict[str, tuple[str, ...]] = {  # and the collections of a full name
    "job": ("queues", "jobs"),
    "node": ("sites", "nodes"),
    "model": ("models",),
    "replica": ("models", "replicas"),
    "incident": ("incidents",),
    "checkpoint": ("queues", "jobs", "checkpoints"),
    "queue": ("queues",),
    "reservation": ("reservations",),
    "raycluster": ("rayClusters",),
    "dataset": ("datasets",),
    "site": ("sites",),
    "offer": ("offers",),
    "lease": ("leases",),
    "jointoken": ("joinTokens",),
    "apikey": ("apiKeys",),
    "price": ("prices",),
    "adjustment": ("adjustments",),
    "budget": ("budgets",),
    "recommendation": ("recommendations",),
}
MOST_WORDS = 32
SKEW = timedelta(minutes=5)  # by which the clock of whoever wrote it down may be ahead of the bus
LATEST = timedelta(days=1)  # by which a publication may be late and is still found below a given end


@dataclass(frozen=True, slots=True)
class EventFilter:
    """See `whaleflux.v1.EventFilter`; instants are UTC."""

    resource: str = ""
    kinds: tuple[str, ...] = ()
    what: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def admits(self, resource: str, what: str, at: datetime) -> bool:
        """Whether an event that the subjects let through is one of those asked for."""
        if self.resource and resource != self.resource and not resource.startswith(f"{self.resource}/replicas/"):
            return False
        if self.what and what.upper() not in self.what:
            return False
        return (self.since is None or at >= self.since) and (self.until is None or at < self.until)

    def is_over(self, stored: datetime) -> bool:
        """Whether nothing that was stored from then on can have happened before the end asked for."""
        return self.until is not None and stored > self.until + LATEST

    def is_before(self, stored: datetime) -> bool:
        """Whether all that was stored until then happened before the beginning asked for: nothing is stored before it happens."""
        return self.since is not None and stored < self.since - SKEW

    @property
    def first_stored(self) -> datetime | None:
        """What is asked for was not stored before this."""
        return self.since - SKEW if self.since is not None else None


def event_filter(
    resource: str,
    kinds: Collection[str],
    what: Collection[str],
    since: datetime | None = None,
    until: datetime | None = None,
) -> EventFilter:
    """Raises InvalidArgument naming each wrong field."""
    wrong = [
        FieldViolation(f"filter.kinds[{i}]", f"{kind[:40]!r} is none of {', '.join(KINDS)}")
        for i, kind in enumerate(kinds)
        if kind not in KINDS
    ]
    if len(what) > MOST_WORDS:
        wrong.append(FieldViolation("filter.what", f"{len(what)} words; use at most {MOST_WORDS}"))
    if since is not None and until is not None and since >= until:
        wrong.append(FieldViolation("filter.until", "is not after filter.since"))
    if wrong:
        raise InvalidArgument(wrong)
    if resource:
        _ids(resource)
    return EventFilter(resource, tuple(dict.fromkeys(kinds)), frozenset(word.upper() for word in what), since, until)


def subjects(wanted: EventFilter, root: str) -> list[str]:
    """Patterns of subjects, `<root>.<site>.<kind>.<id>.<what>`, none of which overlap."""
    if wanted.resource:
        kind, ids = _ids(wanted.resource)
        own = [f"{root}.*.{kind}.{ids}.*"]
        return [*own, f"{root}.*.replica.*.*"] if kind == "model" else own
    return [f"{root}.*.{kind}.*.*" for kind in wanted.kinds] or [f"{root}.>"]


def _ids(resource: str) -> tuple[str, str]:
    """Kind and joined ids of a full name, as subjects have them."""
    found = collections(resource)
    kind = next((kind for kind, form in KINDS.items() if form == found), "")
    if not kind:
        raise InvalidArgument(
            FieldViolation(
                "filter.resource",
                f"{resource[:100]!r} is not a full name such as queues/default/jobs/j or sites/a/nodes/n",
            )
        )
    return kind, "_".join(split(resource, *found, field="filter.resource"))
