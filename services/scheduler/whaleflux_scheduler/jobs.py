"""Reading jobs: from the cache where it is new enough, else from the store."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from whaleflux import names
from whaleflux.errors import NotFound
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.store import keys
from whaleflux.store.api import Delete, Entry, Store, Write
from whaleflux.store.cache import Cache
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import Job

_SCOPE = "jobs:"
MADE_ID_CHARS = 26  # of a ULID


def key_of(name: str) -> str:
    """The store's key of a job name that is known to be one."""
    return keys.of_name(keys.JOBS, name)


def job_key(name: str) -> str:
    """The store's key of a job name; refuses what is no such name."""
    names.split(name, "queues", "jobs")
    return key_of(name)


def deletion(stored: StoredJob) -> list[Write]:
    """What removes a job. The fence of a name that may come again stays: agents remember its highest epoch."""
    once = len(stored.value.id) == MADE_ID_CHARS
    fence = [Delete(keys.of_name(keys.JOB_FENCES, stored.value.name))] if once else []
    return [Delete(stored.entry.key), *fence]


class Jobs:
    """What servicers read. A replica sees its own writes at once: reads wait until the cache has them."""

    def __init__(self, store: Store, cache: Cache[StoredJob]) -> None:
        self._store, self.cache = store, cache
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
        return known if known is not None and known.entry == entry else convert.JOBS.decode(entry)

    async def get(self, name: str) -> StoredJob:
        """The job; raises NotFound. What the cache does not know yet is looked up, so that any replica sees any job."""
        key = job_key(name)
        await self.current()
        found = self.cache.get(key)
        if found is None and (entry := await self._store.get(key)) is not None:
            found = convert.JOBS.decode(entry)
        if found is None:
            raise NotFound("job", name, "list what exists with: whaleflux jobs -a")
        return found

    async def newest(self, name: str) -> StoredJob:
        """The job as it is in the store now, for changing it; raises NotFound."""
        entry = await self._store.get(job_key(name))
        if entry is None:
            raise NotFound("job", name, "list what exists with: whaleflux jobs -a")
        return convert.JOBS.decode(entry)

    async def page(self, request: pb.ListJobsRequest) -> tuple[list[StoredJob], str]:
        """Newest first within each queue."""
        queue = "" if request.parent in ("", "queues/-") else names.split(request.parent, "queues", field="parent")[0]
        size = page_size(request.page_size)
        after, _ = parse_token(request.page_token, _SCOPE)
        await self.current()
        found = sorted(
            (key, stored)
            for stored in self.cache.values.values()
            if (not queue or stored.value.queue == queue)
            and (request.show_ended or not stored.value.ended)
            and (key := _SCOPE + _order(stored.value)) > after
        )
        page = found[:size]
        token = page_token(page[-1][0], self.cache.revision) if len(found) > size else ""
        return [stored for _, stored in page], token

    async def follow(self, name: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then each time it has changed, until it is deleted."""
        yield (await self.get(name)).value
        key = job_key(name)
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
