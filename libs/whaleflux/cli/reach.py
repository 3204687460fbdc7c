"""Whether the fleet's front door can be spoken with, told at once and in words.

gRPC would dial again and again for seconds, and write lines of its own about a failed handshake to stderr.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from whaleflux import hostport
from whaleflux.context import Context
from whaleflux.contexts import is_state
from whaleflux.errors import Unauthenticated, Unavailable
from whaleflux.reasons import ErrorReason

WITHIN_S = 3.0  # to connect, and again to shake hands


def check_known(explicit: str, within_s: float = WITHIN_S) -> None:
    """`check` of the fleet that a name, a variable or this folder means; of one that a token has yet to log in to, nothing."""
    from whaleflux.login.current import known

    if (context := known(explicit)) is not None:
        check(context, within_s)


def check(context: Context, within_s: float = WITHIN_S) -> None:
    """Connects once and throws the connection away; each of its two steps may take `within_s`.

    Raises Unavailable when nobody answers at `context.server`, Unauthenticated when another authority than
    `context.ca` vouches for whoever does, InvalidArgument when the address is none.
    """
    address = hostport.parse(context.server, "context.server")
    trust = ssl.create_default_context(cafile=context.ca)
    trust.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(address, within_s) as plain:
            plain.settimeout(within_s)
            with trust.wrap_socket(plain, server_hostname=context.server_name):
                pass
    except ssl.SSLCertVerificationError as wrong:
        raise Unauthenticated(
            f"{context.server} shows a certificate that {context.ca} does not vouch for ({wrong.verify_message}); "
            "use the context file of that fleet",
            reason=ErrorReason.IDENTITY_MISSING,
        ) from None
    except OSError as error:
        raise Unavailable(
            f"the fleet at {context.server} {_said(error, within_s)}{_not_running(context)}",
            reason=ErrorReason.SERVER_UNREACHABLE,
        ) from None


def check_certificate(context: Context) -> None:
    """Raises Unauthenticated when what is shown there is not valid now, by this machine's clock."""
    from datetime import UTC, datetime

    from cryptography import x509

    shown = x509.load_pem_x509_certificate(Path(context.cert).read_bytes())
    begins, ends, now = shown.not_valid_before_utc, shown.not_valid_after_utc, datetime.now(UTC)
    if begins <= now <= ends:
        return
    when = f"ended at {ends:%Y-%m-%d %H:%M}" if ends < now else f"begins at {begins:%Y-%m-%d %H:%M}"
    raise Unauthenticated(
        f"the certificate {context.cert} {when} UTC, and the clock here says {now:%Y-%m-%d %H:%M}; have it made anew where it "
        "came from (whaleflux up does that as it starts), or set the clock",
        reason=ErrorReason.IDENTITY_MISSING,
    )


def _said(error: OSError, within_s: float) -> str:
    match error:
        case ConnectionRefusedError():
            return "refuses the connection"
        case TimeoutError():
            return f"did not answer within {within_s:g} s"
        case socket.gaierror():
            return "has a name that is not known here"
        case _:
            return f"cannot be reached ({error.strerror or error})"


def _not_running(context: Context) -> str:
    """Of a fleet of this machine whose suite does not run: how to start it again."""
    state = Path(context.ca).parent.parent
    if not is_state(state):
        return ""
    from whaleflux.embedded.layout import Layout, running_pid

    if running_pid(Layout(state)) is not None:
        return ""
    return f": it does not run; start it with: whaleflux up --state {state}, or choose another with: whaleflux config use NAME"
