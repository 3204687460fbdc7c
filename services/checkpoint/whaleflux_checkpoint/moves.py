"""A checkpoint's change of state as one transaction."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.store.api import Condition, Entry, Put, Store, Unchanged, Write
from whaleflux_checkpoint import convert
from whaleflux_checkpoint.core.state_machine import DELETABLE, State


async def move(store: Store, entry: Entry, state: State, message: str, when: Sequence[Condition] = ()) -> None:
    """Stores the new state, and the mark by which deletable ones are found. Raises ConditionFailed when it was changed."""
    changed = convert.decode(entry)
    changed.state, changed.message = convert.state_number(state), message
    writes: list[Write] = [Put(entry.key, convert.encode(changed))]
    if state in DELETABLE:
        writes.append(convert.deletable_mark(changed))
    await store.commit(*writes, when=[Unchanged(entry), *when])
