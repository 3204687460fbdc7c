"""Who sees, uses, reads and changes which jobs: the owner rules (`whaleflux.trust`), asked about the scheduler's records."""

from __future__ import annotations

import contextlib

from whaleflux import names
from whaleflux.errors import NotFound, PermissionDenied, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, roles
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.cache import Cache
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.trust.sight import Sight
from whaleflux.trust.view import UNKNOWN, access_of
from whaleflux.trust.watched import Rules
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob, StoredQueue
from whaleflux_scheduler.core import queue_access
from whaleflux_scheduler.reservation_records import StoredReservation


class JobAccess:
    """Answers from the cache of queues, so that no call waits; it is some milliseconds old."""

    def __init__(
        self, store: Store, queues: Cache[StoredQueue], reservations: Cache[StoredReservation] | None = None
    ) -> None:
        self._store, self._queues, self._reservations = store, queues, reservations
        self._known: dict[str, tuple[StoredQueue, Access]] = {}

    def of(self, queue: str) -> Access:
        """Whom the queue is for; of one that is not there, or cannot be read: operators, and owners of what is in it."""
        stored, known = self._queues.get(keys.QUEUES + queue), self._known.get(queue)
        if stored is None:
            return UNKNOWN
        if known is None or known[0] is not stored:
            known = self._known[queue] = stored, access_of(stored.message)
        return known[1]

    def queues(self) -> list[str]:
        """Ids of those that are known."""
        return [key.removeprefix(keys.QUEUES) for key in self._queues.values]

    async def knows_queues(self, revision: int) -> None:
        """Returns when queues are known as they were then, or after a second."""
        with contextlib.suppress(Unavailable):
            await self._queues.at_least(revision, timeout_s=1.0)

    def above(self, queue: str) -> list[str]:
        """Ids of the queues above it."""
        found: list[str] = []
        stored = self._queues.get(keys.QUEUES + queue)
        while stored is not None and stored.value.parent and stored.value.parent not in found:
            found.append(stored.value.parent)
            stored = self._queues.get(keys.QUEUES + stored.value.parent)
        return found

    def sight(self) -> Sight:
        """The caller's."""
        return Sight(auth.principal(), self.of, self._reserved_for)

    def _reserved_for(self, reservation: str) -> str | None:
        """The id of the queue that it is for; "": maintenance, which concerns everybody."""
        known = self._reservations.get(keys.of_name(keys.RESERVATIONS, reservation)) if self._reservations else None
        return known.value.queue if known is not None else None

    def of_earlier_queue(self, stored: StoredJob) -> bool:
        """Whether the job ended in a queue that was deleted, of which another has the name now."""
        queue = self._queues.get(keys.QUEUES + stored.value.queue)
        return queue is not None and of_earlier_queue(stored, queue)

    def _queue_of(self, stored: StoredJob) -> str:
        """Whose members see the job: nobody's, when its queue is gone, whoever has the name now."""
        return "" if self.of_earlier_queue(stored) else stored.value.queue

    def hides(self, stored: StoredJob, sight: Sight) -> bool:
        """Whether the job is not there for the caller."""
        return not sight.sees(self._queue_of(stored), stored.message.submitter)

    def watch_rules(self, sight: Sight) -> Rules[StoredJob]:
        """Of a watch of jobs."""
        return Rules(
            lambda stored: self.hides(stored, sight), lambda key: sight.sees_named(keys.name_of(key)), self.queues
        )

    def check_change(self, stored: StoredJob, sight: Sight) -> None:
        """Raises PermissionDenied (NOT_OWNER) for a job that the caller sees and may not change."""
        if not sight.changes(self._queue_of(stored), stored.message.submitter):
            raise ownership.not_owner(stored.value.name, stored.message.submitter)

    def check_read(self, stored: StoredJob, sight: Sight) -> None:
        """The same for what is private of it: its output."""
        if not sight.reads(self._queue_of(stored), stored.message.submitter):
            raise ownership.not_owner(stored.value.name, stored.message.submitter)

    async def check_use(self, queue: str, priority: int) -> None:
        """Raises NotFound for a queue that is not there for the caller, PermissionDenied for a token or a priority that is not for it.

        Whether there is such a queue when the job is stored is asked again then.
        """
        who, access = auth.principal(), await self.sure(queue)
        if access is UNKNOWN:
            ownership.note_asked()
            if names.queue(queue) != names.DEFAULT_QUEUE:  # which the first leader makes
                raise queue_not_there(queue)
            return
        if not ownership.may_see(who, access):
            raise queue_not_there(queue)
        if not ownership.may_use(who, queue, access):
            raise PermissionDenied(
                f"this token is for {', '.join(sorted(map(names.queue, who.queues or ())))} alone; use one of them, or another token",
                reason=ErrorReason.QUEUE_NOT_IN_TOKEN,
                metadata={"queue": names.queue(queue)},
            )
        if who.role == roles.USER:
            queue_access.check_priority(priority, access.max_priority, names.queue(queue))

    def check_priority(self, queue: str, priority: int) -> None:
        """Raises PermissionDenied for more than the caller may give there."""
        if auth.principal().role == roles.USER:
            queue_access.check_priority(priority, self.of(queue).max_priority, names.queue(queue))

    def highest_of(self, queue: str, owner: str, priority: int) -> int:
        """The priority, brought down to what the owner may give there."""
        role = owner.partition("/")[0]
        return priority if role in roles.OPERATORS else min(priority, self.of(queue).max_priority)

    async def sure(self, queue: str) -> Access:
        """Of a queue that was made this moment, too."""
        if (access := self.of(queue)) is not UNKNOWN:
            return access
        entry = await self._store.get(keys.QUEUES + queue)
        return UNKNOWN if entry is None else access_of(pb.Queue.FromString(entry.value))


def of_earlier_queue(stored: StoredJob, queue: StoredQueue) -> bool:
    """Whether the job's queue is an earlier one of this name. The record of a job that replaces an ended one is older than itself, so both count."""
    if stored.entry.created >= queue.entry.created or not stored.value.ended:
        return False
    made = convert.instant(queue.message, "create_time")
    return made is not None and stored.value.create_time < made


def queue_not_there(queue: str) -> NotFound:
    """The same for one that is not there, and for one that is not there for the caller."""
    hint = f'use "{names.DEFAULT_QUEUE}" or one of: whaleflux queue ls; an operator makes one with: whaleflux queue create {queue}'
    return NotFound("queue", names.queue(queue), hint)
