"""How trainings went, by attempt and minute, asked by step.

Made of ranks' steps when an hour is closed, and of an open hour's so far; kept in DuckDB for answers.
A minute's row is of all ranks of an attempt; ranks' steps beside each part say how many of them told it, so that a mean is of those alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import DAY_MS, File, Kind, State
from whaleflux_console.ledger.rules import MINUTE_MS
from whaleflux_console.ledger.schemas import FACTS, PROGRESS, STEP_PARTS
from whaleflux_console.ledger.shelf import local_files, rows_in
from whaleflux_console.ledger.usage import LOSSES

_AT_ONCE = 64  # files of one insert
_OWNED = ("job", "user", "uid", "attempt", "epoch")
_SAID = ", ".join(
    f"sum({part}_us)::BIGINT AS {part}_us, coalesce(sum(n) FILTER ({part}_us IS NOT NULL), 0)::BIGINT AS {part}_steps"
    for part in STEP_PARTS
)
_MADE = f"""
    WITH own AS (SELECT *, last_step - first_step + 1 AS n, end_ms - start_ms AS ms FROM work
        WHERE start_ms >= {{begin}} AND start_ms < {{end}} AND last_step >= first_step)
    SELECT any_value(o.job) AS job, any_value(o."user") AS "user", w.uid AS uid, o.attempt AS attempt,
        min(start_ms) AS start_ms, max(end_ms) AS end_ms, min(first_step) AS first_step, max(last_step) AS last_step,
        count(DISTINCT rank) AS ranks, sum(n)::BIGINT AS steps, sum(ms)::BIGINT AS took_ms, sum(ms)::BIGINT // count(DISTINCT rank) AS wall_ms,
        min(ms * 1000 // n) AS fastest_us, max(ms * 1000 // n) AS slowest_us,
        {_SAID}, sum(tokens)::BIGINT AS tokens, sum(flops) AS flops, {LOSSES}
    FROM own w JOIN owned o ON w.uid = o.uid AND w.attempt = o.epoch
    GROUP BY w.uid, o.attempt, start_ms // {MINUTE_MS} ORDER BY uid, attempt, start_ms"""
# Attempts of the last job that had the name, the newest first: first and last step and instants, whose it is, its uid.
ATTEMPTS = """
    WITH named AS MATERIALIZED (SELECT * FROM progress.minutes WHERE job = $1)
    SELECT attempt, min(first_step), max(last_step), min(start_ms), max(end_ms), any_value("user"), any_value(uid)
    FROM named WHERE uid = (SELECT arg_max(uid, start_ms) FROM named) GROUP BY attempt ORDER BY attempt DESC LIMIT $2"""
_PARTS = ", ".join(f"sum({part}_us) / nullif(sum({part}_steps), 0) / 1e6" for part in STEP_PARTS)
# Points of `width` steps: see `StepPoint` of the contract for the order of the columns.
POINTS = f"""
    SELECT attempt, min(first_step), max(last_step), min(start_ms), max(end_ms), max(ranks),
        sum(took_ms) / sum(steps) / 1e3, min(fastest_us) / 1e6, max(slowest_us) / 1e6, {_PARTS},
        sum(tokens) * 1e3 / nullif(sum(wall_ms) FILTER (tokens IS NOT NULL), 0), sum(flops) * 1e3 / nullif(sum(wall_ms) FILTER (flops IS NOT NULL), 0),
        sum(loss_sum) FILTER (loss_count > 0) / nullif(sum(loss_count), 0), min(loss_min), max(loss_max), sum(loss_not_finite)::BIGINT
    FROM progress.minutes WHERE uid = $1 AND attempt >= $2 AND last_step >= $3 AND first_step <= $4
    GROUP BY attempt, (first_step - 1) // $5 ORDER BY attempt, 2"""


def progress_of(engine: Engine, hour_ms: int, work: pa.Table, told: Sequence[pa.Table]) -> pa.Table:
    """WORK of an hour as PROGRESS, by the FACTS that are told of it; of attempts that nobody told of nothing."""
    query = _MADE.format(begin=hour_ms, end=hour_ms + HOUR_MS)
    return engine.table(query, work=work, owned=_owned(told)).select(PROGRESS.names).cast(PROGRESS)


def _owned(told: Sequence[pa.Table]) -> pa.Table:
    """Whose attempts are, each once."""
    type_ = FACTS.field("attempts").type
    parts = [table.column("attempts").drop_null().cast(type_) for table in told if "attempts" in table.column_names]
    column = pa.chunked_array([chunk for part in parts for chunk in part.chunks], type_)
    attempts = pa.table({name: pc.struct_field(column, name) for name in _OWNED})
    return (
        attempts.group_by(["uid", "attempt"])
        .aggregate([(name, "max") for name in ("job", "user", "epoch")])
        .rename_columns(["uid", "attempt", "job", "user", "epoch"])
    )


class ProgressCache:
    """Table `progress.minutes`, of the last weeks. Calls block; one at a time changes it. Thrown away with the process."""

    def __init__(self, folder: Folder, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        self._writing = engine.cursor()
        self._held: dict[int, str] = {}  # hour -> path that its rows are of
        self.damaged: dict[int, Damaged] = {}  # hour -> why it is not in the answers
        kinds = {pa.string(): "VARCHAR", pa.int64(): "BIGINT", pa.float64(): "DOUBLE"}
        columns = ", ".join(f'"{field.name}" {kinds[field.type]}' for field in PROGRESS)
        self._writing.execute(f"ATTACH '{engine.scratch / 'progress.duckdb'}' AS progress")
        self._writing.execute(f"CREATE TABLE progress.minutes (hour_ms BIGINT, {columns})")

    def follow(self, state: State, days: Iterable[int] | None, hot_from_ms: int) -> None:
        """Brings these days (None: all) to what the state says; hours before `hot_from_ms` leave."""
        starts = (
            sorted(start for kind, start in state.spans if kind is Kind.PROGRESS and start >= hot_from_ms)
            if days is None
            else [start for day in sorted(days) if day >= hot_from_ms for start in range(day, day + DAY_MS, HOUR_MS)]
        )
        found = [file for start in starts if (file := state.newest(Kind.PROGRESS, start))]
        new = [file for file in found if self._held.get(file.start_ms) != file.path]
        for begin in range(0, len(new), _AT_ONCE):
            self._insert(new[begin : begin + _AT_ONCE])
        self._leave(
            [hour for hour in self._held if hour < hot_from_ms or (days is None and (Kind.PROGRESS, hour) not in state.spans)]
        )  # fmt: skip

    def _insert(self, files: Sequence[File]) -> None:
        """One that is damaged is noted and left out."""
        try:
            with local_files(self._folder, files, self._engine.scratch) as paths:
                self._replace([file.start_ms for file in files], rows_in(paths))
        except Damaged as damage:
            if len(files) > 1:
                for file in files:
                    self._insert([file])
                return
            self._leave([files[0].start_ms])
            self.damaged[files[0].start_ms] = damage
            return
        for file in files:
            self._held[file.start_ms] = file.path
            self.damaged.pop(file.start_ms, None)

    def _leave(self, hours: list[int]) -> None:
        if hours:
            self._replace(hours, "")
        for hour in hours:
            self._held.pop(hour, None)
            self.damaged.pop(hour, None)

    def _replace(self, hours: list[int], source: str) -> None:
        columns = ", ".join(f'"{name}"' for name in PROGRESS.names)
        self._writing.execute("BEGIN")
        try:
            self._writing.execute("DELETE FROM progress.minutes WHERE hour_ms IN (SELECT unnest(?))", [hours])
            if source:
                hour = f"start_ms // {HOUR_MS} * {HOUR_MS}"
                self._writing.execute(f"INSERT INTO progress.minutes SELECT {hour}, {columns} FROM ({source})")
            self._writing.execute("COMMIT")
        except Exception:
            self._writing.execute("ROLLBACK")
            raise
