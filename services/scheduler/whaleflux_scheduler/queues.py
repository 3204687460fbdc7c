"""Queues in the store: made, read, changed and deleted by people; the leader follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FailedPrecondition, NotFound
from whaleflux.quantities import shown_bytes
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import changes
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, NoneCreated, Put, Snapshot, Store, Unchanged
from whaleflux.trust import audit, ownership
from whaleflux.trust.sight import Sight
from whaleflux.trust.view import access_of
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import queue_access, quota_rules
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.job_verbs import RACES, contended
from whaleflux_scheduler.jobs import Jobs
from whaleflux_scheduler.reservation_records import RESERVATIONS

UPDATABLE = (
    *("weight", "max_gpus", "members", "max_priority"),
    *("parent", "guaranteed_gpus", "lending_limit_gpus", "data_quota_bytes"),
)
_UNSETTABLE = ("max_priority", "lending_limit_gpus")
_OF_THE_TREE = frozenset({"parent", "guaranteed_gpus", "max_gpus"})
MOST_TOLD = 10  # members in an event

_Record = TypeVar("_Record")


class Queues:
    """Any replica does this."""

    def __init__(self, store: Store, jobs: Jobs, clock: Clock) -> None:
        self._store, self._jobs, self._clock = store, jobs, clock

    async def create(self, request: pb.CreateQueueRequest) -> pb.Queue:
        """A repeated request (by its request_id) answers with what the first made."""
        name = names.queue(names.check_id("queue_id", request.queue_id))
        queue = pb.Queue(name=name)
        for path in UPDATABLE:
            _set(queue, request.queue, path)
        _check(queue)
        queue.create_time.FromDatetime(self._clock.now())
        queue.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        key = keys.of_name(keys.QUEUES, name)
        for _ in range(RACES):
            if (existing := await self._store.get(key)) is not None:
                return _made_before(existing, queue, request.request_id)
            place = await self._place(queue)
            try:
                revision = await self._store.commit(_put(key, queue), *place.touches, when=[Absent(key), *place.when])
            except ConditionFailed:
                continue
            queue.etag = f'"{revision}"'
            return queue
        raise contended(name)

    async def get(self, name: str) -> Entry:
        """Raises NotFound."""
        names.split(name, "queues")
        entry = await self._store.get(keys.of_name(keys.QUEUES, name))
        if entry is None:
            ownership.note_asked()
            raise _not_there(name)
        return entry

    async def seen(self, name: str, sight: Sight) -> Entry:
        """The same for one that is not there for the caller."""
        entry = await self.get(name)
        ownership.note_asked()
        if not (sight.everything or ownership.may_see(sight.principal, access_of(pb.Queue.FromString(entry.value)))):
            raise _not_there(name)
        return entry

    async def page(self, request: pb.ListQueuesRequest, sight: Sight) -> Page[pb.Queue]:
        """Those that are there for the caller."""
        size = page_size(request.page_size)
        ownership.note_asked()
        return await list_page(
            self._store,
            keys.QUEUES,
            queue_message,
            size=size,
            token=request.page_token,
            keep=lambda queue: sight.everything or ownership.may_see(sight.principal, access_of(queue)),
        )

    async def update(self, request: pb.UpdateQueueRequest) -> pb.Queue:
        """Sets the fields that the mask names, adds and removes members; everybody who watches knows within a second.

        The leader's planner takes weight and limit with its next round; members and priority hold for what is asked from then on.
        """
        come_or_go = bool(request.add_members or request.remove_members)
        paths = paths_of(request.update_mask.paths, UPDATABLE, needed=not come_or_go)
        for _ in range(RACES):
            entry = await self.get(request.queue.name)
            check_etag(request.queue.etag, entry)
            queue = pb.Queue.FromString(entry.value)
            parent = queue.parent
            changed = (*paths, *["members"] * come_or_go)
            audit.note(before=", ".join(_said(queue, path) for path in changed))
            for path in paths:
                _set(queue, request.queue, path)
            if come_or_go:
                members = queue_access.changed(queue.members, request.add_members, request.remove_members, queue.name)
                queue.members[:] = members
            _check(queue)
            place = await self._place(queue, parent) if _OF_THE_TREE.intersection(paths) else _Place()
            what = ", ".join(_said(queue, path) for path in changed)
            queue.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), what))
            try:
                writes = _put(entry.key, queue), *place.touches
                revision = await self._store.commit(*writes, when=[Unchanged(entry), *place.when])
            except ConditionFailed:
                continue
            queue.etag = f'"{revision}"'
            return queue
        raise contended(request.queue.name)

    async def _place(self, queue: pb.Queue, parent: str = "") -> _Place:
        """Checks the queue among all others, as they are at one revision. Raises InvalidArgument.

        A queue that gets another below it is written again as it is: so it is not deleted at the same time.
        """
        snapshot = await self._store.list(keys.QUEUES)
        queue_id = names.last(queue.name)
        quota_rules.check_tree(_known(snapshot) | {queue_id: convert.queue_of(queue)}, queue_id)
        unchanged: list[Condition] = [NoneCreated(keys.QUEUES, snapshot.revision, or_written=True)]
        if queue.parent in ("", parent):
            return _Place(unchanged)
        above = next(e for e in snapshot.entries if e.key == keys.of_name(keys.QUEUES, queue.parent))
        return _Place([*unchanged, Unchanged(above)], [Put(above.key, above.value)])

    async def delete(self, request: pb.DeleteQueueRequest) -> None:
        """Refuses while it has unfinished jobs, reservations, Ray clusters, or queues below it, also those that come at this moment."""
        entry = await self.get(request.name)
        check_etag(request.etag, entry)
        if request.name == names.DEFAULT_QUEUE:
            raise FailedPrecondition(
                f"{names.DEFAULT_QUEUE} exists always",
                reason=ErrorReason.QUEUE_PERMANENT,
                metadata={"name": request.name},
            )
        for _ in range(RACES):
            await self._none_below(request.name)
            as_of = [
                await self._jobs_ended(request.name),
                await self._none_reserved(request.name),
                await self._no_ray_cluster(request.name),
            ]
            marked = pb.Queue.FromString(entry.value)
            marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
            try:
                await changes.delete(self._store, entry, _put(entry.key, marked).value, when=as_of)
            except ConditionFailed as changed:
                if not set(as_of) & set(changed.failed):
                    raise contended(request.name) from None
                entry = await self.get(request.name)
                continue
            return
        raise contended(request.name)

    async def _none_below(self, name: str) -> None:
        """Refuses for queues below it, and for records that may be of one; one that comes later changes the record."""
        entries = (await self._store.list(keys.QUEUES)).entries
        queues = {
            e.key.removeprefix(keys.QUEUES): convert.queue_of(_read(e, name, pb.Queue.FromString)) for e in entries
        }
        below = quota_rules.children(queues, names.last(name))
        if below:
            more = f" and {len(below) - 1} more" if len(below) > 1 else ""
            raise FailedPrecondition(
                f"{names.queue(below[0])}{more} are below {name}; delete them first, or put them elsewhere with: whaleflux queue set "
                f"{below[0]} --parent NAME",
                reason=ErrorReason.QUEUE_HAS_CHILDREN,
                metadata={"name": name, "queues": str(len(below))},
            )

    async def _none_reserved(self, name: str) -> NoneCreated:
        """The same of reservations that are not over; refuses for one of it."""
        snapshot = await self._store.list(keys.RESERVATIONS)
        kept = []
        for entry in snapshot.entries:
            one = _read(entry, name, RESERVATIONS.read)
            kept += [one.name] if one.queue == name and one.state != pb.RESERVATION_STATE_ENDED else []
        if kept:
            raise FailedPrecondition(
                f"{kept[0]} keeps GPUs for {name}; wait until it is over, or delete it with: whaleflux reservation rm "
                f"{names.last(kept[0])}",
                reason=ErrorReason.QUEUE_RESERVED,
                metadata={"name": name, "reservations": str(len(kept))},
            )
        return NoneCreated(keys.RESERVATIONS, snapshot.revision, or_written=True)

    async def _no_ray_cluster(self, name: str) -> NoneCreated:
        """The same of Ray clusters, whose next head or worker would find no queue; refuses for one of it."""
        snapshot = await self._store.list(keys.RAY_CLUSTERS)
        there = []
        for entry in snapshot.entries:
            one = _read(entry, name, pb.RayCluster.FromString)
            there += [one.name] if one.queue == name else []
        if there:
            raise FailedPrecondition(
                f"{there[0]} has its jobs in {name}; take it down first with: whaleflux ray down {names.last(there[0])}",
                reason=ErrorReason.QUEUE_NOT_EMPTY,
                metadata={"name": name, "ray_clusters": str(len(there))},
            )
        return NoneCreated(keys.RAY_CLUSTERS, snapshot.revision)

    async def _jobs_ended(self, name: str) -> NoneCreated:
        """What has to hold while the queue is deleted: that no job came after those that were looked at, nor took the place of one.

        Refuses for unfinished jobs.
        """
        prefix = keys.of_name(keys.JOBS, name) + "/"
        revision = (await self._store.list(prefix, limit=1)).revision
        await self._jobs.cache.at_least(revision)
        queue = names.top(name)
        left = sum(j.value.queue == queue and not j.value.ended for j in self._jobs.cache.values.values())
        if left:
            raise FailedPrecondition(
                f"{name} has {left} unfinished jobs; cancel them or wait for their end",
                reason=ErrorReason.QUEUE_NOT_EMPTY,
                metadata={"name": name, "jobs": str(left)},
            )
        return NoneCreated(prefix, revision, or_written=True)


@dataclass(frozen=True, slots=True)
class _Place:
    """What has to hold, and to be written beside it, so that a queue gets its place in the tree."""

    when: Sequence[Condition] = ()
    touches: Sequence[Put] = ()


def _read(entry: Entry, queue: str, read: Callable[[bytes], _Record]) -> _Record:
    """Raises FailedPrecondition for a record that cannot be read: it may be of the queue."""
    try:
        return read(entry.value)
    except DecodeError:
        raise FailedPrecondition(
            f"the record {entry.key} {convert.UNREADABLE}; it may be of {queue}, which is not deleted before",
            reason=ErrorReason.RECORD_UNREADABLE,
            metadata={"name": queue, "record": entry.key},
        ) from None


def _known(snapshot: Snapshot) -> dict[str, Queue]:
    """By id; a record that cannot be read stands in nobody's way."""
    known = {}
    for entry in snapshot.entries:
        with contextlib.suppress(DecodeError):
            known[entry.key.removeprefix(keys.QUEUES)] = convert.queue_of(pb.Queue.FromString(entry.value))
    return known


