"""What agents and ranks reported, rolled up: means weighted by time, sums of steps; never across a gap, and never over what is not known.

A stretch is what reports cover without a gap; where one ends, or where something becomes known or unknown, a new one begins. So what was
not reported stays unknown, and is no mean of its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.signals import BUSY_SM_PPM
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.rules import MINUTE_MS
from whaleflux_console.ledger.schemas import MINUTES, SAMPLES, STEPS, WORK
from whaleflux_console.ledger.shelf import rows_in

EDGE_MS = 600_000  # of the hours beside: by it a silence across the edge is judged
_JOINED_MS = 50  # between two reports: clocks count whole milliseconds, and timers are late

_MEANS = ("tensor_ppm", "sm_active_ppm", "dram_active_ppm", "busy_ppm", "clock_ppm", "power_mw")
_SUMS = ("nvlink_sent_bytes", "nvlink_received_bytes", "pcie_sent_bytes", "pcie_received_bytes")
# Rows without a loss say nothing of the others'; of rows that have no number, least and greatest are no losses either.
LOSSES = """sum(loss_count)::BIGINT AS loss_count, sum(loss_sum) AS loss_sum, sum(loss_not_finite)::BIGINT AS loss_not_finite,
        min(loss_min) FILTER (loss_count > 0) AS loss_min, max(loss_max) FILTER (loss_count > 0) AS loss_max"""
_TIMES = ("data_us", "host_us", "save_us", "comm_in_node_us", "comm_cross_us", "tokens")


def _stretches(source: str, once: bool, of: str, known: str) -> str:
    """Rows of `source`, each report `once`, with the number of the stretch that they lie in."""
    order = "start_ms, end_ms, reporter, sequence" if once else "start_ms, end_ms"
    same = ("start_ms", "reporter", "sequence") if once else ()
    again = " AND ".join(f"{name} = lag({name}) OVER w" for name in same) or "false"
    return f"""
    WITH marked AS (SELECT *, {known} AS known FROM ({source})),
    broken AS (SELECT *, (start_ms > lag(end_ms) OVER w + {_JOINED_MS} OR known <> lag(known) OVER w)::INT AS breaks,
        coalesce({again}, false) AS again FROM marked WINDOW w AS (PARTITION BY {of} ORDER BY {order})),
    placed AS (SELECT * EXCLUDE (known), sum(coalesce(breaks, 0))
        OVER (PARTITION BY {of} ORDER BY start_ms, end_ms ROWS UNBOUNDED PRECEDING) AS stretch FROM broken WHERE NOT again)
    """


def _known(*columns: str) -> str:
    return " || ".join(f"({column} IS NULL)::INT::VARCHAR" for column in columns)


_KNOWN = _known("tensor_ppm", "sm_active_ppm", "busy_ppm", "idle_power")


def _mean(column: str) -> str:
    """Whole millionths (milliwatts), weighted by how long each was seen."""
    return f"(sum({column}::HUGEINT * (end_ms - start_ms)) // greatest(sum(end_ms - start_ms), 1))::BIGINT AS {column}"


def _sum(column: str) -> str:
    return f"sum({column})::BIGINT AS {column}"


def reported(hour_ms: int, paths: Sequence[Path]) -> str:
    """SQL of the rows of these files that reach into the hour or its edges; `empty` is a table without rows that has all columns."""
    if not paths:
        return "SELECT * FROM empty"
    inside = f"start_ms < {hour_ms + HOUR_MS + EDGE_MS} AND end_ms > {hour_ms - EDGE_MS}"
    return f"SELECT * FROM empty UNION ALL BY NAME {rows_in(paths)} WHERE {inside}"


def samples_of(engine: Engine, hour_ms: int, paths: Sequence[Path]) -> pa.Table:
    """Samples in files as MINUTES: one row per device, stretch and minute."""
    return _samples(engine, reported(hour_ms, paths), True, _KNOWN, MINUTE_MS, empty=SAMPLES.empty_table())


def coarser_samples(engine: Engine, minutes: pa.Table, bucket_ms: int) -> pa.Table:
    """The same by longer buckets, none of which has minutes of rest and of work: by runs of rest is told what was idle."""
    rests = f"coalesce(idle_power AND sm_active_ppm < {BUSY_SM_PPM} AND coalesce(tensor_ppm, 0) = 0, false)::VARCHAR"
    return _samples(engine, "SELECT * FROM minutes", False, f"{_KNOWN} || {rests}", bucket_ms, minutes=minutes)


def _samples(engine: Engine, source: str, once: bool, known: str, bucket_ms: int, **tables: pa.Table) -> pa.Table:
    query = f"""{_stretches(source, once, "device", known)}
    SELECT min(node) AS node, device, min(start_ms) AS start_ms, max(end_ms) AS end_ms,
        {", ".join(_mean(c) for c in _MEANS)}, max(memory_used_bytes) AS memory_used_bytes, {", ".join(_sum(c) for c in _SUMS)},
        bool_and(idle_power) AS idle_power, min(source) AS source
    FROM placed GROUP BY device, stretch, start_ms // {bucket_ms} ORDER BY device, start_ms"""
    return _as(engine.table(query, **tables), MINUTES)


def steps_of(engine: Engine, hour_ms: int, paths: Sequence[Path]) -> pa.Table:
    """Steps in files as WORK: one row per rank of an attempt, stretch and minute."""
    return _steps(engine, reported(hour_ms, paths), True, MINUTE_MS, empty=STEPS.empty_table())


def coarser_steps(engine: Engine, work: pa.Table, bucket_ms: int) -> pa.Table:
    """The same by longer buckets."""
    return _steps(engine, "SELECT * FROM work", False, bucket_ms, work=work)


def _steps(engine: Engine, source: str, once: bool, bucket_ms: int, **tables: pa.Table) -> pa.Table:
    rank = "uid, attempt, rank, device"
    query = f"""{_stretches(source, once, rank, _known(*_TIMES, "flops"))}
    SELECT {rank}, min(start_ms) AS start_ms, max(end_ms) AS end_ms, min(first_step) AS first_step, max(last_step) AS last_step,
        {", ".join(_sum(c) for c in _TIMES)}, sum(flops) AS flops, {LOSSES}
    FROM placed GROUP BY {rank}, stretch, start_ms // {bucket_ms} ORDER BY device, start_ms"""
    return _as(engine.table(query, **tables), WORK)


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return table.select(schema.names).cast(schema)


def within(hour_ms: int, table: pa.Table) -> pa.Table:
    """Rows that reach into the hour."""
    return table.filter(pc.and_(pc.less(table["start_ms"], hour_ms + HOUR_MS), pc.greater(table["end_ms"], hour_ms)))


def joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """One after the other; a column that an older file has not is not known."""
    if not tables:
        return schema.empty_table()
    return pa.concat_tables([_completed(table, schema) for table in tables])


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
