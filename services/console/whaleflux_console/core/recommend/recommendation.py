"""What a recommendation says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def saved_micros(self) -> int:
        return sum(self.saved.values())

    @property
    def id(self) -> str:
        """The same for the same kind and subject, a-z, 0-9 and '-'."""
        digest = hashlib.sha256(self.subject.encode()).hexdigest()[:16]
        return f"{self.kind.replace('_', '-')}-{digest}"
