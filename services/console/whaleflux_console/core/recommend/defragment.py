"""GPUs that are free and of no use to the gangs that wait, since they lie in the wrong places.

Moves take a while and are bounded, so not all of it is saved: what the scheduler's own moves saved in replays of busy fleets of 64 and 128
GPUs (`python -m benchmarks.tco_replay`) is promised.
"""

from __future__ import annotations

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Spent, Window
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_HOURS = 3  # of the window: less is over before it can be mended
MOVED_PPM = 600_000


def find(window: Window, pool: Spent) -> Recommendation | None:
    """Most of what was free beside a gang that would have fitted on all free ones together."""
    whole = pool.whole
    wasted = whole.of(CostClass.FRAGMENTED)
    hours = [part.of(CostClass.FRAGMENTED) for part in pool.parts if part.of(CostClass.FRAGMENTED)]
    if len(hours) < LEAST_HOURS:
        return None
    return Recommendation(
        Kind.DEFRAGMENT,
        pool.subject,
        f"free GPUs were of no use to waiting jobs in {len(hours)} hours; move what runs between them together",
        "whaleflux rebalance plan",
        {CostClass.FRAGMENTED: wasted * MOVED_PPM // WHOLE_PPM},
        0,
        Level.MEDIUM,
        Level.LOW,
        whole.bill_micros,
        {CostClass.FRAGMENTED: wasted},
        pool.cash_ppm,
    )
