"""Answers about cost and waste, by any replica: it follows the head, keeps the ledger in DuckDB, and asks that.

An answer says as of when it is, and which hours are not in it since their files are damaged: nothing is left out silently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from whaleflux.errors import DeadlineExceeded, FieldViolation, InvalidArgument
from whaleflux.store.api import Store
from whaleflux_console.core.recommend.evidence import Pace
from whaleflux_console.core.rows import CLASSES, CostClass, LedgerRow
from whaleflux_console.core.units import Run
from whaleflux_console.ledger import chain, devices, node_cards, runs
from whaleflux_console.ledger.cache import HOT_DAYS, Cache, reading
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.head import Head, read_head
from whaleflux_console.ledger.manifest import DAY_MS, File, Kind, State, date, day_of
from whaleflux_console.ledger.paces import Paces, hours_of
from whaleflux_console.ledger.progress import ProgressCache
from whaleflux_console.ledger.question import CLASS, Question, check
from whaleflux_console.ledger.schemas import table_rows
from whaleflux_console.ledger.shelf import table_of
from whaleflux_console.ledger.sql import sql

T = TypeVar("T")
Files = TypeVar("Files")
DEADLINE_S = 10.0
AT_ONCE = 4  # questions that are worked on side by side; others wait their turn


@dataclass(frozen=True, slots=True)
class Sum:
    """`keys` as the question's `by` (a time as its start, milliseconds in decimal); `micros` in the order of CLASSES, summing to the bill.

    `gpu_ms` is of whole bills: by class it is not known, and 0.
    """

    keys: tuple[str, ...]
    gpu_ms: int
    bill_micros: int
    micros: tuple[int, ...]

    def of(self, kind: CostClass) -> int:
        return self.micros[CLASSES.index(kind)]


@dataclass(frozen=True, slots=True)
class Answer:
    """`total` is everything that the question is about, `others` what its limit cut off: rows and others sum to it."""

    rows: tuple[Sum, ...]
    others: Sum
    total: Sum
    as_of_ms: int  # everything that was reported before it is in the closed hours
    damaged: tuple[str, ...]  # files of hours that are not in it


class Answers:
    """Call `follow` first, and again when the ledger may have changed. `state` changes on the event loop alone, where it is asked."""

    def __init__(self, folder: Folder, store: Store, engine: Engine, *, hot_days: int = HOT_DAYS) -> None:
        self._folder, self._store, self._engine = folder, store, engine
        self._cache, self._paces = Cache(folder, engine, hot_days), Paces(folder, engine)
        self._progress = ProgressCache(folder, engine)
        self._state = State()
        self._as_of_ms = 0  # of what the cache holds
        self._head: Head | None = None  # that the cache is as of; None: it may lack any day
        self._following = asyncio.Lock()
        self._windows = asyncio.Semaphore(1)  # whose files are read
        self._places = asyncio.Semaphore(AT_ONCE)

    @property
    def state(self) -> State:
        """As of which it answers."""
        return self._state

    @property
    def hot_from_ms(self) -> int:
        """What is older is answered by whole days."""
        return self._cache.hot_from_ms

    @property
    def damaged(self) -> tuple[str, ...]:
        """Files of hours and days that are not in the answers."""
        found = (*self._cache.damaged.values(), *self._progress.damaged.values())
        return tuple(sorted(damage.path for damage in found))

    async def follow(self) -> bool:
        """Takes up what was committed since; whether there was anything. Raises Damaged when the chain itself is, Unavailable."""
        async with self._following:
            head, _ = await read_head(self._store)
            if head is None or head == self._head:
                return False
            changed = await self._advance(head)
            self._head = None  # what ends before the cache has it all begins anew
            await _to_the_end(self._fill, self._state, changed)
            self._head, self._as_of_ms = head, self._state.watermark_ms
            return True

    def _fill(self, state: State, changed: Iterable[int] | None) -> None:
        self._cache.follow(state, changed)
        self._progress.follow(state, changed, self._cache.hot_from_ms)

    async def _advance(self, head: Head) -> Iterable[int] | None:
        """Days whose hours changed; None: any may have."""
        if self._head is None or self._head.folder != head.folder or head.number < self._head.number:
            await self._load(head)
            return None
        try:
            steps = await asyncio.to_thread(chain.behind, self._folder, self._state, head.at)
        except Damaged:  # too far behind, or the chain is another one: from its checkpoint
            await self._load(head)
            return None
        for delta, named in steps:
            self._state.apply(delta, named)
        deltas = [delta for delta, _ in steps]
        kinds = (f"{Kind.HOURS}/", f"{Kind.DAYS}/")
        added = {day_of(file.start_ms) for delta in deltas for file in delta.added if file.path.startswith(kinds)}
        gone = any(path.startswith(kinds) for delta in deltas for path in delta.removed)
        return None if gone and not added else added

    async def _load(self, head: Head) -> None:
        self._state = await asyncio.to_thread(chain.load, self._folder, head)

    async def ask(self, question: Question) -> Answer:
        """Raises InvalidArgument for a question that cannot be answered, Unavailable until the ledger was read once."""
        check(question)
        self._check_days(question)
        query, parameters = sql(
            question, self._cache.source(question.start_ms, question.end_ms, by_hour=question.time == "hour")
        )
        async with self._places:
            *rows, total = await self._run(query, parameters)
        width = len(question.by)
        kept, whole = tuple(_in_time(question, [_sum(row[1:], width) for row in rows])), _sum((*total[1 + width :],), 0)
        return Answer(kept, _rest(whole, kept, question), whole, self._as_of_ms, self._damaged(question))

    def _check_days(self, question: Question) -> None:
        """Before the last weeks there are whole days alone."""
        first_hot, start, end = self._cache.hot_from_ms, question.start_ms, question.end_ms
        since = f"before {date(first_hot)} it is kept by day"
        if start < first_hot and (start % DAY_MS or (end < first_hot and end % DAY_MS)):
            raise InvalidArgument(FieldViolation("window", f"{since}: begin and end with a whole day (UTC)"))
        if start < first_hot and question.time == "hour":
            raise InvalidArgument(FieldViolation("by", f"{since}: ask by day, or for a later window"))

    async def select(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Rows of `progress.minutes`. Raises Unavailable until the ledger was read once."""
        if not self._cache.filled:
            raise reading()
        async with self._places:
            found: list[tuple[Any, ...]] = await self._run(query, parameters)
        return found

    async def versions(self, hour_ms: int) -> list[tuple[LedgerRow, ...]]:
        """A closed hour's rows as of each version that is kept, oldest first. Raises Damaged for a file that is not as it was written."""
        return await self._read(lambda: self._versions(hour_ms), self._rows_of)

    async def runs(self, start_ms: int, end_ms: int) -> list[Run]:
        """What each run cost and did in the closed hours of a window. Raises Damaged for a file that is not as it was written."""
        async with self._windows:
            return await self._read(
                lambda: runs.days(self._state, start_ms, end_ms),
                lambda days: runs.runs(self._folder, self._engine, days),
            )

    async def paces(self, start_ms: int, end_ms: int) -> list[Pace]:
        """Nodes that were slower than others of their run in closed hours of a window, as far as they are read: see `Paces`.

        Raises Damaged for a file that is not as it was written.
        """
        async with self._windows:
            return await self._read(lambda: hours_of(self._state, start_ms, end_ms), self._paces.slow)

    async def node_cards(self, hour_ms: int) -> Mapping[str, int]:
        """GPUs of the largest node of each {site}/{class} in an hour. Raises Damaged for a file that is not as it was written."""
        async with self._windows:
            return await self._read(
                lambda: [file] if (file := self._state.newest(Kind.HOURS, hour_ms)) else [],
                lambda files: node_cards.most(self._folder, self._engine, files),
            )

    async def devices(self, asked: devices.Asked) -> list[devices.Row]:
        """See `devices.rows`. Raises Damaged for a file that is not as it was written, DeadlineExceeded, Unavailable until the ledger was read."""
        if not self._cache.filled:
            raise reading()
        async with self._windows:
            return await self._read(
                lambda: devices.files(self._state, asked),
                lambda files: devices.rows(self._folder, self._engine, asked, files),
            )

    async def _read(self, find: Callable[[], Files], read: Callable[[Files], T]) -> T:
        """What the files in force say; those of a newer version where they were replaced meanwhile."""
        try:
            return await _to_the_end(read, find())
        except Damaged:
            await self.follow()
            return await _to_the_end(read, find())

    def _versions(self, hour_ms: int) -> list[File]:
        files = (file for file in self._state.of(Kind.HOURS, hour_ms) if file.version)
        return sorted(files, key=lambda file: file.version)

    def _rows_of(self, files: Sequence[File]) -> list[tuple[LedgerRow, ...]]:
        return [table_rows(table_of(self._folder, file)) for file in files]

    async def _run(self, query: str, parameters: Sequence[Any]) -> Any:
        cursor = self._engine.cursor()
        work = asyncio.ensure_future(asyncio.to_thread(_fetched, cursor, query, parameters))
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.shield(work)
        except TimeoutError:
            raise DeadlineExceeded(
                f"not answered within {DEADLINE_S:.0f} s: ask for a shorter window, or by less"
            ) from None
        finally:
            if not work.done():
                cursor.interrupt()
                await asyncio.wait([work])
            cursor.close()

    def _damaged(self, question: Question) -> tuple[str, ...]:
        found = self._cache.damaged.items()
        first_ms = day_of(question.start_ms)
        return tuple(sorted(damage.path for at, damage in found if first_ms <= at < question.end_ms))


