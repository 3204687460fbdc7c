"""Whether the output that somebody asks for can be there; what there is instead. Pure."""

from __future__ import annotations

from typing import Protocol

from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
from whaleflux_scheduler.core.model import Attempt, Job


class LogsAsked(Protocol):
    """As in the contract's StreamLogsRequest."""

    rank: int
    all_ranks: bool
    follow: bool
    attempt: int
    tail_lines: int


def check(asked: LogsAsked, job: Job) -> None:
    """Raises InvalidArgument, which says what there is, and NotFound for what is recorded no more.

    The next attempt may be followed before there is one.
    """
    if asked.tail_lines < 0:
        raise InvalidArgument(FieldViolation("tail_lines", f"{asked.tail_lines} is negative; use 0 for all"))
    ranks = max([job.spec.world_size, 1, *(attempt.ranks for attempt in job.attempts())])
    if not asked.all_ranks and asked.rank >= ranks:
        there = "one rank, 0" if ranks == 1 else f"{ranks} ranks, 0 to {ranks - 1}"
        raise InvalidArgument(FieldViolation("rank", f"{asked.rank}: {job.name} has {there}"))
    kept = dict(job.numbered())
    comes_yet = asked.follow and not job.ended and asked.attempt == 1 + max(kept, default=0)
    if asked.attempt and not comes_yet:
        _check_attempt(asked.attempt, job, kept)


def _check_attempt(number: int, job: Job, kept: dict[int, Attempt]) -> None:
    if number in kept:
        if not kept[number].tasks:
            raise NotFound("output", job.name, f"on which nodes attempt {number} ran is recorded no more")
        return
    if not kept:
        there = "has not had any attempt yet"
    elif len(kept) == 1:
        there = f"has had one attempt, {min(kept)}"
    else:
        there = f"has attempts {min(kept)} to {max(kept)}" + (" on record" if min(kept) > 1 else "")
    raise InvalidArgument(FieldViolation("attempt", f"{number}: {job.name} {there}"))
