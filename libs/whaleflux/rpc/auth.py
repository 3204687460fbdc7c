"""Who is calling, and may they? Identities come from certificates, permissions from `roles.TABLE`.

The caller is the peer's certificate, unless the peer is the front door: then it is the certificate that Envoy
verified and forwarded in `x-forwarded-client-cert`, which is believed from nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import PermissionDenied, Unauthenticated
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import roles

XFCC = "x-forwarded-client-cert"
CLIENT_ADDRESS = "x-wf-client-address"  # who dialled the front door, as it alone says
CERTIFICATE_END = (
    "x-wf-certificate-end"  # of who dialled the front door, Unix seconds: connections outlive certificates
)
DEFAULT_TRUST_DOMAIN = "whaleflux"
_URI = re.compile(r"spiffe://(?P<domain>[a-z0-9._-]{1,255})/(?P<role>[a-z_]+)/(?P<name>[A-Za-z0-9._/-]{1,200})")
_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")
_MAX_XFCC_CHARS = 8192


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody with a certificate: spiffe://{trust_domain}/{role}/{name}[/{session}]; an agent's name is "{site}/{node}".

    `session` is a ULID: the login, the token or the node's admission that the certificate came from. Certificates from elsewhere
    (cert-manager, SPIRE) have none.
    """

    role: str
    name: str
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    session: str = ""

    @property
    def uri(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.role}/{self.name}" + (f"/{self.session}" if self.session else "")

    @property
    def subject(self) -> str:
        """Who it is, whatever the session: "user/ann", "agent/onprem/n1"."""
        return f"{self.role}/{self.name}"

    @property
    def node(self) -> str:
        """The resource name of an agent's own node, "" for everybody else."""
        if self.role != roles.AGENT:
            return ""
        site, _, node_id = self.name.partition("/")
        return names.node(site, node_id)

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The identity in a URI name; refuses anything that our CA would not have written."""
        match = _URI.fullmatch(uri)
        if not match or match["role"] not in roles.CERTIFIED:
            raise Unauthenticated(f"{uri[:200]!r} is not an identity; expected spiffe://<trust domain>/<role>/<name>")
        segments = match["name"].split("/")
        wanted = 2 if match["role"] == roles.AGENT else 1
        session = segments.pop() if len(segments) == wanted + 1 and names.is_ulid(segments[-1]) else ""
        if len(segments) != wanted or not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise Unauthenticated(f"{uri[:200]!r}: a name of role {match['role']} has {wanted} segment(s)")
        return cls(match["role"], "/".join(segments), match["domain"], session)


_parsed = functools.lru_cache(maxsize=8192)(Identity.parse)  # the same callers come again and again
NOBODY = Identity(roles.ANONYMOUS, "-")


class Authority:
    """Turns the certificate and headers of a call into an identity, and checks it against the table."""

    def __init__(
        self,
        trust_domain: str = DEFAULT_TRUST_DOMAIN,
        table: roles.Table | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._trust_domain, self._now_s = trust_domain, now_s
        self._table = roles.TABLE if table is None else table
        self._allowed: dict[str, frozenset[str]] = {}  # by method; only methods that exist are asked for

    def check(
        self,
        method: str,
        peer_certificate: Mapping[str, Iterable[bytes]],
        metadata: Sequence[tuple[str, str | bytes]],
    ) -> Identity:
        """The caller of `method`, or Unauthenticated (unknown), or PermissionDenied (known and not allowed)."""
        return self.judged(method, self.identified(method, peer_certificate, metadata))

    def identified(
        self,
        method: str,
        peer_certificate: Mapping[str, Iterable[bytes]],
        metadata: Sequence[tuple[str, str | bytes]],
    ) -> Identity:
        """Who calls `method`, allowed or not; Unauthenticated for what is nobody's certificate."""
        peer = self._trusted(peer_uri(peer_certificate))
        return self._behind(peer, self._wanted(method), metadata) if peer.role == roles.FRONTDOOR else peer

    def judged(self, method: str, caller: Identity) -> Identity:
        """The caller, whose role may call `method`; raises as `check`."""
        wanted = self._wanted(method)
        if caller.role in wanted:
            return caller
        if caller is NOBODY and wanted:
            raise Unauthenticated(
                f"{method} needs a certificate; people log in (whaleflux login --server HOST:PORT), nodes join by a token (whaleflux token create)",
                metadata={"method": method},
            )
        raise PermissionDenied(
            f"role {caller.role!r} may not call {method}" + ("" if wanted else " (no role may)"),
            metadata={"method": method, "role": caller.role, "needs": ",".join(sorted(wanted))},
        )

    def _wanted(self, method: str) -> frozenset[str]:
        if (wanted := self._allowed.get(method)) is None:
            wanted = self._allowed[method] = roles.allowed(method, self._table)
        return wanted

    def _trusted(self, uri: str) -> Identity:
        identity = _parsed(uri)
        if identity.trust_domain != self._trust_domain:
            raise Unauthenticated(f"trust domain {identity.trust_domain!r} is not ours ({self._trust_domain!r})")
        return identity

    def _behind(
        self, frontdoor: Identity, wanted: frozenset[str], metadata: Sequence[tuple[str, str | bytes]]
    ) -> Identity:
        """Whom the front door speaks for: a certificate's owner, nobody, or (only where the table says so) itself."""
        headers = [value for key, value in metadata if key.lower() == XFCC]
        if not headers:
            own = roles.FRONTDOOR in wanted and roles.ANONYMOUS not in wanted
            return frontdoor if own else NOBODY
        if len(headers) > 1 or not isinstance(headers[0], str) or len(headers[0]) > _MAX_XFCC_CHARS:
            raise Unauthenticated(f"{XFCC} must be one header; the front door has to use SANITIZE_SET")
        uri = forwarded_uri(headers[0])
        if not uri:
            return NOBODY
        _check_end(metadata, self._now_s())
        return self._trusted(uri)


