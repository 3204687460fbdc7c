"""Refusals that repeat are counted instead of written down one by one, so that a flood of them neither fills the trail nor hides in it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from whaleflux.trust.audit import AuditRecord

EVERY_S = 10.0
MOST = 4_096  # different ones at a time; beyond, those of one method are counted together
MANY = "anonymous/many"  # then their subject


@dataclass(slots=True)
class _Counted:
    last: AuditRecord
    since_s: float
    count: int = 0  # since it was last written down


class Denials:
    """The first of its kind is written down at once, all that follow within ten seconds as one with their number."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: OrderedDict[tuple[str, ...], _Counted] = OrderedDict()  # in the order in which they are due

    def take(self, record: AuditRecord, now_s: float) -> AuditRecord | None:
        """The record when it is the first of its kind; else it is counted."""
        record = self._merged(record)
        known = self._known.get(_kind(record))
        if known is None:
            self._known[_kind(record)] = _Counted(record, now_s)
            return record
        known.last, known.count = record, known.count + 1
        return None

    def due(self, now_s: float) -> list[tuple[AuditRecord, int]]:
        """What is to be written down now, each with how many it stands for. Kinds that did not come again are forgotten."""
        found: list[tuple[AuditRecord, int]] = []
        while self._known and now_s - (first := next(iter(self._known.values()))).since_s >= EVERY_S:
            kind, _ = self._known.popitem(last=False)
            if first.count:
                found.append((first.last, first.count))
                self._known[kind] = _Counted(first.last, now_s)
        return found

    def rest(self) -> list[tuple[AuditRecord, int]]:
        """All that is counted, now."""
        found = [(known.last, known.count) for known in self._known.values() if known.count]
        self._known.clear()
        return found

    def next_s(self) -> float | None:
        """When something is due; None: nothing is counted."""
        return next((known.since_s + EVERY_S for known in self._known.values()), None)

    def _merged(self, record: AuditRecord) -> AuditRecord:
        if len(self._known) < self._most or _kind(record) in self._known:
            return record
        return replace(record, subject=MANY, peer="", object="")


def _kind(record: AuditRecord) -> tuple[str, ...]:
    return (record.subject, record.peer, record.method, record.result, record.reason)
