"""What people and programs log in by, as it is kept: hashed, with an end, used once where it is for one login."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta

from whaleflux.errors import Unauthenticated
from whaleflux.login import credential
from whaleflux.login.credential import Credential
from whaleflux.reasons import ErrorReason
from whaleflux.store import keys
from whaleflux.store.api import Delete, Entry, Put, Store
from whaleflux.store.reading import read_all
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory import sessions
from whaleflux_inventory.sessions import session_of

KEPT_AFTER_END = timedelta(days=1)
_SWEPT_AT_ONCE, _SWEPT_AT_MOST = 100, 5_000
_PREFIXES = {credential.CODE: keys.LOGIN_CODES, credential.TOKEN: keys.TOKENS}
_NOBODY = bytes(32)


def key_of(shown: Credential) -> str:
    """Where a credential is kept."""
    return _PREFIXES[shown.kind] + shown.id


def record_of(entry: Entry) -> pb.CredentialRecord:
    """The record of an entry."""
    return pb.CredentialRecord.FromString(entry.value)


def put(key: str, user: str, secret_sha256: bytes, expires: datetime, session: str = "", used_by: bytes = b"") -> Put:
    """The write that keeps one. `used_by`: SHA-256 of the public key that used it."""
    record = pb.CredentialRecord(user=user, secret_sha256=secret_sha256, session=session, key_sha256=used_by)
    record.expire_time.FromDatetime(expires)
    return Put(key, record.SerializeToString(deterministic=True))


async def shown_by(store: Store, text: str, kind: str, now: datetime) -> tuple[Entry, pb.CredentialRecord]:
    """The record of what somebody shows. Raises Unauthenticated (LOGIN_REFUSED), the same whatever is wrong with it."""
    shown = credential.parse(text)
    entry = await store.get(key_of(shown)) if shown is not None and shown.kind == kind else None
    record = record_of(entry) if entry is not None else pb.CredentialRecord(secret_sha256=_NOBODY)
    right = hmac.compare_digest(record.secret_sha256, shown.secret_sha256 if shown is not None else b"\xff" * 32)
    if entry is None or not right or now >= record.expire_time.ToDatetime(tzinfo=UTC):
        raise refused()
    return entry, record


async def again(store: Store, record: pb.CredentialRecord, key_sha256: bytes) -> trust_pb2.Session:
    """The login that was made before, for the key that made it: its answer was lost. Nobody else gets it."""
    kept = await store.get(keys.SESSIONS + record.session)
    if kept is None or not hmac.compare_digest(record.key_sha256, key_sha256):
        raise refused()
    return session_of(kept)


def refused() -> Unauthenticated:
    """The one answer to what admits nobody."""
    return Unauthenticated(
        "this code or token is unknown, used or expired; ask an operator for a new one (whaleflux user link NAME, or whaleflux tokens create)",
        reason=ErrorReason.LOGIN_REFUSED,
    )


async def sweep(store: Store, now: datetime) -> None:
    """Forgets what ended a day ago (codes, tokens, used ID tokens, sessions), old logins beyond the bound, and revocations that are over."""
    over = set[str]()
    for prefix in (keys.LOGIN_CODES, keys.ID_TOKENS, keys.TOKENS):
        read = read_all((await store.list(prefix)).entries, record_of)
        over |= {entry.key for entry, record in read.values if _ended(record.expire_time.ToDatetime(tzinfo=UTC), now)}
    known = read_all((await store.list(keys.SESSIONS)).entries, session_of).values
    over |= {entry.key for entry, session in known if _ended(session.expire_time.ToDatetime(tzinfo=UTC), now)}
    over |= set(sessions.too_many(known))
    revoked = read_all((await store.list(keys.REVOKED)).entries, lambda e: trust_pb2.Revocation.FromString(e.value))
    over |= {entry.key for entry, record in revoked.values if record.HasField("expire_time") and _over(record, now)}
    gone = sorted(over)[:_SWEPT_AT_MOST]
    for start in range(0, len(gone), _SWEPT_AT_ONCE):
        await store.commit(*(Delete(key) for key in gone[start : start + _SWEPT_AT_ONCE]))


def _over(record: trust_pb2.Revocation, now: datetime) -> bool:
    return record.expire_time.ToDatetime(tzinfo=UTC) <= now


def _ended(expires: datetime, now: datetime) -> bool:
    return expires + KEPT_AFTER_END < now
