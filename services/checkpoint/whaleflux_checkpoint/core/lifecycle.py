"""What may happen to a checkpoint, and which ones a job keeps. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from whaleflux.errors import FieldViolation, Invalid, WrongState

DEFAULT_KEEP = 3
MAX_DATA_POSITION_BYTES = 64 * 1024
MAX_WORLD_SIZE = 100_000
MAX_STEP = 10**12 - 1  # twelve digits in the name, so that names sort like steps


class State(Enum):
    """Where a checkpoint stands; the names are those of the contract without their prefix."""

    WRITING = "WRITING"
    COMMITTED = "COMMITTED"
    CERTIFIED = "CERTIFIED"
    EXPIRED = "EXPIRED"
    ABANDONED = "ABANDONED"
    LOST = "LOST"


RESTORABLE = frozenset({State.COMMITTED, State.CERTIFIED})
DELETABLE = frozenset({State.EXPIRED, State.ABANDONED})

NEXT: dict[State, frozenset[State]] = {
    State.WRITING: frozenset({State.COMMITTED, State.ABANDONED}),
    State.COMMITTED: frozenset({State.CERTIFIED, State.EXPIRED, State.LOST}),
    State.CERTIFIED: frozenset({State.EXPIRED, State.LOST}),
    # These three end when their bytes are confirmed deleted: the record goes with them.
    State.EXPIRED: frozenset(),
    State.ABANDONED: frozenset(),
    State.LOST: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Saved:
    """What decisions need to know of one checkpoint."""

    name: str
    epoch: int
    step: int
    state: State
    layout: str = ""
    keep: int = DEFAULT_KEEP

    @property
    def age(self) -> tuple[int, int]:
        """Newer is greater: the step first, and of two attempts at a step the later one."""
        return self.step, self.epoch


def checkpoint_id(step: int, epoch: int) -> str:
    """s{step}-e{epoch}; ids of one job sort by step."""
    return f"s{step:012d}-e{epoch}"


def check_begin(step: int, epoch: int, world_size: int, location: str, data_position: bytes, keep: int) -> None:
    """Refuses what no checkpoint can be, naming each field."""
    bad = [
        FieldViolation(field, fix)
        for field, wrong, fix in (
            ("step", not 0 <= step <= MAX_STEP, f"is {step}; use 0 to {MAX_STEP}"),
            ("epoch", epoch < 1, f"is {epoch}; attempts count from 1"),
            ("world_size", not 1 <= world_size <= MAX_WORLD_SIZE, f"is {world_size}; use 1 to {MAX_WORLD_SIZE}"),
            ("location", not location or len(location) > 4096, "is empty or longer than 4096 characters; give a folder or URL"),
            ("data_position", len(data_position) > MAX_DATA_POSITION_BYTES, f"has {len(data_position)} bytes, at most {MAX_DATA_POSITION_BYTES}; save large positions as part of the state"),
            ("keep", not 0 <= keep <= 1000, f"is {keep}; use 0 (for {DEFAULT_KEEP}) to 1000"),
        )
        if wrong
    ]  # fmt: skip
    if bad:
        raise Invalid(bad)


def check_step_to(saved: Saved, state: State) -> None:
    """Refuses a change that the state machine does not have."""
    if state not in NEXT[saved.state]:
        raise WrongState(
            f"{saved.name} is {saved.state.value} and cannot become {state.value}",
            metadata={"name": saved.name, "state": saved.state.value, "wanted": state.value},
        )


def is_complete(world_size: int, complete_ranks: Collection[int]) -> bool:
    """Whether every rank has reported all of its pieces."""
    return len(set(complete_ranks)) == world_size


def newest_restorable(saved: Iterable[Saved], layout: str = "") -> Saved | None:
    """The one to restore; any world size can be read (torch.distributed.checkpoint reshards), a layout may be asked for."""
    fitting = [s for s in saved if s.state in RESTORABLE and layout in {"", s.layout}]
    return max(fitting, key=lambda s: s.age, default=None)


@dataclass(frozen=True, slots=True)
class Retention:
    """What becomes of a job's other checkpoints once one is committed."""

    expire: tuple[Saved, ...]
    abandon: tuple[Saved, ...]


def retain(saved: Sequence[Saved], committed: Saved) -> Retention:
    """Keeps the newest `committed.keep` restorable ones (never fewer than one); gives up older unfinished ones.

    An unfinished checkpoint is given up when its attempt is over, or when a newer step of its own attempt is in.
    """
    restorable = sorted((s for s in saved if s.state in RESTORABLE), key=lambda s: s.age, reverse=True)
    unfinished = [s for s in saved if s.state is State.WRITING]
    stale = [
        s for s in unfinished if s.epoch < committed.epoch or (s.epoch == committed.epoch and s.step < committed.step)
    ]
    return Retention(tuple(restorable[max(1, committed.keep) :]), tuple(stale))
