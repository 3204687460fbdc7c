"""What may be asked of the ledger, checked: which window, by what, of what. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES
from whaleflux_console.ledger.manifest import DAY_MS

FIELDS = ("site", "gpu_class", "node", "queue", "user", "job", "model", "basis", "price_kind", "adjustment")
TIMES = {"hour": HOUR_MS, "day": DAY_MS}
CLASS = "class"
BILL = "bill"
MAX_BY = 3
MAX_VALUES = 10_000
MAX_CHARACTERS = 300
MAX_ROWS = 10_000
MAX_WINDOW_MS = 5 * 366 * DAY_MS
MAX_HOURS_MS = 35 * DAY_MS  # of a window by hour


@dataclass(frozen=True, slots=True)
class Question:
    """Bills in [start_ms, end_ms), whole hours, summed `by` up to three of FIELDS, one of TIMES, CLASS.

    `where`: only rows whose field is one of the values ("" is nobody's, of none). `order`: BILL or a cost class, dearest first; by a time
    in its order. `limit` rows; what it cuts off is summed in the answer too.
    """

    start_ms: int
    end_ms: int
    by: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    order: str = BILL
    limit: int = 1_000

    @property
    def time(self) -> str:
        """The time that it is by, or empty."""
        return next((each for each in self.by if each in TIMES), "")


def check(question: Question) -> None:
    """Raises InvalidArgument that names each bad field with what would be right."""
    if bad := [*_bad_window(question), *_bad_by(question), *_bad_where(question.where), *_bad_order(question)]:
        raise InvalidArgument(bad)


def _bad_window(question: Question) -> list[FieldViolation]:
    start, end = question.start_ms, question.end_ms
    if start % HOUR_MS or end % HOUR_MS:
        return [FieldViolation("window", "begins and ends with whole hours (UTC)")]
    if not 0 <= start < end:
        return [FieldViolation("window", "ends before it begins, or at once: give a later end")]
    if end - start > MAX_WINDOW_MS:
        return [FieldViolation("window", "is longer than five years: ask for a part of it")]
    if question.time == "hour" and end - start > MAX_HOURS_MS:
        return [
            FieldViolation(
                "window", "is longer than 35 days, which is the most by hour: ask by day, or for a part of it"
            )
        ]
    return []


def _bad_by(question: Question) -> list[FieldViolation]:
    known = (*FIELDS, *TIMES, CLASS)
    bad = [
        FieldViolation("by", f"{_shown(each)}: use of {', '.join(known)}") for each in question.by if each not in known
    ]
    if len(set(question.by)) > MAX_BY or len(set(question.by)) < len(question.by):
        bad.append(FieldViolation("by", f"takes up to {MAX_BY} different ones"))
    if len(set(question.by) & set(TIMES)) > 1:
        bad.append(FieldViolation("by", "takes one of hour and day"))
    return bad


def _bad_where(where: Mapping[str, Sequence[str]]) -> list[FieldViolation]:
    bad = []
    for name, values in where.items():
        if name not in FIELDS:
            bad.append(FieldViolation("where", f"{_shown(name)}: use of {', '.join(FIELDS)}"))
        elif not 1 <= len(values) <= MAX_VALUES or any(len(value) > MAX_CHARACTERS for value in values):
            limit = (
                f"takes 1 to {MAX_VALUES} values of at most {MAX_CHARACTERS} characters; leave the filter out for all"
            )
            bad.append(FieldViolation(f"where.{name}", limit))
    return bad


def _bad_order(question: Question) -> list[FieldViolation]:
    bad = []
    if question.order not in (BILL, *CLASSES):
        bad.append(
            FieldViolation("order", f"{_shown(question.order)}: use {BILL} or a cost class: {', '.join(CLASSES)}")
        )
    if not 1 <= question.limit <= MAX_ROWS:
        bad.append(FieldViolation("limit", f"{question.limit}: use 1 to {MAX_ROWS}"))
    return bad


def _shown(word: str) -> str:
    return repr(word[:64])
