"""Who has nothing: no certificate, or one that the fleet did not give, at everything that listens; and a little noise, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import Awaitable, Callable
from datetime import timedelta

import grpc

from tests.robustness.hostile.app_key import raw, request
from tests.robustness.hostile.attempts import (
    CLOSED,
    DOOR,
    HANDSHAKE,
    METHODS,
    NOTHING,
    UNKNOWN,
    Attempt,
    Calls,
    Reply,
)
from tests.robustness.hostile.place import Place
from whaleflux.rpc.pki import CertificateAuthority, Tls, new_key_and_request
from whaleflux.v1 import agent_pb2 as a
from whaleflux.v1 import audit_pb2 as au
from whaleflux.v1 import identity_pb2 as i
from whaleflux.v1 import inventory_pb2 as n
from whaleflux.v1 import router_pb2 as r
from whaleflux.v1 import scheduler_pb2 as s
from whaleflux.v1 import secrets_pb2 as k

NOBODY, OFTEN = "anonymous/-", "RESOURCE_EXHAUSTED"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)


async def attempts(place: Place) -> list[Attempt]:
    outside = Calls(place.as_caller("no certificate"), NOBODY)
    return [
        *_without_a_certificate(outside),
        *await _by_credentials(outside, place),
        *_by_certificates(place),
        *_at_other_ports(place),
        *_by_noise(place),
    ]


def _without_a_certificate(outside: Calls) -> list[Attempt]:
    admin = (("x-forwarded-client-cert", "URI=spiffe://whaleflux/admin/ada"),)
    _, wanted = new_key_and_request()
    return [
        outside.attempt("list nodes", "Inventory/ListNodes", n.ListNodesRequest(), UNKNOWN),
        outside.attempt("a job", "Scheduler/CreateJob", s.CreateJobRequest(parent="queues/open"), UNKNOWN),
        outside.attempt("Ann's job", "Scheduler/GetJob", s.GetJobRequest(name="queues/open/jobs/train"), UNKNOWN),
        outside.attempt("into it", "Scheduler/AttachJob", s.AttachJobRequest(), UNKNOWN),
        outside.attempt("a node's tasks", "Task/Sync", a.SyncRequest(hello=a.SyncHello(node="sites/a/nodes/n1")), UNKNOWN),
        outside.attempt("all secrets", "Secret/ListSecrets", k.ListSecretsRequest(), UNKNOWN),
        outside.attempt("their values", "Secret/OpenSecrets", k.OpenSecretsRequest(), UNKNOWN),
        outside.attempt("a user", "Identity/CreateUser", i.CreateUserRequest(user_id="m"), UNKNOWN),
        outside.attempt("the trail", "Audit/ExportAudit", au.ExportAuditRequest(), UNKNOWN),
        outside.attempt("a model", "Router/CreateModel", r.CreateModelRequest(model_id="m"), UNKNOWN),
        outside.attempt("admin by a header", "Identity/ListGroups", i.ListGroupsRequest(), UNKNOWN, metadata=admin),
        outside.attempt("a login renewed", "Identity/RenewLogin", i.RenewLoginRequest(certificate_request_pem=wanted.decode()), UNKNOWN),
        _elsewhere(outside, "health behind the door", "/grpc.health.v1.Health/Check"),
        _elsewhere(outside, "addresses of engines", "/envoy.service.endpoint.v3.EndpointDiscoveryService/FetchEndpoints"),
        _elsewhere(outside, "a node's own service", "/whaleflux.v1.NodeService/Probe"),
        _elsewhere(outside, "pieces of a node", "/whaleflux.v1.PieceService/ReadPiece"),
        _elsewhere(outside, "a detour", "/whaleflux.v1.InventoryService/../whaleflux.v1.NodeService/Probe"),
        _reflection(outside),
    ]  # fmt: skip


def _elsewhere(outside: Calls, name: str, path: str) -> Attempt:
    """What the front door leads nowhere."""

    async def do() -> Reply:
        try:
            return Reply("OK", repr(await outside.channel.unary_unary(path)(b"", timeout=5)))
        except grpc.aio.AioRpcError as error:
            return Reply(error.code().name, error.details() or "")

    return Attempt(name, do, frozenset({"UNIMPLEMENTED", "NOT_FOUND", "INVALID_ARGUMENT"}), DOOR)


def _reflection(outside: Calls) -> Attempt:
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"

    async def do() -> Reply:
        reply = await once()
        return await once() if "from Core" in reply.words else reply  # of the attacker's own grpc, not of the suite

    async def once() -> Reply:
        asking = outside.channel.stream_stream(path)(timeout=5)
        try:
            await asking.write(b"\x3a\x01*")
            answer = await asking.read()
            return Reply("OK", repr(answer)) if answer is not grpc.aio.EOF else Reply((await asking.code()).name)
        except grpc.aio.AioRpcError as error:
            return Reply(error.code().name, error.details() or "")
        except asyncio.InvalidStateError:
            return Reply((await asking.code()).name)

    return Attempt("which services there are", do, frozenset({UNKNOWN}), who=NOBODY, what=path)


async def _by_credentials(outside: Calls, place: Place) -> list[Attempt]:
    _, wanted = new_key_and_request()
    pem = wanted.decode()
    own = CertificateAuthority.create(place.now)

    def join(name: str, token: str, *refused: str) -> Attempt:
        message = n.JoinRequest(token=token, node_id="m1", machine_id="m" * 32, certificate_request_pem=pem)
        return outside.attempt(name, "Inventory/Join", message, *refused, "INVALID_ARGUMENT")

    def login(name: str, **credential: object) -> Attempt:
        message = i.LoginRequest(certificate_request_pem=pem, **credential)  # type: ignore[arg-type]
        return outside.attempt(
            name, "Identity/Login", message, UNKNOWN, "FAILED_PRECONDITION", OFTEN, "INVALID_ARGUMENT"
        )

    made = await place.world.admin.inventory.CreateJoinToken(n.CreateJoinTokenRequest(site="sites/a"))
    await place.world.admin.inventory.DeleteJoinToken(n.DeleteJoinTokenRequest(name=made.name))
    unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."  # {"alg": "none"}, {"sub": "admin"}
    forged = own.issue("user", "ann", place.now).chain.decode()
    return [
        join("a token that was taken back", made.secret, UNKNOWN, OFTEN),
        join("a guessed token", "wfj-" + "a" * 43, UNKNOWN, OFTEN),
        join("no token", "", UNKNOWN, OFTEN),
        login("a guessed code", code="wfl-" + "a" * 43),
        login("a guessed token of an account", token="wft-" + "a" * 43),
        login("a token that nobody signed", oidc=i.OidcLogin(id_token=unsigned, nonce="x")),
        login("a certificate of another authority", certificate_pem=forged),
        *[login(f"guess {number}", code=f"wfl-{number:043}") for number in range(25)],
    ]


def _by_certificates(place: Place) -> list[Attempt]:
    """At the front door, and past it at a service."""
    ours, theirs = place.authority(), CertificateAuthority.create(place.now)
    roots = ours.certificate_pem
    ended = ours.issue("admin", "ada", place.now - timedelta(days=2))
    forged = theirs.issue("admin", "ada", place.now)
    door, scheduler = place.world.suite.ports["frontdoor"], place.world.suite.ports["scheduler"]

    def shows(name: str, tls: Tls, port: int, server: str) -> Attempt:
        async def do() -> Reply:
            options = (("grpc.ssl_target_name_override", f"{server}.whaleflux"),)
            shown = grpc.ssl_channel_credentials(roots, tls.key, tls.chain)
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", shown, options) as channel:
                try:
                    said = await channel.unary_unary(METHODS["Identity/WhoAmI"].path)(b"", timeout=3)
                    return Reply("OK", repr(said))
                except grpc.aio.AioRpcError as error:
                    return Reply(error.code().name, error.details() or "")

        return Attempt(name, do, frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"}), HANDSHAKE)

    return [
        shows("an admin's, ended", ended, door, "frontdoor"),
        shows("an admin's, of another authority", forged, door, "frontdoor"),
        shows("the front door's, of another authority", theirs.issue("frontdoor", "1", place.now), scheduler, "scheduler"),
        shows("a service's, of another authority", theirs.issue("inventory", "1", place.now), scheduler, "scheduler"),
        shows("a root of one's own", Tls(theirs.key_pem, theirs.certificate_pem, roots), door, "frontdoor"),
        _dials("an old TLS", door, b"", version=ssl.TLSVersion.TLSv1_1),
        _dials("HTTP/1.1 where HTTP/2 is spoken", door, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", alpn="http/1.1"),
        _dials("a service without a certificate", scheduler, PREFACE),
    ]  # fmt: skip


def _dials(
    name: str,
    port: int,
    content: bytes,
    *,
    alpn: str = "h2",
    version: ssl.TLSVersion | None = None,
    seen_by: str = HANDSHAKE,
) -> Attempt:
    """TLS without a certificate; gained is an answer that is no refusal."""

    async def do() -> Reply:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([alpn])
        if version is not None:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
        return await _said(port, content, context)

    return Attempt(name, do, frozenset({CLOSED, "401", "403"}), seen_by)


async def _said(port: int, content: bytes, context: ssl.SSLContext | None) -> Reply:
    """A status, "GOAWAY" where a server of HTTP/2 ends it, "answered" for all else."""
    writer = None
    try:
        async with asyncio.timeout(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(content)
            answer = await reader.read(65536)
    except (OSError, TimeoutError):  # also what TLS says
        return Reply(CLOSED)
    finally:
        if writer is not None:
            writer.transport.abort()
    if not answer or answer[:1] == b"\x15":  # an alert of TLS
        return Reply(CLOSED)
    status = answer.split(b" ")[1:2]
    return Reply(
        status[0].decode("latin-1")[:3] if answer.startswith(b"HTTP/") else "answered", answer.decode("latin-1")
    )


def _at_other_ports(place: Place) -> list[Attempt]:
    ports = place.world.suite.ports

    def get(path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()

    def plain(name: str, port: str, content: bytes, *refused: str, seen_by: str = DOOR) -> Attempt:
        async def do() -> Reply:
            return await _said(ports[port], content, None)

        return Attempt(name, do, frozenset(refused), seen_by)

    switches = [("POST", "/quitquitquit"), ("GET", "/config_dump"), ("GET", "/certs"), ("POST", "/logging?level=trace")]
    return [
        _dials("the store", ports["etcd"], get("/version"), alpn="http/1.1"),
        _dials("its members", ports["etcd_peer"], get("/members"), alpn="http/1.1"),
        _dials("figures of a service", ports["scheduler_metrics"], get("/metrics"), alpn="http/1.1"),
        _dials("the policy", ports["policy"], get("/v1/models"), alpn="http/1.1"),
        plain("the store in plain text", "etcd", get("/version"), CLOSED, "400", seen_by=HANDSHAKE),
        plain("the front door in plain text", "frontdoor", get("/"), CLOSED, "400", seen_by=HANDSHAKE),
        plain("a service in plain text", "inventory", PREFACE, CLOSED, seen_by=HANDSHAKE),
        *[plain(f"Envoy's admin port: {path}", "admin", request(method, path, ""), "403") for method, path in switches],
        Attempt("the bus", _bus(ports["nats"]), frozenset({CLOSED}), HANDSHAKE),
    ]  # fmt: skip


def _bus(port: int) -> Callable[[], Awaitable[Reply]]:
    async def do() -> Reply:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        told = b""
        try:
            writer.write(b'CONNECT {"verbose":true}\r\nSUB > 1\r\nPING\r\n')
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(2):
                    while part := await reader.read(4096):
                        told += part
        finally:
            writer.transport.abort()
        return Reply("answered" if b"PONG" in told else CLOSED, told.decode("latin-1"))

    return do


def _by_noise(place: Place) -> list[Attempt]:
    """Bounded; gained is a front door that does not serve others any more."""
    door, http = place.world.suite.ports["frontdoor"], place.world.suite.ports["http"]

    async def serves() -> Reply:
        answer = await raw(http, request("GET", "/v1/models", place.world.api_keys["own"]), wait_s=20)
        me = await place.world.admin.identity.WhoAmI(i.WhoAmIRequest(), timeout=20)
        return Reply("serves", me.subject) if answer.code == "200" else answer

    async def slow() -> Reply:
        held = [await asyncio.open_connection("127.0.0.1", http) for _ in range(50)]
        for _, writer in held:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: ")
        try:
            return await serves()
        finally:
            for _, writer in held:
                writer.transport.abort()

    def frames(content: bytes) -> Callable[[], Awaitable[Reply]]:
        async def do() -> Reply:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            await _said(door, PREFACE + content, context)
            return await serves()

        return do

    block = b"\x83\x87\x84\x41\x01x"  # POST, https, /, a host
    resets = b"".join(_frame(1, 4, 2 * one + 1, block) + _frame(3, 0, 2 * one + 1, bytes(4)) for one in range(500))
    endless = _frame(1, 0, 1, block) + b"".join(_frame(9, 0, 1, b"\0\x01a\x7e" + b"x" * 126) for _ in range(500))
    wrong = Calls(place.as_caller("no certificate"), NOBODY)

    async def malformed() -> Reply:
        try:
            await wrong.channel.unary_unary(METHODS["Identity/Login"].path)(b"\xff" * 64, timeout=20)
        except grpc.aio.AioRpcError as error:
            return Reply(error.code().name, error.details() or "")
        return Reply("OK")

    return [
        Attempt("fifty that never finish their headers", slow, frozenset({"serves"}), DOOR),
        Attempt("500 requests, taken back at once", frames(resets), frozenset({"serves"}), DOOR),
        Attempt("headers without an end", frames(endless), frozenset({"serves"}), DOOR),
        Attempt("a frame that is none", frames(b"\xff" * 4096), frozenset({"serves"}), DOOR),
        Attempt("a message that is none", malformed, frozenset({"INVALID_ARGUMENT", OFTEN}), NOTHING),
    ]


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack("!I", len(content))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + content
