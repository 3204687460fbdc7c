"""What was decided about a job, over time. Pure.

Placements, starts and ends of attempts follow from the job's record at any time (`in_record`), so that none is missing, whoever led. What
a record forgets is noted as it happens: claims, holds, priorities (`of_change`), and why the job waits when the kind of reason changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum

from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.model import Attempt, Claim, ClaimPurpose, Job, SchedulingDecision
from whaleflux_scheduler.core.observed import EndReason

MOST = 50  # entries kept of one job, the newest
MOST_CHARS = 300  # of one message


class DecisionKind(IntEnum):
    """What was decided."""

    UNSPECIFIED = 0
    WAITS = 1
    PLACED = 2
    RUNS = 3
    MAKES_ROOM = 4  # others are stopped for it
    PROMISED = 5  # a start at a certain time
    GOES_ON_ELSEWHERE = 6  # a place is kept where it goes on, with as many GPUs or others
    CLAIM_ENDED = 7  # what was kept for it is not any more
    PREEMPTED = 8
    MOVED = 9
    RESIZED = 10
    REQUEUED = 11
    INTERRUPTED = 12  # its attempt ended by a failure, a lost or drained node, or a deadline
    HELD = 13
    RELEASED = 14
    PRIORITY_CHANGED = 15
    ENDED = 16


_PLANNED = {
    EndReason.PREEMPTED: DecisionKind.PREEMPTED,
    EndReason.MOVED: DecisionKind.MOVED,
    EndReason.RESIZED: DecisionKind.RESIZED,
    EndReason.REQUEUED: DecisionKind.REQUEUED,
}
_CLAIMED = {
    ClaimPurpose.RESERVATION: DecisionKind.PROMISED,
    ClaimPurpose.RESIZE: DecisionKind.GOES_ON_ELSEWHERE,
    ClaimPurpose.MOVE: DecisionKind.GOES_ON_ELSEWHERE,
}
_OF_ATTEMPTS = frozenset(
    {DecisionKind.PLACED, DecisionKind.RUNS, DecisionKind.INTERRUPTED, DecisionKind.ENDED, *_PLANNED.values()}
)


@dataclass(frozen=True, slots=True)
class Noted:
    """One decision. `attempt` from 1, 0: none; `position` in its queue while it waited, 0: not known; `gpus` that it got or is to get."""

    time: datetime
    kind: DecisionKind
    message: str
    attempt: int = 0
    position: int = 0
    gpus: int = 0


def of_wait(decision: SchedulingDecision) -> Noted:
    """Why it waits."""
    message = decision.summary.removeprefix("waits: ")[:MOST_CHARS]
    return Noted(decision.time, DecisionKind.WAITS, message, position=decision.position)


_NAMES, _NUMBERS = re.compile(r"\b[\w.-]+(?:/[\w.-]+)+"), re.compile(r"\d+(?:\.\d+)?")


def kind_of_wait(decision: SchedulingDecision) -> str:
    """The reason without what changes all the time: names, numbers, and what follows the first half of the sentence."""
    return _NUMBERS.sub("#", _NAMES.sub("…", re.split(r"[;(]", decision.summary)[0])).strip()


def of_change(old: Job, new: Job, now: datetime) -> Iterator[Noted]:
    """What the new record will not tell later."""
    if new.claim != old.claim:
        yield from _of_claim(old, new, now)
    if new.hold != old.hold and new.hold is not None:
        why = f": {new.hold.reason}" if new.hold.reason else ""
        yield Noted(new.hold.time, DecisionKind.HELD, f"by {new.hold.by}{why}"[:MOST_CHARS])
    elif new.hold != old.hold and not new.ended:
        yield Noted(now, DecisionKind.RELEASED, "")
    if new.spec.priority != old.spec.priority:
        told = f"from {old.spec.priority} to {new.spec.priority}"
        yield Noted(now, DecisionKind.PRIORITY_CHANGED, told)


def _of_claim(old: Job, new: Job, now: datetime) -> Iterator[Noted]:
    if new.claim is None:
        placed = new.attempt is not None and (old.attempt is None or old.attempt.epoch != new.attempt.epoch)
        if not placed and not new.ended:
            yield Noted(now, DecisionKind.CLAIM_ENDED, "what was kept for it is not any more")
        return
    if old.claim is None or _gist(old.claim) != _gist(new.claim):
        kind = _CLAIMED.get(new.claim.purpose, DecisionKind.MAKES_ROOM)
        yield Noted(now, kind, _claim_words(new.claim)[:MOST_CHARS], gpus=_gpus(new.claim))


def _gist(claim: Claim) -> object:
    return claim.purpose, claim.start_time, claim.victims, len(claim.nodes), _gpus(claim)


def _gpus(claim: Claim) -> int:
    return sum(len(uuids) for _, uuids in claim.nodes)


def _claim_words(claim: Claim) -> str:
    told = [f"{_gpus(claim)} GPUs on {len(claim.nodes)} node{'s' * (len(claim.nodes) != 1)}"]
    if claim.start_time is not None:
        told.append(f"from {claim.start_time.isoformat(timespec='seconds')} on")
    if claim.victims:
        more = f" and {len(claim.victims) - 1} more" if len(claim.victims) > 1 else ""
        told.append(f"stops {claim.victims[0]}{more}")
    return ", ".join(told)


def in_record(job: Job, placed_because: str = "") -> Iterator[Noted]:
    """What a job's record tells of its attempts and its end; `placed_because`: of its newest attempt."""
    for number, attempt in job.numbered():
        gpus = sum(count for _, count in attempt.gpus_by_model) or attempt.gpus
        newest = attempt is job.attempt
        where = placed_because if newest and placed_because else _where(attempt, gpus)
        yield Noted(attempt.allocate_time, DecisionKind.PLACED, where[:MOST_CHARS], number, gpus=gpus)
        if attempt.run_time is not None:
            yield Noted(attempt.run_time, DecisionKind.RUNS, "", number, gpus=gpus)
        if attempt.end_time is not None and not (newest and job.ended):
            kind = _PLANNED.get(ended_by(attempt) or EndReason.VANISHED, DecisionKind.INTERRUPTED)
            why = attempt.end_reason if kind is DecisionKind.INTERRUPTED else attempt.end_reason.partition(": ")[2]
            yield Noted(attempt.end_time, kind, why[:MOST_CHARS], number)
    if job.ended:
        last = max((number for number, _ in job.numbered()), default=0)
        told = f"{job.state.name}: {job.state_message}" if job.state_message else job.state.name
        yield Noted(job.end_time or job.create_time, DecisionKind.ENDED, told[:MOST_CHARS], last)


def _where(attempt: Attempt, gpus: int) -> str:
    nodes = attempt.nodes
    on = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"{gpus} GPU{'s' * (gpus != 1)} on {on}" if nodes else f"{gpus} GPUs"


def joined(known: Sequence[Noted], new: Iterable[Noted]) -> tuple[Noted, ...]:
    """Both in the order of time, the newest `MOST`; what is told twice stays as it was told first."""
    told = {_identity(one) for one in known}
    added = [one for one in new if _identity(one) not in told]
    return tuple(sorted((*known, *added), key=lambda one: one.time)[-MOST:])


def _identity(one: Noted) -> object:
    """An attempt is placed once, runs once and ends once."""
    return (one.kind, one.attempt) if one.kind in _OF_ATTEMPTS else one


def placed_at(noted: Noted, position: int) -> Noted:
    """With its position in its queue, where that was not known."""
    return noted if noted.position or noted.kind is not DecisionKind.WAITS else replace(noted, position=position)
