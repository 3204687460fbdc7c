"""A row of the ledger: one hour of one card for one attempt (or for nobody), its bill divided into classes that sum to it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CostClass(StrEnum):
    """Where money goes; in this order they stand in rows, files and pictures."""

    USEFUL = "useful"
    RECOMPUTE = "recompute"  # forward work done again to save memory
    BUBBLE = "bubble"  # stages of a pipeline that wait for one another
    COMM_IN_NODE = "comm_in_node"  # exposed communication within a node
    COMM_AVOIDABLE = "comm_avoidable"  # across nodes, above what the best placement that was free would have had
    COMM_STRUCTURAL = "comm_structural"  # across nodes, what the best placement has too
    HOST = "host"
    DATA = "data"
    SAVE = "save"
    STARTUP = "startup"
    ALLOCATED_IDLE = "allocated_idle"
    IDLE = "idle"  # nobody held it
    FRAGMENTED = "fragmented"  # nobody held it, and no waiting gang could use it
    UNAVAILABLE = "unavailable"  # nobody could be given it
    LOST = "lost"  # work that was done again after a failure
    UNKNOWN = "unknown"


CLASSES: tuple[CostClass, ...] = tuple(CostClass)
WASTE = tuple(c for c in CLASSES if c not in {CostClass.USEFUL, CostClass.COMM_STRUCTURAL, CostClass.UNKNOWN})


class Basis(StrEnum):
    """What the division into classes rests on."""

    MEASURED = "measured"
    MODELLED = "modelled"
    ALLOCATION = "allocation"  # only who held it is known


NO_PRICE = "no price"  # the source of a row whose card has no price at that time: billed 0 and shown
OVERLAP = "overlap"  # more than the whole card was said to be held: scaled to the whole
NO_CARD = "matches no card"  # an adjustment for cards that were not there


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """`micros` are in the order of CLASSES and sum to `bill_micros`; negative only in a credit."""

    hour_ms: int
    card: str
    node: str  # sites/{site}/nodes/{node}
    site: str  # its id alone
    gpu_class: str
    queue: str  # queues/{queue}; empty, as the next five: nobody held it
    user: str
    job: str
    uid: str
    attempt: int
    model: str
    gpu_ms: int  # of the card, weighted by share: four quarters for an hour are 3,600,000
    bill_micros: int
    micros: tuple[int, ...]
    basis: Basis
    price_kind: str
    price_source: str
    adjustment: str = ""  # name of the invoice adjustment that it is; empty: usage
    version: int = 1  # of the hour; readers take the highest
    micros_per_hour: int = 0  # the price of a whole card: an hour whose price changes has a row for each
    note: str = ""  # what was wrong with what it was told, such as OVERLAP; an adjustment's reason

    def of(self, kind: CostClass) -> int:
        return self.micros[CLASSES.index(kind)]
