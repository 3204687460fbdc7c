"""A chain of records, each with the hash of the one before, and what finds out that it is not as it was written. Pure.

A chain alone could be written anew by whoever may write to the bus. So its head is kept elsewhere too (`AuditHead`, in the store), and a
writer's next start names the last record of its predecessor: rewriting, inserting and cutting the tail all contradict one of them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from google.protobuf.message import DecodeError

from whaleflux.trust import audit_encoding
from whaleflux.trust.audit import AuditRecord
from whaleflux.v1 import audit_pb2 as pb

MAX_FINDINGS = 1_000
_REMEMBERED = 4_096  # last records of each chain, to tell a repeated one from a forked one
Kind: TypeAlias = pb.AuditFinding.Kind


_SHA256 = hashlib.sha256()


def _digest(content: bytes) -> bytes:
    made = _SHA256.copy()  # a new one is looked up in OpenSSL each time
    made.update(content)
    return made.digest()


def _nowhere(link: bytes) -> None:
    pass


class Chain:
    """Seals the records of one process."""

    def __init__(self, writer: str, predecessor: pb.AuditHead | None = None) -> None:
        self.writer, self._writer = writer, writer.encode()
        self._sequence, self._hash, self._at = 0, b"", b""  # of the last one; its time as a serialized Timestamp
        self._predecessor = predecessor

    @property
    def head(self) -> pb.AuditHead:
        """Its last record."""
        head = pb.AuditHead(writer=self.writer, sequence=self._sequence, hash=self._hash)
        if self._at:
            head.time.ParseFromString(self._at)
        return head

    def seal(
        self,
        said: AuditRecord,
        now: datetime,
        keep: Callable[[bytes], None] = _nowhere,
        *,
        count: int = 0,
        lost: int = 0,
    ) -> bytes:
        """The next link, as it is stored; it counts once `keep` has taken it. On the path of every change: plain and quick."""
        at = audit_encoding.stamp(now)
        content = audit_encoding.record(said, self._place(at), count=count, lost=lost)
        digest = _digest(content)
        link = audit_encoding.link(content, digest)
        keep(link)
        self._sequence, self._hash, self._at = self._sequence + 1, digest, at
        return link

    def _place(self, at: bytes) -> bytes:
        """The fields that say where the next record stands in the chain."""
        if self._sequence:
            return audit_encoding.place(self._writer, self._sequence + 1, self._hash, at, self._at)
        first = pb.AuditRecord(writer=self.writer, sequence=1)
        first.time.ParseFromString(at)
        if self._predecessor is not None:
            first.predecessor, first.predecessor_sequence = self._predecessor.writer, self._predecessor.sequence
            first.previous_hash = self._predecessor.hash
        return first.SerializeToString()


def head_of(link: bytes) -> pb.AuditHead:
    """The head of a chain that ends with this link; raises DecodeError for what is none."""
    found = pb.AuditLink.FromString(link)
    record = pb.AuditRecord.FromString(found.record)
    return pb.AuditHead(writer=record.writer, sequence=record.sequence, hash=found.hash, time=record.time)


@dataclass(slots=True)
class _Seen:
    """What was read of one chain so far."""

    sequence: int
    hash: bytes
    recent: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    missing: set[int] = field(default_factory=set)

    def remember(self, sequence: int, digest: bytes) -> None:
        self.recent[sequence] = digest
        if len(self.recent) > _REMEMBERED:
            self.recent.popitem(last=False)


class Verifier:
    """Reads a trail from its beginning: `take` each link in the order of the trail, then `finish`.

    `heads` were read before the trail was: they can be behind it, never before it. What was written before `kept_since` may have
    aged out. `heads` None: an excerpt, of which nobody knows where it should begin and end.
    """

    def __init__(self, heads: Iterable[pb.AuditHead] | None, kept_since: datetime | None = None) -> None:
        self._heads, self._excerpt = {head.writer: head for head in heads or ()}, heads is None
        self.kept_since = kept_since or datetime.min.replace(tzinfo=UTC)  # until `finish`, which looks at it
        self._begun: list[pb.AuditRecord] = []  # first records that were met of chains, which are not their first
        self._chains: dict[str, _Seen] = {}
        self._claims: list[tuple[str, pb.AuditHead]] = []  # of successors about their predecessors
        self.findings: list[pb.AuditFinding] = []
        self._found: set[tuple[int, str, int]] = set()
        self.records = self.lost = 0
        self.oldest: datetime | None = None

    def take(self, link: pb.AuditLink) -> None:
        """The next link."""
        try:
            record = pb.AuditRecord.FromString(link.record)
        except DecodeError:
            self._find(pb.AuditFinding.KIND_CHANGED, "", 0, "what is stored there is no record")
            return
        self.records += 1
        self.lost += record.lost
        self._note_oldest(record)
        writer, sequence = record.writer, record.sequence
        if hashlib.sha256(link.record).digest() != link.hash:
            self._find(pb.AuditFinding.KIND_CHANGED, writer, sequence, "its content is not what was hashed")
        seen = self._chains.get(writer)
        if seen is None:
            self._begin(record, link.hash)
        elif sequence > seen.sequence:
            self._follow(seen, record, link.hash)
        else:
            self._repeat(seen, record, link.hash)
        head = self._heads.get(writer)
        if head is not None and head.sequence == sequence and head.hash != link.hash:
            self._find(pb.AuditFinding.KIND_CHANGED, writer, sequence, "the head that the store keeps has another hash")

    def finish(self) -> list[pb.AuditFinding]:
        """Everything that is wrong, worst first as it was met."""
        for record in self._begun:
            if record.previous_time.ToDatetime(tzinfo=UTC) >= self.kept_since:
                words = "all records before this one's successor are missing"
                self._find(pb.AuditFinding.KIND_MISSING, record.writer, record.sequence - 1, words)
        for writer, seen in self._chains.items():
            for sequence in sorted(seen.missing):
                self._find(pb.AuditFinding.KIND_MISSING, writer, sequence, "the record is missing")
            if writer not in self._heads and not self._excerpt:
                self._find(pb.AuditFinding.KIND_INSERTED, writer, seen.sequence, "the store knows of no such writer")
        for head in self._heads.values():
            self._check_end(head, closed=head.closed, by="the store")
        for successor, head in self._claims:
            self._check_end(head, closed=True, by=successor)
        return self.findings

    @property
    def chains(self) -> int:
        """How many were read."""
        return len(self._chains)

    def _begin(self, record: pb.AuditRecord, digest: bytes) -> None:
        writer, sequence = record.writer, record.sequence
        self._chains[writer] = seen = _Seen(sequence, digest)
        seen.remember(sequence, digest)
        if sequence > 1 and not self._excerpt:
            self._begun.append(record)
        if record.predecessor:
            claimed = pb.AuditHead(
                writer=record.predecessor, sequence=record.predecessor_sequence, hash=record.previous_hash
            )
            claimed.time.CopyFrom(record.time)
            self._claims.append((writer, claimed))

    def _follow(self, seen: _Seen, record: pb.AuditRecord, digest: bytes) -> None:
        if record.sequence == seen.sequence + 1:
            if record.previous_hash != seen.hash:
                words = "the record after it holds another hash of it: one of the two was changed or inserted"
                self._find(pb.AuditFinding.KIND_CHANGED, record.writer, seen.sequence, words)
        else:
            seen.missing |= set(range(seen.sequence + 1, min(record.sequence, seen.sequence + 1 + MAX_FINDINGS)))
        seen.sequence, seen.hash = record.sequence, digest
        seen.remember(record.sequence, digest)

    def _repeat(self, seen: _Seen, record: pb.AuditRecord, digest: bytes) -> None:
        """A record at a place that was passed: the same one, told twice, is no harm."""
        sequence = record.sequence
        if sequence in seen.missing:
            seen.missing.discard(sequence)
            self._find(pb.AuditFinding.KIND_REORDERED, record.writer, sequence, "it comes after its successors")
        elif sequence not in seen.recent:
            self._find(pb.AuditFinding.KIND_REORDERED, record.writer, sequence, "it comes long after its successors")
        elif seen.recent[sequence] != digest:
            self._find(pb.AuditFinding.KIND_FORKED, record.writer, sequence, "two different records have this place")
        seen.remember(sequence, digest)

    def _check_end(self, head: pb.AuditHead, *, closed: bool, by: str) -> None:
        seen = self._chains.get(head.writer)
        if seen is None:
            if head.sequence and not self._excerpt and head.time.ToDatetime(tzinfo=UTC) >= self.kept_since:
                self._find(
                    pb.AuditFinding.KIND_CUT, head.writer, head.sequence, f"the whole chain is missing, says {by}"
                )
        elif seen.sequence < head.sequence:
            words = f"all records after {seen.sequence} are missing, says {by}"
            self._find(pb.AuditFinding.KIND_CUT, head.writer, head.sequence, words)
        elif closed and seen.sequence > head.sequence:
            words = f"the chain ended with {head.sequence}, says {by}; what follows was not written by it"
            self._find(pb.AuditFinding.KIND_INSERTED, head.writer, head.sequence + 1, words)
        elif seen.recent.get(head.sequence, head.hash) != head.hash:
            self._find(pb.AuditFinding.KIND_CHANGED, head.writer, head.sequence, f"its hash is another one, says {by}")

    def _note_oldest(self, record: pb.AuditRecord) -> None:
        at = record.time.ToDatetime(tzinfo=UTC)
        self.oldest = at if self.oldest is None else min(at, self.oldest)

    def _find(self, kind: Kind, writer: str, sequence: int, message: str) -> None:
        found = pb.AuditFinding(kind=kind, writer=writer, sequence=sequence, message=message)
        if len(self.findings) < MAX_FINDINGS and (kind, writer, sequence) not in self._found:
            self._found.add((kind, writer, sequence))
            self.findings.append(found)
