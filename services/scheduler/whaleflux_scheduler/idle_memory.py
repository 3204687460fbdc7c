"""How long rented machines were not needed, as the leader remembers it: one record, so that whoever leads next goes on from there."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from whaleflux.store import keys
from whaleflux.store.api import Held, Put, Store
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.idle_times import Idle, IdleTimes, Open
from whaleflux_scheduler.core.offered import Kind

log = logging.getLogger(__name__)
Times = Mapping[Kind, IdleTimes]


class IdleMemory:
    """Read once in a leadership, written when it changed."""

    def __init__(self, store: Store, held: Held) -> None:
        self._store, self._held = store, held
        self._times: Times | None = None

    async def times(self) -> Times:
        """What is known; nothing where the record cannot be read: it is learned anew."""
        if self._times is None:
            entry = await self._store.get(keys.IDLE_TIMES)
            self._times = _times_in(entry.value) if entry is not None else {}
        return self._times

    async def keep(self, times: Times) -> None:
        """Raises Fenced when another leads."""
        if times != self._times:
            value = _record(times).SerializeToString(deterministic=True)
            await self._store.commit(Put(keys.IDLE_TIMES, value), when=[self._held])
            self._times = times


def _times_in(value: bytes) -> Times:
    try:
        record = pb.IdleTimesRecord.FromString(value)
    except DecodeError as error:
        log.warning("what was learned of idle machines cannot be read, and is learned anew: %s", error)
        return {}
    return {Kind(one.site, one.gpu_type, one.gpus): _of_kind(one) for one in record.kinds}


def _of_kind(one: pb.IdleTimesOfKind) -> IdleTimes:
    opened = tuple(Open(each.since_s, each.room, each.given_back_s) for each in one.open)
    over = tuple(Idle(each.lasted_s, each.kept_s, each.room) for each in one.over)
    return IdleTimes(one.needed, opened, over)


def _record(times: Times) -> pb.IdleTimesRecord:
    return pb.IdleTimesRecord(
        kinds=[
            pb.IdleTimesOfKind(
                site=kind.site,
                gpu_type=kind.gpu_type,
                gpus=kind.gpus,
                needed=one.needed,
                open=[
                    pb.OpenIdleTime(since_s=each.since_s, room=each.room, given_back_s=each.given_back_s)
                    for each in one.open
                ],
                over=[pb.OverIdleTime(lasted_s=each.lasted_s, kept_s=each.kept_s, room=each.room) for each in one.over],
            )
            for kind, one in times.items()
        ]
    )
