"""Addresses as "host:port": taken apart and put together in one place, IPv6 in brackets as in URLs. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from whaleflux.errors import FieldViolation, InvalidArgument

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
# As resolvers read them: an IPv4 address, also one in hexadecimal or with parts left out ("0x7f.1" is 127.0.0.1). No name ends like this.
_NUMBERS = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.*")
_MAX_HOST_CHARACTERS = 253  # of a DNS name
_SHOWN_CHARACTERS = 80


class HostPort(NamedTuple):
    """One address; `host` is a name or an IP address without brackets, "" for all interfaces."""

    host: str
    port: int

    def __str__(self) -> str:
        return join(self.host, self.port)

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The host as an IP address, None for a name that has to be looked up."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None


def join(host: str, port: int | str) -> str:
    """The text that `parse` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse(text: str, field: str = "address", *, listening: bool = False) -> HostPort:
    """Raises InvalidArgument on `field`, saying what is wrong and what would be right.

    Where one listens, the host may be empty (all interfaces) and the port 0 (a free one).
    """
    host, colon, port = text.rpartition(":")
    if "/" in text:
        raise _invalid(field, text, "is a URL or has a path", "10.0.0.5:7000")
    if not colon:
        raise _invalid(field, text, "has no port", "10.0.0.5:7000")
    return HostPort(_host(text, host, field, listening=listening), _port(text, port, field, listening=listening))


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an IP address) is this machine and nobody else's; "" (all interfaces) is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(text: str, host: str, field: str, *, listening: bool) -> str:
    if host.startswith("[") and host.endswith("]"):
        if not _is_ip(host[1:-1], ipaddress.IPv6Address):
            raise _invalid(field, text, "has no IPv6 address between its brackets", "[::1]:7000")
        return host[1:-1]
    if ":" in host:
        raise _invalid(field, text, "has an IPv6 address without brackets", "[::1]:7000")
    if _NUMBERS.fullmatch(host) and not _is_ip(host, ipaddress.IPv4Address):
        raise _invalid(field, text, "has no valid IPv4 address", "10.0.0.5:7000")
    if len(host) > _MAX_HOST_CHARACTERS or not (_NAME.fullmatch(host) or (listening and not host)):
        raise _invalid(field, text, "has no valid host", "gpu-1.example.org:7000")
    return host


def _port(text: str, port: str, field: str, *, listening: bool) -> int:
    lowest = 0 if listening else 1
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and lowest <= int(port) <= 65535):
        raise _invalid(field, text, f"has no port from {lowest} to 65535", "10.0.0.5:7000")
    return int(port)


def _is_ip(text: str, kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _invalid(field: str, text: str, wrong: str, right: str) -> InvalidArgument:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return InvalidArgument(FieldViolation(field, f"{shown!r} {wrong}; use host:port, for example {right}"))
