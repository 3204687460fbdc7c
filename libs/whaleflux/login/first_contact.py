"""A machine that knows nothing of a fleet: its authority is fetched, compared with what one was told, and only then believed."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

import grpc
from cryptography import x509

from whaleflux import hostport
from whaleflux.errors import FieldViolation, InvalidArgument, Unauthenticated, Unavailable
from whaleflux.login.credential import fingerprint
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import sync
from whaleflux.rpc.pki import server_name
from whaleflux.rpc.retry_policy import channel_options
from whaleflux.rpc.tls_files import Tls
from whaleflux.v1 import identity_pb2, identity_pb2_grpc

WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """A front door that is believed. `roots` is its authority, PEM; `name` what its certificate has to say."""

    server: str
    roots: bytes
    name: str
    options: identity_pb2.GetLoginOptionsResponse

    def channel(self) -> sync.SyncChannel:
        """Calls to it without a certificate."""
        return sync.connect(self.server, Tls(b"", b"", self.roots), server=self.name)


def believe(server: str, authority: str, within_s: float = WITHIN_S) -> FrontDoor:
    """The front door at `server` when its authority has this fingerprint (`credential.fingerprint`), and vouches for it.

    Raises Unauthenticated when it is another one, Unavailable when nobody answers.
    """
    options = told(server, within_s)
    if fingerprint(options.authority_pem.encode()) != authority:
        raise _another(server, "is of another fleet than the code or fingerprint that you gave")
    return _checked(server, options, within_s)


def known(server: str, roots: bytes, within_s: float = WITHIN_S) -> FrontDoor:
    """The front door at `server` for who has its authority already."""
    return believe(server, fingerprint(roots), within_s)


def told(server: str, within_s: float = WITHIN_S) -> identity_pb2.GetLoginOptionsResponse:
    """What whoever answers at `server` says of itself; nothing of it is proven. No secret is sent."""
    leaf = _shown_certificate(server, within_s)
    try:
        names = x509.load_pem_x509_certificate(leaf).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        name = names.value.get_values_for_type(x509.DNSName)[0]
    except (ValueError, IndexError, x509.ExtensionNotFound):
        raise _another(server, "shows a certificate that is none of a WhaleFlux front door") from None
    channel = grpc.secure_channel(server, grpc.ssl_channel_credentials(leaf), channel_options(name))
    with sync.SyncChannel(channel) as calls:
        stub = identity_pb2_grpc.IdentityServiceStub(calls)
        answer: identity_pb2.GetLoginOptionsResponse = stub.GetLoginOptions(
            identity_pb2.GetLoginOptionsRequest(), timeout=within_s
        )
    try:
        fingerprint(answer.authority_pem.encode())
    except ValueError:
        raise _another(server, "names no authority") from None
    return answer


def _checked(server: str, options: identity_pb2.GetLoginOptionsResponse, within_s: float) -> FrontDoor:
    """Shakes hands again, this time by the authority that is believed by now."""
    name = server_name("frontdoor", trust_domain=options.trust_domain)
    trust = ssl.create_default_context(cadata=options.authority_pem)
    try:
        with _connected(server, within_s) as plain, trust.wrap_socket(plain, server_hostname=name):
            pass
    except ssl.SSLError as wrong:
        raise _another(server, f"is not vouched for by the authority that it names ({wrong.reason})") from None
    return FrontDoor(server, options.authority_pem.encode(), name, options)


def _shown_certificate(server: str, within_s: float) -> bytes:
    anything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE  # only to see what is shown; nothing is sent
    anything.set_alpn_protocols(["h2"])
    host = hostport.parse(server, "--server").host
    try:
        with _connected(server, within_s) as plain, anything.wrap_socket(plain, server_hostname=host) as shaken:
            return ssl.DER_cert_to_PEM_cert(shaken.getpeercert(binary_form=True) or b"").encode()
    except ssl.SSLError as wrong:
        raise _another(server, f"is no front door: no TLS, or not without a certificate ({wrong.reason})") from None


def _connected(server: str, within_s: float) -> socket.socket:
    try:
        return socket.create_connection(hostport.parse(server, "--server"), within_s)
    except OSError as error:
        raise Unavailable(
            f"the fleet at {server} cannot be reached ({error.strerror or error}); check the address, and that its front door runs",
            reason=ErrorReason.SERVER_UNREACHABLE,
        ) from None


def _another(server: str, what: str) -> Unauthenticated:
    return Unauthenticated(
        f"{server} {what}; compare the address with whoever gave it to you", reason=ErrorReason.IDENTITY_MISSING
    )


def parsed_fingerprint(text: str) -> str:
    """A fingerprint as people type it: as in codes, or SHA-256 in hex with or without colons. Raises InvalidArgument."""
    import base64
    import re

    plain = text.strip().replace(":", "")
    if re.fullmatch("[0-9a-fA-F]{64}", plain):
        return base64.urlsafe_b64encode(bytes.fromhex(plain)).decode().rstrip("=")
    if re.fullmatch("[A-Za-z0-9_-]{43}", plain):
        return plain
    raise InvalidArgument(
        FieldViolation(
            "--ca-sha256",
            "is no SHA-256 of a certificate; use the 64 hex digits of: openssl x509 -in ca.crt -noout -fingerprint -sha256",
        )
    )
