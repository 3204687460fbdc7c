"""What a budget may say, and which of its thresholds are reached. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from whaleflux.errors import FieldViolation

DEFAULT_PERCENTS = (50, 80, 100)
MOST_PERCENTS = 8
_HIGHEST_PERCENT = 1_000
_MOST_USER = 128  # characters


class Outlook(Enum):
    """What is to be expected of a budget's month."""

    WITHIN = "within"
    OVER = "over"
    UNKNOWN = "unknown"  # too few days are known to foretell it


def outlook(spent_micros: int, expected_micros: int | None, budget_micros: int) -> Outlook:
    """Whether the whole month costs more than the budget; None: nobody knows what it will have cost."""
    if max(spent_micros, expected_micros or 0) > budget_micros:
        return Outlook.OVER
    return Outlook.UNKNOWN if expected_micros is None else Outlook.WITHIN


def reached(spent_micros: int, budget_micros: int, percents: Sequence[int]) -> list[int]:
    """Thresholds that the spending is at or above, in whole micro-dollars."""
    return sorted({percent for percent in percents if spent_micros * 100 >= budget_micros * percent})


def still_reached(kept: Sequence[int], told: Sequence[int], was_micros: int, now_micros: int) -> list[int]:
    """Those of `kept` that the spending is at or above in the new amount too, as far as what was `told` of the old one shows it."""
    return reached(max(told, default=0) * was_micros // 100, now_micros, kept)


def percents(field: str, values: Sequence[int]) -> Iterator[FieldViolation]:
    """Few, different, of 1 to 1000."""
    if len(values) > MOST_PERCENTS:
        yield FieldViolation(field, f"are {len(values)}; use at most {MOST_PERCENTS}")
    if twice := sorted({value for value in values if list(values).count(value) > 1}):
        yield FieldViolation(field, f"{twice[0]} is there twice; leave one out")
    for value in values:
        if not 1 <= value <= _HIGHEST_PERCENT:
            yield FieldViolation(field, f"{value} is outside of 1 to {_HIGHEST_PERCENT}")


def user(field: str, value: str) -> Iterator[FieldViolation]:
    """role/name, or nothing."""
    role, _, name = value.partition("/")
    if value and (not role or not name or len(value) > _MOST_USER or not value.isprintable()):
        yield FieldViolation(field, f"{value[:64]!r} is no role/name; use one such as user/ann")
