"""Which nodes were slower than the others of their run, hour by hour: read once out of each closed hour's files, and remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.recommend.evidence import Pace
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File, Kind, State
from whaleflux_console.ledger.shelf import local_files, rows_in

MOST_AT_ONCE = 24  # hours whose files one call reads: the newest; later calls read the others
MOST_KEPT = 840  # hours, the newest: as many as the longest window that can be asked for has
Hour = tuple[File, File]  # HOURS and WORK in force

# What a rank does not say of its communication says nothing of its own time. A node counts beside others alone, and is slow from a twentieth on.
_QUERY = """
    WITH told AS (SELECT uid, device, sum(end_ms - start_ms) AS ms, sum(last_step - first_step + 1) AS steps,
            sum(comm_in_node_us + comm_cross_us) AS comm_us
        FROM ({work}) WHERE comm_in_node_us IS NOT NULL AND comm_cross_us IS NOT NULL AND last_step >= first_step GROUP BY uid, device),
    held AS (SELECT uid, card, any_value(job) AS job, any_value(node) AS node, sum(bill_micros) AS micros
        FROM ({hours}) WHERE adjustment = '' AND uid <> '' GROUP BY uid, card),
    ranks AS (SELECT uid, job, node, micros, greatest(ms * 1000 - comm_us, 0) // steps AS own_us, ms * 1000 // steps AS step_us
        FROM told JOIN held USING (uid) WHERE card = device),
    runs AS (SELECT uid, quantile_disc(own_us, 0.5) AS median_us, quantile_disc(step_us, 0.5) AS step_us, count(DISTINCT node) AS nodes
        FROM ranks GROUP BY uid),
    bills AS (SELECT uid, sum(micros) AS micros FROM held GROUP BY uid),
    nodes AS (SELECT uid, any_value(job) AS job, node, quantile_disc(own_us, 0.5) AS own_us FROM ranks GROUP BY uid, node),
    on_node AS (SELECT uid, node, sum(micros) AS micros FROM held GROUP BY uid, node)
    SELECT job, uid, node, own_us::BIGINT, median_us::BIGINT, step_us::BIGINT, (bills.micros - on_node.micros)::BIGINT
    FROM nodes JOIN runs USING (uid) JOIN bills USING (uid) JOIN on_node USING (uid, node)
    WHERE runs.nodes > 1 AND own_us > median_us + median_us // 20 ORDER BY uid, node
"""


class Paces:
    """Calls block; one at a time. Remembers hours that were read, whichever windows are asked for between."""

    def __init__(self, folder: Folder, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        self._known: dict[tuple[int, str, str], tuple[Pace, ...]] = {}  # by hour and paths

    def slow(self, hours: Sequence[Hour]) -> list[Pace]:
        """Of these hours as far as they are read. Raises Damaged for a file that is not as it was written."""
        new = [hour for hour in hours if _key(hour) not in self._known][-MOST_AT_ONCE:]
        known = self._known | {_key(hour): tuple(self._read(*hour)) for hour in new}
        self._known = {key: known[key] for key in sorted(known)[-MOST_KEPT:]}
        return [pace for hour in hours for pace in known.get(_key(hour), ())]

    def _read(self, paid: File, done: File) -> Iterable[Pace]:
        with (
            local_files(self._folder, [paid], self._engine.scratch) as hours,
            local_files(self._folder, [done], self._engine.scratch) as work,
        ):
            table = self._engine.table(_QUERY.format(hours=rows_in(hours), work=rows_in(work)))
        for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield Pace(paid.start_ms, *values)


def hours_of(state: State, start_ms: int, end_ms: int) -> list[Hour]:
    """Closed hours in which ranks told what they did, oldest first."""
    found = []
    for hour_ms in range(start_ms, end_ms, HOUR_MS):
        paid, done = state.newest(Kind.HOURS, hour_ms), state.newest(Kind.WORK, hour_ms)
        if paid is not None and paid.version and done is not None:
            found.append((paid, done))
    return found


def _key(hour: Hour) -> tuple[int, str, str]:
    return hour[0].start_ms, hour[0].path, hour[1].path
