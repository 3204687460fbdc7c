"""Which manifest is the newest: one small record in the store, compared and swapped under the leader's fence.

So an old leader that wakes up cannot commit, whatever it wrote into the folder meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from whaleflux.store.api import Absent, Condition, Entry, Put, Store, Unchanged
from whaleflux.store.election import Leader
from whaleflux.store.keys import LEDGER_HEAD
from whaleflux.store.once import commit_once
from whaleflux_console.ledger.manifest import Named


@dataclass(frozen=True, slots=True)
class Head:
    """`at` is the newest manifest, `checkpoint` where reading begins (empty: at the first manifest), `folder` whose files they are."""

    number: int
    at: Named
    checkpoint: Named
    folder: str


async def read_head(store: Store) -> tuple[Head | None, Entry | None]:
    """The head and the entry to compare with at the next swap."""
    entry = await store.get(LEDGER_HEAD)
    if entry is None:
        return None, None
    value = json.loads(entry.value)
    at, checkpoint = Named(**value["at"]), Named(**value["checkpoint"])
    return Head(value["number"], at, checkpoint, value["folder"]), entry


async def swap_head(store: Store, leader: Leader, head: Head, before: Entry | None) -> Entry:
    """Raises Fenced when another leads, Unavailable when nobody can say whether it is done: then read everything afresh."""
    value = json.dumps(asdict(head), sort_keys=True).encode()
    unchanged: Condition = Unchanged(before) if before else Absent(LEDGER_HEAD)
    revision = await commit_once(store, Put(LEDGER_HEAD, value), when=[leader.held, unchanged], key=LEDGER_HEAD)
    made = before.created if before else revision
    return Entry(LEDGER_HEAD, value, revision, made)
