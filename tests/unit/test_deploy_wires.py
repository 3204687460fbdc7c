"""deploy/ against the table of ports: who has a reason to dial a port can, nobody else can, and nothing is published but what may be."""

import ipaddress
import itertools
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests.support.deploy_files import DEPLOY
from whaleflux import bootstrap, ports
from whaleflux.ports import Party
from whaleflux.services import SERVICES

BASE = DEPLOY / "kubernetes" / "base"
NAMESPACE, AGENTS = "whaleflux", "whaleflux-agents"
HOSTS = [service.host for service in SERVICES]
LISTENERS = [*HOSTS, Party.FRONTDOOR, Party.ETCD, Party.NATS, Party.AGENT]


def documents(*files):
    return [d for file in files for d in yaml.safe_load_all(file.read_text()) if d]


def _policies():
    named = [(NAMESPACE, d) for d in documents(BASE / "network-policies.yaml")]
    return named + [
        (AGENTS, d) for d in documents(DEPLOY / "kubernetes" / "agent" / "agent.yaml") if d["kind"] == "NetworkPolicy"
    ]


POLICIES = _policies()


def _pod_labels():
    found = {}
    for file in [*BASE.glob("*.yaml"), DEPLOY / "kubernetes" / "agent" / "agent.yaml"]:
        for d in documents(file):
            if d["kind"] in ("Deployment", "StatefulSet", "DaemonSet") and d["metadata"]["name"] != "any":
                found[d["metadata"]["name"]] = d["spec"]["template"]["metadata"]["labels"]
    return found


LABELS = _pod_labels()
NAMESPACES = {NAMESPACE: {}, AGENTS: {}, "monitoring": {"whaleflux.dev/scrapes": "true"}, "elsewhere": {}}
PLACES = {  # party -> (namespace, labels of its pod), or an address outside of the cluster
    **{host: (NAMESPACE, LABELS[host]) for host in (*HOSTS, Party.FRONTDOOR, Party.ETCD, Party.NATS)},
    Party.AGENT: (AGENTS, LABELS["agent"]),
    Party.SCRAPER: ("monitoring", {"app": "prometheus"}),
    Party.OUTSIDE: "203.0.113.7",
    Party.SITE_NATS: "203.0.113.8",
    "a-stranger-s-pod": ("elsewhere", {"app.kubernetes.io/name": "etcd", "app.kubernetes.io/component": "service"}),
}


def matches(selector, labels):
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    told = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in told)
    return exact and all(labels.get(e["key"]) in e["values"] for e in told)


def is_peer(peer, place, own_namespace):
    if "ipBlock" in peer:
        return isinstance(place, str) and ipaddress.ip_address(place) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    if isinstance(place, str):
        return False
    namespace, labels = place
    if "namespaceSelector" in peer:
        here = matches(peer["namespaceSelector"], NAMESPACES[namespace] | {"kubernetes.io/metadata.name": namespace})
    else:
        here = namespace == own_namespace
    return here and matches(peer.get("podSelector", {}), labels)


def opens(rule, way, place, number, own_namespace):
    told = rule.get("ports")
    port = not told or any(
        t.get("protocol", "TCP") == "TCP" and t["port"] <= number <= t.get("endPort", t["port"]) for t in told
    )
    return port and (way not in rule or any(is_peer(peer, place, own_namespace) for peer in rule[way]))


def lets(place, direction, other, number):
    """Whether the policies of the pod at `place` let this way through; where none is about it, everything is."""
    if isinstance(place, str):
        return True
    namespace, labels = place
    about = [
        p["spec"]
        for where, p in POLICIES
        if where == namespace and direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], labels)
    ]
    key, way = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return not about or any(opens(rule, way, other, number, namespace) for p in about for rule in p.get(key, []))


def reaches(dialer, listener, number):
    there, here = PLACES[listener], PLACES[dialer]
    return lets(here, "Egress", there, number) and lets(there, "Ingress", here, number)


def parties(names):
    return {host for name in names for host in (HOSTS if name == Party.SERVICE else [name])}


def told(listener):
    """Number -> who may dial it, from the table; a number that nobody listens at among them."""
    return {port.number: parties(port.dialers) for port in ports.of(listener)} | {12345: set()}


@pytest.mark.parametrize("listener", LISTENERS)
def test_network_policies_let_through_what_the_table_says_and_nothing_else(listener):
    tried = [(dialer, number, dialers) for number, dialers in told(listener).items() for dialer in PLACES]
    # Who comes from addresses that nobody knows beforehand is let in with everybody, and shows who it is.
    exact = [
        (d, n, dialers) for d, n, dialers in tried if d in dialers or not dialers & {Party.OUTSIDE, Party.SITE_NATS}
    ]
    wrong = [f"{d} -> {listener}:{n}" for d, n, dialers in exact if reaches(d, listener, n) != (d in dialers)]
    assert wrong == []
    assert len(exact) > len(PLACES)


def test_what_reaches_nodes_reaches_engines_at_any_other_port():
    for dialer in (*(s.host for s in SERVICES if s.reaches_nodes), Party.FRONTDOOR):
        assert all(
            lets(PLACES[dialer], "Egress", "198.51.100.1", number) for number in (80, 443, 8000, 8080, 20000, 65535)
        )
    assert not lets(PLACES["scheduler"], "Egress", "198.51.100.1", 20000)


def test_a_service_of_kubernetes_leads_to_ports_of_the_table_that_others_may_dial():
    services = [d for d in documents(*BASE.glob("*.yaml")) if d["kind"] == "Service"]
    assert len(services) > len(HOSTS)
    for d in services:
        listener = d["spec"]["selector"]["app.kubernetes.io/name"]
        known = {port.number for port in ports.of(listener) if not port.loopback}
        assert {port["port"] for port in d["spec"]["ports"]} <= known, d["metadata"]["name"]


COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
CONTAINERS = {  # containers of a party
    **{host: {host} for host in HOSTS},
    Party.FRONTDOOR: {"frontdoor"},
    Party.AGENT: {"agent-1", "agent-2"},
    Party.ETCD: {"etcd"},
    Party.NATS: {"nats"},
    Party.SITE_NATS: {"nats-site-a"},
    Party.SCRAPER: {"prometheus"},
    Party.OUTSIDE: {"cli", "tokens"},
}
# Beside them without a reason to dial; services and agents answer nobody there who shows no certificate.
BESIDE = {
    **{host: {"prometheus", "jaeger", "nats", "etcd"} for host in HOSTS},
    **{s.host: {"prometheus", "jaeger", "nats", "etcd", "agent-1", "agent-2", "cli", "tokens"} for s in SERVICES if s.reaches_nodes},
    Party.FRONTDOOR: {*HOSTS, "prometheus", "jaeger"},
    Party.AGENT: {"frontdoor", "prometheus", "jaeger", "cli", "tokens"},
    Party.NATS: {"nats-site-a"},  # a site's server is beside the clients' port too, with a certificate of the other authority
}  # fmt: skip


class TestCompose:
    """On one network everything reaches everything: so who shares one with a listener has to have a reason, or shows who it is."""

    def containers(self, names):
        return set().union(*(CONTAINERS.get(party, set()) for party in parties(names)))

    def networks(self, container):
        service = COMPOSE["services"][container]
        return set() if service.get("network_mode") == "none" else set(service["networks"])

    def beside(self, container):
        mine = self.networks(container)
        return {other for other in COMPOSE["services"] if other != container and self.networks(other) & mine}

    @pytest.mark.parametrize("listener", LISTENERS)
    def test_who_has_a_reason_is_beside_it_and_who_else_is_is_known(self, listener):
        reasons = self.containers(itertools.chain(*(port.dialers for port in ports.of(listener))))
        for container in CONTAINERS[listener]:
            beside = self.beside(container)
            assert reasons - {container} <= beside
            assert beside - reasons <= BESIDE.get(listener, set()), "has no reason to dial it: take it off the network"

    def test_the_store_has_nobody_beside_it_but_services(self):
        assert self.beside("etcd") == set(HOSTS)

    def test_the_policy_is_bound_where_the_front_door_alone_is(self):
        router = COMPOSE["services"]["inference-router"]
        host, _, number = router["environment"]["WHALEFLUX_POLICY_LISTEN"].partition(":")
        assert int(number) == ports.number("inference-router", "policy")
        assert router["networks"]["policy"]["aliases"] == [host]
        on_it = {name for name in COMPOSE["services"] if "policy" in self.networks(name)}
        assert on_it == {"inference-router", "frontdoor"}

    def test_what_is_published_is_for_the_outside(self):
        known = {str(port.number) for port in ports.of(Party.FRONTDOOR) if Party.OUTSIDE in port.dialers}
        published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
        assert {told.rpartition(":")[2] for told in published.pop("frontdoor")} == known
        assert set(published) == {"jaeger", "prometheus", "grafana"}  # for who sits at this machine
        assert all(told.startswith("127.0.0.1:") for all_told in published.values() for told in all_told)

    def test_networks_of_the_control_plane_lead_nowhere_else(self):
        internal = {name for name, network in COMPOSE["networks"].items() if (network or {}).get("internal")}
        assert internal == {"store", "bus", "policy", "site-a", "control"}


def addresses(files):
    """Every address with a scheme in what processes are told: settings, flags, configurations."""
    for file in files:
        text = re.sub(r"(^|\s)#.*$", "", file.read_text(), flags=re.MULTILINE)
        yield from ((file.name, found) for found in re.findall(r"\b(?:https?|nats|tls)://[^\s\"',}]+", text))


def test_nothing_is_plain_but_on_loopback():
    """Traces alone go as the collector's address says: they hold no secrets, and the collector is not ours."""
    folders = (DEPLOY / "compose", DEPLOY / "kubernetes", DEPLOY / "nats")
    found = list(addresses([file for folder in folders for file in folder.rglob("*.*") if file.is_file()]))
    assert len(found) > 20
    plain = {(name, at) for name, at in found if at.startswith(("http://", "nats://"))}
    beyond = {(name, at) for name, at in plain if "//127.0.0.1" not in at}
    assert {at.rpartition(":")[2] for _, at in beyond} == {"4317"}


def test_both_deployments_say_the_same_of_the_wires():
    compose = COMPOSE["x-settings"]
    settings = documents(BASE / "settings.yaml")[0]["data"]
    wires = ("STORE", "NATS", "TLS_CERT", "TLS_KEY", "TLS_CA", "STORE_CERT", "STORE_KEY", "STORE_CA")
    told = {name: compose[f"WHALEFLUX_{name}"] for name in wires}
    assert told == {name: settings[f"WHALEFLUX_{name}"] for name in wires}
    assert (told["STORE"], told["NATS"]) == ("https://etcd:2379", "tls://nats:4222")


def test_services_find_what_bootstrap_writes(tmp_path):
    bootstrap.write_identities(tmp_path, datetime(2026, 1, 1, tzinfo=UTC), hosts=["h"], life=timedelta(days=1))
    for service in SERVICES:
        names = {path.name for path in (tmp_path / service.role).iterdir()}
        told = {Path(value).name for name, value in COMPOSE["x-settings"].items() if value.startswith("/identity/")}
        assert told == names
