"""`python -m whaleflux_agent`: joins the fleet at the first start, then runs this node's part of its work."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from whaleflux import telemetry
from whaleflux.clock import Clock, SystemClock
from whaleflux.config import load
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.rpc.pki import TlsFiles
from whaleflux.service import collect_rarely, hold_little, leave_no_core, run_service
from whaleflux_agent import identity
from whaleflux_agent.app import build
from whaleflux_agent.joining import join_parameters
from whaleflux_agent.revocation import Revocation
from whaleflux_agent.settings import Settings
from whaleflux_agent.state import exclusive

_BAD_SETTINGS = 2


def main() -> None:
    """Runs the agent until a signal; exits with 0 stopped in order, 1 a loop was lost, 2 bad settings or not admitted."""
    try:
        settings = load(Settings, sys.argv[1:])
    except InvalidArgument as wrong:
        for violation in wrong.violations:
            print(f"agent: {violation.field}: {violation.description}", file=sys.stderr)
        raise SystemExit(_BAD_SETTINGS) from None
    hold_little()
    leave_no_core()
    telemetry.setup_logging("agent", level=settings.log_level)
    telemetry.setup_tracing("agent", endpoint=settings.otlp_endpoint)
    collect_rarely()
    try:
        code = asyncio.run(run(settings))
    except StatusError as error:
        _tell(error.message)
        code = _BAD_SETTINGS
    except OSError as error:  # a folder that is none, a disk that is full
        _tell(f"{error.filename or settings.state_dir}: {error.strerror}; use another folder: --state-dir FOLDER")
        code = _BAD_SETTINGS
    telemetry.flush()
    raise SystemExit(code)


def _tell(text: str) -> None:
    """To whoever started it, beside the log."""
    print(f"agent: {text}", file=sys.stderr, flush=True)


async def run(settings: Settings) -> int:
    """Joins if need be, then serves. Raises the status error when this node is not admitted."""
    settings = settings.model_copy(update={"state_dir": settings.state_dir.resolve()})  # ranks work elsewhere
    with exclusive(settings.state_dir, tell=_tell):
        return await _run_alone(settings)


async def _run_alone(settings: Settings) -> int:
    tls = identity.files(settings.state_dir)
    clock = SystemClock()
    node = identity.known_identity(tls, clock.now()) or await _admitted(settings, tls, clock)
    identity.require_node(node, settings.site, settings.node_id)
    own = settings.model_copy(update={"tls_key": tls.key, "tls_cert": tls.chain, "tls_ca": tls.roots})
    revocation = Revocation()
    code = await run_service("agent", own, lambda ctx: build(ctx, revocation))
    if revocation.error is not None:
        raise revocation.error
    return code


async def _admitted(settings: Settings, tls: TlsFiles, clock: Clock) -> str:
    """The node, by the key of the certificate that has ended, or else by a token."""
    kept = identity.kept_identity(tls)
    if kept is not None and _is_wanted(kept, settings):
        try:
            return await identity.come_back(
                tls, kept, join_parameters(settings, _roots(settings) or kept.roots), clock, _tell
            )
        except StatusError as refused:
            if not _token(settings):
                raise
            _tell(f"{refused.message}; joining by the token")
    return await identity.join(tls, _by_token(settings), clock, _tell)


def _is_wanted(kept: identity.KeptIdentity, settings: Settings) -> bool:
    """Whether the settings want the node that was here before."""
    try:
        identity.require_node(kept.node, settings.site, settings.node_id)
    except InvalidArgument:
        return False
    return True


def _token(settings: Settings) -> str:
    if settings.join_token_file is not None:
        return _read("join_token_file", settings.join_token_file).decode().strip()
    return settings.join_token.get_secret_value()


def _by_token(settings: Settings) -> identity.JoinParameters:
    token = _token(settings)
    if not token:
        fix = "make one with `whaleflux token create --site NAME` and give it as WHALEFLUX_JOIN_TOKEN"
        raise InvalidArgument(FieldViolation("join_token", f"is needed: this node has no valid certificate; {fix}"))
    if not (roots := _roots(settings)):
        raise InvalidArgument(FieldViolation("ca_file", "is needed to join: the fleet's CA certificate, PEM"))
    return join_parameters(settings, roots, token)


def _roots(settings: Settings) -> bytes:
    """The authority that the settings name, b"" for none."""
    return b"" if settings.ca_file is None else _read("ca_file", settings.ca_file)


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(FieldViolation(field, f"cannot read {path}: {error.strerror}")) from None


if __name__ == "__main__":
    main()
