"""Tokens: what programs log in by, with no more than their user has, for a while."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied, ResourceExhausted
from whaleflux.login import credential
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store import keys
from whaleflux.store.api import Delete, Store
from whaleflux.trust import audit
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory import credentials, records, sessions
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.people import is_self_or_operator, read_user, require_may_act_as, user_of

DAY_S = 86_400
TTL_S, MAX_TTL_S = 90 * DAY_S, 366 * DAY_S
MAX_DISPLAY_NAME = 256
MAX_QUEUES = 64
MOST_OF_ONE = 100  # tokens of one user at a time


class Tokens:
    """`authority` is None where certificates come from elsewhere, and nobody can log in by a token."""

    def __init__(self, store: Store, clock: Clock, authority: CertificateAuthority | None) -> None:
        self._store, self._clock, self._authority = store, clock, authority

    async def create(self, request: pb.CreateTokenRequest) -> pb.Token:
        """A token of the caller, or (for operators) of somebody whom they may act as. The answer alone has the secret."""
        wanted, now = request.token, self._clock.now()
        life = _checked(wanted, request.ttl_s)
        user = await self._holder(wanted.user)
        role = wanted.role or _least(user.role, auth.principal().role)
        if not roles.within(role, user.role):
            raise InvalidArgument(
                FieldViolation("token.role", f"{role[:40]!r} is above {user.role!r}, the role of {user.name}")
            )
        require_may_act_as(user, role)
        queues = _scope(wanted.queues)
        if queues and role in roles.OPERATORS:
            raise InvalidArgument(
                FieldViolation(
                    "token.queues",
                    f"bound users and viewers, and {role}s run the whole fleet; ask for a token of --role user",
                )
            )
        if self._authority is None:
            raise FailedPrecondition(
                "this fleet's certificates are not made here, so that nobody can log in by a token",
                reason=ErrorReason.NO_AUTHORITY,
            )
        made = credential.new(credential.TOKEN, names.ulid(now.timestamp()), self._authority.certificate_pem)
        session = trust_pb2.Session(
            id=made.id,
            principal=user.name,
            queues=queues,
            kind=trust_pb2.SESSION_KIND_TOKEN,
            role=role,
            display_name=wanted.display_name,
            method="token",
        )
        session.create_time.FromDatetime(now)
        session.expire_time.FromDatetime(now + life)
        session.last_change.CopyFrom(changes.asked(What.CREATED, now))
        kept = credentials.put(credentials.key_of(made), user.name, made.secret_sha256, now + life, made.id)
        await self._store.commit(kept, sessions.put(session))
        audit.note(after=f"{names.token(made.id)} of {user.name}, role {role}")
        token = _shown(session)
        token.secret = made.text
        return token

    async def page(self, request: pb.ListTokensRequest) -> Page[pb.Token]:
        """One page of the tokens that the caller may see."""
        if request.user:
            names.split(request.user, "users", field="user")
        is_self_or_operator("")  # of an empty list too: it was asked for
        listed = await list_page(
            self._store,
            keys.TOKENS,
            credentials.record_of,
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda record: is_self_or_operator(record.user) and request.user in {"", record.user},
        )
        shown = [await self._shown_of(record) for record in listed.items]
        found = tuple(token for token in shown if token is not None)
        return Page(found, listed.next_page_token, listed.revision, listed.unreadable)

    async def revoke(self, request: pb.RevokeTokenRequest) -> None:
        """Ends a token; whoever logged in by it is refused from then on."""
        names.split(request.name, "tokens")
        entry = await records.read(self._store, keys.SESSIONS, request.name, "access_token")
        session = sessions.session_of(entry)
        if session.kind != trust_pb2.SESSION_KIND_TOKEN or not is_self_or_operator(session.principal):
            raise records.not_found("access_token", request.name)
        audit.note(before=f"{request.name} of {session.principal}")
        ended = sessions.end(entry, f"the token was ended by {changes.actor()}", self._clock.now())
        await self._store.commit(*ended, Delete(keys.TOKENS + session.id))

    async def _holder(self, asked: str) -> trust_pb2.Principal:
        """As whom the token logs in: the caller, or a program."""
        await sessions.require_no_token(self._store)
        mine = names.user(auth.caller().name)
        name = asked or mine
        if not is_self_or_operator(name):
            raise records.not_found("user", name)
        user = user_of(await read_user(self._store, name))
        if name != mine and user.kind != trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT:
            raise PermissionDenied(
                f"{name} is a person, and only they make tokens by which a program is them; for a program: whaleflux user add NAME --service-account",
                reason=ErrorReason.NOT_OWNER,
                metadata={"name": name, "owner": name},
            )
        await self._check_count(name)
        return user

    async def _check_count(self, user: str) -> None:
        there = [s for _, s in await sessions.of_user(self._store, user) if s.kind == trust_pb2.SESSION_KIND_TOKEN]
        if len(there) >= MOST_OF_ONE:
            raise ResourceExhausted(
                f"{user} has {len(there)} tokens; end some of them (whaleflux tokens ls, whaleflux tokens rm ID)",
                metadata={"subject": user, "limit": str(MOST_OF_ONE)},
            )

    async def _shown_of(self, record: pb.CredentialRecord) -> pb.Token | None:
        """None for one that was ended in this moment."""
        entry = await self._store.get(keys.SESSIONS + record.session)
        if entry is None:
            return None
        token = _shown(sessions.session_of(entry))
        if record.HasField("last_use_time"):
            token.last_use_time.CopyFrom(record.last_use_time)
        return token


def _checked(token: pb.Token, ttl_s: int) -> timedelta:
    """What is wrong with the request by itself; for how long the token lives."""
    found = Findings()
    found.text("token.display_name", token.display_name, MAX_DISPLAY_NAME)
    if token.role and token.role not in roles.GIVEN:
        found.add("token.role", f"{token.role[:40]!r} is no role; use one of {', '.join(roles.GIVEN)}")
    found.count("token.queues", token.queues, MAX_QUEUES)
    if not 0 <= ttl_s <= MAX_TTL_S:
        found.add("ttl_s", f"{ttl_s} is outside of 0 (for {TTL_S // DAY_S} days) to {MAX_TTL_S}")
    found.raise_if_any()
    for queue in token.queues:
        names.split(queue, "queues", field="token.queues")
    return timedelta(seconds=ttl_s or TTL_S)


def _scope(queues: Sequence[str]) -> list[str]:
    """Within the caller's own; a caller with some gives no more than these."""
    mine, asked = auth.principal().queues, {names.last(queue) for queue in queues}
    if mine is not None and not asked <= mine:
        raise PermissionDenied(
            f"you may act in {', '.join(sorted(mine))} only, so that a token of yours may too",
            reason=ErrorReason.ROLE_MISSING,
        )
    return [names.queue(queue) for queue in sorted(asked or mine or ())]


def _least(one: str, other: str) -> str:
    return one if roles.within(one, other) else other


def _shown(session: trust_pb2.Session) -> pb.Token:
    token = pb.Token(
        name=names.token(session.id),
        user=session.principal,
        display_name=session.display_name,
        role=session.role,
        queues=session.queues,
    )
    token.create_time.CopyFrom(session.create_time)
    token.expire_time.CopyFrom(session.expire_time)
    token.last_change.CopyFrom(session.last_change)
    return token
