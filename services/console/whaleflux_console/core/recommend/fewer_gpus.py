"""A job whose GPUs wait for one another so long that half of them would do the same work for less.

A step of n GPUs takes w / n + c: w is work that is divided, c is communication, which a ring's length hardly changes. n/2 GPUs cost
w + c x n/2 where n cost w + c x n, so half of c's cost is saved, and the step takes (2 - share of c) times as long.
"""

from __future__ import annotations

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend.evidence import Spent, Window, share_ppm
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_PPM = 300_000
COMMUNICATION = (CostClass.COMM_IN_NODE, CostClass.COMM_STRUCTURAL)  # what another place would not save


def find(window: Window, job: Spent) -> Recommendation | None:
    """Half of its communication."""
    whole = job.whole
    sent = whole.of(*COMMUNICATION)
    ppm = share_ppm(sent, whole.bill_micros)
    if job.gpus < 2 or job.gpus % 2 or job.model or ppm < LEAST_PPM:
        return None
    lowest = min(share_ppm(part.of(*COMMUNICATION), part.bill_micros) for part in job.parts)
    longer = (2 * WHOLE_PPM - ppm) // 10_000
    return Recommendation(
        Kind.FEWER_GPUS,
        job.subject,
        f"{job.gpus // 2} instead of {job.gpus} GPUs do its work for less, in {longer // 100}.{longer % 100:02d} times the time: change gpus in its job file",
        "whaleflux submit FILE",  # a job that runs keeps its size
        {kind: whole.of(kind) // 2 for kind in COMMUNICATION},
        min(WHOLE_PPM, lowest * WHOLE_PPM // ppm),
        Level.MEDIUM,
        Level.MEDIUM,
        whole.bill_micros,
        {kind: whole.of(kind) for kind in COMMUNICATION},
        job.cash_ppm,
        job.owner,
    )
