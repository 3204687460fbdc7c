"""The ledger as DuckDB has it, for answers: all days, and the hours of the last weeks. Made of the files, thrown away with the process.

Rows of an hour or day are replaced together when there is a newer version: nothing is updated in place, and no table is made or changed
after the beginning. A day's sums are 24 times fewer rows than its hours: who asks about whole days reads those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from whaleflux.errors import Unavailable
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.days import rolled_up
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import DAY_MS, File, Kind, State, day_of
from whaleflux_console.ledger.schemas import DAY_KEYS, DAY_SUMS
from whaleflux_console.ledger.shelf import local_files, rows_in

HOT_DAYS = 35
_AT_ONCE = 64  # files of one insert
_COLUMNS = [*DAY_KEYS, *DAY_SUMS]


class Cache:
    """Tables `hourly` (hour_ms, since `hot_from_ms`) and `daily` (day_ms). Calls block; one at a time changes it."""

    def __init__(self, folder: Folder, engine: Engine, hot_days: int = HOT_DAYS) -> None:
        self._folder, self._engine, self._hot_ms = folder, engine, hot_days * DAY_MS
        self._writing = engine.cursor()
        self._held: dict[tuple[str, int], str] = {}  # (table, start) -> path that its rows are of
        self.damaged: dict[int, Damaged] = {}  # hour or day -> why it is not in the answers
        self.hot_from_ms = 0
        self.filled = False
        columns = ", ".join([*(f"{n} VARCHAR" for n in DAY_KEYS), *(f"{n} BIGINT" for n in DAY_SUMS)])
        self._writing.execute(f"ATTACH '{engine.scratch / 'cache.duckdb'}' AS cache")
        for table, start in (("hourly", "hour_ms"), ("daily", "day_ms")):
            self._writing.execute(f"CREATE TABLE cache.{table} ({start} BIGINT, {columns})")

    def follow(self, state: State, days: Iterable[int] | None = None) -> None:
        """Brings these days (None: all) to what the state says, and those that are no longer of the last weeks."""
        hot_from_ms = max(0, day_of(state.watermark_ms) - self._hot_ms)
        cooled = range(self.hot_from_ms, hot_from_ms, DAY_MS) if self.hot_from_ms else ()
        self.hot_from_ms = hot_from_ms
        if days is None:
            self._drop_unknown(state)
        wanted = {day_of(start) for _, start in state.spans} if days is None else {*days, *cooled}
        hours = [file for day in wanted if day >= hot_from_ms for file in state.hours_of_day(day)]
        self._bring("hourly", hours)
        self._sum_days({day_of(file.start_ms) for file in hours})
        for day in cooled:
            self._leave("hourly", day, day + DAY_MS)
        self._bring_days(state, sorted(day for day in wanted if day < hot_from_ms))
        self.filled = True

    def _sum_days(self, days: set[int]) -> None:
        """Days of the last weeks, out of their hours."""
        if not days:
            return
        listed = ", ".join(map(str, sorted(days)))
        day = f"hour_ms // {DAY_MS} * {DAY_MS}"
        hours = f"SELECT * FROM cache.hourly WHERE {day} IN ({listed})"
        self._replace("daily", sorted(days), rolled_up(hours, f"({day})"))
        self._held.update({("daily", each): "its hours" for each in days})

    def _bring_days(self, state: State, days: Sequence[int]) -> None:
        rolled = [file for day in days if state.is_rolled(day) and (file := state.newest(Kind.DAYS, day))]
        self._bring("daily", rolled)
        by_roll = {file.start_ms for file in rolled}
        for day in (day for day in days if day not in by_roll):
            self._bring_unrolled(day, state.hours_of_day(day))

    def _bring(self, table: str, files: Sequence[File]) -> None:
        new = [file for file in files if self._held.get((table, file.start_ms)) != file.path]
        for begin in range(0, len(new), _AT_ONCE):
            self._insert(table, new[begin : begin + _AT_ONCE])

    def _drop_unknown(self, state: State) -> None:
        """Rows of hours and days that the ledger no longer has."""
        kinds = {"hourly": (Kind.HOURS,), "daily": (Kind.DAYS, Kind.HOURS)}
        known = {
            (table, day_of(start) if table == "daily" else start)
            for table in kinds
            for kind, start in state.spans
            if kind in kinds[table]
        }
        for table, start_ms in [held for held in self._held if held not in known]:
            self._leave(table, start_ms, start_ms + HOUR_MS)

    def _leave(self, table: str, begin_ms: int, end_ms: int) -> None:
        self._writing.execute(
            f"DELETE FROM cache.{table} WHERE {_start(table)} BETWEEN ? AND ?", [begin_ms, end_ms - 1]
        )
        for start_ms in range(begin_ms, end_ms, HOUR_MS):
            self._held.pop((table, start_ms), None)
            self.damaged.pop(start_ms, None)

    def _insert(self, table: str, files: Sequence[File]) -> None:
        """All of them in one transaction, in place of what was there; one that is damaged is noted and left out."""
        try:
            with local_files(self._folder, files, self._engine.scratch) as paths:
                self._replace(table, [file.start_ms for file in files], _read(table, paths))
        except Damaged as damage:
            if len(files) > 1:
                for file in files:
                    self._insert(table, [file])
                return
            self._replace(table, [files[0].start_ms], "")
            self.damaged[files[0].start_ms] = damage
            return
        for file in files:
            self._held[table, file.start_ms] = file.path
            self.damaged.pop(file.start_ms, None)

    def _bring_unrolled(self, day_ms: int, hours: Sequence[File]) -> None:
        """A cold day without a roll-up that is newer than its hours: summed here."""
        mark = "|".join(file.path for file in hours)
        if self._held.get(("daily", day_ms)) == mark:
            return
        try:
            with local_files(self._folder, hours, self._engine.scratch) as paths:
                self._replace("daily", [day_ms], _read("hourly", paths, f"{day_ms}") if paths else "")
        except Damaged as damage:
            self._replace("daily", [day_ms], "")
            self.damaged[day_ms] = damage
            return
        self._held["daily", day_ms] = mark
        self.damaged.pop(day_ms, None)

    def _replace(self, table: str, starts: Sequence[int], source: str) -> None:
        self._writing.execute("BEGIN")
        try:
            self._writing.execute(
                f"DELETE FROM cache.{table} WHERE {_start(table)} IN (SELECT unnest(?))", [list(starts)]
            )
            if source:
                self._writing.execute(f"INSERT INTO cache.{table} {source}")
            self._writing.execute("COMMIT")
        except Exception:
            self._writing.execute("ROLLBACK")
            raise

    def source(self, start_ms: int, end_ms: int, *, by_hour: bool) -> str:
        """SQL of the rows in the window, with `at_ms`; a part that is no whole day lies in the last weeks. Raises Unavailable until filled."""
        if not self.filled:
            raise reading()
        first, last = -(-start_ms // DAY_MS) * DAY_MS, day_of(end_ms)
        if by_hour or first > last:
            first = last = start_ms
        parts = (("hourly", start_ms, first), ("daily", first, last), ("hourly", last, end_ms))
        return " UNION ALL ".join(_rows(*part) for part in parts if part[1] < part[2]) or _rows("daily", 0, 0)


def reading() -> Unavailable:
    """Before anything is known."""
    return Unavailable("the ledger is being read; ask again in a moment", retry_after_s=1.0)


def _rows(table: str, start_ms: int, end_ms: int) -> str:
    at, columns = _start(table), ", ".join(_COLUMNS)
    return f"SELECT {at} AS at_ms, {columns} FROM cache.{table} WHERE {at} >= {start_ms} AND {at} < {end_ms}"


def _start(table: str) -> str:
    return "hour_ms" if table == "hourly" else "day_ms"


def _read(table: str, paths: Sequence[Path], day: str = "") -> str:
    """SQL of what files hold, summed by what the table keeps."""
    source = rows_in(paths)
    if table == "daily":
        return f"SELECT day_ms, {', '.join(_COLUMNS)} FROM ({source})"
    return rolled_up(source, day or "hour_ms")
