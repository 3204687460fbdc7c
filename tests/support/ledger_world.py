"""A ledger on a folder and a store, with reports and rows to put into it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pyarrow as pa

from whaleflux.store.election import elect
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES, Basis, CostClass, LedgerRow
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import Reports, open_ledger
from whaleflux_console.ledger.schemas import SAMPLES, STEPS

BEGIN_MS = 1_764_547_200_000  # 2025-12-01T00:00:00Z
MINUTE_MS = 60_000


def sample(device="gpu-0", start_ms=BEGIN_MS, end_ms=0, **more):
    """A row of SAMPLES of ten seconds."""
    return {"node": "sites/s/nodes/n", "reporter": "boot/start", "sequence": 1, "device": device, "start_ms": start_ms,
            "end_ms": end_ms or start_ms + 10_000, "source": "gpm", **more}  # fmt: skip


def step(rank=0, start_ms=BEGIN_MS, end_ms=0, first=1, last=10, **more):
    """A row of STEPS of ten seconds."""
    return {"node": "sites/s/nodes/n", "reporter": "boot/start", "sequence": 1, "uid": "u1", "attempt": 1, "rank": rank, "device": f"gpu-{rank}",
            "start_ms": start_ms, "end_ms": end_ms or start_ms + 10_000, "first_step": first, "last_step": last, **more}  # fmt: skip


def reports(first, last=0, *, samples=(), steps=(), taken_ms=BEGIN_MS):
    return Reports(
        pa.Table.from_pylist(list(samples), SAMPLES),
        pa.Table.from_pylist(list(steps), STEPS),
        first,
        last or first,
        f"id-{last or first}",
        taken_ms,
    )


def row(
    hour_ms=BEGIN_MS,
    card="gpu-0",
    job="queues/q/jobs/j",
    node="sites/s/nodes/n",
    bill=3_000_000,
    kind=CostClass.USEFUL,
    **more,
):
    """An hour of a card, all of one class."""
    micros = tuple(bill if each is kind else 0 for each in CLASSES)
    values = {"site": "s", "gpu_class": "H200", "queue": "q", "user": "user/ada", "uid": "u1", "attempt": 1, "model": "", "gpu_ms": HOUR_MS,
              "bill_micros": bill, "micros": micros, "basis": Basis.MEASURED, "price_kind": "owned", "price_source": "list"} | more  # fmt: skip
    return LedgerRow(hour_ms, card, node, job=job, **values)


@contextlib.asynccontextmanager
async def leading(folder: Path, store, **more):
    """A ledger under a leadership of its own."""
    async with elect(store, "console", "here") as leader:
        engine = Engine()
        try:
            yield await open_ledger(LocalFolder(folder), store, leader, engine=engine, **more)
        finally:
            engine.close()
