"""Who asked for a change: kept in the record by the transaction that makes it, so that its event can tell (`events.state_events`).

A deletion leaves no record behind. So it says what it is about to do in the record first, and deletes that then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from whaleflux.errors import Unauthenticated
from whaleflux.reasons import What
from whaleflux.rpc import auth
from whaleflux.store.api import Condition, Delete, Entry, Put, Store, Unchanged, Write
from whaleflux.trust import audit
from whaleflux.v1 import types_pb2

MAX_REASON = 1_000


def actor() -> str:
    """role/name of who makes the call being served, as `user/alice`; "" outside of one."""
    try:
        who = auth.caller()
    except Unauthenticated:
        return ""
    return f"{who.role}/{who.name}"


def asked(what: str, now: datetime, reason: str = "") -> types_pb2.Change:
    """The caller's change, for a record's `last_change`. `what` as an event says it."""
    audit.note(after=reason[:MAX_REASON])
    change = types_pb2.Change(actor=actor(), reason=reason[:MAX_REASON], what=what)
    change.time.FromDatetime(now)
    return change


def deletion(now: datetime, reason: str = "") -> types_pb2.Change:
    """What a record says before it is deleted on request."""
    return asked(What.DELETED, now, reason)


async def delete(
    store: Store, entry: Entry, marked: bytes, *, also: Sequence[Write] = (), when: Sequence[Condition] = ()
) -> int:
    """Deletes a record that is as `entry` says, once it says by whom (`marked`: its value with that); returns the revision.

    Raises ConditionFailed when it changed, or `when` does not hold; it may be left marked then, which changes nothing else.
    """
    revision = await store.commit(Put(entry.key, marked), when=[Unchanged(entry), *when])
    written = replace(entry, value=marked, revision=revision, version=entry.version + 1)
    return await store.commit(Delete(entry.key), *also, when=[Unchanged(written), *when])
