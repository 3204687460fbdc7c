"""All recommendations of a window, the dearest first, with what they overlap taken out once: what all together would save.

A subject's class is paid once. What two recommendations would both save of it counts for the one that saves more; so the total never
exceeds what was wasted, and that never exceeds the bill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend import (
    checkpoint_interval,
    defragment,
    fewer_gpus,
    hand_back,
    one_island,
    release_idle,
)
from whaleflux_console.core.recommend.evidence import Window
from whaleflux_console.core.recommend.recommendation import Kind, Recommendation
from whaleflux_console.core.rows import CostClass

_OF_JOBS = (release_idle.find, one_island.find, checkpoint_interval.find, fewer_gpus.find)
_OF_POOLS = (defragment.find, hand_back.find)


@dataclass(frozen=True, slots=True)
class Joint:
    """`total_micros` <= `targeted_micros` (what the window paid for the classes that they are about) <= `bill_micros`."""

    found: tuple[Recommendation, ...]
    total_micros: int
    targeted_micros: int
    bill_micros: int


def recommend(window: Window, trust_ppm: Mapping[Kind, int] | None = None) -> Joint:
    """`trust_ppm`: by how much a kind kept what it promised where that is known to be less."""
    found = [
        *(one for job in window.jobs for find in _OF_JOBS if (one := find(window, job))),
        *(one for pool in window.pools for find in _OF_POOLS if (one := find(window, pool))),
    ]
    trusted = [_trusted(one, (trust_ppm or {}).get(one.kind, WHOLE_PPM)) for one in found]
    return joint(apart(sorted(trusted, key=lambda one: (-one.saved_micros, one.kind, one.subject))), window)


def apart(found: Iterable[Recommendation]) -> tuple[Recommendation, ...]:
    """Without what an earlier one saves already; one that has nothing left is left out."""
    left: dict[tuple[str, CostClass], int] = {}
    kept: list[Recommendation] = []
    for one in found:
        saved: dict[CostClass, int] = {}
        for kind, micros in one.saved.items():
            room = left.setdefault((one.subject, kind), one.evidence[kind])
            saved[kind] = max(0, min(micros, room))
            left[one.subject, kind] = room - saved[kind]
        if sum(saved.values()) > 0:
            kept.append(replace(one, saved=saved))
    return tuple(sorted(kept, key=lambda one: (-one.saved_micros, one.kind, one.subject)))


def joint(found: Sequence[Recommendation], window: Window) -> Joint:
    """Their sum, held against what was paid."""
    paid = {(one.subject, kind): micros for one in found for kind, micros in one.evidence.items()}
    made = Joint(
        tuple(found),
        sum(one.saved_micros for one in found),
        sum(paid.values()),
        sum(spent.whole.bill_micros for spent in (*window.jobs, *window.pools)),
    )
    if not made.total_micros <= made.targeted_micros <= made.bill_micros:
        raise ArithmeticError(f"saves {made.total_micros} of {made.targeted_micros} of a bill of {made.bill_micros}")
    return made


def _trusted(one: Recommendation, ppm: int) -> Recommendation:
    return replace(one, saved={kind: micros * ppm // WHOLE_PPM for kind, micros in one.saved.items()})
