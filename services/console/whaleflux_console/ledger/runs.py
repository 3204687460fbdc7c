"""What runs cost and did, out of closed hours' files: a day at a time, so that a window takes no more memory than its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.units import Run
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File, Kind, State, day_of
from whaleflux_console.ledger.schemas import RUNS, WORK
from whaleflux_console.ledger.shelf import local_files, rows_in

Day = tuple[list[File], list[File], list[File]]  # HOURS, WORK and RUNS in force

# Of two endings of one run the greater word counts: a job that was given up may have succeeded after all.
_QUERY = """
    WITH paid AS (SELECT uid, any_value(job) AS job, any_value(queue) AS queue, any_value(model) AS model,
            sum(bill_micros)::BIGINT AS bill_micros, sum(gpu_ms)::BIGINT AS gpu_ms,
            sum(CASE WHEN adjustment = '' AND bill_micros > 0 THEN gpu_ms::HUGEINT * useful_micros // bill_micros ELSE 0 END)::BIGINT AS useful
        FROM ({hours}) WHERE uid <> '' GROUP BY uid),
    done AS (SELECT uid, sum(tokens)::BIGINT AS tokens FROM ({work}) WHERE tokens IS NOT NULL GROUP BY uid),
    told AS (SELECT uid, sum(input_tokens)::BIGINT AS input_tokens, sum(output_tokens)::BIGINT AS output_tokens, max(ending) AS ending
        FROM ({told}) GROUP BY uid)
    SELECT paid.uid, job, queue, model, bill_micros, gpu_ms, useful, tokens, input_tokens, output_tokens, ending
        FROM paid LEFT JOIN done ON paid.uid = done.uid LEFT JOIN told ON paid.uid = told.uid ORDER BY paid.uid
"""


def days(state: State, start_ms: int, end_ms: int) -> list[Day]:
    """Files of the closed hours in a window of whole hours, by day."""
    found: dict[int, Day] = {}
    for hour_ms in range(start_ms, end_ms, HOUR_MS):
        newest = state.newest(Kind.HOURS, hour_ms)
        if newest is None or not newest.version:
            continue
        paid, done, told = found.setdefault(day_of(hour_ms), ([], [], []))
        paid.append(newest)
        for kind, files in ((Kind.WORK, done), (Kind.RUNS, told)):
            if file := state.newest(kind, hour_ms):
                files.append(file)
    return list(found.values())


def runs(folder: Folder, engine: Engine, found: Sequence[Day]) -> list[Run]:
    """By uid. Raises Damaged for a file that is not as it was written."""
    by_uid: dict[str, Run] = {}
    for day in found:
        for run in _of_day(folder, engine, *day):
            before = by_uid.get(run.uid)
            by_uid[run.uid] = _joined(before, run) if before else run
    return list(by_uid.values())


def _of_day(
    folder: Folder, engine: Engine, paid: Sequence[File], done: Sequence[File], told: Sequence[File]
) -> Iterator[Run]:
    with (
        local_files(folder, paid, engine.scratch) as hours,
        local_files(folder, done, engine.scratch) as work,
        local_files(folder, told, engine.scratch) as known,
    ):
        sources = {
            "hours": rows_in(hours),
            "work": rows_in(work) if work else "SELECT * FROM no_work",
            "told": rows_in(known) if known else "SELECT * FROM no_runs",
        }
        empty = {"no_work": WORK.empty_table(), "no_runs": RUNS.empty_table()}
        table = engine.table(_QUERY.format(**sources), **empty)
    for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
        yield Run(*values)


def _joined(one: Run, other: Run) -> Run:
    return replace(
        one,
        bill_micros=one.bill_micros + other.bill_micros,
        gpu_ms=one.gpu_ms + other.gpu_ms,
        useful_gpu_ms=one.useful_gpu_ms + other.useful_gpu_ms,
        tokens=_sum(one.tokens, other.tokens),
        input_tokens=_sum(one.input_tokens, other.input_tokens),
        output_tokens=_sum(one.output_tokens, other.output_tokens),
        ending=max(one.ending or "", other.ending or "") or None,
    )


def _sum(*known: int | None) -> int | None:
    told = [one for one in known if one is not None]
    return sum(told) if told else None
