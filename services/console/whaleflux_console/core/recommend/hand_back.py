"""GPUs that nobody needed at any time that counts: fewer would have done."""

from __future__ import annotations

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Part, Spent, Window
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_HOURS = 24
BASE_PPM = 100_000  # in all but a tenth of the hours at least so many were free


def find(window: Window, pool: Spent) -> Recommendation | None:
    """Whole nodes' GPUs that were free in nine hours of ten, at the pool's mean price; hours in which they were needed are not saved."""
    hours = sorted(_free_gpus(part) for part in pool.parts)
    if window.hours < LEAST_HOURS:
        return None
    hours = [0] * (window.hours - len(hours)) + hours
    nodes = hours[len(hours) * BASE_PPM // WHOLE_PPM] // pool.node_gpus
    base = nodes * pool.node_gpus
    if nodes < 1:
        return None
    saved = sum(
        min(part.of(CostClass.IDLE), part.bill_micros * base * HOUR_MS // part.gpu_ms)
        for part in pool.parts
        if part.gpu_ms > 0
    )
    lowest = hours[0]
    return Recommendation(
        Kind.HAND_BACK,
        pool.subject,
        f"{base} GPUs, as many as {nodes} nodes have, were free in nine hours of ten; drain and end what is rented, or sell or lend what is owned",
        "whaleflux leases ls",
        {CostClass.IDLE: saved},
        min(WHOLE_PPM, lowest * WHOLE_PPM // base),
        Level.MEDIUM,
        Level.MEDIUM,
        pool.whole.bill_micros,
        {CostClass.IDLE: pool.whole.of(CostClass.IDLE)},
        pool.cash_ppm,
    )


def _free_gpus(part: Part) -> int:
    """Whole ones that nobody held in an hour, at the mean price of the pool."""
    return part.of(CostClass.IDLE) * part.gpu_ms // (part.bill_micros * HOUR_MS) if part.bill_micros > 0 else 0
