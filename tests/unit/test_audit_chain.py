"""The chain of the audit trail, and what is found of it when somebody tampered with a copy; where records wait."""

import errno
import hashlib
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from whaleflux.trust import audit_encoding
from whaleflux.trust.audit import AuditRecord
from whaleflux.trust.audit_chain import Chain, Verifier, head_of
from whaleflux.trust.audit_denials import EVERY_S, MANY, Denials
from whaleflux.trust.audit_spool import SEGMENT_BYTES, FileSpool, MemorySpool, left_behind
from whaleflux.v1 import audit_pb2 as pb

NOW = datetime(2026, 11, 30, tzinfo=UTC)
SAID = AuditRecord("user/ann", "", "/whaleflux.v1.SchedulerService/CancelJob", "queues/q/jobs/j", "OK")
F = pb.AuditFinding


def written(count, writer="scheduler/1/a", predecessor=None):
    chain = Chain(writer, predecessor)
    links = [chain.seal(replace(SAID, object=f"jobs/{n}"), NOW + timedelta(seconds=n)) for n in range(count)]
    return [pb.AuditLink.FromString(link) for link in links], chain.head


def verified(links, *heads, kept_since=None):
    verifier = Verifier(heads, kept_since)
    for link in links:
        verifier.take(link)
    return [(f.kind, f.sequence) for f in verifier.finish()]


def rewritten(link, **fields):
    """A link with other fields, and a hash that fits them."""
    record = pb.AuditRecord.FromString(link.record)
    for name, value in fields.items():
        setattr(record, name, value)
    content = record.SerializeToString()
    return pb.AuditLink(record=content, hash=hashlib.sha256(content).digest())


class TestTampering:
    def test_a_chain_as_it_was_written_is_sound(self):
        links, head = written(10)
        assert verified(links, head) == []
        assert verified([], pb.AuditHead(writer="w", time=head.time)) == [], "who wrote nothing lacks nothing"

    def test_a_changed_record(self):
        links, head = written(10)
        changed = pb.AuditLink(record=links[4].record.replace(b"ann", b"eve"), hash=links[4].hash)
        assert verified([*links[:4], changed, *links[5:]], head) == [(F.KIND_CHANGED, 5)]
        assert verified([*links[:4], rewritten(links[4], subject="user/eve"), *links[5:]], head) == [
            (F.KIND_CHANGED, 5)
        ]
        assert verified([*links[:4], pb.AuditLink(record=b"\xff"), *links[5:]], head)[0] == (F.KIND_CHANGED, 0)

    def test_a_chain_that_was_written_anew_from_some_record_on(self):
        links, head = written(10)
        forged, _ = written(4)
        last, anew = rewritten(forged[-1], subject="user/eve"), forged[:-1]
        anew.append(last)
        for link in links[4:]:
            last = rewritten(link, previous_hash=last.hash)
            anew.append(last)
        assert verified(anew, head) == [(F.KIND_CHANGED, 10)], "only the head outside of the trail tells"

    def test_a_dropped_record(self):
        links, head = written(10)
        assert verified([*links[:4], *links[5:]], head) == [(F.KIND_MISSING, 5)]

    def test_an_inserted_record(self):
        links, head = written(10)
        closed = pb.AuditHead(writer=head.writer, sequence=10, hash=head.hash, time=head.time, closed=True)
        more = rewritten(links[9], sequence=11, previous_hash=head.hash, subject="user/eve")
        assert verified([*links, more], closed) == [(F.KIND_INSERTED, 11)]
        assert verified([*links, *written(1, "scheduler/1/nobody")[0]], head) == [(F.KIND_INSERTED, 1)]

    def test_reordered_records(self):
        links, head = written(10)
        assert verified([*links[:4], links[5], links[4], *links[6:]], head) == [(F.KIND_REORDERED, 5)]

    def test_a_cut_tail(self):
        links, head = written(10)
        assert verified(links[:7], head) == [(F.KIND_CUT, 10)]
        assert verified([], head) == [(F.KIND_CUT, 10)]

    def test_a_cut_tail_that_only_the_next_start_knows_of(self):
        links, head = written(10)
        behind = head_of(links[5].SerializeToString())
        following, its_head = written(3, "scheduler/1/b", predecessor=head)
        assert verified([*links, *following], behind, its_head) == []
        assert verified([*links[:7], *following], behind, its_head) == [(F.KIND_CUT, 10)]

    def test_a_forked_chain(self):
        links, head = written(10)
        assert (F.KIND_FORKED, 5) in verified([*links[:6], rewritten(links[4], subject="user/eve"), *links[6:]], head)

    def test_what_is_told_twice_is_no_harm(self):
        links, head = written(10)
        assert verified([*links[:6], *links[3:]], head) == []

    def test_what_aged_out_is_not_missing_and_what_was_purged_is(self):
        links, head = written(10)
        assert verified(links[5:], head, kept_since=NOW + timedelta(seconds=5)) == []
        assert verified(links[5:], head, kept_since=NOW) == [(F.KIND_MISSING, 5)]


