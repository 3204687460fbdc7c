"""The trail of one process on its way to a bus in memory: what is shipped, what waits, what is said to be lost."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux.errors import Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.subjects import AUDIT_ROOT
from whaleflux.store import keys
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import audit_spool
from whaleflux.trust.audit import AuditRecord
from whaleflux.trust.audit_chain import Verifier
from whaleflux.trust.audit_spool import FileSpool
from whaleflux.trust.audit_trail import Options, Trail
from whaleflux.v1 import audit_pb2 as pb

SAID = AuditRecord("user/ann", "", "/whaleflux.v1.SchedulerService/CancelJob", "queues/q/jobs/j", "OK")
DENIED = replace(SAID, result="PERMISSION_DENIED", reason="NOT_OWNER")


class World:
    def __init__(self):
        self.clock, self.store = LoopClock(), MemoryStore()
        self.bus = MemoryBus(self.clock)

    def trail(self, **options):
        return Trail(self.bus, self.store, self.clock, "scheduler", "embedded", Options(**options))

    async def kept(self):
        found = await self.bus.read([f"{AUDIT_ROOT}.>"])
        return [link for event in found.events for link in pb.AuditBatch.FromString(event.data).links]

    async def records(self):
        return [pb.AuditRecord.FromString(link.record) for link in await self.kept()]

    async def findings(self):
        heads = [pb.AuditHead.FromString(e.value) for e in (await self.store.list(keys.AUDIT_HEADS)).entries]
        verifier = Verifier(heads)
        for link in await self.kept():
            verifier.take(link)
        return verifier.finish()


@contextlib.asynccontextmanager
async def running(trail):
    task = asyncio.create_task(trail.run())
    try:
        yield
    finally:
        task.cancel()
        await trail.close()


async def shipped(w, count):
    async with asyncio.timeout(30):
        while len(await w.records()) < count:
            await asyncio.sleep(0.05)


async def test_what_is_recorded_is_shipped_together_and_its_head_is_anchored():
    w = World()
    trail = w.trail()
    async with running(trail):
        for number in range(500):
            trail.record(replace(SAID, object=f"queues/q/jobs/{number}"))
        await shipped(w, 500)
    assert [r.object for r in await w.records()] == [f"queues/q/jobs/{n}" for n in range(500)]
    assert len(w.bus.events) < 10, "one message for many"
    (entry,) = (await w.store.list(keys.AUDIT_HEADS)).entries
    head = pb.AuditHead.FromString(entry.value)
    assert (head.sequence, head.closed) == (500, True)
    assert await w.findings() == []


async def test_a_bus_that_is_away_delays_and_loses_nothing():
    w = World()
    w.bus.reachable = False
    trail = w.trail()
    async with running(trail):
        trail.record(SAID)
        await asyncio.sleep(5)
        assert w.bus.events == ()
        w.bus.reachable = True
        await shipped(w, 1)
    assert await w.findings() == []


async def test_what_there_is_no_room_for_is_counted_and_the_next_record_says_so():
    w = World()
    w.bus.reachable = False
    trail = w.trail(max_bytes=1000)
    async with running(trail):
        for _ in range(50):
            trail.record(SAID)
        trail.check_room()
        w.bus.reachable = True
        await shipped(w, 2)
        trail.record(SAID)
    records = await w.records()
    assert sum(1 + r.lost for r in records) == 51
    assert await w.findings() == [], "the writer said it: nobody tampered"


async def test_a_fleet_that_insists_changes_nothing_without_room():
    w = World()
    w.bus.reachable = False
    trail = w.trail(max_bytes=1000, required=True)
    trail.check_room()
    for _ in range(50):
        trail.record(SAID)
    with pytest.raises(Unavailable, match="audit_required"):
        trail.check_room()


async def test_a_flood_of_refusals_is_two_records():
    w = World()
    trail = w.trail()
    async with running(trail):
        for _ in range(10_000):
            trail.record(DENIED)
        await shipped(w, 2)
    first, rest = await w.records()
    assert (first.count, rest.count) == (0, 9_999)
    assert (rest.time.ToDatetime() - first.time.ToDatetime()).total_seconds() < 60


async def test_what_may_be_done_all_the_same_is_no_refusal_to_be_counted():
    w = World()
    async with running(trail := w.trail()):
        for number, result in enumerate(("CANCELLED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")):
            trail.record(replace(SAID, object=f"queues/q/jobs/{number}", result=result))
        await shipped(w, 4)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_audit_trail import SAID, World
import asyncio
async def main():
    trail = World().trail(folder=Path(sys.argv[1]))
    for _ in range(3):
        trail.record(SAID)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def ended(folder):
    """The exit code of a process that writes down three changes and is killed at once."""
    return subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=30, check=False).returncode


async def test_what_was_acknowledged_survives_a_kill_and_is_shipped_by_the_next_start(tmp_path):
    assert ended(tmp_path) == -signal.SIGKILL
    w = World()
    trail = w.trail(folder=tmp_path)
    async with running(trail):
        trail.record(SAID)
        await shipped(w, 4)
    *left, own = await w.records()
    assert [r.sequence for r in left] == [1, 2, 3]
    assert (own.predecessor, own.predecessor_sequence, own.previous_hash) == (
        left[0].writer,
        3,
        (await w.kept())[2].hash,
    )
    assert await w.findings() == []
    assert len(list((tmp_path / "scheduler-embedded").iterdir())) == 1, "what was left is gone once it is shipped"


async def test_what_was_left_goes_in_messages_that_the_bus_takes(tmp_path):
    w = World()
    trail = w.trail(folder=tmp_path)
    large = replace(SAID, object="\U0001f40b" * 300, client="\U0001f40b" * 300, after="\U0001f40b" * 300)
    for _ in range(150):
        trail.record(large)
    w.bus.reachable = False
    await trail.close()
    w.bus.reachable = True
    async with running(w.trail(folder=tmp_path)):
        await shipped(w, 150)
    assert max(len(event.data) for event in w.bus.events) < 512 << 10
    assert await w.findings() == []


def test_where_no_file_can_be_opened_the_old_one_stays_ours(tmp_path, monkeypatch):
    """Else the number of the closed one is soon a socket's, and is closed, or written to, once more."""
    monkeypatch.setattr(audit_spool, "SEGMENT_BYTES", 1)
    spool = FileSpool(tmp_path / "start")
    spool.append(b"one")
    with monkeypatch.context() as full:
        full.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, "too many open files")))
        with pytest.raises(OSError, match="too many"):
            spool.append(b"two")
    spool.append(b"three")
    assert spool.peek(1, 100) == [b"one"]
    spool.close()
