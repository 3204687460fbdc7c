"""Commits whose answer may get lost: repeated safely, in effect at most once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.retry import Backoff
from whaleflux.store.api import (
    Absent,
    Condition,
    ConditionFailed,
    Entry,
    Put,
    Store,
    Unchanged,
    Unknown,
    Write,
)

_RETRY = Backoff()


async def commit_once(
    store: Store,
    *writes: Write,
    when: Sequence[Condition] = (),
    key: str,
    mine: Callable[[Entry], bool] | None = None,
    within_s: float = 15.0,
) -> int:
    """`store.commit` that goes on when the answer does not come, for up to `within_s`; returns a revision.

    `key` is one of the written keys that `when` also compares (Absent or Unchanged): that comparison makes a second
    application impossible. When a repetition fails by it, the key is read back: `mine(entry)` tells this write by its
    own token (a uid in the value; default: the same bytes), and then the commit is known to be done. The revision is
    the commit's, or a later one of that key. Still raises Unknown when nothing was answered in time.
    """
    value = _guarded_value(writes, when, key)
    is_mine = mine or (lambda entry: entry.value == value)
    end_s = _now_s() + within_s
    unanswered: Unknown | None = None
    failures = 0
    while True:
        try:
            return await _commit_or_find(store, writes, when, key, is_mine if unanswered else None)
        except Unavailable as silence:
            unanswered = silence if isinstance(silence, Unknown) else unanswered
            if _now_s() >= end_s:
                raise (unanswered or silence) from silence
        failures += 1
        await asyncio.sleep(_RETRY.pause_s(failures))


async def _commit_or_find(
    store: Store,
    writes: Sequence[Write],
    when: Sequence[Condition],
    key: str,
    is_mine: Callable[[Entry], bool] | None,
) -> int:
    try:
        return await store.commit(*writes, when=when)
    except ConditionFailed:
        entry = await store.get(key) if is_mine else None
        if entry is not None and is_mine is not None and is_mine(entry):
            return entry.revision
        raise


def _guarded_value(writes: Sequence[Write], when: Sequence[Condition], key: str) -> bytes:
    guarded = any(isinstance(c, (Absent, Unchanged)) and c.key == key for c in when)
    values = [write.value for write in writes if isinstance(write, Put) and write.key == key]
    if not (guarded and values):
        raise InvalidArgument(
            FieldViolation("key", f"{key!r} must be put and compared by Absent or Unchanged in this commit")
        )
    return values[0]


def _now_s() -> float:
    return asyncio.get_running_loop().time()
