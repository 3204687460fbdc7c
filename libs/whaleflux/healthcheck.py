"""Whether the service in this container is ready: `python -m whaleflux.healthcheck`, for engines that start a program to find out.

It asks /readyz where WHALEFLUX_METRICS_LISTEN says, on loopback. Exit code 0: ready; 1: not, with the reason on stderr.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import sys
from collections.abc import Mapping

from whaleflux import hostport

_DEADLINE_S = 3.0


def ready(listen: str) -> str:
    """Why the service that listens at `listen` is not ready; "" when it is."""
    try:
        at = hostport.parse(listen, "metrics_listen", listening=True)
        status = _status("127.0.0.1" if at.host in ("0.0.0.0", "") else "::1" if at.host == "::" else at.host, at.port)
    except Exception as error:  # whatever it is: the service did not say that it is ready
        return f"{listen}: {error}"
    return "" if status == 200 else f"{listen} answered {status}"


def _status(host: str, port: int) -> int:
    """Over TLS; plainly where the service has it switched off. Who answers on loopback needs no proof."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLError):
        return _get(http.client.HTTPSConnection(host, port, timeout=_DEADLINE_S, context=context))
    return _get(http.client.HTTPConnection(host, port, timeout=_DEADLINE_S))


def _get(connection: http.client.HTTPConnection) -> int:
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        return connection.getresponse().status


def main(environment: Mapping[str, str] = os.environ) -> None:
    """Exit code 0 or 1."""
    why = ready(environment.get("WHALEFLUX_METRICS_LISTEN", "127.0.0.1:9000"))
    if why:
        print(f"not ready: {why}", file=sys.stderr)
    raise SystemExit(1 if why else 0)


if __name__ == "__main__":
    main()
