"""Who is admitted now, and with which groups: the trust records and the queues' access, watched and held in memory.

Every service runs one, so that whoever is disabled, retired or revoked is refused everywhere as soon as the news arrives (a few
milliseconds), not when a certificate ends. It reads the store itself: a service that had to ask another one could not tell "nobody
was revoked" from "nobody answers".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import StatusError, Unauthenticated, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.cache import Cache, ValueChange
from whaleflux.trust.ownership import DEFAULT_MAX_PRIORITY, Access
from whaleflux.v1 import scheduler_pb2, trust_pb2

_ALWAYS = roles.SERVICES | {roles.FRONTDOOR, roles.ANONYMOUS}  # parts of the control plane, and who has yet to join
_REMEMBERED = 65_536
_NEWS_TAKES = timedelta(seconds=3)  # from inventory's commit to here, and the difference of two clocks
_AGAIN = "log in again: whaleflux login"


@dataclass(slots=True)
class Records:
    """The trust records by what they are about; ids, not names."""

    disabled: set[str] = field(default_factory=set)  # principals
    roles: dict[str, str] = field(default_factory=dict)  # principal -> the most that its certificates may say
    groups: dict[str, set[str]] = field(default_factory=dict)  # principal -> its groups
    group_ids: set[str] = field(default_factory=set)  # all, also those without members
    sessions: dict[str, trust_pb2.Session] = field(default_factory=dict)
    revoked: dict[str, trust_pb2.Revocation] = field(default_factory=dict)  # subject or session

    def apply(self, key: str, old: Any, new: Any) -> None:
        """One key's record before and after; None: there is none. What is about whom stands in the key."""
        if key.startswith(keys.PRINCIPALS):
            name = key.removeprefix(keys.PRINCIPALS)
            _keep(self.disabled, name, new is not None and new.disabled)
            _put(self.roles, name, new.role if new is not None and new.role else None)
        elif key.startswith(keys.GROUPS):
            _keep(self.group_ids, key.removeprefix(keys.GROUPS), new is not None)
            self._regroup(key.removeprefix(keys.GROUPS), _members(old), _members(new))
        elif key.startswith(keys.SESSIONS):
            _put(self.sessions, key.removeprefix(keys.SESSIONS), new)
        elif key.startswith(keys.REVOKED):
            _put(self.revoked, key.removeprefix(keys.REVOKED), new)

    def _regroup(self, group: str, before: set[str], after: set[str]) -> None:
        for name in before - after:
            self.groups.get(name, set()).discard(group)
        for name in after - before:
            self.groups.setdefault(name, set()).add(group)


def _members(group: trust_pb2.Group | None) -> set[str]:
    return set() if group is None else {names.last(member) for member in group.members}


def _keep(found: set[str], name: str, wanted: bool) -> None:
    (found.add if wanted else found.discard)(name)


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        found.pop(name, None)
    else:
        found[name] = value


def judge(identity: Identity, records: Records, now: datetime) -> Principal:
    """The principal of a certificate. Raises Unauthenticated for who is not admitted any more."""
    for about in (identity.subject, identity.session):
        if about and (revoked := records.revoked.get(about)) is not None:
            raise _refused(
                ErrorReason.REVOKED,
                f"{about} was revoked: {revoked.reason or 'no reason was given'}{_what_next(identity)}",
            )
    if identity.role not in roles.LOGIN:
        return Principal(identity)
    if identity.name in records.disabled:
        raise _refused(ErrorReason.DISABLED, f"user {identity.name} is disabled; ask an operator")
    if not roles.within(identity.role, most := records.roles.get(identity.name, identity.role)):
        raise _refused(
            ErrorReason.SESSION_ENDED,
            f"{identity.name} is {most} by now, and this login is of role {identity.role}; {_AGAIN}",
        )
    groups = records.groups.get(identity.name, set())
    if not identity.session:
        return Principal(identity, frozenset(groups))
    session = records.sessions.get(identity.session)
    if session is None:
        raise _unknown_session(identity.session, now)
    if session.HasField("expire_time") and session.expire_time.ToDatetime(tzinfo=UTC) <= now:
        raise _refused(ErrorReason.SESSION_ENDED, f"this login has ended; {_AGAIN}")
    queues = frozenset(map(names.last, session.queues)) if session.queues else None
    return Principal(identity, frozenset(groups | set(session.groups)), queues)


def _what_next(identity: Identity) -> str:
    return f"; {_AGAIN}" if identity.role in roles.LOGIN else ""


def _unknown_session(session: str, now: datetime) -> StatusError:
    """A login that was ended, unless it began just now and its record has not come here yet."""
    if names.ulid_time(session) > now - _NEWS_TAKES:
        return Unavailable(
            "this login is so young that it is not known here yet; try again",
            reason=ErrorReason.CACHE_BEHIND,
            retry_after_s=0.2,
        )
    return _refused(ErrorReason.SESSION_ENDED, f"this login or token was ended; {_AGAIN}")


def access_of(queue: scheduler_pb2.Queue) -> Access:
    """Whom a queue is for."""
    most = queue.max_priority if queue.HasField("max_priority") else DEFAULT_MAX_PRIORITY
    return Access(frozenset(queue.members), most)


