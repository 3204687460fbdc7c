"""`python -m whaleflux_agent`: joins the fleet at the first start, then runs this node's part of its work."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from whaleflux import telemetry
from whaleflux.clock import SystemClock
from whaleflux.config import load
from whaleflux.errors import FieldViolation, Invalid, Refusal
from whaleflux.rpc.pki import server_name
from whaleflux.service import run_service
from whaleflux_agent import identity
from whaleflux_agent.app import build
from whaleflux_agent.config import AgentSettings
from whaleflux_agent.state import exclusive

_BAD_SETTINGS = 2


def main() -> None:
    """Runs the agent until a signal; exits with 0 stopped in order, 1 a loop was lost, 2 bad settings or not admitted."""
    try:
        settings = load(AgentSettings, sys.argv[1:])
    except Invalid as wrong:
        for violation in wrong.violations:
            print(f"agent: {violation.field}: {violation.description}", file=sys.stderr)
        raise SystemExit(_BAD_SETTINGS) from None
    telemetry.setup_logging("agent", level=settings.log_level)
    telemetry.setup_tracing("agent", endpoint=settings.otlp_endpoint)
    try:
        code = asyncio.run(run(settings))
    except Refusal as refusal:
        print(f"agent: {refusal.message}", file=sys.stderr)
        code = _BAD_SETTINGS
    telemetry.flush()
    raise SystemExit(code)


async def run(settings: AgentSettings) -> int:
    """Joins if need be, then serves. Raises the refusal when this node is not admitted."""
    settings = settings.model_copy(update={"state_dir": settings.state_dir.resolve()})  # ranks work elsewhere
    with exclusive(settings.state_dir):
        return await _run_alone(settings)


async def _run_alone(settings: AgentSettings) -> int:
    tls = identity.files(settings.state_dir)
    clock = SystemClock()
    node = identity.known_identity(tls, clock.now())
    if not node:
        node = await identity.join(tls, _asked(settings), clock)
    identity.require_node(node, settings.site, settings.node_id)
    own = settings.model_copy(update={"tls_key": tls.key, "tls_cert": tls.chain, "tls_ca": tls.roots})
    return await run_service("agent", own, build)


def _asked(settings: AgentSettings) -> identity.JoinAs:
    token = settings.join_token.get_secret_value()
    if settings.join_token_file is not None:
        token = _read("join_token_file", settings.join_token_file).decode().strip()
    if not token:
        fix = "make one with `whaleflux token create --site NAME` and give it as WHALEFLUX_JOIN_TOKEN"
        raise Invalid(FieldViolation("join_token", f"is needed: this node has no valid certificate; {fix}"))
    if settings.ca_file is None:
        raise Invalid(FieldViolation("ca_file", "is needed to join: the fleet's CA certificate, PEM"))
    direct = bool(settings.inventory)
    return identity.JoinAs(
        target=settings.inventory or settings.server,
        server=server_name("inventory", trust_domain=settings.trust_domain) if direct else settings.server_name,
        roots=_read("ca_file", settings.ca_file),
        token=token,
        node_id=settings.own_id,
        addresses=(settings.address_for_ranks(),),
    )


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Invalid(FieldViolation(field, f"cannot read {path}: {error.strerror}")) from None


if __name__ == "__main__":
    main()
