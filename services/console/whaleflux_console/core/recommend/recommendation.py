"""What a recommendation says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from whaleflux_console.core.rows import CostClass


class Kind(StrEnum):
    """What should be done."""

    RELEASE_IDLE = "release_idle"
    ONE_ISLAND = "one_island"
    DEFRAGMENT = "defragment"
    CHECKPOINT_INTERVAL = "checkpoint_interval"
    FEWER_GPUS = "fewer_gpus"
    HAND_BACK = "hand_back"
    SLOW_NODE = "slow_node"
    COMMIT = "commit"


class Level(StrEnum):
    """Of risk and of effort."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`saved` is what of each class the window would not have paid, expected; `low_ppm` of it is what its worst part supports.

    It saves in the future what the window shows only if the future is like the window.
    """

    kind: Kind
    subject: str
    change: str  # for people, one sentence
    command: str  # that does it
    saved: Mapping[CostClass, int]  # micro-dollars of the window
    low_ppm: int
    risk: Level
    effort: Level
    bill_micros: int  # of the subject, in the window
    evidence: Mapping[CostClass, int]  # what the window paid for these classes
    cash_ppm: int  # what of it is of GPUs paid by the hour; the rest are hours of GPUs that others can use
    owner: str = ""
    spread: Mapping[str, Mapping[CostClass, int]] = field(
        default_factory=dict
    )  # whose bills it saves, where not its subject's

    @property
    def pieces(self) -> Mapping[str, Mapping[CostClass, int]]:
        """What is saved of whose bill; they sum to `saved`."""
        return self.spread or {self.subject: self.saved}

    def saving(self, pieces: Mapping[str, Mapping[CostClass, int]]) -> Recommendation:
        """The same with less to save."""
        saved = {kind: sum(piece.get(kind, 0) for piece in pieces.values()) for kind in self.saved}
        return replace(self, saved=saved, spread=pieces if self.spread else {})

    @property
    def saved_micros(self) -> int:
        return sum(self.saved.values())

    @property
    def id(self) -> str:
        """The same for the same kind and subject, a-z, 0-9 and '-'."""
        digest = hashlib.sha256(self.subject.encode()).hexdigest()[:16]
        return f"{self.kind.replace('_', '-')}-{digest}"
