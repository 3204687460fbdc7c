"""The store's protocol: what every service may ask of etcd, and what the memory model promises too.

Keys are text ("/whaleflux/v1/jobs/..."), values bytes (protobuf, see `codec`). A revision is the store's own count
of committed transactions: it only grows, and one number names one state of all keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from whaleflux.errors import Aborted, FieldViolation, InvalidArgument, Unavailable
from whaleflux.reasons import ErrorReason

MAX_OPERATIONS = 128  # etcd's --max-txn-ops: writes and conditions of one commit are counted apart
MAX_COMMIT_BYTES = 1_572_864  # etcd's --max-request-bytes, 1.5 MiB
_OPERATION_BYTES = 64  # what the framing of one write or condition takes at most


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as read. `revision` last changed it, `created` made it; both are the store's revisions."""

    key: str
    value: bytes
    revision: int
    created: int
    version: int = 1  # how often it was written since `created`


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Entries in key order as they were at `revision`; `after` is set when there are more.

    The next page of the same state is `list(prefix, after=page.after, at=page.revision)`.
    """

    entries: tuple[Entry, ...]
    revision: int
    after: str = ""


@dataclass(frozen=True, slots=True)
class Extent:
    """What there is under a prefix at `revision`, without its entries: how many keys, and when the newest was written (0: none)."""

    revision: int
    keys: int
    written: int


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """One key's change: its new entry, or None when it was deleted."""

    key: str
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Batch:
    """All that one transaction changed under a watched prefix.

    Without events it is a bookmark: everything up to `revision` has been delivered.
    """

    revision: int
    events: tuple[KeyEvent, ...] = ()


class Lease(Protocol):
    """A promise to be alive, kept by the store's client until `revoke` or until it cannot be kept.

    `lost` is set before the server lets the lease expire (and deletes its keys) when keepalives are not
    answered in time; it is never cleared.
    """

    @property
    def id(self) -> int: ...
    @property
    def ttl_s(self) -> float:
        """Seconds as granted, which may be more than was asked for."""
        ...

    @property
    def lost(self) -> asyncio.Event: ...
    async def revoke(self) -> None:
        """Deletes the lease with its keys at once. Does not raise: an unreachable server lets it expire."""
        ...


