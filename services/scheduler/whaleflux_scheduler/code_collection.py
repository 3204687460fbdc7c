"""Deletes code that no job has named for a while; done by the leader, beside all else."""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.code.api import CodeStore
from whaleflux.code.retention import deletable
from whaleflux.errors import StatusError
from whaleflux.store.cache import Cache
from whaleflux.telemetry import Event
from whaleflux_scheduler.convert import StoredJob

LOOK_EVERY_S = 600.0
_log = telemetry.get_logger("whaleflux.scheduler")


class CodeCollection:
    """Lives as long as its leadership. `grace_s`: unnamed code is kept for so long."""

    def __init__(self, store: CodeStore, jobs: Cache[StoredJob], clock: Clock, grace_s: float) -> None:
        self._store, self._jobs, self._clock, self._grace_s = store, jobs, clock, grace_s

    async def run(self) -> None:
        """Looks every ten minutes, for ever; what does not answer is asked again then."""
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            try:
                await self.collect()
            except StatusError as error:
                _log.info(Event.FEED_BROKEN, feed="code", reason=error.message)

    async def collect(self) -> None:
        """Deletes what may go now. A job whose record cannot be read may need any of it: then nothing goes."""
        jobs = [stored.value for stored in self._jobs.values.values()]
        if not all(job.readable for job in jobs):
            return
        wanted = {job.spec.code for job in jobs if job.spec.code}
        codes = await self._store.list()
        for code in deletable(codes, wanted, self._clock.now(), self._grace_s, self._store.max_bytes):
            if await self._store.delete(code):
                _log.info(Event.CODE_DELETED, digest=code.digest, bytes=max(0, code.size_bytes))
