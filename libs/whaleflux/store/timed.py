"""How long the store takes to answer, as Prometheus is shown it; what is asked and answered is the inner store's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import contextmanager

from whaleflux import telemetry
from whaleflux.store.api import Batch, Condition, Entry, Extent, Lease, Snapshot, Store, Write
from whaleflux.telemetry import Metric

_CALLS = ("get", "commit")  # of one answer each; how long a listing takes tells of its length


class TimedStore:
    """A Store that observes each get and commit, also one that failed: a store that does not answer is a slow one."""

    def __init__(self, inner: Store, monotonic: Callable[[], float]) -> None:
        self._inner, self._monotonic = inner, monotonic
        telemetry.from_zero(Metric.STORE_DURATION, *_CALLS)

    async def get(self, key: str) -> Entry | None:
        with self._timed("get"):
            return await self._inner.get(key)

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        with self._timed("commit"):
            return await self._inner.commit(*writes, when=when)

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        return await self._inner.list(prefix, after=after, limit=limit, at=at)

    async def extent(self, prefix: str) -> Extent:
        return await self._inner.extent(prefix)

    def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        return self._inner.watch(prefix, after=after)

    async def lease(self, ttl_s: float) -> Lease:
        return await self._inner.lease(ttl_s)

    async def close(self) -> None:
        await self._inner.close()

    @contextmanager
    def _timed(self, call: str) -> Generator[None, None, None]:
        begun_s = self._monotonic()
        try:
            yield
        finally:
            telemetry.histogram(Metric.STORE_DURATION).labels(call).observe(self._monotonic() - begun_s)
