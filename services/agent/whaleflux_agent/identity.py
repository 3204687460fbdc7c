"""Who this node is: a key that never leaves it, and a certificate that is got with a join token and then renewed.

A node that was away until its certificate had ended comes back by its key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from whaleflux import names, telemetry
from whaleflux.clock import CLOCK_SKEW, Clock
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError, Unauthenticated
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import (
    Tls,
    TlsFiles,
    expiry,
    identity_of,
    new_key_and_request,
    renewal_in_s,
    request_for,
    write_private,
)
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc

_JOIN_AGAIN = Backoff(longest_s=5.0)
_RENEW_AGAIN = Backoff(first_s=1.0, longest_s=60.0)

_CALL_S = 10.0
_UNTRUSTED_TRIES = 3  # a certificate may be in the middle of its renewal
_LOOK_EVERY_S = 600.0
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class JoinParameters:
    """What a node needs to join."""

    target: str  # host:port of the front door, or of inventory
    server: str  # name in its certificate, "" for the dialled host
    roots: bytes  # PEM
    token: str = field(repr=False)
    node_id: str
    addresses: tuple[str, ...] = ()
    machine_id: str = ""
    site: str = ""  # the site that it expects to join; "": any


@dataclass(frozen=True, slots=True)
class KeptIdentity:
    """What an earlier agent left, whose certificate may have ended. All PEM."""

    node: str
    key: bytes
    chain: bytes
    roots: bytes

    def __repr__(self) -> str:
        return f"KeptIdentity({self.node}, key=***)"


Tell = Callable[[str], None]


def files(state: Path) -> TlsFiles:
    """Where the identity is kept."""
    return TlsFiles.under(state / "identity", "agent")


def known_identity(tls: TlsFiles, now: datetime) -> str:
    """The node that this state directory belongs to, "" when it must join (again)."""
    try:
        chain = tls.load().chain
    except InvalidArgument:
        return ""
    return identity_of(chain).node if expiry(chain) > now else ""


def kept_identity(tls: TlsFiles) -> KeptIdentity | None:
    """The identity of this state directory, also one whose certificate has ended, or whose renewal an earlier agent did not finish."""
    try:
        key, chain, roots = tls.key.read_bytes(), tls.chain.read_bytes(), tls.roots.read_bytes()
        return KeptIdentity(identity_of(chain).node, key, chain, roots)
    except (OSError, ValueError, StatusError):
        return None


async def come_back(tls: TlsFiles, kept: KeptIdentity, ask: JoinParameters, clock: Clock, tell: Tell) -> str:
    """Gets a new certificate by the key of one that has ended, and keeps it; returns the node. Repeats until the control plane answers.

    Raises the status error when the node is not let in again this way: it was away for too long, was replaced or retired.
    """
    request = inventory_pb2.JoinRequest(
        certificate_pem=kept.chain.decode(),
        certificate_request_pem=request_for(kept.key).decode(),
        addresses=ask.addresses,
        machine_id=ask.machine_id,
    )
    answer = await _joined(request, ask, clock, tell)
    await asyncio.to_thread(tls.save, _got(kept.key, answer))
    _log.info(Event.CERTIFICATE_RENEWED, ends=expiry(answer.certificate_pem.encode()).isoformat())
    return str(answer.node)


async def join(tls: TlsFiles, ask: JoinParameters, clock: Clock, tell: Tell = lambda _: None) -> str:
    """Gets a certificate by a token and keeps it; returns sites/{site}/nodes/{node}. Repeats until the control plane answers.

    `tell` is given what people should know while it waits. Raises Unauthenticated when another authority than `ask.roots` vouches
    for whoever answers, three times in a row.

    The key is kept before it is used: a token counts once, but the same key may ask again when the answer was lost. A key that this
    state directory has already is used again: a node's name belongs to its key.
    Raises the status error when the token or the node id is not accepted.
    """
    pending = tls.key.with_suffix(".pending")
    kept = kept_identity(tls)
    if kept is not None and names.last(kept.node) == ask.node_id and ask.site in ("", names.top(kept.node)):
        key, request_pem = kept.key, request_for(kept.key)
    else:
        key, request_pem = await asyncio.to_thread(_pending, pending)
    request = inventory_pb2.JoinRequest(
        token=ask.token,
        node_id=ask.node_id,
        certificate_request_pem=request_pem.decode(),
        addresses=ask.addresses,
        machine_id=ask.machine_id,
        site=ask.site,
    )
    answer = await _joined(request, ask, clock, tell)
    tls.save(_got(key, answer))
    pending.unlink(missing_ok=True)
    return str(answer.node)


async def _joined(
    request: inventory_pb2.JoinRequest, ask: JoinParameters, clock: Clock, tell: Tell
) -> inventory_pb2.JoinResponse:
    failures = 0
    async with connect(ask.target, Tls(b"", b"", ask.roots), server=ask.server) as channel:
        stub = inventory_pb2_grpc.InventoryServiceStub(channel)
        while True:
            try:
                answer: inventory_pb2.JoinResponse = await stub.Join(request, timeout=_CALL_S)
            except StatusError as error:
                if not worth_repeating(error):
                    raise
                failures += 1
                _say_why(ask.target, error, failures, tell)
            else:
                _compare_clocks(answer, clock.now(), tell)
                return answer
            await clock.sleep(_JOIN_AGAIN.pause_s(failures))


def _say_why(target: str, error: StatusError, failures: int, tell: Tell) -> None:
    """Why it has not joined yet. Raises Unauthenticated when who answers is not whom the CA vouches for."""
    if failures >= _UNTRUSTED_TRIES and _untrusted(error):
        raise Unauthenticated(
            f"{target} shows a certificate that the given CA does not vouch for; give that fleet's CA (--ca-file FILE), and look whether this "
            "machine's clock is right"
        ) from None
    now_and_then = failures in (1, 10) or failures % 100 == 0
    if now_and_then:
        tell(f"cannot join at {target} yet: {error.message}; trying again until it answers (Ctrl-C ends it)")
    level = _log.warning if now_and_then else _log.debug
    level(Event.RPC_FAILED, method="Join", reason=error.message, failures=failures)


def _compare_clocks(answer: inventory_pb2.JoinResponse, now: datetime, tell: Tell) -> None:
    if not answer.HasField("time"):
        return  # of an earlier version
    ahead_s = (now - answer.time.ToDatetime(tzinfo=UTC)).total_seconds()
    if abs(ahead_s) > CLOCK_SKEW.total_seconds():
        way = "ahead of" if ahead_s > 0 else "behind"
        tell(
            f"this machine's clock is {abs(ahead_s):.0f} s {way} the fleet's, and {CLOCK_SKEW.total_seconds():.0f} s are borne; "
            "set it (timedatectl set-ntp true)"
        )


def _got(key: bytes, answer: inventory_pb2.JoinResponse | inventory_pb2.RenewCertificateResponse) -> Tls:
    return Tls(key, answer.certificate_pem.encode(), answer.authority_pem.encode())


def _untrusted(error: StatusError) -> bool:
    said = error.metadata.get("transport", "").lower()
    return "certificate_verify_failed" in said or "handshake" in said


def _pending(path: Path) -> tuple[bytes, bytes]:
    """A key with its signing request: the one of an earlier try, or a new one."""
    if path.exists():
        key, _, request = path.read_bytes().partition(b"\n\n")
        return key, request
    key, request = new_key_and_request()
    write_private(path, key.rstrip() + b"\n\n" + request)
    return key, request


class Renewal:
    """Renews the certificate in its last third, for as long as the agent runs; by `come_back` when it has slept through the end."""

    def __init__(
        self,
        tls: TlsFiles,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        clock: Clock,
        machine_id: str,
        come_back: Callable[[KeptIdentity], Awaitable[object]],
        refused: Callable[[StatusError], None] = lambda _: None,
    ) -> None:
        """`refused` is told why this node is not let in again: no other call of its gets as far as an answer."""
        self._tls, self._stub, self._clock, self._machine_id = tls, stub, clock, machine_id
        self._come_back, self._refused = come_back, refused

    async def run(self) -> None:
        failures = 0
        while True:
            due_s = renewal_in_s(self._tls.load().chain, self._clock.now())
            if due_s > 0:
                await self._clock.sleep(min(due_s, _LOOK_EVERY_S))
                continue
            try:
                await self._once(failures)
                failures = 0
            except (StatusError, OSError) as error:  # the control plane is away, or the disk is full for now
                failures += 1
                if isinstance(error, StatusError):
                    self._refused(error)
                _log.warning(Event.RPC_FAILED, method="RenewCertificate", reason=str(error), failures=failures)
            await self._clock.sleep(_RENEW_AGAIN.pause_s(failures))

    async def _once(self, failures: int) -> None:
        """By the certificate; where that has ended, or may have by the fleet's clock, by its key."""
        ended = expiry(self._tls.load().chain) <= self._clock.now()
        if (ended or failures >= _UNTRUSTED_TRIES) and (kept := kept_identity(self._tls)) is not None:
            await self._come_back(kept)
        else:
            await self._renew()

    async def _renew(self) -> None:
        """The new key is kept until it has its certificate: a renewal whose answer was lost goes on with it."""
        pending = self._tls.key.with_suffix(".renewing")
        key, request = await asyncio.to_thread(_pending, pending)
        answer = await self._stub.RenewCertificate(
            inventory_pb2.RenewCertificateRequest(
                certificate_request_pem=request.decode(), machine_id=self._machine_id
            ),
            timeout=_CALL_S,
        )
        fresh = _got(key, answer)
        await asyncio.to_thread(self._tls.save, fresh)
        await asyncio.to_thread(pending.unlink, missing_ok=True)
        _log.info(Event.CERTIFICATE_RENEWED, ends=expiry(fresh.chain).isoformat())


def require_node(node: str, site: str, node_id: str) -> None:
    """Refuses a state directory of another node than the settings name; "" names any."""
    has_site, has_id = names.split(node, "sites", "nodes")
    if (site and site != has_site) or (node_id and node_id != has_id):
        raise InvalidArgument(
            FieldViolation(
                "state_dir",
                f"belongs to {node}; use another one for node {node_id or has_id} of site {site or has_site}",
            )
        )
