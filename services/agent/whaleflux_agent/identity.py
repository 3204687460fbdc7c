"""Who this node is: a key that never leaves it, and a certificate that is got with a join token and then renewed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import DeadlineExceeded, FieldViolation, Invalid, Refusal, Unavailable
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import (
    Tls,
    TlsFiles,
    expiry,
    identity_of,
    new_key_and_request,
    renewal_in_s,
    write_private,
)
from whaleflux.rpc.status import ServerFailure
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.core.backoff import pause_s

_CALL_S = 10.0
_LOOK_EVERY_S = 600.0
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class JoinAs:
    """What a node needs to join."""

    target: str  # host:port of the front door, or of inventory
    server: str  # name in its certificate, "" for the dialled host
    roots: bytes  # PEM
    token: str
    node_id: str
    addresses: tuple[str, ...] = ()


def files(state: Path) -> TlsFiles:
    """Where the identity is kept."""
    return TlsFiles.under(state / "identity", "agent")


def known_identity(tls: TlsFiles, now: datetime) -> str:
    """The node that this state directory belongs to, "" when it must join (again)."""
    try:
        chain = tls.load().chain
    except Invalid:
        return ""
    return identity_of(chain).node if expiry(chain) > now else ""


async def join(tls: TlsFiles, ask: JoinAs, clock: Clock) -> str:
    """Gets a certificate and keeps it; returns sites/{site}/nodes/{node}. Repeats until the control plane answers.

    The key is kept before it is used: a token counts once, but the same key may ask again when the answer was lost.
    Raises the refusal when the token or the node id is not accepted.
    """
    key, request_pem = await asyncio.to_thread(_pending, tls.key.with_suffix(".pending"))
    request = inventory_pb2.JoinRequest(
        token=ask.token, node_id=ask.node_id, certificate_request_pem=request_pem.decode(), addresses=ask.addresses
    )
    failures = 0
    async with connect(ask.target, Tls(b"", b"", ask.roots), server=ask.server) as channel:
        stub = inventory_pb2_grpc.InventoryServiceStub(channel)
        while True:
            try:
                answer = await stub.Join(request, timeout=_CALL_S)
                break
            except (Unavailable, DeadlineExceeded, ServerFailure) as refusal:
                failures += 1
                level = _log.warning if failures in (1, 10) or failures % 100 == 0 else _log.debug
                level(Event.RPC_FAILED, method="Join", reason=refusal.message, failures=failures)
            await clock.sleep(pause_s(failures, random.random(), longest_s=5.0))
    tls.save(Tls(key, answer.certificate_pem.encode(), answer.authority_pem.encode()))
    tls.key.with_suffix(".pending").unlink(missing_ok=True)
    return str(answer.node)


def _pending(path: Path) -> tuple[bytes, bytes]:
    """A key with its signing request: the one of an earlier try, or a new one."""
    if path.exists():
        key, _, request = path.read_bytes().partition(b"\n\n")
        return key, request
    key, request = new_key_and_request()
    write_private(path, key.rstrip() + b"\n\n" + request)
    return key, request


class Renewal:
    """Renews the certificate in its last third, for as long as the agent runs."""

    def __init__(self, tls: TlsFiles, stub: inventory_pb2_grpc.InventoryServiceStub, clock: Clock) -> None:
        self._tls, self._stub, self._clock = tls, stub, clock

    async def run(self) -> None:
        failures = 0
        while True:
            due_s = renewal_in_s(self._tls.load().chain, self._clock.now())
            if due_s > 0:
                await self._clock.sleep(min(due_s, _LOOK_EVERY_S))
                continue
            try:
                await self._renew()
                failures = 0
            except Refusal as refusal:
                failures += 1
                _log.warning(Event.RPC_FAILED, method="RenewCertificate", reason=refusal.message, failures=failures)
            await self._clock.sleep(pause_s(failures, random.random(), first_s=1.0, longest_s=60.0))

    async def _renew(self) -> None:
        key, request = new_key_and_request()
        answer = await self._stub.RenewCertificate(
            inventory_pb2.RenewCertificateRequest(certificate_request_pem=request.decode()), timeout=_CALL_S
        )
        fresh = Tls(key, answer.certificate_pem.encode(), answer.authority_pem.encode())
        await asyncio.to_thread(self._tls.save, fresh)
        _log.info(Event.CERTIFICATE_RENEWED, ends=expiry(fresh.chain).isoformat())


def require_node(node: str, site: str, node_id: str) -> None:
    """Refuses a state directory of another node than the settings name; "" names any."""
    _, has_site, _, has_id = node.split("/")
    if (site and site != has_site) or (node_id and node_id != has_id):
        raise Invalid(
            FieldViolation("state_dir", f"belongs to {node}; use another one for sites/{site}/nodes/{node_id}")
        )
