"""Where requests may be sent: which addresses a model may name, and which the front door is told. Pure.

Whoever declares a model makes the router and the front door dial for them. So an address is judged as an IP address and a port, once it is
known which one is dialled: what a name says today and tomorrow is two things.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from whaleflux import hostport
from whaleflux.errors import FieldViolation, InvalidArgument

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ORDINARY = "ordinary"  # the word of the setting for every address that is none of `_SPECIAL`
MOST_NETWORKS = 256

_SPECIAL: tuple[tuple[str, tuple[str, ...]], ...] = (  # IANA's registries of special-purpose addresses, RFC 6890
    ("loopback", ("127.0.0.0/8", "::1/128")),
    ("unspecified", ("0.0.0.0/8", "::/128")),
    ("link-local", ("169.254.0.0/16", "fe80::/10", "fec0::/10")),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    ("reserved", ("240.0.0.0/4", "192.0.0.0/24", "::/96", "100::/64")),
)
_METADATA = frozenset(  # where clouds hand out credentials to whoever asks: AWS, Alibaba, Azure, Oracle, Google
    map(ipaddress.ip_address, (
        "169.254.169.254", "fd00:ec2::254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd20:ce::254",
    ))
)  # fmt: skip
_SPECIAL_NETWORKS = tuple((kind, tuple(map(ipaddress.ip_network, of))) for kind, of in _SPECIAL)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class AllowedNetworks:
    """`networks` and, with `ordinary`, all that is not special. `control`: IP addresses and ports of the control plane itself."""

    networks: tuple[Network, ...] = ()
    ordinary: bool = True
    control: frozenset[tuple[Ip, int]] = field(default_factory=frozenset)

    def refusal(self, ip: Ip, port: int, exempt: Collection[str] = ()) -> str:
        """Why this is not dialled; "" when it may be. `exempt`: ip:port that an operator has allowed for the model."""
        meant = inner(ip)
        if hostport.join(str(meant), port) in exempt:
            return ""
        if self._is_control(meant, port):
            return "is the control plane's own"
        if meant in _METADATA and not any(meant in net and net.num_addresses == 1 for net in self.networks):
            return "is a cloud's metadata service"
        if any(meant in net for net in self.networks):
            return ""
        if kind := _special(meant):
            return f"is {kind}"
        return "" if self.ordinary else "is in none of the networks that models may use"

    def _is_control(self, ip: Ip, port: int) -> bool:
        """What listens on a loopback address is reached by any of them, often enough."""
        if (ip, port) in self.control:
            return True
        here = ("loopback", "unspecified")
        return _special(ip) in here and any(p == port and _special(own) in here for own, p in self.control)


def inner(ip: Ip) -> Ip:
    """The IPv4 address that an IPv6 address stands for (mapped, 6to4, Teredo, NAT64), else itself, without a zone."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ipaddress.IPv6Address(int(ip))


def _special(ip: Ip) -> str:
    return next((kind for kind, networks in _SPECIAL_NETWORKS if any(ip in network for network in networks)), "")


def parse(text: str, field_name: str = "model_networks") -> AllowedNetworks:
    """A setting: networks as CIDR and the word "ordinary", comma separated. Raises InvalidArgument naming what is none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    networks, wrong = [], []
    for word in words[:MOST_NETWORKS]:
        if word == ORDINARY:
            continue
        try:
            networks.append(ipaddress.ip_network(word))
        except ValueError as error:
            wrong.append(f"{word[:60]!r} is no network ({error})")
    if len(words) > MOST_NETWORKS:
        wrong.append(f"{len(words)} networks; use at most {MOST_NETWORKS}")
    if wrong:
        raise InvalidArgument(FieldViolation(field_name, f"{'; '.join(wrong)}; write {ORDINARY},10.20.0.0/16"))
    return AllowedNetworks(tuple(networks), ORDINARY in words)


def exemptions(addresses: Iterable[str], field_name: str) -> tuple[str, ...]:
    """What an operator allows a model beside the networks: ip:port each, as `AllowedNetworks.refusal` compares them.

    Names are refused: they may stand for something else tomorrow.
    """
    found, wrong = [], []
    for number, text in enumerate(addresses):
        asked = hostport.parse(text, f"{field_name}[{number}]")
        if asked.ip is None:
            wrong.append(
                FieldViolation(
                    f"{field_name}[{number}]", f"{text[:80]!r} is a name; allow the IP address and port that it has"
                )
            )
        else:
            found.append(hostport.join(str(inner(asked.ip)), asked.port))
    if wrong:
        raise InvalidArgument(wrong)
    return tuple(dict.fromkeys(found))


def is_hidden_number(host: str) -> bool:
    """Whether a host that is no IP address would be read as one all the same: 2130706433, 0x7f.1, 127.1 (as WHATWG's URL says)."""
    last = host.rstrip(".").rpartition(".")[2].lower()
    return last.isdecimal() or last.startswith("0x")
