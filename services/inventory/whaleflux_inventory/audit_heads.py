"""Heads of the audit trail's chains whose records have all aged out are forgotten: each start of a process leaves one."""

from __future__ import annotations

from datetime import UTC, timedelta

from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Delete, Entry, Store, Unchanged
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event, get_logger
from whaleflux.v1 import audit_pb2 as pb

EVERY_S = 3600.0
LATER = timedelta(days=1)  # than the last record of the chain goes
_log = get_logger(__name__)


async def forget_old(store: Store, clock: Clock, kept_days: float) -> None:
    """For ever, each hour."""
    while True:
        try:
            await _forget(store, clock, timedelta(days=kept_days) + LATER)
        except StatusError as away:  # next time
            _log.warning(Event.AUDIT_WAITING, reason=away.message)
        await clock.sleep(EVERY_S)


async def _forget(store: Store, clock: Clock, kept: timedelta) -> None:
    snapshot = await store.list(keys.AUDIT_HEADS)
    heads = read_all(snapshot.entries, lambda entry: pb.AuditHead.FromString(entry.value))
    for entry, head in heads.values:
        if head.time.ToDatetime(tzinfo=UTC) < clock.now() - kept:
            await _delete(store, entry)


async def _delete(store: Store, entry: Entry) -> None:
    try:
        await store.commit(Delete(entry.key), when=[Unchanged(entry)])
    except ConditionFailed:  # its writer lives, and has just written again
        return
