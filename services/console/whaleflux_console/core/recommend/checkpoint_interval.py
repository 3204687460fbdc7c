"""A job that saves too often for how seldom it fails, or the other way round.

Saves cost A / t and lost work B x t of an interval t, whatever A and B are; together they are least where both are equal, at 2 x sqrt(A x B)
(Young 1974). So the window's two sums say how far from there it is, and the interval to go to is the present one x sqrt(saves / lost).
"""

from __future__ import annotations

from math import isqrt

from whaleflux_console.core.recommend.evidence import Spent, Window, share_ppm
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_PPM = 10_000  # of the job's bill: what is saved must be worth a change


def find(window: Window, job: Spent) -> Recommendation | None:
    """What the best interval had saved. Without a failure in the window, or without saves that are measured, nobody knows."""
    whole = job.whole
    save, lost = whole.of(CostClass.SAVE), whole.of(CostClass.LOST)
    if save <= 0 or lost <= 0:
        return None
    saved = save + lost - 2 * (isqrt(save * lost) + 1)
    if saved <= 0 or share_ppm(saved, whole.bill_micros) < LEAST_PPM:
        return None
    hundredths = isqrt(10_000 * save // lost) if save >= lost else isqrt(10_000 * lost // save)
    times = f"{hundredths // 100}.{hundredths % 100:02d} times"
    how = f"{times} as {'seldom' if save > lost else 'often'}"
    dearer = CostClass.SAVE if save > lost else CostClass.LOST
    return Recommendation(
        Kind.CHECKPOINT_INTERVAL,
        job.subject,
        f"saves and lost work cost least together when it saves {how}: change checkpoint.every in its job file",
        "whaleflux submit FILE",  # a job that runs keeps its interval
        {dearer: saved},
        0 if dearer is CostClass.LOST else 500_000,  # failures come in bursts: one window may hold none
        Level.LOW,
        Level.LOW,
        whole.bill_micros,
        {CostClass.SAVE: save, CostClass.LOST: lost},
        job.cash_ppm,
        job.owner,
    )
