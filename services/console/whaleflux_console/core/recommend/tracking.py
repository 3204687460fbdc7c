"""What accepted recommendations really saved, and what that says of their kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.recommend.evidence import MONTH_MS, share_ppm
from whaleflux_console.core.recommend.recommendation import Kind

CASES = 10  # so many must be known before a kind is judged
KEPT_PPM = 900_000  # what realises less of its promises lowers them
FIRST_ANSWER_MS = 24 * HOUR_MS  # after the acceptance
# What is ended by the change itself, so that no bill afterwards is the success: judged by money, others by the share of their bill.
_BY_MONEY = frozenset({Kind.RELEASE_IDLE, Kind.HAND_BACK, Kind.DEFRAGMENT})


@dataclass(frozen=True, slots=True)
class Before:
    """Of the window that it was made of."""

    kind: Kind
    hours: int
    bill_micros: int
    paid_micros: int  # for the classes that it is about
    promised_micros_per_month: int


@dataclass(frozen=True, slots=True)
class After:
    """From the acceptance on, of the same subject."""

    start_ms: int
    end_ms: int
    bill_micros: int
    paid_micros: int


@dataclass(frozen=True, slots=True)
class Record:
    """How well a kind keeps its promises; `trust_ppm` is what its estimates are multiplied by."""

    cases: int
    promised_micros_per_month: int
    realised_micros_per_month: int
    trust_ppm: int


def realised_micros_per_month(before: Before, after: After) -> int | None:
    """What is paid less for these classes than before; None: it is too early, or the subject is gone without having shown it.

    Below 0: it became dearer.
    """
    elapsed_ms = after.end_ms - after.start_ms
    if elapsed_ms < FIRST_ANSWER_MS:
        return None
    monthly = before.paid_micros * MONTH_MS // (before.hours * HOUR_MS)
    if before.kind in _BY_MONEY:
        return monthly - after.paid_micros * MONTH_MS // elapsed_ms
    if after.bill_micros <= 0 or before.bill_micros <= 0:
        return None
    was, now = (share_ppm(one.paid_micros, one.bill_micros) for one in (before, after))
    bill = before.bill_micros * MONTH_MS // (before.hours * HOUR_MS)
    return bill * (was - now) // WHOLE_PPM


def records(cases: Iterable[tuple[Kind, int, int]]) -> Mapping[Kind, Record]:
    """Of (kind, promised, realised), micro-dollars per month."""
    by_kind: dict[Kind, list[tuple[int, int]]] = {}
    for kind, promised, realised in cases:
        by_kind.setdefault(kind, []).append((promised, realised))
    return {kind: _record(pairs) for kind, pairs in by_kind.items()}


def _record(pairs: list[tuple[int, int]]) -> Record:
    promised, realised = (sum(column) for column in zip(*pairs, strict=True))
    kept = max(0, min(WHOLE_PPM, share_ppm(realised, promised)))
    judged = len(pairs) >= CASES and kept < KEPT_PPM
    return Record(len(pairs), promised, realised, kept if judged else WHOLE_PPM)
