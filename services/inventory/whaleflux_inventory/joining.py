"""How machines get an identity: join tokens, and certificates signed by the fleet's authority."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, ResourceExhausted, Unauthenticated
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, pki, roles
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Delete, Put, Store, Unchanged
from whaleflux.store.reading import read_all
from whaleflux.trust import audit
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records, revocations
from whaleflux_inventory.certificate_requests import MAX_REQUEST_BYTES, public_key_sha256
from whaleflux_inventory.core import tokens
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.core.node_identity import Claim
from whaleflux_inventory.node_identities import Admission, NodeIdentities
from whaleflux_inventory.nodes import check_not_retired
from whaleflux_inventory.sites import Sites

MAX_TOKENS = 10_000
MAX_ADDRESSES = 16
KEPT_AFTER_END = timedelta(days=1)  # shown in lists for a while, so that people see what became of a token


class Joining:
    """Tokens in, certificates out. `authority` is None where certificates come from elsewhere (cert-manager, SPIFFE)."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        sites: Sites,
        identities: NodeIdentities,
        authority: CertificateAuthority | None,
    ) -> None:
        self._store, self._clock, self._sites, self._authority = store, clock, sites, authority
        self._identities = identities

    async def create_token(self, request: pb.CreateJoinTokenRequest) -> pb.JoinToken:
        """A new token for a site, which is created when it does not exist. The answer alone has the secret."""
        names.split(request.site, "sites", field="site")
        tokens.check_named(request.site, request.node)
        lifetime = tokens.lifetime(request.ttl_s)
        await self._sweep()
        await revocations.sweep(self._store, self._clock.now())
        now = self._clock.now()
        token_id, secret = names.ulid(now.timestamp()), secrets.token_urlsafe(32)
        record = pb.JoinTokenRecord(secret_sha256=tokens.digest(secret))
        record.token.name, record.token.site = f"joinTokens/{token_id}", request.site
        record.token.node = request.node
        record.token.create_time.FromDatetime(now)
        record.token.last_change.CopyFrom(changes.asked(What.CREATED, now))
        record.token.expire_time.FromDatetime(now + lifetime)
        key = keys.JOIN_TOKENS + token_id
        for _ in range(records.ATTEMPTS):
            writes, when = await self._sites.implied(request.site)
            try:
                await self._store.commit(Put(key, record.SerializeToString()), *writes, when=[Absent(key), *when])
            except ConditionFailed:  # somebody else made the site
                continue
            shown = record.token
            shown.secret = tokens.text_of(token_id, secret)
            return shown
        raise records.contended(request.site)

    async def list_tokens(self, request: pb.ListJoinTokensRequest) -> Page[pb.JoinToken]:
        """One page of tokens, without secrets."""
        return await list_page(
            self._store,
            keys.JOIN_TOKENS,
            convert.shown_token,
            size=page_size(request.page_size),
            token=request.page_token,
        )

    async def delete_token(self, request: pb.DeleteJoinTokenRequest) -> None:
        """Revokes a token; nodes that joined by it stay."""
        names.split(request.name, "joinTokens")
        for _ in range(records.ATTEMPTS):
            entry = await records.read(self._store, keys.JOIN_TOKENS, request.name, "join_token")
            marked = pb.JoinTokenRecord.FromString(entry.value)
            marked.token.last_change.CopyFrom(changes.deletion(self._clock.now()))
            try:
                await changes.delete(self._store, entry, marked.SerializeToString())
            except ConditionFailed:  # used in this moment
                continue
            return
        raise records.contended(request.name)

    async def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Admits a node by its token, or again by its ended certificate.

        Everything is checked and the certificate made before the token is used up, in the transaction that binds the name
        to machine and key: whatever is refused costs no token.
        """
        if request.certificate_pem and not request.token:
            return await self._comes_back(request)
        token_id, secret = tokens.parse(request.token)
        names.check_id("node_id", request.node_id)
        claim = _claim(request)
        for _ in range(records.ATTEMPTS):
            entry = await self._store.get(keys.JOIN_TOKENS + token_id)
            if entry is None:
                raise tokens.refused()
            record = pb.JoinTokenRecord.FromString(entry.value)
            (site,) = names.split(record.token.site, "sites", field="site")
            node, token = names.node(site, request.node_id), convert.token_of(record)
            first = tokens.admits(token, secret, node, claim.key, self._clock.now())
            _check_site(site, request.site)
            tokens.check_node(token, node)
            alive = await self._check_admissible(node)
            admitted = await self._identities.joins(node, claim, record.token.name)
            answer = self._certificate(node, request.certificate_request_pem, admitted.id)
            if not first and not admitted.writes:
                return answer
            record.token.used_by, record.key_sha256 = node, claim.key
            used = Put(entry.key, record.SerializeToString())
            try:
                await self._store.commit(used, *admitted.writes, when=[Unchanged(entry), alive, *admitted.when])
            except ConditionFailed:  # somebody used it in this moment, perhaps this very node
                continue
            audit.note(after=f"{node} by {record.token.name}")
            return answer
        raise records.contended(f"joinTokens/{token_id}")

    async def _comes_back(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """A node whose certificate ended while it was away: the certificate says which, its key proves it."""
        claim, shown = _claim(request), self._shown(request)
        node, ended = shown.node, pki.expiry(request.certificate_pem.encode())
        _check_site(names.top(node), request.site)
        if request.node_id not in ("", names.last(node)):
            raise InvalidArgument(
                FieldViolation("node_id", f"is {request.node_id[:64]!r}, the certificate is of {node}")
            )
        claim = replace(claim, session=shown.session)
        for _ in range(records.ATTEMPTS):
            alive = await self._check_admissible(node)
            admitted = await self._identities.comes_back(node, claim, ended)
            answer = self._certificate(node, request.certificate_request_pem, admitted.id)
            if await self._committed(admitted, alive):
                audit.note(after=f"{node} is back by its key; its certificate ended {ended:%Y-%m-%d %H:%M} UTC")
                return answer
        raise records.contended(node)

    async def _committed(self, admitted: Admission, alive: Condition) -> bool:
        """Whether what the admission changes is stored; False: something else changed, look again."""
        try:
            if admitted.writes:
                await self._store.commit(*admitted.writes, when=[alive, *admitted.when])
        except ConditionFailed:
            return False
        return True

    def _shown(self, request: pb.JoinRequest) -> auth.Identity:
        """Whose the certificate in place of a token is. Raises Unauthenticated where it is no node's of this fleet."""
        shown = request.certificate_pem.encode()
        ours = len(shown) <= MAX_REQUEST_BYTES and self._authority is not None and self._authority.vouches_for(shown)
        if not ours or (identity := pki.identity_of(shown)).role != roles.AGENT:
            raise Unauthenticated(
                "this certificate is no node's of this fleet; ask an operator for a join token (whaleflux token create --site SITE)",
                reason=ErrorReason.CERTIFICATE_REFUSED,
            )
        return identity

    async def renew(self, caller: auth.Identity, request: pb.RenewCertificateRequest) -> pb.RenewCertificateResponse:
        """A fresh certificate, perhaps for a new key, for an agent that has shown its current one."""
        node, claim = caller.node, replace(_claim(request), session=caller.session)
        for _ in range(records.ATTEMPTS):
            alive = await self._check_admissible(node)
            admitted = await self._identities.renews(node, claim)
            joined = self._certificate(node, request.certificate_request_pem, admitted.id)
            if await self._committed(admitted, alive):
                return pb.RenewCertificateResponse(
                    certificate_pem=joined.certificate_pem, authority_pem=joined.authority_pem
                )
        raise records.contended(node)

    async def _check_admissible(self, node: str) -> Condition:
        """Refuses a node that was retired; the answer holds while its record stays as it is."""
        key = keys.of_name(keys.NODES, node)
        entry = await self._store.get(key)
        if entry is None:
            return Absent(key)
        check_not_retired(convert.node_of(entry))
        return Unchanged(entry)

    def _certificate(self, node: str, request_pem: str, admission: str) -> pb.JoinResponse:
        if self._authority is None:
            raise FailedPrecondition(
                "this fleet's certificates are not made here; get the node's from your certificate manager",
                reason=ErrorReason.NO_AUTHORITY,
            )
        site, node_id = names.split(node, "sites", "nodes")
        now = self._clock.now()
        signed = self._authority.sign(request_pem.encode(), roles.AGENT, f"{site}/{node_id}", now, session=admission)
        answer = pb.JoinResponse(
            node=node,
            certificate_pem=signed.decode(),
            authority_pem=self._authority.certificate_pem.decode(),
        )
        answer.time.FromDatetime(now)
        return answer

    async def _sweep(self) -> None:
        """Forgets tokens that ended a day ago; refuses when too many live."""
        snapshot = await self._store.list(keys.JOIN_TOKENS)
        if len(snapshot.entries) >= MAX_TOKENS:
            raise ResourceExhausted(
                f"there are {len(snapshot.entries)} join tokens; delete some of them or wait until they end",
                metadata={"subject": "joinTokens", "limit": str(MAX_TOKENS)},
            )
        before = self._clock.now() - KEPT_AFTER_END
        read = read_all(snapshot.entries, lambda entry: pb.JoinTokenRecord.FromString(entry.value))
        over = [entry for entry, record in read.values if convert.token_of(record).expire_time < before]
        if over:
            await self._store.commit(*(Delete(entry.key) for entry in over[:100]))


def _claim(request: pb.JoinRequest | pb.RenewCertificateRequest) -> Claim:
    """What the caller says of itself, and the key of what it asks for; that it holds that key the authority checks."""
    _check_addresses(request.addresses)
    address = request.addresses[0] if request.addresses else ""
    return Claim(request.machine_id, address, public_key_sha256(request.certificate_request_pem))


def _check_site(admits_to: str, expected: str) -> None:
    if expected and expected != admits_to:
        raise FailedPrecondition(
            f"this join token admits to site {admits_to[:64]}, not to {expected[:64]!r}; it was not used up: "
            f"leave --site away, or ask for a token of the other site (whaleflux token create --site {expected[:64]})",
            reason=ErrorReason.WRONG_SITE,
            metadata={"site": admits_to, "expected": expected[:64]},
        )


def _check_addresses(addresses: Sequence[str]) -> None:
    found = Findings()
    if found.count("addresses", addresses, MAX_ADDRESSES):
        for address in addresses:
            found.text("addresses", address)
    found.raise_if_any()
