"""One leader at a time, and writes that only the leader of this moment can make.

A leader holds a key that lives with its lease. The lease alone proves nothing: a paused process may believe in it for
as long as it is paused. The proof is `Held(leader)` in every commit, which compares the key's creation revision in the
same transaction. With the default TTL of 2 s and etcd's election timeout at 500 ms (see `embedded.etcd`), a dead leader
is replaced in about 2.5 s; one that stops in order resigns, and take-over is immediate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from whaleflux.errors import Compacted, NotFound, Unavailable
from whaleflux.retry import Backoff
from whaleflux.store.api import Absent, ConditionFailed, Fenced, Held, Lease, Put, Store
from whaleflux.store.keys import LEADERS
from whaleflux.telemetry import Metric, gauge

log = logging.getLogger(__name__)

TTL_S = 2.0
_RETRY = Backoff()
_SETTLED_S = 10.0  # a leadership that lasted so long begins counting its outages anew
_RESIGN_S = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Leader:
    """Leadership while it lasts. `lost` is set before another can lead; from then on only stop."""

    identity: str
    key: str
    created: int  # the revision that made the key: what tells this leadership from every other
    lost: asyncio.Event

    @property
    def held(self) -> Held:
        """The condition that fences a commit: `when=[leader.held, ...]`."""
        return Held(self)


@contextlib.asynccontextmanager
async def elect(store: Store, name: str, identity: str, *, ttl_s: float = TTL_S) -> AsyncGenerator[Leader, None]:
    """Waits until this process leads `name`; resigns at the end of the block.

    `identity` is what `leader_of` tells others, such as an address. The block is not cancelled when leadership is lost:
    watch `leader.lost`, or use `lead`.
    """
    lease, leader = await _campaign(store, LEADERS + name, identity, ttl_s)
    try:
        yield leader
    finally:
        with contextlib.suppress(TimeoutError):  # an unreachable store lets the lease expire
            async with asyncio.timeout(_RESIGN_S):
                await lease.revoke()


async def lead(
    store: Store, name: str, identity: str, work: Callable[[Leader], Awaitable[None]], *, ttl_s: float = TTL_S
) -> None:
    """Campaigns and works, again and again, until `work` returns or raises something else than Fenced and Unavailable.

    When leadership is lost, `work` is cancelled; it is called afresh with the next leadership and must not remember
    anything of the last one. An outage that `work` did not wait out leaves unknown what was under way: the leadership
    is given up, and the next one finds out.
    """
    done, failures = False, 0
    leads = gauge(Metric.LEADER).labels(name)
    leads.set(0)
    while not done:
        async with elect(store, name, identity, ttl_s=ttl_s) as leader:
            log.info("%s leads %s", identity, name)
            began_s = asyncio.get_running_loop().time()
            leads.set(1)
            try:
                done = await _work(leader, work)
            except* Fenced:
                log.warning("%s was replaced as leader of %s", identity, name)
            except* Unavailable as outage:
                lasted_s = asyncio.get_running_loop().time() - began_s
                failures = failures + 1 if lasted_s < _SETTLED_S else 1
                log.warning("%s gives up %s: %s", identity, name, _first(outage))
            finally:
                leads.set(0)
        if failures and not done:
            await asyncio.sleep(_RETRY.pause_s(failures))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error itself, out of however many groups."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def leader_of(store: Store, name: str) -> str:
    """The identity of whoever leads `name` now, or ""."""
    entry = await store.get(LEADERS + name)
    return entry.value.decode() if entry else ""


async def _work(leader: Leader, work: Callable[[Leader], Awaitable[None]]) -> bool:
    """Whether `work` ended by itself."""
    working = asyncio.ensure_future(work(leader))
    lost = asyncio.ensure_future(leader.lost.wait())
    try:
        await asyncio.wait({working, lost}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        log.warning("%s lost %s", leader.identity, leader.key)
        return False
    finally:
        lost.cancel()
        working.cancel()
        await asyncio.wait({working, lost})
        if not working.cancelled() and (error := working.exception()):
            log.info("%s stopped with %r", leader.key, error)


async def _campaign(store: Store, key: str, identity: str, ttl_s: float) -> tuple[Lease, Leader]:
    failures = 0
    while True:
        try:
            await _vacancy(store, key)
            if won := await _claim(store, key, identity, ttl_s):
                return won
        except (Unavailable, Compacted) as reason:
            log.info("campaign for %s goes on: %s", key, reason)
            failures += 1
            await asyncio.sleep(_RETRY.pause_s(failures))


async def _vacancy(store: Store, key: str) -> None:
    """Returns when nobody holds the key."""
    now = await store.list(key, limit=1)
    if not any(entry.key == key for entry in now.entries):
        return
    async with contextlib.aclosing(store.watch(key, after=now.revision)) as batches:
        async for batch in batches:
            if any(event.key == key and event.entry is None for event in batch.events):
                return


async def _claim(store: Store, key: str, identity: str, ttl_s: float) -> tuple[Lease, Leader] | None:
    """Tries once. Whatever is not a clear win gives the lease back, and with it a key that was made unseen."""
    lease = await store.lease(ttl_s)
    won = False
    try:
        created = await store.commit(Put(key, identity.encode(), lease), when=[Absent(key)])
        won = True
        return lease, Leader(identity, key, created, lease.lost)
    except (ConditionFailed, NotFound):
        return None
    finally:
        if not won:
            await lease.revoke()
