"""All recommendations of a window, the dearest first, with what they overlap taken out once: what all together would save.

A subject's class is paid once. What two recommendations would both save of it counts for the one that saves more; so the total never
exceeds what was wasted, and that never exceeds the bill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend import (
    checkpoint_interval,
    commit,
    defragment,
    fewer_gpus,
    hand_back,
    one_island,
    release_idle,
    slow_node,
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
        *slow_node.find(window),
        *(one for rented in window.rented if (one := commit.find(window, rented))),
    ]
    trusted = [_trusted(one, (trust_ppm or {}).get(one.kind, WHOLE_PPM)) for one in found]
    ordered = sorted(trusted, key=lambda one: (-one.saved_micros, one.kind, one.subject))
    return joint(apart(ordered, window), window)


def apart(found: Iterable[Recommendation], window: Window) -> tuple[Recommendation, ...]:
    """Without what an earlier one saves already; one that has nothing left is left out."""
    left = _Left(window)
    kept = [one.saving(left.taken(one.pieces)) for one in found]
    return tuple(
        sorted(
            (one for one in kept if one.saved_micros > 0), key=lambda one: (-one.saved_micros, one.kind, one.subject)
        )
    )


def joint(found: Sequence[Recommendation], window: Window) -> Joint:
    """Their sum, held against what was paid."""
    about = {(subject, kind) for one in found for subject in one.pieces for kind in one.evidence}
    left = _Left(window)
    made = Joint(
        tuple(found),
        sum(one.saved_micros for one in found),
        sum(left.of(subject, kind) for subject, kind in about),
        window.all_micros or sum(spent.whole.bill_micros for spent in left.paid.values()),
    )
    if not made.total_micros <= made.targeted_micros <= made.bill_micros:
        raise ArithmeticError(f"saves {made.total_micros} of {made.targeted_micros} of a bill of {made.bill_micros}")
    return made


class _Left:
    """What is still paid for each class of each subject."""

    def __init__(self, window: Window) -> None:
        self.paid = {spent.subject: spent for spent in (*window.jobs, *window.pools, *window.others)}
        self.paid.update({rented.spent.subject: rented.spent for rented in window.rented})
        self._left: dict[tuple[str, CostClass], int] = {}

    def of(self, subject: str, kind: CostClass) -> int:
        if (subject, kind) not in self._left:
            self._left[subject, kind] = self.paid[subject].whole.of(kind)
        return self._left[subject, kind]

    def taken(self, pieces: Mapping[str, Mapping[CostClass, int]]) -> dict[str, dict[CostClass, int]]:
        """As much of it as is left, which is then saved."""
        found = {
            subject: {kind: max(0, min(micros, self.of(subject, kind))) for kind, micros in saved.items()}
            for subject, saved in pieces.items()
        }
        for subject, saved in found.items():
            for kind, micros in saved.items():
                self._left[subject, kind] -= micros
        return found


def _trusted(one: Recommendation, ppm: int) -> Recommendation:
    return one.saving(
        {
            subject: {kind: micros * ppm // WHOLE_PPM for kind, micros in saved.items()}
            for subject, saved in one.pieces.items()
        }
    )
