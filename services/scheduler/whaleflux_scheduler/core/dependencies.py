"""Jobs that wait for the end of others. Pure.

A job is told from others of its name by its uid. What is not known (a record that cannot be read) is waited for; a job that was
deleted before its end was seen is not taken for one that succeeded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from whaleflux_scheduler.core.model import ENDED, Awaited, JobState, When

FEW = 8  # of so few each end is stored
_WORDS = {When.SUCCEEDED: "to succeed", When.ENDED: "to end", When.FAILED: "to end without success"}
Ends = Mapping[str, JobState]
"""By uid: the state of a job that is there, UNSPECIFIED of one that was deleted and whose end nobody saw; others are not known."""


def left(awaits: tuple[Awaited, ...], ends: Ends) -> tuple[Awaited, ...]:
    """What is still waited for; the same object when that is all."""
    kept = tuple(one for one in awaits if not met(one.when, ends.get(one.uid)))
    return awaits if len(kept) == len(awaits) else kept


def worth_writing(awaits: tuple[Awaited, ...], left: tuple[Awaited, ...], gone: Collection[str]) -> bool:
    """Whether what is left is to be stored now. Of many, halves are: the ends themselves say the rest, unless a record is `gone` (uids).

    Each member of an array ends by itself, and all who wait for the array would write all of their record each time.
    """
    if len(awaits) <= FEW or 2 * len(left) <= len(awaits):
        return True
    kept = {one.uid for one in left}
    return any(one.uid in gone and one.uid not in kept for one in awaits)


def never(awaits: tuple[Awaited, ...], ends: Ends) -> tuple[Awaited, str] | None:
    """The first that can never be as it must be, and why; None: none."""
    for one in awaits:
        state = ends.get(one.uid)
        if state is JobState.UNSPECIFIED and one.when is not When.ENDED:
            return one, f"{one.job} was deleted before it was seen {words(one)}"
        if state in ENDED and not met(one.when, state):
            return one, f"{one.job} is {state.name}, and this job waits for it {words(one)}"
    return None


def words(awaited: Awaited) -> str:
    """What the job must do."""
    return _WORDS.get(awaited.when, "to end as a newer version asks for")


def met(when: When, state: JobState | None) -> bool:
    """Whether a job of that state is as it must be; None: that is not known."""
    match when:
        case When.SUCCEEDED:
            return state is JobState.SUCCEEDED
        case When.FAILED:
            return state in (JobState.FAILED, JobState.CANCELLED)
        case When.ENDED:
            return state in ENDED or state is JobState.UNSPECIFIED  # only what has ended can be deleted
        case _:
            return False
