"""State: one protocol (`api`), a model in memory (`memory`), etcd (`etcd`), and what services build on them.

`cache` keeps a prefix in a dict, `election` gives fenced leadership, `batching` merges concurrent commits,
`codec` keeps unknown fields, `once` repeats unanswered commits safely.
"""

from whaleflux.store.api import (
    Absent,
    Batch,
    Condition,
    ConditionFailed,
    Delete,
    Entry,
    Equals,
    Extent,
    Fenced,
    Held,
    KeyEvent,
    Leadership,
    Lease,
    NoneCreated,
    Present,
    Put,
    Snapshot,
    Store,
    Unchanged,
    Unknown,
    Write,
)
from whaleflux.store.keys import ROOT

__all__ = [
    "ROOT",
    "Absent",
    "Batch",
    "Condition",
    "ConditionFailed",
    "Delete",
    "Entry",
    "Equals",
    "Extent",
    "Fenced",
    "Held",
    "KeyEvent",
    "Leadership",
    "Lease",
    "NoneCreated",
    "Present",
    "Put",
    "Snapshot",
    "Store",
    "Unchanged",
    "Unknown",
    "Write",
]
