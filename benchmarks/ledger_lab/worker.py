"""A ledger's leader as a process of its own, for being killed: python -m benchmarks.ledger_lab.worker ENDPOINT FOLDER.

It reads a stream whose reports follow from their numbers, so that anybody can tell which are in the ledger, appends them as fast as it can,
closes hours, rolls up days, and prints what was acknowledged.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.ledger_lab.fleet import BEGIN_MS, MadeFleet
from whaleflux.store.election import Leader, lead
from whaleflux.store.etcd import EtcdStore
from whaleflux_console.core.facts import Facts, Presence
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import Ledger, Reports, open_ledger
from whaleflux_console.ledger.manifest import hour_of
from whaleflux_console.ledger.schemas import SAMPLES, STEPS

CARDS = 8
REPORT_MS = 60_000  # each report is of a minute, of one node with eight cards
AT_ONCE = 20  # reports of one commit
FLEET = MadeFleet(cards=CARDS, jobs=3)


def reports(first: int, last: int) -> Reports:
    """Reports of the stream by their numbers."""
    rows = [_sample(number, card) for number in range(first, last + 1) for card in range(CARDS)]
    samples = pa.Table.from_pylist(rows, SAMPLES)
    return Reports(samples, STEPS.empty_table(), first, last, f"id-{last}", BEGIN_MS + last * REPORT_MS)


def _sample(number: int, card: int) -> dict[str, Any]:
    start_ms = BEGIN_MS + (number - 1) * REPORT_MS
    span = {"start_ms": start_ms, "end_ms": start_ms + REPORT_MS, "tensor_ppm": number * 7 % 1_000_000}
    return {
        "node": "sites/s/nodes/n",
        "reporter": "boot/start",
        "sequence": number,
        "device": f"GPU-{card}",
        **span,
        "source": "made up",
    }


async def work(ledger: Ledger) -> None:
    """For ever."""
    print("leads", ledger.state.position.sequence, flush=True)
    while True:
        first = ledger.state.position.sequence + 1
        await ledger.append(reports(first, first + AT_ONCE - 1))
        print("appended", first + AT_ONCE - 1, flush=True)
        hour_ms = hour_of(ledger.state.watermark_ms)
        told = Facts(
            presences=(
                Presence(f"GPU-{first}", f"GPU-{first}", "sites/s/nodes/n", "H200", 1_000_000, hour_ms, hour_ms + 1),
            )
        )
        await ledger.tell(hour_ms, told)
        print("told", hour_ms, first, flush=True)
        for due_ms in ledger.due():
            version = await ledger.close(await ledger.inputs(due_ms), list(FLEET.rows(due_ms)))
            print("closed", due_ms, version, flush=True)
        await ledger.keep_house(ledger.state.watermark_ms)


async def run(endpoint: str, folder: Path) -> None:
    engine, store = Engine(threads=1), EtcdStore([endpoint])

    async def leading(leader: Leader) -> None:
        await work(await open_ledger(LocalFolder(folder), store, leader, engine=engine))

    await lead(store, "console-ledger", "worker", leading)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2])))
