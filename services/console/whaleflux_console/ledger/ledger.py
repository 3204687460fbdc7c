"""The usage ledger: what was reported and told goes in, hours are closed and restated, and everything is files that a crash leaves whole.

One at a time writes, under its leadership (`open_ledger`). Whoever gets Unavailable from a write opens the ledger anew: a write whose end
is not known may be in effect.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pyarrow.compute as pc

from whaleflux.store.api import Store
from whaleflux.store.election import Leader
from whaleflux_console.core.facts import HOUR_MS, Facts
from whaleflux_console.core.rows import LedgerRow
from whaleflux_console.ledger import repair, schemas, usage
from whaleflux_console.ledger import rules as when
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.days import day_table
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File, Kind, Position, State, day_of, hour_of
from whaleflux_console.ledger.opening import open_writer
from whaleflux_console.ledger.progress import progress_of
from whaleflux_console.ledger.repair import Recovery
from whaleflux_console.ledger.rules import Rules
from whaleflux_console.ledger.shelf import local_files, rows_in, table_of
from whaleflux_console.ledger.writer import New, Writer

T = TypeVar("T")
FACT_BUCKET_MS = (
    300_000  # what an hour's rows are made of is read by so much: 10,000 GPUs' minutes are too many objects
)
KEPT_VERSIONS = 8  # of an hour's rows, the first and the newest: exports tell what restatements changed
MOST_NOTES = 20
_MOST_PUT_OFF = 10_000  # hours
_HOURS_READ = 24  # files that one query reads
LONGEST_REPORT_MS = HOUR_MS  # of a sample or of steps
EARLY_MS = 24 * HOUR_MS  # a report from further ahead of the stream's clock is of a clock that cannot be right


@dataclass(frozen=True, slots=True)
class Reports:
    """What agents reported, in the order of the stream: SAMPLES and STEPS, the places of the first and last report, and when that was taken."""

    samples: Any
    steps: Any
    first: int
    last: int
    last_id: str
    taken_ms: int


@dataclass(frozen=True, slots=True)
class HourInput:
    """Everything that an hour's rows are made of. `made_of` is the commit as of which it was read."""

    hour_ms: int
    made_of: int
    told: tuple[Any, ...] = ()  # FACTS, oldest first
    samples: Any = field(default_factory=schemas.MINUTES.empty_table)  # by FACT_BUCKET_MS, with the hour's edges
    steps: Any = field(default_factory=schemas.WORK.empty_table)
    minutes: Any = field(default_factory=schemas.MINUTES.empty_table)  # of the hour
    work: Any = field(default_factory=schemas.WORK.empty_table)

    @property
    def facts(self) -> Facts:
        """Made anew each time, which takes seconds where the hour is a large one."""
        return schemas.facts_of(self.told, self.samples, self.steps)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Files that an hour is made of."""

    raw: tuple[File, ...]
    steps: tuple[File, ...]
    facts: tuple[File, ...]
    minutes: File | None
    work: File | None


class Ledger:
    """See the module. All that is asked of it is answered from `state`, without reading a file, but `inputs`, `rows` and `verify`."""

    def __init__(self, folder: Folder, writer: Writer, rules: Rules, engine: Engine, notes: Sequence[str] = ()) -> None:
        self.rules, self.folder, self.engine = rules, folder, engine
        self.notes = tuple(notes)  # what was not as it had been left when it was opened
        self.refused_rows = 0  # of reports, whose times cannot be right
        self._writer = writer
        self._closed_ms: dict[int, int] = {}
        self._swept = False
        self._proven_ms = 0

    @property
    def state(self) -> State:
        return self._writer.state

    @property
    def id(self) -> str:
        """Tells it from one that began anew in another folder, or in this one after everything was lost."""
        return self._writer.folder_id

    def note(self, found: Sequence[Damaged]) -> None:
        """Keeps the newest of what is to be said to people."""
        self.notes = tuple(dict.fromkeys((*self.notes, *map(str, found))))[-MOST_NOTES:]

    # What comes in

    async def append(self, reports: Reports, *, missed: int = 0) -> None:
        """Keeps what was reported. What it has already is left out: so reports may come again after a crash. `missed` were gone unread."""
        position = self.state.position
        if reports.last <= position.sequence:
            return
        if reports.first <= position.sequence:
            raise ValueError(f"reports {reports.first} to {reports.last} begin before {position.sequence + 1}")
        after = Position(reports.last, reports.last_id, reports.taken_ms, position.missed + missed, position.again)
        await self._keep(reports, after)

    async def append_again(self, reports: Reports) -> None:
        """Keeps what a file held that is gone: the first of the stretches `position.again`, or its beginning."""
        position = self.state.position
        (first, last), *others = position.again
        if not first <= reports.first <= reports.last <= last:
            raise ValueError(f"reports {reports.first} to {reports.last} are not of {first} to {last}")
        rest = [(reports.last + 1, last)] if reports.last < last else []
        await self._keep(reports, replace(position, again=(*rest, *others)))

    async def give_up(self, through: int) -> None:
        """Of the first stretch of `position.again` the stream no longer has what is up to `through`: it stays unknown."""
        position = self.state.position
        (first, last), *others = position.again
        rest = [(through + 1, last)] if through < last else []
        lost = min(through, last) - first + 1
        await self._writer.commit(position=replace(position, missed=position.missed + lost, again=(*rest, *others)))

    async def _keep(self, reports: Reports, position: Position) -> None:
        new = await self._in_thread(_by_hour, reports)
        self.refused_rows += reports.samples.num_rows + reports.steps.num_rows - sum(n.table.num_rows for n in new)
        await self._writer.commit(new, watermark_ms=reports.taken_ms, position=position)

    async def begin_stream_anew(self) -> None:
        """The stream is another one than was read so far: its reports are counted from 1 on."""
        await self._writer.commit(position=replace(self.state.position, sequence=0, id="", again=()))

    async def advance(self, watermark_ms: int) -> None:
        """Everything that the stream took before this instant is in the ledger, and there was nothing new."""
        if watermark_ms > self.state.watermark_ms:
            await self._writer.commit(watermark_ms=watermark_ms)

    async def tell(self, hour_ms: int, facts: Facts) -> None:
        """Keeps what is known of an hour from owners' records, so that it can be made anew when those are gone.

        Later words count: a fact of the same device and start (attempt, card and start, name) replaces the earlier one.
        """
        await self.tell_hours({hour_ms: facts})

    async def tell_hours(self, told: Mapping[int, Facts]) -> None:
        """The same of many hours, by one commit: all of it or nothing."""
        tables = [(hour_ms, await self._in_thread(schemas.facts_table, facts)) for hour_ms, facts in told.items()]
        if new := [New(Kind.FACTS, hour_of(hour_ms), table, "facts") for hour_ms, table in tables if table.num_rows]:
            await self._writer.commit(new)

    async def told(self, hour_ms: int) -> Facts:
        """What is known of an hour from owners' records. Raises Damaged."""
        return await self._in_thread(self._told, self.state.of(Kind.FACTS, hour_ms))

    def _told(self, files: Sequence[File]) -> Facts:
        return schemas.facts_of([table_of(self.folder, file) for file in files])

    # Hours

    def due(self) -> tuple[int, ...]:
        """Hours to close or to restate now, oldest first."""
        return when.due(self.state, self.rules, self._closed_ms)

    async def inputs(self, hour_ms: int, *, sound_facts: bool = False) -> HourInput:
        """Of reports those beside the hour's edges too. Files of reports that are damaged are taken out, and read again from the stream.

        Raises Damaged when what owners told is: nothing is billed by half of it. `sound_facts`: what is left of it, for a look.
        """
        while True:
            sources = self._sources(hour_ms)
            if sound_facts:
                damaged = {damage.path for damage in await self.damaged_facts(hour_ms)}
                sources = replace(sources, facts=tuple(file for file in sources.facts if file.path not in damaged))
            try:
                return await self._in_thread(self._read_inputs, hour_ms, self.state.number, sources)
            except Damaged as damage:
                file = self.state.files.get(damage.path)
                if file is None or file.kind is Kind.FACTS:
                    raise
                self.note([damage])
                await self.recover([damage])

    async def damaged_facts(self, hour_ms: int) -> tuple[Damaged, ...]:
        """Files of what owners told of an hour that are gone or damaged."""
        return await self._in_thread(repair.damages, self.folder, self.state.of(Kind.FACTS, hour_ms))

    def _sources(self, hour_ms: int) -> _Sources:
        near = (hour_ms - HOUR_MS, hour_ms, hour_ms + HOUR_MS)  # a report lies with the hour in which it began
        state = self.state
        return _Sources(
            tuple(file for hour in near for file in state.of(Kind.RAW, hour)),
            tuple(file for hour in near for file in state.of(Kind.STEPS, hour)),
            state.of(Kind.FACTS, hour_ms),
            state.newest(Kind.MINUTES, hour_ms),
            state.newest(Kind.WORK, hour_ms),
        )

    def _read_inputs(self, hour_ms: int, made_of: int, sources: _Sources) -> HourInput:
        seen = self._rolled_up(hour_ms, sources.raw, sources.minutes, usage.samples_of, schemas.MINUTES)
        done = self._rolled_up(hour_ms, sources.steps, sources.work, usage.steps_of, schemas.WORK)
        return HourInput(
            hour_ms,
            made_of,
            tuple(table_of(self.folder, file) for file in sources.facts),
            usage.coarser_samples(self.engine, seen, FACT_BUCKET_MS),
            usage.coarser_steps(self.engine, done, FACT_BUCKET_MS),
            usage.within(hour_ms, seen),
            usage.within(hour_ms, done),
        )

    def _rolled_up(
        self, hour_ms: int, files: Sequence[File], before: File | None, roll: Callable[..., Any], schema: Any
    ) -> Any:
        """From all reports that are kept; where those of the roll-up are gone, from it and what came since."""
        own = [file for file in files if file.start_ms == hour_ms]
        if before and not any(file.commit <= before.made_of for file in own):
            with local_files(self.folder, [f for f in own if f.commit > before.made_of], self.engine.scratch) as paths:
                since = roll(self.engine, hour_ms, paths)
            return usage.joined([table_of(self.folder, before), since], schema)
        with local_files(self.folder, files, self.engine.scratch) as paths:
            return roll(self.engine, hour_ms, paths)

    def open_hours(self) -> tuple[int, ...]:
        """Hours of which something is told and that are not closed yet, oldest first."""
        return when.open_hours(self.state)

    async def restate(self, hours: Sequence[int]) -> None:
        """Lets these hours be closed again at once: something that they are made of, and that is not in these files, is another by now."""
        empty = schemas.FACTS.empty_table()
        await self._writer.commit([New(Kind.FACTS, hour_ms, empty, "again") for hour_ms in hours])
        self.hurry(hours)

    def hurry(self, hours: Iterable[int]) -> None:
        """Somebody waits to see what these hours cost: they are closed again without waiting for what comes late."""
        for hour_ms in hours:
            self._closed_ms.pop(hour_ms, None)

    async def close(self, made_from: HourInput, rows: Sequence[LedgerRow]) -> int:
        """As `close_with`."""
        return await self.close_with(made_from, await self._in_thread(schemas.rows_table, rows))

    async def close_with(self, made_from: HourInput, rows: Any, *, interim: bool = False) -> int:
        """Closes or restates the hour with these HOURS; returns the version. They are in force when it returns, and nothing of them before.

        Rows that say what is in force already are no new version: they stand for all that was told until now.

        `interim`: the hour stays open, and these are its rows so far (version 0).
        """
        hour_ms = made_from.hour_ms
        so_far = [file for file in self.state.of(Kind.HOURS, hour_ms) if not file.version]
        steps_before = self.state.of(Kind.PROGRESS, hour_ms)
        if interim:
            went = await self._in_thread(progress_of, self.engine, hour_ms, made_from.work, made_from.told)
            table = schemas.of_version(rows, 0)
            new = [
                New(kind, hour_ms, each, "v0", 0, made_from.made_of)
                for kind, each in ((Kind.HOURS, table), (Kind.PROGRESS, went))
            ]
            await self._commit_and_remove(new, [*so_far, *steps_before])
            return 0
        before = [file for file in self.state.of(Kind.HOURS, hour_ms) if file.version]
        last = before[-1] if before else None
        is_same = last is not None and await self._in_thread(self._says, last, rows)
        version = (last.version if last else 0) + (not is_same)
        table = schemas.of_version(rows, version)
        new = [
            New(kind, hour_ms, each, f"v{version}", version, made_from.made_of)
            for kind, each in await self._in_thread(_files_of, self.engine, made_from, table)
        ]
        old = [
            *so_far,
            *(before[-1:] if is_same else before[1 : max(1, len(before) - KEPT_VERSIONS + 2)]),
            *steps_before,
            *self.state.of(Kind.MINUTES, hour_ms),
            *self.state.of(Kind.WORK, hour_ms),
            *self.state.of(Kind.RUNS, hour_ms),
        ]
        await self._commit_and_remove(new, old)
        self.put_off(hour_ms)
        return version

    def put_off(self, hour_ms: int) -> None:
        """The hour is not due for a while: it is closed, or cannot be now, and others are."""
        self._closed_ms[hour_ms] = self.state.watermark_ms
        while len(self._closed_ms) > _MOST_PUT_OFF:
            del self._closed_ms[next(iter(self._closed_ms))]

    def _says(self, file: File, rows: Any) -> bool:
        """Whether these are the rows of the file."""
        try:
            there = table_of(self.folder, file)
        except Damaged:
            return False
        return bool(schemas.in_order(there).equals(schemas.in_order(schemas.of_version(rows, file.version))))

    async def rows(self, hour_ms: int, version: int = 0) -> tuple[LedgerRow, ...]:
        """Of a closed hour, as of a version that is kept (0: the one in force); none of one that is open."""
        found = [file for file in self.state.of(Kind.HOURS, hour_ms) if version in {0, file.version}]
        if not found:
            return ()
        newest = max(found, key=lambda file: file.version)
        return schemas.table_rows(await self._in_thread(table_of, self.folder, newest))

    async def bills(self, hours: Sequence[int], site: str = "", gpu_class: str = "") -> dict[int, int]:
        """What the usage of closed hours cost, micro-dollars, of a site and class alone if these are given; hours without such are left out."""
        files = [file for hour_ms in hours if (file := self.state.newest(Kind.HOURS, hour_ms))]
        found: dict[int, int] = {}
        for first in range(0, len(files), _HOURS_READ):
            found |= await self._in_thread(self._bills, files[first : first + _HOURS_READ], site, gpu_class)
        return found

    def _bills(self, files: Sequence[File], site: str, gpu_class: str) -> dict[int, int]:
        with local_files(self.folder, files, self.engine.scratch) as paths:
            query = f"""SELECT hour_ms, sum(bill_micros)::BIGINT AS micros FROM ({rows_in(paths)})
                WHERE adjustment = '' AND $1 IN ('', site) AND $2 IN ('', gpu_class) GROUP BY hour_ms"""
            table = self.engine.table(query, [site, gpu_class])
        return dict(zip(table["hour_ms"].to_pylist(), table["micros"].to_pylist(), strict=True))

    # Upkeep

    async def keep_house(self, now_ms: int) -> None:
        """Once an hour or so: rolls up days that are over, and lets files go that have outlived their time or that a crash left.

        It reads one day's files to prove them, another day each time.
        """
        if not self._swept:
            strays = await self._in_thread(repair.strays, self.folder, self.state, self._writer.by)
            await self._writer.remove(strays)
            self._swept = True
        for day_ms in when.unrolled_days(self.state, self.rules):
            await self.roll_day(day_ms)
        if gone := when.outlived(self.state, self.rules, now_ms):
            await self._commit_and_remove([], gone)
        await self._prove_a_day()

    async def _prove_a_day(self) -> None:
        """From the newest back, and again."""
        days = sorted({day_of(start_ms) for _, start_ms in self.state.spans}, reverse=True)
        if days:
            day_ms = next((day for day in days if day < self._proven_ms), days[0])
            if found := await self.verify(day_ms):
                await self.mend(found)
            self._proven_ms = day_ms

    async def roll_day(self, day_ms: int) -> None:
        """A day's hours by everything but card and attempt."""
        made_of, hours = self.state.number, self.state.hours_of_day(day_ms)
        table = await self._in_thread(self._day, day_ms, hours)
        before = self.state.of(Kind.DAYS, day_ms)
        version = max((file.version for file in before), default=0) + 1
        await self._commit_and_remove([New(Kind.DAYS, day_ms, table, f"v{version}", version, made_of)], before)

    def _day(self, day_ms: int, hours: list[File]) -> Any:
        with local_files(self.folder, hours, self.engine.scratch) as paths:
            return day_table(self.engine, day_ms, paths)

    async def verify(self, day_ms: int) -> tuple[Damaged, ...]:
        """Reads every file of a day. Raises Unavailable when one cannot be read: that proves nothing."""
        return await self._in_thread(repair.damages, self.folder, self.state.of_day(day_ms))

    async def mend(self, found: Sequence[Damaged]) -> None:
        """Takes out what can be read or made again. Hours whose facts are damaged are to be closed again, for which their owners are asked."""
        self.note(found)
        facts = [damage for damage in found if damage.path.startswith(f"{Kind.FACTS}/")]
        await self.recover([damage for damage in found if damage not in facts])
        hours = {file.start_ms for damage in facts if (file := self.state.files.get(damage.path))}
        if waiting := sorted(hours - self.state.unsettled):
            await self.restate(waiting)

    async def recover(self, damages: Sequence[Damaged]) -> Recovery:
        """Takes damaged files out of the ledger, so that what they held is read or made again; what lies there is set aside."""
        plan = repair.plan(self.state, damages)
        if plan.files:
            await self._in_thread(repair.set_aside, self.folder, damages)
            paths = [file.path for file in plan.files]
            await self._writer.commit(removed=paths, position=replace(self.state.position, again=plan.again))
            await self._writer.remove(paths)
        if again := sorted({file.start_ms for file in plan.files if file.kind is Kind.RUNS}):
            await self.restate(again)
        return plan

    async def _commit_and_remove(self, new: Sequence[New], old: Sequence[File]) -> None:
        """What no manifest names any more is deleted after the commit, never before."""
        paths = [file.path for file in old]
        await self._writer.commit(new, paths)
        await self._writer.remove(paths)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(functools.partial(work, *arguments))