def _made_before(existing: Entry, wanted: pb.Queue, request_id: str) -> pb.Queue:
    """What the first of two equal requests made. Raises AlreadyExists for another one."""
    if not (request_id and _same_limits(existing, wanted)):
        again = f"change it with: whaleflux queue set {names.last(wanted.name)}, or choose another name"
        raise AlreadyExists("queue", wanted.name, again)
    return queue_message(existing)


def _not_there(name: str) -> NotFound:
    return NotFound("queue", name, "list what exists with: whaleflux queue ls")


def queue_message(entry: Entry) -> pb.Queue:
    """The queue as users see it."""
    queue = pb.Queue.FromString(entry.value)
    queue.etag = etag_of(entry)
    return queue


def _set(queue: pb.Queue, wanted: pb.Queue, field: str) -> None:
    if field == "members":
        queue.members[:] = dict.fromkeys(wanted.members)
    elif field in _UNSETTABLE and not wanted.HasField(field):
        queue.ClearField(field)
    else:
        setattr(queue, field, getattr(wanted, field))


def _check(queue: pb.Queue) -> None:
    if queue.parent:
        names.split(queue.parent, "queues", field="queue.parent")
    quota_rules.check_queue(convert.queue_of(queue))
    queue_access.check(queue.members, queue.max_priority if queue.HasField("max_priority") else None)


def _said(queue: pb.Queue, field: str) -> str:
    """The field as its event tells it."""
    if field == "members":
        first = ", ".join(queue.members[:MOST_TOLD]) + (" and more" if len(queue.members) > MOST_TOLD else "")
        return f"members {first or 'all users'}"
    if field == "parent":
        return f"parent {queue.parent or 'none'}"
    if field == "data_quota_bytes":
        return f"data quota {shown_bytes(queue.data_quota_bytes) if queue.data_quota_bytes else 'none'}"
    unset = field in _UNSETTABLE and not queue.HasField(field)
    return f"{field} unset" if unset else f"{field} {getattr(queue, field):.12g}"


def _put(key: str, queue: pb.Queue) -> Put:
    return Put(key, queue.SerializeToString(deterministic=True))


def _same_limits(existing: Entry, wanted: pb.Queue) -> bool:
    known = pb.Queue.FromString(existing.value)
    return all(_said(known, field) == _said(wanted, field) for field in UPDATABLE)
