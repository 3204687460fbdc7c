"""GPUs that are free and of no use to the gangs that wait, since they lie in the wrong places."""

from __future__ import annotations

from whaleflux_console.core.recommend.evidence import Spent, Window
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_HOURS = 3  # of the window: less is over before it can be mended


def find(window: Window, pool: Spent) -> Recommendation | None:
    """What waited beside a gang that would have fitted on all free ones together."""
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
        {CostClass.FRAGMENTED: wasted},
        0,
        Level.MEDIUM,
        Level.LOW,
        whole.bill_micros,
        {CostClass.FRAGMENTED: wasted},
        pool.cash_ppm,
    )