class Leadership(Protocol):
    """What an election hands out; see `election.elect`."""

    @property
    def key(self) -> str: ...
    @property
    def created(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Put:
    """Write `value`; with a lease the key dies with it, without one it loses the lease that it had."""

    key: str
    value: bytes
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the key; removing what is not there is no error."""

    key: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The key has not been written or deleted since `entry` was read."""

    entry: Entry

    @property
    def key(self) -> str:
        return self.entry.key


@dataclass(frozen=True, slots=True)
class Absent:
    key: str


@dataclass(frozen=True, slots=True)
class Present:
    key: str


@dataclass(frozen=True, slots=True)
class Equals:
    """The key exists and has exactly this value; for fences that another service owns."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class NoneCreated:
    """No key under `prefix` that exists was made after the revision `after`: what was listed then is still all there is.

    Keys that are written again (unless `or_written`) or deleted do not break it. It makes "there are none, so the parent may go"
    one step.
    """

    prefix: str
    after: int
    or_written: bool = False  # none was written since either

    @property
    def key(self) -> str:
        return self.prefix

    def made(self, entry: Entry) -> int:
        """The revision of the entry that counts."""
        return entry.revision if self.or_written else entry.created


@dataclass(frozen=True, slots=True)
class Held:
    """The leader's key is still the one that this leader made: the fence of every deciding loop's writes."""

    leader: Leadership

    @property
    def key(self) -> str:
        return self.leader.key


Write: TypeAlias = Put | Delete
Condition: TypeAlias = Unchanged | Absent | Present | Equals | NoneCreated | Held


class ConditionFailed(Aborted):
    """Nothing was written. `failed` are the very condition objects that did not hold."""

    def __init__(self, failed: Sequence[Condition]) -> None:
        keys = ", ".join(condition.key for condition in failed) or "a compared key"
        super().__init__(f"changed in the meantime: {keys}; read again and decide anew", metadata={"keys": keys})
        self.failed = tuple(failed)


class Fenced(ConditionFailed):
    """A `Held` did not hold: this process leads no more. Stop the loop and campaign again."""

    default_reason = ErrorReason.FENCED


class Unknown(Unavailable):
    """The commit was sent and its answer never came: it may or may not be in effect, now or in a moment.

    Never repeat it blindly; read back, or use `once.commit_once`.
    """

    default_reason = ErrorReason.COMMIT_UNKNOWN


def conflict(failed: Sequence[Condition]) -> ConditionFailed:
    """The error for these failed conditions: `Fenced` when leadership is among them."""
    return (Fenced if any(isinstance(c, Held) for c in failed) else ConditionFailed)(failed)


def holds(condition: Condition, entry: Entry | None) -> bool:
    """Whether `condition` is true while its key is `entry` (None: absent); for `NoneCreated` the newest under its prefix."""
    match condition:
        case Absent():
            return entry is None
        case Present():
            return entry is not None
        case Unchanged(read):
            return entry is not None and entry.revision == read.revision
        case Equals(_, value):
            return entry is not None and entry.value == value
        case NoneCreated(_, after):
            return entry is None or condition.made(entry) <= after
        case Held(leader):
            return entry is not None and entry.created == leader.created


def depends_on(condition: Condition, key: str) -> bool:
    """Whether writing `key` may change `condition`."""
    return key.startswith(condition.prefix) if isinstance(condition, NoneCreated) else key == condition.key


def size_bytes(writes: Sequence[Write], when: Sequence[Condition]) -> int:
    """An upper estimate of the transaction's size on the wire."""
    written = sum(len(w.key.encode()) + (len(w.value) if isinstance(w, Put) else 0) for w in writes)
    # A condition's key is sent twice: to compare, and to read it when the comparison fails.
    compared = sum(2 * len(c.key.encode()) + (len(c.value) if isinstance(c, Equals) else 0) for c in when)
    return written + compared + _OPERATION_BYTES * (len(writes) + 2 * len(when))


def check(writes: Sequence[Write], when: Sequence[Condition]) -> int:
    """How large the transaction is, as `size_bytes`. Raises InvalidArgument when one cannot carry this, naming the limit."""
    keys = [write.key for write in writes]
    if not all(keys) or not all(condition.key for condition in when):
        raise InvalidArgument(FieldViolation("key", "is empty; keys have at least one character"))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidArgument(FieldViolation("writes", f"{twice!r} is written twice; one commit writes a key once"))
    for field, items in (("writes", writes), ("when", when)):
        if len(items) > MAX_OPERATIONS:
            limit = f"{len(items)} operations are more than the {MAX_OPERATIONS} of one commit; split them"
            raise InvalidArgument(FieldViolation(field, limit))
    if (size := size_bytes(writes, when)) > MAX_COMMIT_BYTES:
        limit = f"{size} bytes are more than the {MAX_COMMIT_BYTES} of one commit; write less at once"
        raise InvalidArgument(FieldViolation("writes", limit))
    return size


class Store(Protocol):
    """The one way to state.

    All calls have deadlines. Unavailable is raised when the store does not answer, is busy, or is full: the same call may be
    answered later, and every loop waits it out. All other errors come again however often one asks.
    """

    async def get(self, key: str) -> Entry | None:
        """The newest committed entry (linearizable)."""
        ...

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        """Entries under `prefix` behind the key `after`, at most `limit` (0: all), all of one revision.

        `at` asks for an earlier state (a page token's revision); raises Compacted when that is gone, InvalidArgument when it
        is not there yet.
        """
        ...

    async def extent(self, prefix: str) -> Extent:
        """Whether anything changed is told by this alone: keys that were all written before a revision, as many as there were."""
        ...

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        """One transaction, all or nothing; returns its revision.

        Raises ConditionFailed (an Aborted; Fenced for lost leadership) and then nothing was written, Unknown when
        the answer never came, Unavailable when it was never sent, InvalidArgument when it exceeds a limit.
        """
        ...

    def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        """Every change after the revision `after`: ordered, unique, complete, whole transactions; and bookmarks.

        Broken connections are resumed inside. Raises Compacted when that history is gone: list again and watch from
        the listing's revision. Close it (`contextlib.aclosing`) when leaving before its end.
        """
        ...

    async def lease(self, ttl_s: float) -> Lease:
        """A lease that this client keeps alive until it is revoked, lost, or the store is closed."""
        ...

    async def close(self) -> None:
        """Ends connections and stops keeping leases alive, without revoking them."""
        ...
