"""Where calls go: each service, the router's policy, and the replicas that it may name."""

from __future__ import annotations

from typing import Any

from whaleflux import hostport
from whaleflux.frontdoor.model import FrontDoor
from whaleflux.frontdoor.parts import TYPE, URL, address_of, router_stream
from whaleflux.frontdoor.tls import upstream_tls
from whaleflux.rpc.roles import INFERENCE_ROUTER


def service_cluster(front: FrontDoor, role: str) -> dict[str, Any]:
    http2 = {
        TYPE: URL + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            "http2_protocol_options": {"connection_keepalive": {"interval": "5s", "timeout": "3s"}}
        },
    }
    return {
        "name": role,
        **_where(front.upstreams[role]),
        "connect_timeout": "1s",
        "load_assignment": _assignment(role, front.upstreams[role]),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "transport_socket": upstream_tls(front, role),
        "circuit_breakers": _many(),
    }  # fmt: skip


def policy_cluster(front: FrontDoor) -> dict[str, Any]:
    return {
        "name": "policy",
        **_where(front.policy),
        "connect_timeout": "0.5s",
        "circuit_breakers": _many(),
        "load_assignment": _assignment("policy", front.policy),
        "transport_socket": upstream_tls(front, INFERENCE_ROUTER, alpn="http/1.1"),
    }


def replicas_cluster() -> dict[str, Any]:
    """Every replica that the policy may name, from the router; a name that is unknown or used up gives 503, never another one."""
    nobody = {
        TYPE: URL + "envoy.extensions.load_balancing_policies.subset.v3.Subset",
        "fallback_policy": "NO_FALLBACK",
        "subset_selectors": [{"keys": ["none"]}],
        "subset_lb_policy": {
            "policies": [_policy("random", {TYPE: URL + "envoy.extensions.load_balancing_policies.random.v3.Random"})]
        },
    }
    choice = {"key": "envoy.filters.http.ext_authz", "path": [{"key": "x-gateway-destination-endpoint"}]}
    override = {
        TYPE: URL + "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": choice}],
        "fallback_policy": {"policies": [_policy("subset", nobody)]},
    }
    return {
        "name": "replicas",
        "type": "EDS",
        "circuit_breakers": _many(),
        "connect_timeout": "1s",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "initial_fetch_timeout": "1s",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [router_stream()],
                },
            }
        },
        "load_balancing_policy": {"policies": [_policy("override_host", override)]},
    }


def _policy(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"typed_extension_config": {"name": f"envoy.load_balancing_policies.{name}", "typed_config": config}}


def _many() -> dict[str, Any]:
    """Limits that no fleet reaches; what limits work is the listeners and the engines.

    A dying replica fails all of its requests at once: Envoy's default of 3 retries at a time answers the others with 503.
    """
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(limits, 65536)]}


def _where(address: str) -> dict[str, Any]:
    """Addresses are dialled as they are, names are looked up again and again."""
    return (
        {"type": "STATIC"}
        if hostport.parse(address).ip
        else {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED"}
    )


def _assignment(name: str, address: str) -> dict[str, Any]:
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address_of(address)}}]}]}