async def open_ledger(
    folder: Folder,
    store: Store,
    leader: Leader,
    *,
    rules: Rules | None = None,
    engine: Engine | None = None,
    rebuild: bool = False,
) -> Ledger:
    """As its leader. Raises OtherFolder when the folder is not the one that the head names, unless `rebuild`."""
    opened = await open_writer(folder, store, leader, rebuild=rebuild)
    ledger = Ledger(folder, opened.writer, rules or Rules(), engine or Engine(), opened.notes)
    gone = await asyncio.to_thread(repair.gone, folder, ledger.state)
    if gone:
        await ledger.mend(gone)
    return ledger


def _files_of(engine: Engine, made_from: HourInput, rows: Any) -> list[tuple[Kind, Any]]:
    """What an hour that is closed leaves."""
    known = schemas.runs_table(made_from.hour_ms, schemas.of_runs(made_from.told))
    went = progress_of(engine, made_from.hour_ms, made_from.work, made_from.told)
    made = [(Kind.HOURS, rows), (Kind.MINUTES, made_from.minutes), (Kind.WORK, made_from.work), (Kind.PROGRESS, went)]
    return [*made, (Kind.RUNS, known)] if known.num_rows else made


def _by_hour(reports: Reports) -> list[New]:
    """A file per kind and hour in which something began, by device and time: what belongs together lies together."""
    stem = f"{reports.first}-{reports.last}"
    found = []
    for kind, table in ((Kind.RAW, reports.samples), (Kind.STEPS, reports.steps)):
        sound = _sound(table, reports.taken_ms)
        hours = pc.multiply(pc.divide(sound["start_ms"], HOUR_MS), HOUR_MS)
        for hour_ms in sorted(pc.unique(hours).to_pylist()):
            part = sound.filter(pc.equal(hours, hour_ms)).sort_by([("device", "ascending"), ("start_ms", "ascending")])
            found.append(New(kind, hour_ms, part, stem, first=reports.first, last=reports.last))
    return found


def _sound(table: Any, taken_ms: int) -> Any:
    """Rows whose times can be right."""
    start, end = table["start_ms"], table["end_ms"]
    forward = pc.and_(pc.greater(end, start), pc.less_equal(pc.subtract(end, start), LONGEST_REPORT_MS))
    possible = pc.and_(pc.greater_equal(start, 0), pc.less_equal(start, taken_ms + EARLY_MS))
    return table.filter(pc.and_(forward, possible))
