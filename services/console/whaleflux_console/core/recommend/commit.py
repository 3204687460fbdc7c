"""GPUs that are rented by the hour and work in nine hours of ten: a reserved price is less, although it is paid in the tenth hour, too.

Only what no other recommendation is about counts as work, so that what is idle or waits is not committed to for a year. What nobody knows of
(`unknown`) counts as work, but not in what it saves at least.
"""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.money import split
from whaleflux_console.core.recommend.evidence import Part, Rented, Window
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_HOURS = 168
BASE_PPM = 100_000  # the load that is exceeded in all but a tenth of the hours
KNOWN = (
    CostClass.USEFUL,
    CostClass.RECOMPUTE,
    CostClass.BUBBLE,
    CostClass.HOST,
    CostClass.DATA,
    CostClass.STARTUP,
)
WORK = (*KNOWN, CostClass.UNKNOWN)


def find(window: Window, rented: Rented) -> Recommendation | None:
    """Whole nodes' GPUs at the reserved price, which is paid in every hour."""
    pool, reserved = rented.spent, rented.reserved
    if window.hours < LEAST_HOURS:
        return None
    base = _loads(pool.parts, WORK, window.hours)[window.hours * BASE_PPM // WHOLE_PPM]
    gpus = base // HOUR_MS // pool.node_gpus * pool.node_gpus
    worked = sum(_within(part, gpus) for part in pool.parts)
    saved = worked - gpus * reserved.micros_per_hour * window.hours
    if saved <= 0:
        return None
    whole = pool.whole
    price = whole.bill_micros * HOUR_MS // whole.gpu_ms
    lowest = min(gpus * HOUR_MS, _loads(pool.parts, KNOWN, window.hours)[0])
    least = (lowest * price // HOUR_MS - gpus * reserved.micros_per_hour) * window.hours
    paid = [whole.of(kind) for kind in WORK]
    return Recommendation(
        Kind.COMMIT,
        pool.subject,
        f"{gpus} GPUs that are rented by the hour worked in nine hours of ten; reserve as many at {_usd(reserved.micros_per_hour)} "
        f"({reserved.name}, {reserved.source}) instead of {_usd(price)} USD per GPU-hour",
        "whaleflux prices set",  # once the contract is signed
        dict(zip(WORK, split(saved, paid), strict=True)),
        max(0, min(WHOLE_PPM, least * WHOLE_PPM // saved)),
        Level.HIGH,  # it is paid also when the work ends
        Level.MEDIUM,
        whole.bill_micros,
        dict(zip(WORK, paid, strict=True)),
        WHOLE_PPM,
    )


def _loads(parts: Sequence[Part], kinds: Sequence[CostClass], hours: int) -> list[int]:
    """GPU-milliseconds of such work in each hour of the window, ascending; hours without any are 0."""
    found = sorted(part.of(*kinds) * part.gpu_ms // part.bill_micros for part in parts if part.bill_micros > 0)
    return [0] * (hours - len(found)) + found


def _within(part: Part, gpus: int) -> int:
    """What the work of at most so many GPUs was paid in an hour."""
    return min(part.of(*WORK), part.bill_micros * gpus * HOUR_MS // part.gpu_ms) if part.gpu_ms > 0 else 0


def _usd(micros: int) -> str:
    return f"{micros // 1_000_000}.{micros % 1_000_000 // 10_000:02d}"
