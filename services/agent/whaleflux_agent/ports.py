"""Free TCP ports for rendezvous and services, from a range that the kernel gives to nobody else."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

from whaleflux.errors import ResourceExhausted
from whaleflux.reasons import ErrorReason


def choose(first: int, last: int, taken: Collection[int], *, host: str = "") -> int:
    """A port in [first, last] that nobody listens on and that is not in `taken`.

    Raises ResourceExhausted when none is left. It is only looked up, not held: keep the range outside of net.ipv4.ip_local_port_range, from which the kernel
    serves outgoing connections and everybody who binds port 0.
    """
    ports = [port for port in range(first, last + 1) if port not in taken]
    random.shuffle(ports)
    for port in ports:
        if _free(host, port):
            return port
    raise ResourceExhausted(
        f"no free port between {first} and {last}; widen it with --first-port and --last-port,"
        " or see that --host-address is an address of this host",
        reason=ErrorReason.NO_FREE_PORT,
    )


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT does not count as taken
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