def _access(entry: Entry) -> Access:
    return access_of(scheduler_pb2.Queue.FromString(entry.value))


class TrustView:
    """`async with TrustView(store, clock).running() as view`; answers come from memory, and are kept until records change."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._records: Records | None = None
        self._admitted: dict[Identity, Principal] = {}
        self._queues: Cache[Access] | None = None
        self._change = asyncio.Event()
        self.revision = 0  # of the store, of the newest record that is known

    async def until_known(self) -> None:
        """Returns once the records were read."""
        while self._records is None:
            await self._change.wait()

    def admit(self, identity: Identity) -> Principal:
        """See `admission.Admission`."""
        if (known := self._admitted.get(identity)) is not None and not _may_end(self._records, identity):
            return known
        if identity.role in _ALWAYS:
            return Principal(identity)
        if self._records is None:
            raise Unavailable(
                "who is admitted is not known here yet; try again", reason=ErrorReason.CACHE_BEHIND, retry_after_s=0.2
            )
        principal = judge(identity, self._records, self._clock.now())
        if len(self._admitted) >= _REMEMBERED:
            self._admitted.clear()
        self._admitted[identity] = principal
        return principal

    def known(self, subject: str) -> Principal | None:
        """Who a record names ("user/ann"), with that role or what is left of it, and the groups of today.

        None: not admitted any more. Raises Unavailable while nothing is known here.
        """
        role, _, name = subject.partition("/")
        most = self._records.roles.get(name, role) if role in roles.LOGIN and self._records is not None else role
        role = role if roles.within(role, most) else most
        try:
            return self.admit(Identity(role, name))
        except Unauthenticated:
            return None

    def queue_access(self, queue_id: str) -> Access:
        """Whom the queue is for; of one that is not known: nobody but operators, as nothing says that it is open."""
        access = self._queues.get(keys.QUEUES + queue_id) if self._queues is not None else None
        return UNKNOWN if access is None else access

    def groups_of(self, name: str) -> frozenset[str]:
        """Ids of the fleet's groups that a person is in now; of those of identity providers only their certificates tell."""
        return frozenset() if self._records is None else frozenset(self._records.groups.get(name, ()))

    def is_group(self, group: str) -> bool:
        """Whether the fleet itself keeps a group of that id."""
        return self._records is not None and group in self._records.group_ids

    def is_disabled(self, name: str) -> bool:
        """Whether a person or service account is kept out; everybody while nothing is known."""
        return self._records is None or name in self._records.disabled

    async def changed(self) -> None:
        """See `admission.Admission`."""
        await self._change.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[TrustView]:
        """Follows the records while the block runs."""
        async with (
            Cache(self._store, keys.TRUST, _decoded, stand_in=_suspected) as trust,
            Cache(self._store, keys.QUEUES, _access) as self._queues,
        ):
            async with asyncio.TaskGroup() as group:  # a view that stood still would admit the revoked
                following = group.create_task(self._follow(trust))
                try:
                    yield self
                finally:
                    following.cancel()

    async def run(self) -> None:
        """As a loop of a service: for ever."""
        async with self.running():
            await asyncio.Event().wait()

    async def _follow(self, cache: Cache[Any]) -> None:
        records = Records()
        async with contextlib.aclosing(cache.changes()) as groups:
            self._adopt(records)  # of an empty store no change ever tells
            async for changes in groups:
                for change in changes:
                    records.apply(change.key, change.old, change.new)
                    self.revision = max(self.revision, change.revision)
                if not all(map(_is_login, changes)):
                    self._adopt(records)

    def _adopt(self, records: Records) -> None:
        self._records = records
        self._admitted.clear()
        self._change.set()
        self._change = asyncio.Event()


UNKNOWN = Access(members=frozenset({"groups/-"}), max_priority=0)  # no group has such an id


def _is_login(change: ValueChange[Any]) -> bool:
    """A session that began: nobody was admitted by it before, so that no answer is another now. The most frequent change by far."""
    return change.old is None and change.key.startswith(keys.SESSIONS)


def _may_end(records: Records | None, identity: Identity) -> bool:
    """Whether time alone may end the admission: then it is judged each time."""
    return bool(identity.session) and records is not None and identity.session in records.sessions


def _decoded(entry: Entry) -> Any:
    """The record under a key of the trust prefix; of a kind that a newer version writes: nothing."""
    for prefix, kind in _KINDS.items():
        if entry.key.startswith(prefix):
            return kind.FromString(entry.value)
    return None


def _suspected(entry: Entry, last: Any) -> Any:
    """What stands for a record that cannot be read: what was known, else that nobody is admitted by it."""
    if last is not None:
        return last
    if entry.key.startswith(keys.REVOKED):
        return trust_pb2.Revocation(reason="its record cannot be read")
    return trust_pb2.Principal(disabled=True) if entry.key.startswith(keys.PRINCIPALS) else None


_KINDS: Mapping[str, Any] = {
    keys.PRINCIPALS: trust_pb2.Principal,
    keys.GROUPS: trust_pb2.Group,
    keys.SESSIONS: trust_pb2.Session,
    keys.REVOKED: trust_pb2.Revocation,
}


def _refused(reason: ErrorReason, message: str) -> Unauthenticated:
    return Unauthenticated(message, reason=reason)