def _check_end(metadata: Sequence[tuple[str, str | bytes]], now_s: float) -> None:
    """Refuses a certificate that has ended since its handshake. A revocation is kept for no longer than certificates hold."""
    told = next((value for key, value in metadata if key == CERTIFICATE_END), "")
    if isinstance(told, str) and told.isdecimal() and int(told) + CLOCK_SKEW.total_seconds() < now_s:
        raise Unauthenticated(
            "the certificate of this connection has ended; renew it and connect again",
            reason=ErrorReason.CERTIFICATE_ENDED,
        )


def address_of(
    peer: str,
    certificate: Mapping[str, Iterable[bytes]],
    metadata: Sequence[tuple[str, str | bytes]],
) -> str:
    """The address of who dialled, without its port: what the front door says of its own caller, else the connection's peer."""
    for uri in certificate.get("peer_uri", ()):
        if b"/frontdoor/" in uri:
            told = [value for key, value in metadata if key == CLIENT_ADDRESS and isinstance(value, str)]
            return told[0][:64] if len(told) == 1 else ""
    return _host_of(peer)


@functools.lru_cache(maxsize=4096)  # one for each connection
def _host_of(peer: str) -> str:
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


def peer_uri(certificate: Mapping[str, Iterable[bytes]]) -> str:
    """The one URI name of the peer's certificate, from gRPC's auth context."""
    uris = [value.decode("utf-8", "replace") for value in certificate.get("peer_uri", ())]
    if len(uris) != 1:
        raise Unauthenticated("no certificate with one spiffe:// name was shown")
    return uris[0]


def forwarded_uri(header: str) -> str:
    """The URI in Envoy's x-forwarded-client-cert, "" when it names none; refuses several certificates or URIs."""
    elements = _split(header, ",")
    if len(elements) != 1:
        raise Unauthenticated(f"{XFCC} names {len(elements)} certificates; the front door has to use SANITIZE_SET")
    pairs = [pair.partition("=") for pair in _split(elements[0], ";")]
    uris = [_unquoted(value) for key, _, value in pairs if key.strip().lower() == "uri" and value]
    if len(uris) > 1:
        raise Unauthenticated(f"{XFCC} has {len(uris)} URIs; our certificates have one")
    return uris[0] if uris else ""


def _split(text: str, separator: str) -> list[str]:
    """Splits at `separator` outside of double quotes; a backslash escapes a quote."""
    parts, quoted, escaped = [""], False, False
    for character in text:
        if character == separator and not quoted:
            parts.append("")
            continue
        parts[-1] += character
        if character == '"' and not escaped:
            quoted = not quoted
        escaped = character == "\\" and not escaped
    return parts


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1].replace('\\"', '"')
    return value


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller, and what the fleet's records say of it.

    `groups`: ids of the groups it is in. `queues`: ids of the queues that its token is for; None: whichever the rules give.
    """

    identity: Identity
    groups: frozenset[str] = frozenset()
    queues: frozenset[str] | None = None

    @property
    def role(self) -> str:
        return self.identity.role

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def subject(self) -> str:
        """How records name who submitted, changed, owns: "user/ann"."""
        return self.identity.subject

    @property
    def is_service(self) -> bool:
        """A part of the control plane."""
        return self.identity.role in roles.SERVICES

    @property
    def is_operator(self) -> bool:
        """Whoever runs the fleet."""
        return self.identity.role in roles.OPERATORS


_caller: ContextVar[Principal] = ContextVar("whaleflux_caller")


def principal() -> Principal:
    """Who makes the call being served, with groups; `Unauthenticated` outside of one."""
    try:
        return _caller.get()
    except LookupError:
        raise Unauthenticated("no call is being served here") from None


def caller() -> Identity:
    """Who makes the call being served; `Unauthenticated` outside of one."""
    return principal().identity


def _as_principal(who: Identity | Principal) -> Principal:
    return who if isinstance(who, Principal) else Principal(who)


def act_as(who: Identity | Principal) -> None:
    """Serves the rest of this task on behalf of `who` (streams, whose task ends with them)."""
    _caller.set(_as_principal(who))


@contextlib.contextmanager
def acting_as(who: Identity | Principal) -> Iterator[None]:
    """Serves the block on behalf of `who`: the boundary for each call, unit tests for themselves."""
    token = _caller.set(_as_principal(who))
    try:
        yield
    finally:
        _caller.reset(token)


def require_own_node(name: str) -> None:
    """Refuses an agent that touches another node than its own; other roles were judged by the table."""
    who = caller()
    if who.role == roles.AGENT and who.node != name:
        raise PermissionDenied(
            f"agent {who.name} may touch only {who.node}, not {name[:200]!r}",
            reason=ErrorReason.NOT_OWN_NODE,
            metadata={"agent": who.name, "name": name[:200]},
        )
