"""Logins: a one-time code, a token or an ID token in, a short-lived certificate out, and its renewal.

What does not admit gets one answer, whoever it is of. What admits once is used up in the transaction that makes the login; the same key
may ask again for an answer that was lost.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import timedelta

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unauthenticated
from whaleflux.login import credential
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, roles
from whaleflux.rpc.pki import CertificateAuthority, identity_of
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Entry, Put, Store, Unchanged
from whaleflux.trust import audit
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory import credentials, records, sessions
from whaleflux_inventory.certificate_requests import MAX_REQUEST_BYTES, certificate_key_sha256, public_key_sha256
from whaleflux_inventory.login_throttle import LoginThrottle
from whaleflux_inventory.oidc_logins import OidcLogins
from whaleflux_inventory.people import is_self_or_operator, read_user, require_may_act_as, user_of

CODE_TTL_S, MAX_CODE_TTL_S = 86_400, 604_800
_SWEEP_EVERY_S = 600.0
_USE_NOTED_EVERY = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class LoginLife:
    """How long certificates hold, and how long a person's login may be renewed."""

    certificate: timedelta = timedelta(hours=12)
    login: timedelta = timedelta(days=7)


class Logins:
    """`authority` is None where certificates come from elsewhere; `oidc` is None without an OpenID provider."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        authority: CertificateAuthority | None,
        life: LoginLife,
        oidc: OidcLogins | None,
    ) -> None:
        self._store, self._clock, self._authority, self._life, self._oidc = store, clock, authority, life, oidc
        self._throttle = LoginThrottle()
        self._swept_s = float("-inf")

    async def create_link(self, request: pb.CreateLoginLinkRequest) -> pb.LoginLink:
        """A one-time code for a person: oneself, or anybody for operators."""
        ttl_s = request.ttl_s or CODE_TTL_S
        if not 0 < ttl_s <= MAX_CODE_TTL_S:
            raise InvalidArgument(FieldViolation("ttl_s", f"{ttl_s} is outside of 0 (for a day) to {MAX_CODE_TTL_S}"))
        await sessions.require_no_token(self._store)
        if not is_self_or_operator(request.user):
            raise records.not_found("user", request.user)
        user = user_of(await read_user(self._store, request.user))
        _check_may_log_in(user)
        require_may_act_as(user)
        await self._sweep()
        now = self._clock.now()
        made = credential.new(credential.CODE, names.ulid(now.timestamp()), self._signing().certificate_pem)
        expires = now + timedelta(seconds=ttl_s)
        await self._store.commit(credentials.put(credentials.key_of(made), user.name, made.secret_sha256, expires))
        link = pb.LoginLink(user=user.name, code=made.text)
        link.expire_time.FromDatetime(expires)
        return link

    async def log_in(self, request: pb.LoginRequest, peer: str) -> pb.LoginResponse:
        """A certificate for whoever shows what admits. ResourceExhausted (TOO_OFTEN) after many refusals from one address."""
        self._signing()
        key_sha256 = public_key_sha256(request.certificate_request_pem)
        try:
            user, session = await self._admitted(request, key_sha256, peer)
            _check_may_log_in(user)
            answer = self._certificate(user, session, request.certificate_request_pem)
        except Unauthenticated:
            self._throttle.refused(peer, self._clock.monotonic())
            raise
        await self._sweep()
        audit.note(after=f"{answer.subject} by {session.method}, session {session.id}")
        return answer

    async def renew(self, request: pb.RenewLoginRequest) -> pb.LoginResponse:
        """A fresh certificate for the caller's session, with the role that it has now."""
        public_key_sha256(request.certificate_request_pem)
        _, session = await sessions.of_caller(self._store)
        user = user_of(await read_user(self._store, session.principal))
        _check_may_log_in(user)
        return self._certificate(user, session, request.certificate_request_pem)

    async def log_out(self, request: pb.LogoutRequest) -> None:
        """Ends the caller's login, or all of them. A token is not the login of one program alone: it is revoked, not left."""
        if request.everywhere:
            await sessions.end_logins(self._store, names.user(auth.caller().name))
            return
        entry, session = await sessions.of_caller(self._store)
        if session.kind != trust_pb2.SESSION_KIND_LOGIN:
            raise FailedPrecondition(
                f"this certificate came from {names.token(session.id)}, which others may use too; end it with: whaleflux tokens rm {session.id}",
                reason=ErrorReason.WRONG_STATE,
            )
        await self._store.commit(*sessions.end(entry, "logged out", self._clock.now()))

    async def _admitted(
        self, request: pb.LoginRequest, key_sha256: bytes, peer: str
    ) -> tuple[trust_pb2.Principal, trust_pb2.Session]:
        match request.WhichOneof("credential"):
            case "code":
                return await self._by_code(request.code, key_sha256, peer)
            case "token":
                return await self._by_token(request.token)
            case "certificate_pem":
                return await self._by_certificate(request.certificate_pem, key_sha256)
            case "oidc":
                if self._oidc is None:
                    raise _not_offered()
                return await self._oidc.log_in(request.oidc, key_sha256, peer)
        raise InvalidArgument(FieldViolation("credential", "is not set; show a code, a token or an ID token"))

    async def _by_code(self, code: str, key_sha256: bytes, peer: str) -> tuple[trust_pb2.Principal, trust_pb2.Session]:
        for _ in range(records.ATTEMPTS):
            now = self._clock.now()
            entry, record = await credentials.shown_by(self._store, code, credential.CODE, now)
            holder = await read_user(self._store, record.user)
            user = user_of(holder)
            _check_may_log_in(user)
            if record.key_sha256:
                return user, await credentials.again(self._store, record, key_sha256)
            session = sessions.new_login(user.name, "code", now, self._life.login, peer)
            record.key_sha256, record.session = key_sha256, session.id
            used = Put(entry.key, record.SerializeToString(deterministic=True))
            try:
                await self._store.commit(used, sessions.put(session), when=[Unchanged(entry), Unchanged(holder)])
            except ConditionFailed:  # used, or the user was changed, in this moment
                continue
            return user, session
        raise records.contended("the login")

    async def _by_token(self, token: str) -> tuple[trust_pb2.Principal, trust_pb2.Session]:
        now = self._clock.now()
        entry, record = await credentials.shown_by(self._store, token, credential.TOKEN, now)
        kept = await self._store.get(keys.SESSIONS + record.session)
        if kept is None:
            raise credentials.refused()
        await self._note_use(entry, record)
        return user_of(await read_user(self._store, record.user)), sessions.session_of(kept)

    async def _by_certificate(
        self, certificate_pem: str, key_sha256: bytes
    ) -> tuple[trust_pb2.Principal, trust_pb2.Session]:
        """Who slept longer than its certificate lived comes back by its key, while the login goes on."""
        ours = len(certificate_pem) <= MAX_REQUEST_BYTES and self._signing().vouches_for(certificate_pem.encode())
        if not ours or not hmac.compare_digest(certificate_key_sha256(certificate_pem), key_sha256):
            raise credentials.refused()
        who = identity_of(certificate_pem.encode())
        kept = await self._store.get(keys.SESSIONS + who.session) if who.session else None
        if kept is None or (session := sessions.session_of(kept)).principal != names.user(who.name):
            raise credentials.refused()
        return user_of(await read_user(self._store, session.principal)), session

    async def _note_use(self, entry: Entry, record: pb.CredentialRecord) -> None:
        """When it was last used, to the hour; another replica's note is as good."""
        now = self._clock.now()
        if now.timestamp() - record.last_use_time.seconds < _USE_NOTED_EVERY.total_seconds():
            return
        record.last_use_time.FromDatetime(now)
        try:
            await self._store.commit(
                Put(entry.key, record.SerializeToString(deterministic=True)), when=[Unchanged(entry)]
            )
        except ConditionFailed:
            return

    def _certificate(self, user: trust_pb2.Principal, session: trust_pb2.Session, request_pem: str) -> pb.LoginResponse:
        now, ends = self._clock.now(), sessions.expires(session)
        life = min(self._life.certificate, ends - now)
        if life <= timedelta(0):
            raise credentials.refused()
        role = session.role or user.role
        if not roles.within(role, user.role):
            raise Unauthenticated(
                f"the token is of role {role}, and {user.name} is only {user.role} by now; make another one: whaleflux tokens create",
                reason=ErrorReason.LOGIN_REFUSED,
            )
        name = names.last(user.name)
        signed = self._signing().sign(request_pem.encode(), role, name, now, lifetime=life, session=session.id)
        answer = pb.LoginResponse(
            certificate_pem=signed.decode(),
            authority_pem=self._signing().certificate_pem.decode(),
            subject=f"{role}/{name}",
        )
        answer.certificate_expire_time.FromDatetime(now + life)
        answer.session_expire_time.FromDatetime(ends)
        return answer

    def _signing(self) -> CertificateAuthority:
        if self._authority is None:
            raise FailedPrecondition(
                "this fleet's certificates are not made here; get yours from its certificate manager, or ask an operator to give inventory "
                "the CA (settings ca_cert, ca_key)",
                reason=ErrorReason.NO_AUTHORITY,
            )
        return self._authority

    async def _sweep(self) -> None:
        """Now and then, what has ended is forgotten."""
        if self._clock.monotonic() - self._swept_s >= _SWEEP_EVERY_S:
            self._swept_s = self._clock.monotonic()
            await credentials.sweep(self._store, self._clock.now())


def _check_may_log_in(user: trust_pb2.Principal) -> None:
    """Who shows a right credential of a disabled user may know that it is disabled."""
    if user.disabled:
        raise Unauthenticated(
            f"{user.name} is disabled; ask an operator (whaleflux user enable {names.last(user.name)})",
            reason=ErrorReason.DISABLED,
        )


def _not_offered() -> FailedPrecondition:
    return FailedPrecondition(
        "this fleet has no OpenID provider; ask an operator for a code (whaleflux user link NAME), or for the setting oidc_issuer",
        reason=ErrorReason.LOGIN_NOT_OFFERED,
    )
