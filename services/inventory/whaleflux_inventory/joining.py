"""How machines get an identity: join tokens, and certificates signed by the fleet's authority."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, Invalid, OverLimit, WrongState
from whaleflux.rpc import roles
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Put, Store, Unchanged
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records
from whaleflux_inventory.core import tokens
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.nodes import check_not_retired
from whaleflux_inventory.sites import Sites

MAX_TOKENS = 10_000
MAX_REQUEST_BYTES = 8192
MAX_ADDRESSES = 16
KEPT_AFTER_END = timedelta(days=1)  # shown in lists for a while, so that people see what became of a token


class Joining:
    """Tokens in, certificates out. `authority` is None where certificates come from elsewhere (cert-manager, SPIFFE)."""

    def __init__(self, store: Store, clock: Clock, sites: Sites, authority: CertificateAuthority | None) -> None:
        self._store, self._clock, self._sites, self._authority = store, clock, sites, authority

    async def create_token(self, request: pb.CreateJoinTokenRequest) -> pb.JoinToken:
        """A new token for a site, which is created when it does not exist. The answer alone has the secret."""
        names.split(request.site, "sites", field="site")
        lifetime = tokens.lifetime(request.ttl_s)
        await self._sweep()
        now = self._clock.now()
        token_id, secret = names.ulid(now.timestamp()), secrets.token_urlsafe(32)
        record = pb.JoinTokenRecord(secret_sha256=tokens.digest(secret))
        record.token.name, record.token.site = f"joinTokens/{token_id}", request.site
        record.token.create_time.FromDatetime(now)
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
        entry = await records.read(self._store, keys.JOIN_TOKENS, request.name, "join_token")
        await self._store.commit(Delete(entry.key))

    async def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Admits a node by its token. The token is used up in the same step in which the certificate is made."""
        token_id, secret = tokens.parse(request.token)
        names.check_id("node_id", request.node_id)
        key_sha256 = _public_key_sha256(request.certificate_request_pem)
        _check_addresses(request.addresses)
        for _ in range(records.ATTEMPTS):
            entry = await self._store.get(keys.JOIN_TOKENS + token_id)
            if entry is None:
                raise tokens.refused()
            record = pb.JoinTokenRecord.FromString(entry.value)
            (site,) = names.split(record.token.site, "sites", field="site")
            node = names.node(site, request.node_id)
            first = tokens.admits(convert.token_of(record), secret, node, key_sha256, self._clock.now())
            await self._check_admissible(node)
            answer = self._certificate(site, request.node_id, request.certificate_request_pem)
            if not first:
                return answer
            record.token.used_by, record.key_sha256 = node, key_sha256
            try:
                await self._store.commit(Put(entry.key, record.SerializeToString()), when=[Unchanged(entry)])
            except ConditionFailed:  # somebody used it in this moment, perhaps this very node
                continue
            return answer
        raise records.contended(f"joinTokens/{token_id}")

    async def renew(self, node: str, request: pb.RenewCertificateRequest) -> pb.RenewCertificateResponse:
        """A fresh certificate for the agent of `node`, who has shown its current one."""
        _public_key_sha256(request.certificate_request_pem)
        _check_addresses(request.addresses)
        await self._check_admissible(node)
        site, node_id = names.split(node, "sites", "nodes")
        joined = self._certificate(site, node_id, request.certificate_request_pem)
        return pb.RenewCertificateResponse(certificate_pem=joined.certificate_pem, authority_pem=joined.authority_pem)

    async def _check_admissible(self, node: str) -> None:
        if entry := await self._store.get(keys.of_name(keys.NODES, node)):
            check_not_retired(convert.node_of(entry))

    def _certificate(self, site: str, node_id: str, request_pem: str) -> pb.JoinResponse:
        if self._authority is None:
            raise WrongState(
                "this fleet's certificates are not made here; get the node's from your certificate manager",
                reason="NO_AUTHORITY",
            )
        signed = self._authority.sign(request_pem.encode(), roles.AGENT, f"{site}/{node_id}", self._clock.now())
        return pb.JoinResponse(
            node=names.node(site, node_id),
            certificate_pem=signed.decode(),
            authority_pem=self._authority.certificate_pem.decode(),
        )

    async def _sweep(self) -> None:
        """Forgets tokens that ended a day ago; refuses when too many live."""
        snapshot = await self._store.list(keys.JOIN_TOKENS)
        if len(snapshot.entries) >= MAX_TOKENS:
            raise OverLimit(
                f"there are {len(snapshot.entries)} join tokens; delete some of them or wait until they end",
                metadata={"subject": "joinTokens", "limit": str(MAX_TOKENS)},
            )
        before = self._clock.now() - KEPT_AFTER_END
        records_ = ((e, pb.JoinTokenRecord.FromString(e.value)) for e in snapshot.entries)
        over = [e for e, record in records_ if convert.token_of(record).expire_time < before]
        if over:
            await self._store.commit(*(Delete(entry.key) for entry in over[:100]))


def _public_key_sha256(request_pem: str) -> bytes:
    """Fingerprint of the key that asks; what else is wrong with the request the authority says."""
    if len(request_pem) > MAX_REQUEST_BYTES:
        violation = f"has {len(request_pem)} characters; use at most {MAX_REQUEST_BYTES}"
        raise Invalid(FieldViolation("certificate_request_pem", violation))
    try:
        public = x509.load_pem_x509_csr(request_pem.encode()).public_key()
    except (ValueError, TypeError):
        violation = "is not a PEM certificate signing request (PKCS #10)"
        raise Invalid(FieldViolation("certificate_request_pem", violation)) from None
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _check_addresses(addresses: Sequence[str]) -> None:
    found = Findings()
    if found.count("addresses", addresses, MAX_ADDRESSES):
        for address in addresses:
            found.text("addresses", address)
    found.raise_if_any()
