"""GPUs that nobody needed at any time that counts: fewer would have done."""

from __future__ import annotations

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Part, Spent, Window
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_HOURS = 24
BASE_PPM = 100_000  # in all but a tenth of the hours at least so many were free


def find(window: Window, pool: Spent) -> Recommendation | None:
    """Whole GPUs that were free in nine hours of ten, at the pool's mean price; hours in which they were needed are not saved."""
    hours = sorted(_free_gpus(part) for part in pool.parts)
    if window.hours < LEAST_HOURS:
        return None
    hours = [0] * (window.hours - len(hours)) + hours
    base = hours[len(hours) * BASE_PPM // WHOLE_PPM]
    if base < 1:
        return None
    saved = sum(
        part.of(CostClass.IDLE) * min(base, _free_gpus(part)) // max(1, _free_gpus(part)) for part in pool.parts
    )
    lowest = hours[0]
    return Recommendation(
        Kind.HAND_BACK,
        pool.subject,
        f"{base} GPUs were free in nine hours of ten; end that much of what is rented, or sell or lend what is owned",
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