def test_a_record_holds_no_more_of_a_text_than_its_bound():
    link = pb.AuditLink.FromString(Chain("w").seal(replace(SAID, object="x" * 5000, after="y" * 5000), NOW, lost=3))
    record = pb.AuditRecord.FromString(link.record)
    assert (len(record.object), len(record.after), record.lost) == (300, 300, 3)


@pytest.mark.parametrize("before", ["", "priority 10"])
@pytest.mark.parametrize(("about", "at"), [("", 0), ("jobs/é" + "ü" * 300, 1), ("x" * 127, 999_999), ("x" * 128, 127)])
def test_what_is_encoded_by_hand_is_what_protobuf_reads(about, at, before):
    now, chain = NOW.replace(microsecond=at), Chain("w/1/" + "a" * 200)
    said = replace(SAID, object=about, trace_id="0af7", groups=("a", "b"), before=before, peer="::1", client="c")
    seen = b""
    for sequence in range(1, 300):
        link = pb.AuditLink.FromString(sealed := chain.seal(said, now, lost=sequence % 2))
        record = pb.AuditRecord.FromString(link.record)
        assert (record.sequence, record.previous_hash, record.lost) == (sequence, seen, sequence % 2)
        seen = link.hash
    assert record.time.ToDatetime(tzinfo=UTC) == record.previous_time.ToDatetime(tzinfo=UTC) == now
    assert (record.writer, record.subject, record.method) == (chain.writer, said.subject, said.method)
    assert (record.object, record.trace_id, list(record.groups)) == (about[:300], "0af7", ["a", "b"])
    assert (record.before, record.peer, record.client, record.result) == (before, "::1", "c", "OK")
    assert list(pb.AuditBatch.FromString(audit_encoding.batch([sealed, sealed])).links) == [link, link]


def sealed(count, writer="scheduler/1/a"):
    return [link.SerializeToString() for link in written(count, writer)[0]]


@pytest.mark.parametrize("make", [lambda folder: MemorySpool(), lambda folder: FileSpool(folder / "a")])
def test_a_spool_gives_back_what_it_took_in_order(tmp_path, make):
    spool, links = make(tmp_path), sealed(10)
    for link in links[:6]:
        spool.append(link)
    assert spool.peek(4, 1 << 20) == links[:4]
    assert spool.peek(100, 1) == links[:1], "at least one"
    spool.drop(4, head_of(links[3]))
    for link in links[6:]:
        spool.append(link)
    found = []
    while batch := spool.peek(3, 1 << 20):
        found += batch
        spool.drop(len(batch), head_of(batch[-1]))
    assert found == links[4:]
    assert spool.size_bytes == 0
    spool.close()


