"""What may happen to a checkpoint, and which ones a job keeps. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.manifests.job_fields import DEFAULT_CHECKPOINTS_KEPT
from whaleflux.reasons import ErrorReason

MAX_DATA_POSITION_BYTES = 64 * 1024
MAX_WORLD_SIZE = 100_000
MAX_STEP = 10**12 - 1  # twelve digits in the name, so that names sort like steps
MAX_SERIAL = 10**6 - 1


class State(Enum):
    """Where a checkpoint stands; the names are those of the contract without their prefix."""

    WRITING = "WRITING"
    COMMITTED = "COMMITTED"
    CERTIFIED = "CERTIFIED"
    EXPIRED = "EXPIRED"
    ABANDONED = "ABANDONED"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"  # of a newer version: neither restored nor given up here


RESTORABLE = frozenset({State.COMMITTED, State.CERTIFIED})
DELETABLE = frozenset({State.EXPIRED, State.ABANDONED})

NEXT: dict[State, frozenset[State]] = {
    State.WRITING: frozenset({State.COMMITTED, State.ABANDONED}),
    State.COMMITTED: frozenset({State.CERTIFIED, State.EXPIRED, State.LOST}),
    State.CERTIFIED: frozenset({State.EXPIRED, State.LOST}),
    # Lost is what somebody has read, not what is: when all bytes are read again and are right, it is back.
    State.LOST: frozenset({State.COMMITTED, State.EXPIRED}),
    # These two end when their bytes are confirmed deleted: the record goes with them.
    State.EXPIRED: frozenset(),
    State.ABANDONED: frozenset(),
    State.UNKNOWN: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Saved:
    """What decisions need to know of one checkpoint."""

    name: str
    epoch: int
    step: int
    state: State
    keep: int = DEFAULT_CHECKPOINTS_KEPT
    serial: int = 0
    job_uid: str = ""

    @property
    def age(self) -> tuple[int, int, int]:
        """Newer is greater: the step first, of two attempts at a step the later one, of two saves of it the later one."""
        return self.step, self.epoch, self.serial


def check_begin(
    step: int, epoch: int, serial: int, world_size: int, location: str, data_position: bytes, keep: int
) -> None:
    """Refuses what no checkpoint can be, naming each field."""
    bad = [
        FieldViolation(field, fix)
        for field, wrong, fix in (
            ("step", not 0 <= step <= MAX_STEP, f"is {step}; use 0 to {MAX_STEP}"),
            ("epoch", epoch < 1, f"is {epoch}; attempts count from 1"),
            ("serial", not 0 <= serial <= MAX_SERIAL, f"is {serial}; use 0 to {MAX_SERIAL}"),
            ("world_size", not 1 <= world_size <= MAX_WORLD_SIZE, f"is {world_size}; use 1 to {MAX_WORLD_SIZE}"),
            ("location", not location or len(location) > 4096, "is empty or longer than 4096 characters; give a folder or URL"),
            ("data_position", len(data_position) > MAX_DATA_POSITION_BYTES, f"has {len(data_position)} bytes, at most {MAX_DATA_POSITION_BYTES}; save large positions as part of the state"),
            ("keep", not 0 <= keep <= 1000, f"is {keep}; use 0 (for {DEFAULT_CHECKPOINTS_KEPT}) to 1000"),
        )
        if wrong
    ]  # fmt: skip
    if bad:
        raise InvalidArgument(bad)


def check_step_to(saved: Saved, state: State) -> None:
    """Refuses a change that the state machine does not have."""
    if state not in NEXT[saved.state]:
        raise FailedPrecondition(
            f"{saved.name} is {saved.state.value} and cannot become {state.value}",
            metadata={"name": saved.name, "state": saved.state.value, "wanted": state.value},
        )


def is_complete(world_size: int, complete_ranks: Collection[int]) -> bool:
    """Whether every rank has reported all of its pieces."""
    return len(set(complete_ranks)) == world_size


def newest_restorable(
    saved: Iterable[Saved], *, job_uid: str = "", exclude: Collection[str] = frozenset()
) -> Saved | None:
    """The one to restore, but those that were tried in vain; None when the job never committed one.

    A lost one comes last: it was found damaged, and somebody may have mended what was read. Who can read it, `resharding` says. Raises FailedPrecondition when all there are were tried in vain: a training that
    starts over must not be taken for one that starts.
    """
    known = [s for s in saved if s.state in RESTORABLE | {State.LOST} and job_uid in {"", s.job_uid}]
    usable = [s for s in known if s.name not in exclude]
    if known and not usable:
        raise FailedPrecondition(
            f"{len(known)} checkpoints were committed, the newest at step {max(known, key=lambda s: s.age).step}, and none of "
            "them can be restored from here",
            reason=ErrorReason.CHECKPOINT_UNREACHABLE,
        )
    return max(usable, key=lambda s: (s.state in RESTORABLE, s.age), default=None)


@dataclass(frozen=True, slots=True)
class Retention:
    """What becomes of a job's other checkpoints once one is committed."""

    expire: tuple[Saved, ...]
    abandon: tuple[Saved, ...]


def retain(saved: Sequence[Saved], committed: Saved) -> Retention:
    """Keeps the job's newest `committed.keep` restorable ones (never fewer than one); gives up older unfinished and lost ones.

    Of later attempts before those of earlier ones: an attempt that went back behind what it could not read must not lose what it
    commits to that. What would be offered first is kept besides. An unfinished checkpoint is given up when its attempt is over,
    or when a newer step of its own attempt is in. Those of an earlier job of the same name are not this one's to give up.
    """
    own = [s for s in saved if s.job_uid == committed.job_uid]
    restorable = sorted((s for s in own if s.state in RESTORABLE), key=lambda s: (s.epoch, *s.age), reverse=True)
    keep = max(1, committed.keep)
    kept, rest = restorable[:keep], restorable[keep:]
    first = newest_restorable(restorable)
    lost = [s for s in own if s.state is State.LOST and len(kept) == keep and all(s.age < k.age for k in kept)]
    unfinished = [s for s in own if s.state is State.WRITING]
    stale = [
        s for s in unfinished if s.epoch < committed.epoch or (s.epoch == committed.epoch and s.age < committed.age)
    ]
    return Retention((*(s for s in rest if s is not first), *lost), tuple(stale))


def end_with_job(state: State) -> State:
    """What becomes of a checkpoint whose job is gone."""
    if state in DELETABLE:
        return state
    return State.ABANDONED if state is State.WRITING else State.EXPIRED
