"""What devices of a node did, out of the files of a window: minutes of hours that are closed, reports of those that are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File, Kind, State, hour_of
from whaleflux_console.ledger.schemas import MINUTES
from whaleflux_console.ledger.shelf import local_files, rows_in
from whaleflux_console.ledger.usage import EDGE_MS

MOST_ROWS = 8_000
FIGURES = ("tensor_ppm", "sm_active_ppm", "dram_active_ppm", "busy_ppm", "power_mw", "memory_used_bytes")
Row = tuple[
    Any, ...
]  # width_ms, device, start_ms, end_ms, source, then mean, least and greatest of each of FIGURES (None: not measured)

_RANGES = ", ".join(
    f"""(sum({name}::HUGEINT * (end_ms - start_ms)) FILTER ({name} IS NOT NULL)
        // nullif(sum(end_ms - start_ms) FILTER ({name} IS NOT NULL), 0))::BIGINT, min({name}), max({name})"""
    for name in FIGURES
)
_QUERY = f"""
    WITH seen AS MATERIALIZED (SELECT * FROM ({{source}}) WHERE node = $1 AND $2 IN ('', device) AND end_ms > start_ms
            AND start_ms < $4 AND end_ms > $3),
        wide AS (SELECT greatest($5, -(-($4 - $3) * (SELECT count(DISTINCT device) FROM seen) // {MOST_ROWS}))::BIGINT AS width)
    SELECT any_value(width), device, min(start_ms), max(end_ms), min(source), {_RANGES}
    FROM seen, wide GROUP BY device, greatest(start_ms - $3, 0) // width ORDER BY device, 3"""


@dataclass(frozen=True, slots=True)
class Asked:
    """`device` "": all of the node; `width_ms` of a point, and more where there would be more than MOST_ROWS."""

    node: str
    device: str
    start_ms: int
    end_ms: int
    width_ms: int


def files(state: State, asked: Asked) -> list[File]:
    """Those that hold what began in hours of the window, or so shortly before that its end may reach into it."""
    found: list[File] = []
    for hour_ms in range(hour_of(max(0, asked.start_ms - EDGE_MS)), asked.end_ms, HOUR_MS):
        minutes = state.newest(Kind.MINUTES, hour_ms)
        found += [minutes] if minutes else state.of(Kind.RAW, hour_ms)
    return found


def rows(folder: Folder, engine: Engine, asked: Asked, found: Sequence[File]) -> list[Row]:
    """By device and time. Raises Damaged for a file that is not as it was written."""
    with local_files(folder, found, engine.scratch) as paths:
        columns = ", ".join(("node", "device", "start_ms", "end_ms", "source", *FIGURES))
        files_ = f" UNION ALL BY NAME {rows_in(paths)}" if paths else ""
        source = f"SELECT {columns} FROM (SELECT * FROM empty{files_})"
        table = engine.table(
            _QUERY.format(source=source),
            [asked.node, asked.device, asked.start_ms, asked.end_ms, asked.width_ms],
            empty=MINUTES.empty_table(),
        )
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
