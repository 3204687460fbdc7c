"""Group commit: commits that wait at the same moment travel in one transaction.

A durable commit costs one fsync however many writes it carries, so under load the rate grows with the number of
callers; a caller alone is passed through without delay. Each caller keeps the meaning of its own `commit`: it succeeds
or fails by its own conditions, and what is merged is what could have run one after the other in order of arrival.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from whaleflux.errors import StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.store.api import (
    MAX_COMMIT_BYTES,
    MAX_OPERATIONS,
    Batch,
    Condition,
    ConditionFailed,
    Entry,
    Extent,
    Lease,
    NoneCreated,
    Snapshot,
    Store,
    Unknown,
    Write,
    check,
    conflict,
    depends_on,
)

_LOOK_AHEAD = 256  # commits left behind because of a contended key, before a group goes as it is


@dataclass(eq=False, slots=True)
class _Commit:
    writes: tuple[Write, ...]
    when: tuple[Condition, ...]
    size_bytes: int
    answer: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, result: int | StatusError) -> None:
        if self.answer.done():  # its caller was cancelled
            return
        if isinstance(result, StatusError):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


def take(waiting: deque[_Commit]) -> tuple[_Commit, ...]:
    """Removes from `waiting` what may travel together: in order of arrival, within one transaction's limits.

    All conditions of a transaction see the state before it, so a commit that writes or compares what an earlier one of
    the group writes stays behind for the next group.
    """
    group, behind = _Group(), deque[_Commit]()
    while waiting and len(behind) < _LOOK_AHEAD:
        commit = waiting.popleft()
        if not group.admit(commit):
            behind.append(commit)
    waiting.extendleft(reversed(behind))
    return tuple(group.commits)


class _Group:
    def __init__(self) -> None:
        self.commits: list[_Commit] = []
        self._written: set[str] = set()
        self._operations = self._size_bytes = 0

    def admit(self, commit: _Commit) -> bool:
        written = {write.key for write in commit.writes}
        operations = self._operations + max(len(commit.writes), len(commit.when))
        size = self._size_bytes + commit.size_bytes
        if self.commits and (operations > MAX_OPERATIONS or size > MAX_COMMIT_BYTES):
            return False
        if not self._written.isdisjoint(written | {condition.key for condition in commit.when}):
            return False
        ranges = [condition for condition in commit.when if isinstance(condition, NoneCreated)]
        if any(depends_on(condition, key) for condition in ranges for key in self._written):
            return False
        self.commits.append(commit)
        self._written |= written
        self._operations, self._size_bytes = operations, size
        return True


def lose(group: Sequence[_Commit], refused: ConditionFailed) -> tuple[_Commit, ...]:
    """Settles those whose own conditions failed and returns the others."""
    failed, left = set(refused.failed), []
    for commit in group:
        if mine := [condition for condition in commit.when if condition in failed]:
            commit.settle(conflict(mine))
        else:
            left.append(commit)
    if len(left) < len(group):
        return tuple(left)
    for commit in group:  # it changed back between compare and read, so nobody can be named
        commit.settle(ConditionFailed(commit.when))
    return ()


def settle_all(group: Sequence[_Commit], silence: Unavailable) -> None:
    for commit in group:  # one exception object each: raising adds a traceback to it
        commit.settle(type(silence)(silence.message, reason=silence.reason, metadata=silence.metadata))


class GroupCommit:
    """A Store around `store` that merges concurrent commits; everything else passes through.

    At most `in_flight` transactions are under way at once and `waiting` commits queue behind them
    (Unavailable beyond).
    """

    def __init__(self, store: Store, *, in_flight: int = 2, waiting: int = 10_000) -> None:
        self._store, self._free, self._limit = store, in_flight, waiting
        self._waiting: deque[_Commit] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        size = check(writes, when)
        if self._free and not self._waiting:
            return await self._alone(writes, when)
        if len(self._waiting) >= self._limit:
            raise Unavailable(
                f"{self._limit} commits wait for the store; slow down", reason=ErrorReason.STORE_BUSY, retry_after_s=1.0
            )
        commit = _Commit(writes, tuple(when), size)
        self._waiting.append(commit)
        self._start()
        return await commit.answer

    async def get(self, key: str) -> Entry | None:
        return await self._store.get(key)

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        return await self._store.list(prefix, after=after, limit=limit, at=at)

    async def extent(self, prefix: str) -> Extent:
        return await self._store.extent(prefix)

    def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        return self._store.watch(prefix, after=after)

    async def lease(self, ttl_s: float) -> Lease:
        return await self._store.lease(ttl_s)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        while self._waiting:
            self._waiting.popleft().settle(Unavailable("the store was closed before the commit was sent"))
        await self._store.close()

    async def _alone(self, writes: tuple[Write, ...], when: Sequence[Condition]) -> int:
        self._free -= 1
        try:
            return await self._store.commit(*writes, when=when)
        finally:
            self._free += 1
            self._start()

    def _start(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            group = take(self._waiting)
            task = asyncio.get_running_loop().create_task(self._run(group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, group: Sequence[_Commit]) -> None:
        try:
            await self._send(group)
        except asyncio.CancelledError:
            for commit in group:
                commit.settle(Unknown("the store was closed while the commit was under way"))
            raise
        finally:
            self._free += 1
            self._start()

    async def _send(self, group: Sequence[_Commit]) -> None:
        """Commits the group as one; those whose own conditions failed drop out and the rest goes again."""
        while group:
            writes = [write for commit in group for write in commit.writes]
            when = list(dict.fromkeys(condition for commit in group for condition in commit.when))
            try:
                revision = await self._store.commit(*writes, when=when)
            except ConditionFailed as refused:
                group = lose(group, refused)
            except Unavailable as silence:
                return settle_all(group, silence)
            except StatusError as refused:
                return await self._one_by_one(group, refused)
            else:
                for commit in group:
                    commit.settle(revision)
                return None
        return None

    async def _one_by_one(self, group: Sequence[_Commit], refused: StatusError) -> None:
        """One caller's fault, such as a lost lease, must not fail the others."""
        if len(group) == 1:
            return group[0].settle(refused)
        for commit in group:
            await self._send([commit])
        return None
