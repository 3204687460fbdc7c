"""What the GPUs of a machine that is played do while work has them: "usage=45%@50s,0%@10s", again and again. Pure.

Nothing is there that could be measured: whoever plays a machine says what its counters shall show, and without this they show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux import quantities
from whaleflux.errors import FieldViolation, InvalidArgument

_MOST_SPELLS = 32
_LONGEST_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Spell:
    """Tensor cores work for this share of the time, for so many seconds; 0: no kernel runs."""

    tensor_share: float
    for_s: float


def parse(text: str) -> tuple[Spell, ...]:
    """Of `usage=PERCENT%@TIME,...`. Raises InvalidArgument with what would be right."""
    try:
        spells = tuple(_spell(part) for part in text.split(","))
    except ValueError:
        spells = ()
    if not 1 <= len(spells) <= _MOST_SPELLS:
        form = f"usage=PERCENT%@TIME, at most {_MOST_SPELLS} with commas, of 0 to 100 % and at most a day: usage=45%@50s,0%@10s"
        raise InvalidArgument(FieldViolation("profile", f"usage={text[:100]!r} is not {form}"))
    return spells


def mean_share(spells: Sequence[Spell], start_s: float, end_s: float) -> float:
    """The mean of what is played over and over from second 0 on, between two seconds."""
    if end_s <= start_s:
        return 0.0
    return (_area(spells, end_s) - _area(spells, start_s)) / (end_s - start_s)


def busy_share(spells: Sequence[Spell], start_s: float, end_s: float) -> float:
    """For which share of that time a kernel ran."""
    return mean_share([Spell(float(one.tensor_share > 0), one.for_s) for one in spells], start_s, end_s)


def _spell(part: str) -> Spell:
    share, _, time = part.partition("@")
    found = Spell(float(share.removesuffix("%")) / 100, quantities.seconds(time))
    if not (share.endswith("%") and 0 <= found.tensor_share <= 1 and 0 < found.for_s <= _LONGEST_S):
        raise ValueError(part)
    return found


def _area(spells: Sequence[Spell], until_s: float) -> float:
    """Seconds of work from second 0 on."""
    rounds, left_s = divmod(until_s, math.fsum(one.for_s for one in spells))
    area = rounds * math.fsum(one.tensor_share * one.for_s for one in spells)
    for one in spells:
        area += one.tensor_share * min(one.for_s, left_s)
        left_s = max(0.0, left_s - one.for_s)
    return area
