"""AuditService over a bus in memory: what is found, who sees it, and what a verification says."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from tests.unit.test_audit_chain import written
from tests.unit.test_audit_trail import DENIED, SAID, World, running, shipped
from whaleflux.cli import audit_files
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.audit_chain import Verifier
from whaleflux.v1 import audit_pb2 as pb
from whaleflux_inventory import audit_heads
from whaleflux_inventory.audit_reading import AuditReading

ADMIN, ANN = auth.Identity("admin", "root"), auth.Identity("user", "ann")


async def filled(count=250):
    w = World()
    trail = w.trail()
    async with running(trail):
        for number in range(count):
            trail.record(replace(SAID, object=f"queues/q/jobs/j{number}"))
            if number % 10 == 9:
                await shipped(w, number + 1)
        trail.record(replace(DENIED, subject="user/eve"))
        await shipped(w, count + 1)
    return w, AuditReading(w.bus, w.store, w.clock, 400.0)


async def listed(reading, who=ADMIN, size=7, oldest_first=False, asked_who="", **wanted):
    found, token = [], ""
    wanted["who"] = asked_who
    with auth.acting_as(who):
        while True:
            request = pb.ListAuditRequest(
                filter=pb.AuditFilter(**wanted), page_size=size, page_token=token, oldest_first=oldest_first
            )
            page = await reading.ListAudit(request, None)
            assert len(page.records) <= size
            found += page.records
            token = page.next_page_token
            if not token:
                return found


async def test_pages_hold_every_record_once_in_either_order():
    _, reading = await filled(50)
    backwards, forwards = await listed(reading), await listed(reading, oldest_first=True)
    assert [r.sequence for r in backwards] == list(range(51, 0, -1))
    assert [r.sequence for r in forwards] == list(range(1, 52))
    assert [r.sequence for r in await listed(reading, size=1000)] == list(range(51, 0, -1))


async def test_filters_are_put_together():
    _, reading = await filled(20)
    assert [r.subject for r in await listed(reading, denied=True)] == ["user/eve"]
    assert [r.result for r in await listed(reading, asked_who="user/eve")] == ["PERMISSION_DENIED"]
    assert len(await listed(reading, asked_who="user")) == 21, "a role"
    assert [r.object for r in await listed(reading, object="queues/q/jobs/j7")] == ["queues/q/jobs/j7"]
    assert len(await listed(reading, object="queues/q")) == 21, "with all below it"
    assert len(await listed(reading, what="canceljob")) == 21
    assert await listed(reading, what="DrainNode") == []
    with pytest.raises(InvalidArgument, match=r"filter\.who"):
        await listed(reading, asked_who="z" * 301)
    with auth.acting_as(ADMIN), pytest.raises(InvalidArgument, match="page_token"):
        await reading.ListAudit(pb.ListAuditRequest(page_token="bmV3ZXN0"), None)


async def test_who_is_no_operator_sees_what_is_written_down_of_its_own_calls():
    _, reading = await filled(20)
    assert {r.subject for r in await listed(reading, who=ANN)} == {"user/ann"}
    assert await listed(reading, who=auth.Identity("user", "bob")) == []


async def test_a_verification_reads_all_and_an_export_can_be_verified_elsewhere():
    w, reading = await filled(30)
    sound = await reading.VerifyAudit(pb.VerifyAuditRequest(), None)
    assert (sound.records, sound.chains, len(sound.findings)) == (31, 1, 0)
    links = [link async for part in reading.ExportAudit(pb.ExportAuditRequest(), None) for link in part.links]
    verifier = Verifier([])
    for link in links:
        verifier.take(link)
    assert [f.message for f in verifier.finish()] == ["the store knows of no such writer"]
    await w.bus.publish("wf.audit.scheduler.embedded.forged.records", b"\xff\xff", id="forged")
    assert [f.kind for f in (await reading.VerifyAudit(pb.VerifyAuditRequest(), None)).findings] == [
        pb.AuditFinding.KIND_CHANGED
    ]


async def test_records_that_went_for_want_of_room_are_no_tampering():
    w = World()
    w.bus = MemoryBus(w.clock, max_events=3)  # of one record each
    trail = w.trail()
    async with running(trail):
        for number in range(10):
            trail.record(replace(SAID, object=f"queues/q/jobs/j{number}"))
            await asyncio.sleep(1)
    found = {}
    for max_bytes in (1000, 1 << 30):
        reading = AuditReading(w.bus, w.store, w.clock, 400.0, max_bytes)
        answer = await reading.VerifyAudit(pb.VerifyAuditRequest(), None)
        found[max_bytes] = [(f.kind, f.sequence) for f in answer.findings]
        assert answer.records == 3
    assert found == {1000: [], 1 << 30: [(pb.AuditFinding.KIND_MISSING, 7)]}


async def test_a_bus_that_is_away_is_no_empty_trail():
    w, reading = await filled(1)
    w.bus.reachable = False
    with pytest.raises(Unavailable):
        await listed(reading)
    with pytest.raises(Unavailable, match="without nats"):
        await listed(AuditReading(None, w.store, w.clock, 400.0))


def test_an_export_that_was_edited_is_found_out_by_itself(tmp_path):
    file = tmp_path / "audit.jsonl"
    links, _ = written(5)
    assert audit_files.write(file, [pb.ExportAuditResponse(links=links)]) == 5
    assert file.stat().st_mode & 0o077 == 0
    sound = audit_files.verified(file)
    assert (sound.records, list(sound.findings)) == (5, [])
    lines = file.read_text().splitlines(keepends=True)

    def kinds(*changed):
        file.write_text("".join(changed))
        return [found.kind for found in audit_files.verified(file).findings]

    assert kinds(lines[0], lines[1].replace("user/ann", "user/eve", 1), *lines[2:]) == [pb.AuditFinding.KIND_CHANGED]
    assert kinds(*lines[:2], *lines[3:]) == [pb.AuditFinding.KIND_MISSING]
    assert kinds(*lines[1:]) == [], "an excerpt may begin anywhere"
    with pytest.raises(InvalidArgument, match="line 2"):
        kinds(lines[0], "{}\n")


async def test_heads_of_chains_that_aged_out_are_forgotten_and_no_others():
    store, clock = MemoryStore(), VirtualClock()
    for days, start in ((500, "old"), (399, "kept"), (0, "new")):
        head = pb.AuditHead(writer=f"scheduler/1/{start}", sequence=1)
        head.time.FromDatetime(clock.now() - timedelta(days=days))
        await store.commit(Put(keys.AUDIT_HEADS + head.writer, head.SerializeToString()))
    forgetting = asyncio.create_task(audit_heads.forget_old(store, clock, 400.0))
    await clock.advance(1)
    left = [entry.key.rpartition("/")[2] for entry in (await store.list(keys.AUDIT_HEADS)).entries]
    forgetting.cancel()
    assert left == ["kept", "new"]
