"""Every port of a fleet: who listens, who dials, and what each shows the other. One table.

docs/guide/wires.md is made from it, and the network policies, published ports and probes of deploy/ are compared with it by tests.
Two authorities sign what is shown: the fleet's (services, agents, people), and the store's, which signs for etcd, NATS and the
services alone, so that what admits a node or a person opens nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from whaleflux.services import FRONTDOOR_GRPC_PORT, FRONTDOOR_HTTP_PORT, GRPC_PORT, METRICS_PORT, SERVICES


class Party(StrEnum):
    """Who listens or dials, beside the services, which are named by their host."""

    SERVICE = "service"  # each service of the control plane
    FRONTDOOR = "frontdoor"
    AGENT = "agent"
    ETCD = "etcd"
    NATS = "nats"
    SITE_NATS = "site-nats"  # a site's own event server, outside of the control plane
    SCRAPER = "scraper"  # Prometheus, or whatever reads metrics
    OUTSIDE = "outside"  # people, their programs and agents, from wherever they are
    ITSELF = "itself"  # programs on the same host or in the same pod


class Proof(StrEnum):
    """What a dialler shows before anything is answered."""

    FLEET = "a certificate of the fleet's authority"
    FLEET_OR_NONE = "a certificate of the fleet's authority; only joining and logging in need none"
    STORE = "a certificate of the store's authority"
    KEY = "an API key, over TLS"
    METRICS = (
        "a certificate of the fleet's authority for /metrics; nothing for /healthz and /readyz, which tell nothing else"
    )
    LOOPBACK = "nothing: it listens on loopback alone"


@dataclass(frozen=True, slots=True)
class Port:
    """One port of one kind of listener, where it has a host of its own."""

    number: int
    name: str  # as containers, Services and `ports.json` call it
    listener: str  # a Party, or the host of one service
    dialers: tuple[str, ...]  # Parties, or hosts of services; nobody else has a reason to
    carries: str
    proof: Proof

    @property
    def loopback(self) -> bool:
        """Whether it is reached from its own host or pod alone: published by nobody, named in no network policy."""
        return self.proof is Proof.LOOPBACK


def _policy_ports() -> Iterator[Port]:
    for service in SERVICES:
        for setting, number in service.http.items():
            carries = "the routing policy: HTTP over mTLS, asked for each inference request"
            yield Port(number, setting.removesuffix("_listen"), service.host, (Party.FRONTDOOR,), carries, Proof.FLEET)


PORTS: tuple[Port, ...] = (
    Port(
        FRONTDOOR_GRPC_PORT,
        "grpc",
        Party.FRONTDOOR,
        (Party.OUTSIDE, Party.AGENT),
        "gRPC over TLS: command line, SDK, agents",
        Proof.FLEET_OR_NONE,
    ),
    Port(FRONTDOOR_HTTP_PORT, "http", Party.FRONTDOOR, (Party.OUTSIDE,), "the inference API over TLS", Proof.KEY),
    Port(9901, "admin", Party.FRONTDOOR, (Party.ITSELF,), "Envoy's own figures", Proof.LOOPBACK),
    Port(
        GRPC_PORT,
        "grpc",
        Party.SERVICE,
        (Party.SERVICE, Party.FRONTDOOR),
        "gRPC over mTLS; also Envoy's discovery and access log at the router",
        Proof.FLEET,
    ),
    *_policy_ports(),
    Port(METRICS_PORT, "metrics", Party.SERVICE, (Party.SCRAPER,), "figures and probes over TLS", Proof.METRICS),
    Port(
        GRPC_PORT,
        "grpc",
        Party.AGENT,
        (Party.AGENT, *(s.host for s in SERVICES if s.reaches_nodes)),
        "gRPC over mTLS: probes of silent nodes, rendezvous",
        Proof.FLEET,
    ),
    Port(METRICS_PORT, "metrics", Party.AGENT, (Party.SCRAPER,), "figures and probes over TLS", Proof.METRICS),
    Port(2379, "client", Party.ETCD, (Party.SERVICE, Party.ETCD), "etcd's gRPC over mTLS", Proof.STORE),
    Port(2380, "peer", Party.ETCD, (Party.ETCD,), "etcd's members among themselves, mTLS", Proof.STORE),
    Port(2381, "metrics", Party.ETCD, (Party.ITSELF,), "etcd's probes (/livez, /readyz) and figures", Proof.LOOPBACK),
    Port(
        4222,
        "client",
        Party.NATS,
        (Party.SERVICE,),
        "NATS over mTLS; the certificate says which user, and a user has its own subjects",
        Proof.STORE,
    ),
    Port(
        7422,
        "leaf",
        Party.NATS,
        (Party.SITE_NATS,),
        "sites' event servers over mTLS; each may touch its own site's subjects alone",
        Proof.FLEET,
    ),
    Port(8222, "monitor", Party.NATS, (Party.ITSELF,), "NATS' probes (/healthz) and figures", Proof.LOOPBACK),
)


def number(listener: str, name: str) -> int:
    """The port `name` of a listener; KeyError for one that it has not."""
    return {port.name: port.number for port in of(listener)}[name]


def of(listener: str) -> tuple[Port, ...]:
    """The ports of a listener; of a service, those that every service has too."""
    hosts = {service.host for service in SERVICES}
    mine = {listener, Party.SERVICE} if listener in hosts else {listener}
    return tuple(port for port in PORTS if port.listener in mine)


def table() -> str:
    """The table as Markdown."""
    lines = ["| port | of | dialled by | carries | the dialler shows |", "|---|---|---|---|---|"]
    for port in PORTS:
        dialers = ", ".join(port.dialers)
        lines.append(f"| {port.number} `{port.name}` | {port.listener} | {dialers} | {port.carries} | {port.proof} |")
    return "\n".join(lines) + "\n"
