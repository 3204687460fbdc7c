"""Logins by an ID token: who the person is here, from the first login on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import PermissionDenied, Unauthenticated
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import roles
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Put, Store, Unchanged, Write
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2, types_pb2
from whaleflux_inventory import credentials, records, sessions
from whaleflux_inventory.core import oidc
from whaleflux_inventory.core.oidc import Person, Provider
from whaleflux_inventory.id_tokens import IdTokens
from whaleflux_inventory.people import subject_key, user_of

_ACTOR = "inventory/oidc"


@dataclass(frozen=True, slots=True)
class _Holder:
    """The user that a person is, as the login will leave it, with what has to be written and to hold for that."""

    user: trust_pb2.Principal
    writes: tuple[Write, ...]
    when: tuple[Condition, ...]


class OidcLogins:
    """`life`: for how long a login may be renewed."""

    def __init__(self, store: Store, clock: Clock, provider: Provider, tokens: IdTokens, life: timedelta) -> None:
        self._store, self._clock, self._provider, self._tokens, self._life = store, clock, provider, tokens, life

    async def log_in(
        self, shown: pb.OidcLogin, key_sha256: bytes, peer: str
    ) -> tuple[trust_pb2.Principal, trust_pb2.Session]:
        """The user behind an ID token and a new login of theirs. A token makes one login, whoever shows it again."""
        claims = await self._tokens.claims(shown.id_token)
        oidc.check_claims(claims, self._provider, shown.nonce, self._clock.now())
        person = oidc.person_of(claims, self._provider)
        digest = hashlib.sha256(shown.id_token.encode()).digest()
        used_key = keys.ID_TOKENS + digest.hex()
        for _ in range(records.ATTEMPTS):
            used = await self._store.get(used_key)
            holder = await self._holder(person)
            if holder.user.disabled:
                raise _disabled(holder.user)
            if used is not None:
                return holder.user, await credentials.again(self._store, credentials.record_of(used), key_sha256)
            now = self._clock.now()
            session = sessions.new_login(holder.user.name, "oidc", now, self._life, peer, person.groups)
            ends = datetime.fromtimestamp(claims["exp"], UTC) + oidc.SKEW
            kept = credentials.put(used_key, holder.user.name, digest, ends, session.id, key_sha256)
            try:
                writes = (*holder.writes, kept, sessions.put(session))
                await self._store.commit(*writes, when=[*holder.when, Absent(used_key)])
            except ConditionFailed:  # another login of the person in this moment
                continue
            return holder.user, session
        raise records.contended("the login")

    async def _holder(self, person: Person) -> _Holder:
        """By (issuer, sub) where that is known; else a new user, or one that waits for its login at the provider."""
        key = subject_key(person.issuer, person.subject)
        if (known := await self._store.get(key)) is not None:
            name = pb.OidcSubjectRecord.FromString(known.value).user
            return await self._changed(name, person, (), (Unchanged(known),))
        name = names.user(person.name)
        record = pb.OidcSubjectRecord(issuer=person.issuer, subject=person.subject, user=name)
        bound = (Put(key, record.SerializeToString(deterministic=True)),)
        if await self._store.get(keys.of_name(keys.PRINCIPALS, name)) is not None:
            return await self._changed(name, person, bound, (Absent(key),))
        user = trust_pb2.Principal(
            name=name,
            kind=trust_pb2.PRINCIPAL_KIND_USER,
            role=_role(person, self._provider.default_role),
            display_name=person.display_name,
            oidc_issuer=person.issuer,
            oidc_subject=person.subject,
        )
        user.create_time.FromDatetime(self._clock.now())
        user.last_change.CopyFrom(self._change(What.CREATED))
        return self._written(user, bound, (Absent(key), Absent(keys.of_name(keys.PRINCIPALS, name))))

    async def _changed(
        self, name: str, person: Person, writes: tuple[Write, ...], when: tuple[Condition, ...]
    ) -> _Holder:
        """A known user: bound to the person where it waits for that, with the role that the provider gives now."""
        entry = await records.read(self._store, keys.PRINCIPALS, name, "user")
        user = user_of(entry)
        user.ClearField("etag")
        if writes:
            _check_binds(user, person)
            user.oidc_issuer, user.oidc_subject, user.awaits_oidc = person.issuer, person.subject, False
        if self._provider.decides_roles:
            user.role = _role(person, "")
        if user == trust_pb2.Principal.FromString(entry.value):
            return _Holder(user, writes, (*when, Unchanged(entry)))
        user.last_change.CopyFrom(self._change(What.CHANGED))
        return self._written(user, writes, (*when, Unchanged(entry)))

    def _written(self, user: trust_pb2.Principal, writes: tuple[Write, ...], when: tuple[Condition, ...]) -> _Holder:
        put = Put(keys.of_name(keys.PRINCIPALS, user.name), user.SerializeToString(deterministic=True))
        return _Holder(user, (*writes, put), when)

    def _change(self, what: str) -> types_pb2.Change:
        change = types_pb2.Change(actor=_ACTOR, reason="logged in at the OpenID provider", what=what)
        change.time.FromDatetime(self._clock.now())
        return change


def _role(person: Person, otherwise: str) -> str:
    role = person.role or otherwise
    if role not in roles.HUMANS:
        raise PermissionDenied(
            f"{person.name} is in no group that this fleet admits; ask an operator (settings oidc_roles and oidc_default_role, or "
            f"whaleflux user add {person.name} --oidc)",
            reason=ErrorReason.LOGIN_REFUSED,
        )
    return role


def _check_binds(user: trust_pb2.Principal, person: Person) -> None:
    """A name that is somebody's stays theirs: the provider's claim alone makes nobody that user."""
    free = user.awaits_oidc and not user.oidc_subject and user.kind == trust_pb2.PRINCIPAL_KIND_USER
    if not free:
        holder = f"sub {user.oidc_subject!r} of {user.oidc_issuer}" if user.oidc_subject else "an account made here"
        raise PermissionDenied(
            f"{user.name} is {holder}, and you are sub {person.subject!r} of {person.issuer}; if you are the same person, ask an operator: "
            f"whaleflux user set {names.last(user.name)} --oidc",
            reason=ErrorReason.USER_NAME_TAKEN,
            metadata={"name": user.name, "subject": user.oidc_subject, "issuer": user.oidc_issuer},
        )


def _disabled(user: trust_pb2.Principal) -> Unauthenticated:
    return Unauthenticated(
        f"{user.name} is disabled; ask an operator (whaleflux user enable {names.last(user.name)})",
        reason=ErrorReason.DISABLED,
    )
