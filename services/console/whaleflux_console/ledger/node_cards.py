"""How many GPUs the nodes of each pool have: counted, since a node that joined at half past has half of their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File
from whaleflux_console.ledger.shelf import local_files, rows_in

_QUERY = """
    WITH nodes AS (SELECT site, gpu_class, node, count(DISTINCT card) AS cards FROM ({rows})
        WHERE adjustment = '' AND card <> '' GROUP BY site, gpu_class, node)
    SELECT site || '/' || gpu_class, max(cards)::BIGINT FROM nodes GROUP BY site, gpu_class
"""


def most(folder: Folder, engine: Engine, hours: Sequence[File]) -> Mapping[str, int]:
    """Cards of the largest node of each {site}/{class} in these hours, at least 1. Raises Damaged."""
    if not hours:
        return {}
    with local_files(folder, hours, engine.scratch) as paths:
        table = engine.table(_QUERY.format(rows=rows_in(paths)))
    pools, cards = (column.to_pylist() for column in table.columns)
    return dict(zip(pools, cards, strict=True))
