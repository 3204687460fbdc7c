"""A job that is spread over nodes although a better place was free."""

from __future__ import annotations

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Spent, Window, share_ppm
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_PPM = 50_000


def find(window: Window, job: Spent) -> Recommendation | None:
    """The communication that the best free place had not had, less one more start."""
    whole = job.whole
    avoidable = whole.of(CostClass.COMM_AVOIDABLE)
    if share_ppm(avoidable, whole.bill_micros) < LEAST_PPM:
        return None
    saved = avoidable - whole.of(CostClass.STARTUP)
    if saved <= 0:
        return None
    lowest = min(share_ppm(part.of(CostClass.COMM_AVOIDABLE), part.bill_micros) for part in job.parts)
    percent = share_ppm(avoidable, whole.bill_micros) // 10_000
    return Recommendation(
        Kind.ONE_ISLAND,
        job.subject,
        f"{percent} % of its time goes into sending between nodes that a better place would not need; move it there",
        "whaleflux rebalance plan",
        {CostClass.COMM_AVOIDABLE: saved},
        min(WHOLE_PPM, lowest * WHOLE_PPM // share_ppm(avoidable, whole.bill_micros)),
        Level.LOW,
        Level.LOW,
        whole.bill_micros,
        {CostClass.COMM_AVOIDABLE: avoidable},
        job.cash_ppm,
        job.owner,
    )
