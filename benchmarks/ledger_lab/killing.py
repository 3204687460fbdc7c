"""Kills the ledger's leader again and again while it writes, and looks at what is left: every acknowledged report, once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.ledger_lab.fleet import BEGIN_MS
from benchmarks.ledger_lab.worker import CARDS, FLEET, reports
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import Ledger, open_ledger
from whaleflux_console.ledger.manifest import DAY_MS, Kind
from whaleflux_console.ledger.shelf import table_of

LEADS_WITHIN_S = 120.0


@dataclass(slots=True)
class Acknowledged:
    """What the process said is done, over all its lives."""

    rounds: int = 0
    reports: int = 0
    closed: dict[int, int] = field(default_factory=dict)  # hour -> version
    told: set[tuple[int, int]] = field(default_factory=set)  # hour, card

    def take(self, line: str) -> None:
        what, *values = line.split()
        numbers = [int(value) for value in values]
        if what == "appended":
            self.reports = max(self.reports, numbers[0])
        elif what == "closed":
            self.closed[numbers[0]] = max(self.closed.get(numbers[0], 0), numbers[1])
        elif what == "told":
            self.told.add((numbers[0], numbers[1]))


async def kill_again_and_again(endpoint: str, folder: Path, rounds: int, chance: random.Random) -> Acknowledged:
    """Each life leads, works for up to half a second, and ends by SIGKILL."""
    said = Acknowledged()
    for _ in range(rounds):
        async with _living(endpoint, folder) as lines:
            await _until_it_leads(lines)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.uniform(0.02, 0.5)):
                    async for line in lines:
                        said.take(line)
        async for line in lines:  # what it said before it ended
            said.take(line)
        said.rounds += 1
    return said


@contextlib.asynccontextmanager
async def _living(endpoint: str, folder: Path) -> AsyncIterator[_Lines]:
    command = (sys.executable, "-m", "benchmarks.ledger_lab.worker", endpoint, str(folder))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield _Lines(process.stdout)
    finally:
        process.kill()
        await process.wait()


class _Lines:
    """Whole lines; a line that was being read when time was up is not lost."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> str:
        line = await self._stream.readline()
        if not line.endswith(b"\n"):
            raise StopAsyncIteration
        return line.decode()


async def _until_it_leads(lines: _Lines) -> None:
    async with asyncio.timeout(LEADS_WITHIN_S):
        async for line in lines:
            if line.startswith("leads"):
                return
    raise RuntimeError("the worker ended before it led")


async def faults(endpoint: str, folder: Path, said: Acknowledged) -> list[str]:
    """What is not as it was acknowledged; empty: all is."""
    store, engine = EtcdStore([endpoint]), Engine()
    try:
        async with elect(store, "console-ledger", "judge") as leader:
            ledger = await open_ledger(LocalFolder(folder), store, leader, engine=engine)
            return [*_of_reports(ledger, said), *await _of_hours(ledger, said), *await _of_files(ledger)]
    finally:
        engine.close()
        await store.close()


def _of_reports(ledger: Ledger, said: Acknowledged) -> list[str]:
    last = ledger.state.position.sequence
    found = Counter[tuple[int, str]]()
    for file in ledger.state.all_files(Kind.RAW):
        table = table_of(ledger.folder, file)
        found.update(zip(table["sequence"].to_pylist(), table["device"].to_pylist(), strict=True))
    expected = reports(1, last).samples
    wanted = set(zip(expected["sequence"].to_pylist(), expected["device"].to_pylist(), strict=True)) if last else set()
    lost = [] if last >= said.reports else [f"reports {last + 1} to {said.reports} were acknowledged and are lost"]
    gone = [f"report {n} of {device} is lost" for n, device in sorted(wanted - set(found))]
    twice = [f"report {n} of {device} is there {count} times" for (n, device), count in found.items() if count > 1]
    return [*lost, *gone, *twice]


async def _of_hours(ledger: Ledger, said: Acknowledged) -> list[str]:
    found = []
    for hour_ms, version in said.closed.items():
        rows = await ledger.rows(hour_ms)
        bill = sum(row.bill_micros for row in rows)
        wanted = sum(row.bill_micros for row in FLEET.rows(hour_ms))
        if not rows or rows[0].version < version or bill != wanted or len(rows) != CARDS:
            found.append(
                f"hour {hour_ms} version {version} was acknowledged: {len(rows)} rows, {bill} instead of {wanted}"
            )
    for hour_ms in sorted({hour for hour, _ in said.told}):
        cards = {one.card for one in (await ledger.inputs(hour_ms)).facts.presences}
        found += [
            f"what was told of GPU-{card} is lost"
            for hour, card in said.told
            if hour == hour_ms and f"GPU-{card}" not in cards
        ]
    return found


async def _of_files(ledger: Ledger) -> list[str]:
    await ledger.keep_house(ledger.state.watermark_ms)
    last_ms = max(ledger.state.watermark_ms, BEGIN_MS + HOUR_MS)
    damaged = [str(damage) for day in range(BEGIN_MS, last_ms + DAY_MS, DAY_MS) for damage in await ledger.verify(day)]
    there = {found.path for kind in Kind for found in ledger.folder.list(kind)}
    return damaged + [f"{path} is in no manifest" for path in sorted(there - set(ledger.state.files))]