async def _to_the_end(work: Callable[..., T], *arguments: Any) -> T:
    """In a thread. Whoever is cancelled meanwhile keeps its turn until the thread is done: that cannot be stopped."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(working)
    finally:
        if not working.done():
            await asyncio.wait([working])


def _fetched(cursor: Any, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    return list(cursor.execute(query, list(parameters)).fetchall())


def _sum(values: Sequence[Any], width: int) -> Sum:
    gpu_ms, bill, *micros = (int(value or 0) for value in values[width:])
    return Sum(tuple(map(str, values[:width])), gpu_ms, bill, tuple(micros))


def _in_time(question: Question, rows: list[Sum]) -> list[Sum]:
    if question.time:
        place = question.by.index(question.time)
        rows.sort(key=lambda each: int(each.keys[place]))
    return rows


def _rest(whole: Sum, kept: Sequence[Sum], question: Question) -> Sum:
    """What the limit cut off."""
    if not question.by:
        return Sum((), 0, 0, (0,) * len(CLASSES))
    gpu_ms = 0 if CLASS in question.by else whole.gpu_ms - sum(each.gpu_ms for each in kept)
    micros = tuple(value - sum(each.micros[place] for each in kept) for place, value in enumerate(whole.micros))
    return Sum((), gpu_ms, whole.bill_micros - sum(each.bill_micros for each in kept), micros)
