"""Host names of servers that run elsewhere, looked up here: the front door is only given addresses that it can dial, and may.

One name that cannot be looked up is that replica's trouble alone: it is left out, named and shown, and the others go on. Each answer of a
name server is judged anew (`core.allowed_networks`): a name may stand for the control plane a minute after it was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from whaleflux import hostport
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, StatusError, Unavailable
from whaleflux.hostport import HostPort
from whaleflux.reasons import ErrorReason
from whaleflux_inference_router.core.allowed_networks import AllowedNetworks, Ip, is_hidden_number

LOOKUP_S = 2.0
KNOWN_S = 30.0  # how long an answer is used before it is asked for again
LOOKUPS_AT_ONCE = 4  # each holds a thread while its name server is silent
MOST_ANSWERS = 32  # of one name

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Dialled:
    """host:port with the host as an IP address; `note` says which of its name's addresses are left out, and why."""

    address: str
    note: str = ""


class Resolver:
    """One per process. `lookup`: the IP addresses of a host name, OSError when there are none. `control`: host:port of the control plane."""

    def __init__(
        self,
        clock: Clock,
        lookup: Lookup | None = None,
        *,
        allowed: AllowedNetworks | None = None,
        control: Iterable[HostPort] = (),
    ) -> None:
        self._clock, self._lookup = clock, lookup or _lookup
        self._networks, self._control = allowed or AllowedNetworks(), tuple(control)
        self._known: dict[str, tuple[float, tuple[Ip, ...]]] = {}
        self._asking = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        literal = frozenset((own.ip, own.port) for own in self._control if own.ip is not None)
        self._current, self._until_s = replace(self._networks, control=literal), 0.0

    async def dialled(self, address: str, exempt: Collection[str] = ()) -> Dialled:
        """What is dialled for an address that a model names.

        Raises Unavailable when the name was never found, FailedPrecondition (ADDRESS_REFUSED) when all that it stands for is refused. A
        name that was found before keeps its last addresses while the name server is silent: not known is not gone.
        """
        asked = hostport.parse(address)
        allowed = await self._allowed()
        refused: list[str] = []
        for ip in await self._addresses(asked):
            if why := allowed.refusal(ip, asked.port, exempt):
                refused.append(f"{hostport.join(str(ip), asked.port)} {why}")
            else:
                return Dialled(hostport.join(str(ip), asked.port), f"left out: {'; '.join(refused)}" if refused else "")
        raise _refused(address, refused)

    def may_dial(self, address: str, exempt: Collection[str] = ()) -> bool:
        """Whether an address whose host is an IP address may be given to the front door."""
        asked = hostport.parse(address)
        return asked.ip is not None and not self._current.refusal(asked.ip, asked.port, exempt)

    async def keep_current(self) -> None:
        """Follows the names of the control plane, until cancelled."""
        while True:
            await self._allowed()
            await self._clock.sleep(KNOWN_S)

    async def _allowed(self) -> AllowedNetworks:
        """With the control plane's addresses as they are now; of a name that cannot be looked up, those that it had."""
        if self._clock.monotonic() < self._until_s:
            return self._current
        found: set[tuple[Ip, int]] = set()
        for own in self._control:
            with contextlib.suppress(StatusError):
                found.update((ip, own.port) for ip in await self._addresses(own))
        self._until_s = self._clock.monotonic() + KNOWN_S
        self._current = replace(self._networks, control=frozenset(found))
        return self._current

    async def _addresses(self, asked: HostPort) -> tuple[Ip, ...]:
        if asked.ip is not None:
            return (asked.ip,)
        host = asked.host.rstrip(".").lower()
        at_s, known = self._known.get(host, (0.0, ()))
        if known and self._clock.monotonic() - at_s < KNOWN_S:
            return known
        return await self._asked(host, asked.port, known)

    async def _asked(self, host: str, port: int, before: tuple[Ip, ...]) -> tuple[Ip, ...]:
        if is_hidden_number(host):
            raise Unavailable(
                f"{host} is a number, not a name; write an IP address as 10.0.0.5", reason=ErrorReason.HOST_UNKNOWN
            )
        try:
            async with self._asking, asyncio.timeout(LOOKUP_S):
                answers = await self._lookup(host, port)
            found = tuple(map(ipaddress.ip_address, answers[:MOST_ANSWERS]))
        except (OSError, TimeoutError, ValueError) as error:
            if not before:
                why = "its name server does not answer" if isinstance(error, TimeoutError) else str(error)
                raise Unavailable(
                    f"the host name {host} cannot be looked up: {why}", reason=ErrorReason.HOST_UNKNOWN
                ) from None
            found = before
        self._known[host] = (self._clock.monotonic(), found)
        return found

    def keep_only(self, hosts: set[str]) -> None:
        """Forgets names that no model uses any more."""
        kept = {host.rstrip(".").lower() for host in (*hosts, *(own.host for own in self._control))}
        for gone in self._known.keys() - kept:
            del self._known[gone]


def _refused(address: str, refused: Sequence[str]) -> FailedPrecondition:
    return FailedPrecondition(
        f"{address} may not be dialled: {'; '.join(refused[:4])}; use an address of the servers' own network, or let an operator allow it "
        "(whaleflux deploy --allow-address IP:PORT, or the router's setting model_networks)",
        reason=ErrorReason.ADDRESS_REFUSED,
        metadata={"address": address},
    )


async def _lookup(host: str, port: int) -> Sequence[str]:
    """IPv4 first, as the front door's other clusters do."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in addresses))
