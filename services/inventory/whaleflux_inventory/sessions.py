"""The sessions of people and programs: what a certificate came from, and for how long it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.errors import FailedPrecondition, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Delete, Entry, Put, Store, Write
from whaleflux.store.reading import read_all
from whaleflux.v1 import trust_pb2

MOST_LOGINS = 50  # of one person at a time; the oldest makes room
_SAID_FOR = timedelta(minutes=10)
_DELETED_AT_ONCE = 100  # of etcd's 128 operations in a transaction


def session_of(entry: Entry) -> trust_pb2.Session:
    """A stored session."""
    return trust_pb2.Session.FromString(entry.value)


def put(session: trust_pb2.Session) -> Put:
    """The write that keeps one."""
    return Put(keys.SESSIONS + session.id, session.SerializeToString(deterministic=True))


def new_login(
    user: str, method: str, now: datetime, life: timedelta, peer: str, groups: Sequence[str] = ()
) -> trust_pb2.Session:
    """A person's login from `now` on. `groups`: those that the provider named."""
    session = trust_pb2.Session(
        id=names.ulid(now.timestamp()),
        principal=user,
        groups=groups,
        kind=trust_pb2.SESSION_KIND_LOGIN,
        method=method,
        peer=peer,
    )
    session.create_time.FromDatetime(now)
    session.expire_time.FromDatetime(now + life)
    return session


def expires(session: trust_pb2.Session) -> datetime:
    """When it ends."""
    return session.expire_time.ToDatetime(tzinfo=UTC)


async def of_user(store: Store, user: str) -> list[tuple[Entry, trust_pb2.Session]]:
    """The logins and tokens of a user, oldest first (their ids sort by time)."""
    read = read_all((await store.list(keys.SESSIONS)).entries, session_of)
    return [(entry, session) for entry, session in read.values if session.principal == user]


async def end_logins(store: Store, user: str) -> None:
    """Forgets the logins of a user: their certificates are refused from then on. Tokens stay."""
    over = [e.key for e, session in await of_user(store, user) if session.kind == trust_pb2.SESSION_KIND_LOGIN]
    for start in range(0, len(over), _DELETED_AT_ONCE):
        await store.commit(*(Delete(key) for key in over[start : start + _DELETED_AT_ONCE]))


def end(entry: Entry, reason: str, now: datetime) -> tuple[Write, ...]:
    """The writes that end one session: it is gone, and for a while that is known not to be because it is young (`trust.view`)."""
    session = session_of(entry)
    revoked = trust_pb2.Revocation(subject=session.id, reason=reason)
    revoked.revoke_time.FromDatetime(now)
    revoked.expire_time.FromDatetime(now + _SAID_FOR)
    return Delete(entry.key), Put(keys.REVOKED + session.id, revoked.SerializeToString(deterministic=True))


def too_many(read: Sequence[tuple[Entry, trust_pb2.Session]]) -> list[str]:
    """Keys of the oldest logins of those who have more than one may have; `read` is all sessions in the order of their ids."""
    by_user = defaultdict[str, list[str]](list)
    for entry, session in read:
        if session.kind == trust_pb2.SESSION_KIND_LOGIN:
            by_user[session.principal].append(entry.key)
    return [key for logins in by_user.values() for key in logins[:-MOST_LOGINS]]


async def require_no_token(store: Store) -> None:
    """Who logged in by a token makes nothing by which one logs in: a stolen token could else outlive its end."""
    kept = await store.get(keys.SESSIONS + auth.caller().session) if auth.caller().session else None
    if kept is not None and session_of(kept).kind == trust_pb2.SESSION_KIND_TOKEN:
        raise PermissionDenied(
            "who logged in by a token makes no tokens and no codes; log in as a person: whaleflux login",
            reason=ErrorReason.ROLE_MISSING,
        )


async def of_caller(store: Store) -> tuple[Entry, trust_pb2.Session]:
    """The session that the caller's certificate came from. FailedPrecondition for certificates from elsewhere."""
    entry = await store.get(keys.SESSIONS + auth.caller().session) if auth.caller().session else None
    if entry is None:
        raise FailedPrecondition(
            f"the certificate of {auth.caller().subject} came from no login here (whaleflux up, the bootstrap command, or a certificate "
            "manager made it), so that there is none to renew or end; whoever made it renews it, and whaleflux user disable refuses it",
            reason=ErrorReason.LOGIN_FROM_ELSEWHERE,
        )
    return entry, session_of(entry)