def test_what_a_killed_process_left_is_found_but_for_what_was_shipped(tmp_path):
    spool, links = FileSpool(tmp_path / "a"), sealed(10)
    for link in links[:6]:
        spool.append(link)
    spool.drop(len(spool.peek(2, 1 << 20)), head_of(links[1]))
    assert list(left_behind(tmp_path)) == [], "it is still running"
    spool.close()
    with next((tmp_path / "a").glob("*.spool")).open("ab") as torn:
        torn.write((100).to_bytes(4, "big") + b"begun")
    (left,) = left_behind(tmp_path)
    assert list(left.links) == links[2:6]
    assert left.head.sequence == 6
    left.forget()
    assert list(left_behind(tmp_path)) == []
    assert not (tmp_path / "a").exists()


def test_a_process_that_is_killed_leaves_what_it_wrote_and_not_what_it_had_shipped_before(tmp_path):
    spool, links = FileSpool(tmp_path / "a" / "1"), sealed(9)
    for link in links[:6]:
        spool.append(link)
    while batch := spool.peek(4, 1 << 20):
        spool.drop(len(batch), head_of(batch[-1]))
    for link in links[6:]:
        spool.append(link)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as the kernel has it, while the process lives
    (left,) = left_behind(tmp_path / "b")
    assert (list(left.links), left.head) == (links[6:], head_of(links[8]))
    spool.close()


def test_a_spool_without_room_takes_nothing_and_goes_on_when_there_is_some(tmp_path, monkeypatch):
    spool, link = FileSpool(tmp_path / "a"), b"x" * (SEGMENT_BYTES - 100)
    spool.append(link)

    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no room"):
            spool.append(link)
    spool.append(link)
    assert spool.peek(9, 9 << 20) == [link]
    spool.drop(1, pb.AuditHead(writer="w", sequence=1))
    assert spool.peek(9, 9 << 20) == [link]
    spool.close()


def test_who_shipped_all_leaves_its_head(tmp_path):
    spool, links = FileSpool(tmp_path / "a"), sealed(3)
    for link in links:
        spool.append(link)
    spool.drop(len(spool.peek(3, 1 << 20)), head_of(links[2]))
    spool.close()
    (left,) = left_behind(tmp_path)
    assert list(left.links) == []
    assert left.head == head_of(links[2])


def test_a_spool_stays_small_however_much_goes_through_it(tmp_path):
    spool, big = FileSpool(tmp_path / "a"), b"x" * (SEGMENT_BYTES // 4)
    head = pb.AuditHead(writer="w", sequence=1)
    for _ in range(40):
        spool.append(big)
        spool.append(big)
        spool.peek(1, 1)
        spool.drop(1, head)  # never empty
        while spool.size_bytes > 6 * len(big):
            spool.peek(1, 1)
            spool.drop(1, head)
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) < 6 * SEGMENT_BYTES
    spool.close()


class TestDenials:
    DENIED = replace(SAID, result="PERMISSION_DENIED", reason="NOT_OWNER", peer="10.0.0.1")

    def test_the_first_is_told_at_once_and_the_rest_as_a_number(self):
        denials = Denials()
        told = [denials.take(self.DENIED, 0.0) for _ in range(1000)]
        assert [one for one in told if one] == [self.DENIED]
        assert denials.due(EVERY_S - 1) == []
        assert denials.due(EVERY_S) == [(self.DENIED, 999)]
        assert denials.due(2 * EVERY_S) == [], "it did not come again"
        assert denials.take(self.DENIED, 2 * EVERY_S) == self.DENIED

    def test_different_callers_are_told_apart_and_their_number_is_bounded(self):
        denials = Denials(most=10)
        told = [denials.take(replace(self.DENIED, peer=f"10.0.0.{n}"), 0.0) for n in range(100)]
        assert [one.subject for one in told if one] == ["user/ann"] * 10 + [MANY]
        assert denials.rest() == [(replace(self.DENIED, subject=MANY, peer="", object=""), 89)]
