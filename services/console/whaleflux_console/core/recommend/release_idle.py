"""A job that holds GPUs and does nothing with them."""

from __future__ import annotations

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Spent, Window, share_ppm
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

GRACE_MS = 1_800_000  # of its GPUs: so long may be idle before it is released
LEAST_PPM = 200_000  # of its bill; a job that idles less is between steps, not forgotten


def find(window: Window, job: Spent) -> Recommendation | None:
    """Its idle time without the grace that is waited before GPUs are taken away, once for each GPU and day."""
    whole = job.whole
    idle = whole.of(CostClass.ALLOCATED_IDLE)
    if share_ppm(idle, whole.bill_micros) < LEAST_PPM:
        return None
    grace = sum(_grace_micros(job.gpus, part.gpu_ms, part.bill_micros) for part in job.parts)
    saved = idle - grace
    if saved <= 0:
        return None
    lowest = min(share_ppm(part.of(CostClass.ALLOCATED_IDLE), part.bill_micros) for part in job.parts)
    return Recommendation(
        Kind.RELEASE_IDLE,
        job.subject,
        f"{share_ppm(idle, whole.bill_micros) // 10_000} % of what it held did nothing; put it back until it is needed"
        if not job.model
        else f"{job.model} had nothing to do for {share_ppm(idle, whole.bill_micros) // 10_000} % of its GPUs' time; lower replicas.min in its model file",
        f"whaleflux requeue --hold {job.subject}" if not job.model else "whaleflux deploy FILE",
        {CostClass.ALLOCATED_IDLE: saved},
        min(WHOLE_PPM, lowest * WHOLE_PPM // share_ppm(idle, whole.bill_micros)),
        Level.LOW if not job.model else Level.MEDIUM,
        Level.LOW,
        whole.bill_micros,
        {CostClass.ALLOCATED_IDLE: idle},
        job.cash_ppm,
        job.owner,
    )


def _grace_micros(gpus: int, gpu_ms: int, bill_micros: int) -> int:
    return min(bill_micros, bill_micros * gpus * GRACE_MS // gpu_ms) if gpu_ms > 0 else 0
