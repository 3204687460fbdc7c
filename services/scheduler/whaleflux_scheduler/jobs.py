"""Reading jobs: from the cache where it is new enough, else from the store."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from whaleflux import names
from whaleflux.errors import FailedPrecondition, NotFound
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.store import keys, placements
from whaleflux.store.api import Delete, Entry, Store, Write
from whaleflux.store.cache import Cache
from whaleflux.trust import ownership
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert, decision_records
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import decision_history
from whaleflux_scheduler.core.decision_history import Noted
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.job_access import JobAccess

_SCOPE = "jobs:"


def key_of(name: str) -> str:
    """The store's key of a job name that is known to be one."""
    return keys.of_name(keys.JOBS, name)


def job_key(name: str) -> str:
    """The store's key of a job name; refuses what is no such name."""
    names.split(name, "queues", "jobs")
    return key_of(name)


def deletion(stored: StoredJob) -> list[Write]:
    """What removes a job. The fence of a name that may come again stays: agents remember its highest epoch.

    Made names cannot be given by users (`submit.check_job_id`): they never come again.
    """
    decisions = keys.of_name(keys.JOB_DECISIONS, stored.value.name)
    writes: list[Write] = [Delete(stored.entry.key), Delete(placements.key_of(stored.value.name)), Delete(decisions)]
    if names.is_made(stored.value.id):
        writes.append(Delete(keys.of_name(keys.JOB_FENCES, stored.value.name)))
    if stored.message.request_key:
        writes.append(Delete(keys.JOB_REQUESTS + stored.message.request_key))
    return writes


def check_deletable(stored: StoredJob) -> None:
    """Refuses for a job that has not ended, or of which something is left."""
    job = stored.value
    if not job.ended:
        raise FailedPrecondition(
            f"{job.name} is {job.state.name}; cancel it first",
            reason=ErrorReason.JOB_NOT_ENDED,
            metadata={"name": job.name},
        )
    if held := next((task for _, task in job.holding()), None):
        raise FailedPrecondition(
            f"{job.name} still holds GPUs on {held.node}; wait for its agent, or retire the node",
            reason=ErrorReason.GPUS_HELD,
            metadata={"name": job.name, "node": held.node},
        )


class Jobs:
    """What servicers read. A replica sees its own writes at once: reads wait until the cache has them."""

    def __init__(self, store: Store, cache: Cache[StoredJob], access: JobAccess) -> None:
        self._store, self.cache, self.access = store, cache, access
        self._written = 0

    def wrote(self, revision: int) -> None:
        """This replica has committed `revision`."""
        self._written = max(self._written, revision)

    async def current(self) -> None:
        """Returns when the cache has what this replica wrote."""
        if self.cache.revision < self._written:
            await self.cache.at_least(self._written)

    def decode(self, entry: Entry) -> StoredJob:
        """As the codec does, but what the cache has read already is not read again."""
        known = self.cache.get(entry.key)
        return known if known is not None and known.entry == entry else convert.read_job(entry, known)

    async def get(self, name: str, sight: Sight) -> StoredJob:
        """The job as it is known here; raises NotFound, the same for one that is not there for the caller.

        What the cache does not know yet is looked up, so that any replica sees any job.
        """
        key = job_key(name)
        await self.current()
        found = self.cache.get(key)
        if found is None and (entry := await self._store.get(key)) is not None:
            found = convert.read_job(entry)
        return self._seen(name, found, sight)

    async def newest(self, name: str, sight: Sight) -> StoredJob:
        """The job as it is in the store now, for changing it; raises NotFound."""
        entry = await self._store.get(job_key(name))
        return self._seen(name, None if entry is None else convert.read_job(entry), sight)

    async def placed(self, name: str) -> StoredJob:
        """The job as it is in the store now, for an agent, whose tasks of it the caller looks at; raises NotFound.

        All agents of a gang ask, so that a large record is not read for each of them.
        """
        entry = await self._store.get(job_key(name))
        if entry is None:
            raise NotFound("job", name)
        return self.decode(entry)

    def _seen(self, name: str, found: StoredJob | None, sight: Sight) -> StoredJob:
        if found is None or self.access.hides(found, sight):
            ownership.note_asked()
            raise self._not_there(name, sight)
        return found

    def _not_there(self, name: str, sight: Sight) -> NotFound:
        """An array's own name is told as such, where its first member is called by 0 or 1."""
        known = ((one, self.cache.get(job_key(one))) for one in (f"{name}-0", f"{name}-1"))
        members = [one for one, stored in known if stored is not None and not self.access.hides(stored, sight)]
        hint = "list what exists with: whaleflux jobs -a"
        if members:
            hint = (
                f"it is an array, whose members are jobs, such as {members[0]}; see them with: whaleflux jobs --members"
            )
        return NotFound("job", name, hint)

    async def page(self, request: pb.ListJobsRequest, sight: Sight) -> tuple[list[StoredJob], str]:
        """Newest first within each queue; what is not there for the caller is left out, and of a queue what ended in an earlier one of its name."""
        queue = "" if request.parent in ("", "queues/-") else names.split(request.parent, "queues", field="parent")[0]
        size = page_size(request.page_size)
        after, _ = parse_token(request.page_token, _SCOPE)
        await self.current()
        found = sorted(
            (key, stored)
            for stored in self.cache.values.values()
            if (not queue or (stored.value.queue == queue and not self.access.of_earlier_queue(stored)))
            and (request.show_ended or not stored.value.ended)
            and (sight.everything or not self.access.hides(stored, sight))
            and (key := _SCOPE + _order(stored.value)) > after
        )
        page = found[:size]
        token = page_token(page[-1][0], self.cache.revision) if len(found) > size else ""
        return [stored for _, stored in page], token

    async def decisions(self, job: StoredJob) -> tuple[Noted, ...]:
        """What was decided about the job so far, oldest first; what is not written down yet is taken from its record."""
        entry = await self._store.get(keys.of_name(keys.JOB_DECISIONS, job.value.name))
        known = decision_records.read(entry.value, job.value.uid) if entry is not None else ()
        if not job.value.readable:
            return known
        return decision_history.joined(known, decision_history.in_record(job.value, job.message.decision.summary))

    def of_unknown_holdings(self) -> list[str]:
        """Names of jobs whose records cannot be read and could not be before: what they hold is not known."""
        return [j.value.name for j in self.cache.values.values() if not j.value.readable and j.value.attempt is None]

    async def follow(self, stored: StoredJob) -> AsyncGenerator[Job, None]:
        """The job as it is, then each time it has changed, until it is deleted."""
        yield stored.value
        key = stored.entry.key
        async for changes in self.cache.changes():
            for change in changes:
                if change.key == key:
                    if change.new is None:
                        return
                    yield change.new.value


def _order(job: Job) -> str:
    """Text that sorts by queue, then newest first."""
    age_us = 10**17 - int(job.create_time.timestamp() * 1_000_000)
    return f"{job.queue}/{age_us:017d}/{job.id}"
