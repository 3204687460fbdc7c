"""Where the OpenAI API is served: a client's headers are stripped, the key asked for, then the policy, replicas tried in its order.

The key comes first, by the headers alone: without a valid one no byte of a body is kept. Who shows none, or what cannot be one, is refused
here: a flood of those costs the router a line of the access log each, from which it writes its audit trail.
"""

from __future__ import annotations

import json
from typing import Any

from whaleflux import hostport
from whaleflux.frontdoor.bounds import connection_bounds, connection_limit, header_bounds, http2, seconds
from whaleflux.frontdoor.headers import CLIENT_ADDRESS, http_headers
from whaleflux.frontdoor.http_paths import HTTP_PATHS, MALFORMED_KEY, NO_KEY, NO_SUCH_PATH, HttpPath
from whaleflux.frontdoor.model import (
    KEY_ADVICE,
    KEY_NEEDED,
    KEY_PATTERN,
    KEY_PREFIX,
    MAX_BODY_BYTES,
    NO_REPLICA_STATUS,
    FrontDoor,
)
from whaleflux.frontdoor.parts import (
    TYPE,
    URL,
    address_of,
    connection_manager,
    network_filter,
    router_filter,
    router_stream,
)
from whaleflux.frontdoor.tls import public_tls

_KEY_FILTER, _POLICY_FILTER = (
    "whaleflux.key",
    "envoy.filters.http.ext_authz",
)  # the latter names the metadata that replicas are chosen by


def http_listener(front: FrontDoor) -> dict[str, Any]:
    retry = {
        # All of it before the first byte of the answer; each attempt goes to the next name of the ranking. An attempt that had
        # begun is repeated only where the policy says so (x-envoy-retry-on: reset), and then it names one replica more, not three:
        # a request that ends its engine would else end all of them.
        "retry_on": "connect-failure,refused-stream,reset-before-request,retriable-status-codes",
        "retriable_status_codes": [503],  # how an engine says that it has not begun: loading, or full
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.005s"},
    }
    routes = [_refusing(row, *why) for row in HTTP_PATHS if row.who == "app" for why in _NO_KEY]
    routes += [_route(row, retry) for row in HTTP_PATHS]
    routes.append(
        {
            "name": NO_SUCH_PATH,
            "match": {"prefix": "/"},
            **_refusal(404, "invalid_request_error", "the API is under /v1"),
        }
    )
    limits = front.limits
    manager = {
        **connection_manager("http", routes, limits),
        "stream_idle_timeout": "600s",
        "request_timeout": seconds(
            limits.upload_s
        ),  # until the last byte of a body; the answer may take as long as it takes
        "common_http_protocol_options": {
            **header_bounds(limits),
            "idle_timeout": seconds(limits.idle_connection_s),
            "max_connection_duration": seconds(limits.connection_s),
        },
        "http2_protocol_options": http2(limits.http_streams),
        # What the policy judged is what an engine gets: no detours to paths beside the API.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "access_log": [_record_log("request")],
        "http_filters": [http_headers(), _key(), _authorise(), router_filter(upstream_log=[_failed_attempts_log()])],
        "local_reply_config": _openai_errors(),
    }
    return {
        "name": "http",
        "address": address_of(hostport.join(front.listen_host, front.http_port)),
        **connection_bounds(limits),
        "filter_chains": [
            {
                "filters": [connection_limit("http", limits.http_connections), network_filter(manager)],
                **public_tls(front),
            }
        ],
    }


def _route(row: HttpPath, retry: dict[str, Any]) -> dict[str, Any]:
    """One row of the table as a route."""
    made: dict[str, Any] = {"name": f"{row.method} {row.path}", "match": _match(row)}
    if row.engines:
        # A key opens the whole API; neither it nor who sent it is any business of the one engine that answers.
        made["route"] = {"cluster": "replicas", "timeout": "0s", "retry_policy": retry}
        made["request_headers_to_remove"] = ["authorization", CLIENT_ADDRESS, "x-forwarded-for"]
        return made
    made["typed_per_filter_config"] = _without(_KEY_FILTER, _POLICY_FILTER)
    if row.who == "anyone":
        return made | {"direct_response": {"status": 200, "body": {"inline_string": "ok\n"}}}
    return made | {"route": {"cluster": "policy", "timeout": "5s"}}  # the policy asks for the key and answers by itself


_NO_KEY: tuple[tuple[str, dict[str, Any]], ...] = (
    (NO_KEY, {"present_match": False}),
    (
        MALFORMED_KEY,
        {"string_match": {"safe_regex": {"regex": f"(?i:bearer) +{KEY_PATTERN} *"}}, "invert_match": True},
    ),
)


def _refusing(row: HttpPath, name: str, matched: dict[str, Any]) -> dict[str, Any]:
    """The answer to a row's requests whose header `authorization` cannot hold a key, for as long as the runtime says that one is needed."""
    match = _match(row, {"name": "authorization", **matched})
    always = {"default_value": {"numerator": 100}, "runtime_key": KEY_NEEDED}
    return {
        "name": name,
        "match": {**match, "runtime_fraction": always},
        **_refusal(401, "authentication_error", KEY_ADVICE),
    }


def _match(row: HttpPath, *headers: dict[str, Any]) -> dict[str, Any]:
    return {"path_separated_prefix" if row.below else "path": row.path, "headers": [_method(row.method), *headers]}


def _key() -> dict[str, Any]:
    """Whose request is it? Asked by the headers alone, before any of the body is read into memory."""
    asked = _authz(KEY_PREFIX, ("authorization", CLIENT_ADDRESS), {"allowed_client_headers": _FOR_CLIENTS})
    return {"name": _KEY_FILTER, "typed_config": asked}


def _authorise() -> dict[str, Any]:
    """Where may it go? Asked with the whole body."""
    answer = {
        # The id goes to the replica, for its log and for the records of attempts; the ranking stays here.
        "allowed_upstream_headers": _exactly("x-wf-decision-id", "x-envoy-retry-on"),
        "allowed_client_headers": _FOR_CLIENTS,
        "dynamic_metadata_from_headers": {
            "patterns": [{"exact": "x-gateway-destination-endpoint"}, {"prefix": "x-wf-"}]
        },
    }
    asked = _authz("", ("authorization", "content-type", "content-encoding", CLIENT_ADDRESS), answer)
    whole = {"max_request_bytes": MAX_BODY_BYTES, "allow_partial_message": False, "pack_as_bytes": True}
    return {"name": _POLICY_FILTER, "typed_config": {**asked, "with_request_body": whole}}


def _authz(prefix: str, headers: tuple[str, ...], answer: dict[str, Any]) -> dict[str, Any]:
    server = {"uri": "http://policy", "cluster": "policy", "timeout": "2s"}
    return {
        TYPE: URL + "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "failure_mode_allow": False,
        "status_on_error": {"code": "ServiceUnavailable"},
        "allowed_headers": _exactly(*headers),
        "http_service": {"server_uri": server, "path_prefix": prefix, "authorization_response": answer},
    }


def _exactly(*names: str) -> dict[str, Any]:
    return {"patterns": [{"exact": name} for name in names]}


_FOR_CLIENTS = _exactly("content-type", "retry-after")


def _without(*filters: str) -> dict[str, Any]:
    off = {TYPE: URL + "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", "disabled": True}
    return dict.fromkeys(filters, off)


def _record_log(name: str) -> dict[str, Any]:
    return {
        "name": "envoy.access_loggers.http_grpc",
        "typed_config": {
            TYPE: URL + "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "additional_request_headers_to_log": ["x-wf-decision-id"],
            "common_config": {
                "log_name": name,
                "transport_api_version": "V3",
                "grpc_service": router_stream(),
                "buffer_flush_interval": "0.05s",  # the default of 1 s would keep load that is gone
                "buffer_size_bytes": 16384,
            },
        },
    }


def _failed_attempts_log() -> dict[str, Any]:
    """One record per failed attempt, so that the replica that failed is named too."""
    flags = {"response_flag_filter": {"flags": ["UF", "UC", "UR", "UH", "UT", "UPE"]}}
    return {**_record_log("attempt"), "filter": {"or_filter": {"filters": [flags, _status("GE", 500)]}}}


def _openai_errors() -> dict[str, Any]:
    """What Envoy itself answers looks like any other error of the API, and says what to do."""
    cases = (
        (408, "invalid_request_error", "the request did not arrive in time; send it faster, or less at a time"),
        (413, "invalid_request_error", f"the request has more than {MAX_BODY_BYTES} bytes; send less at a time"),
        (503, "server_error", "no replica could answer at this moment; try again in a second"),
        (504, "server_error", "no replica answered in time; try again"),
    )
    own = [
        {
            "filter": _status("EQ", status),
            "body_format_override": {
                "json_format": {"error": {"message": message, "type": kind, "code": status}},
                "content_type": "application/json",
            },
        }
        for status, kind, message in cases
    ]
    return {"mappers": [{"filter": _status("EQ", NO_REPLICA_STATUS), "status_code": 503}, *own]}


def _status(comparison: str, status: int) -> dict[str, Any]:
    value = {"default_value": status, "runtime_key": "none"}
    return {"status_code_filter": {"comparison": {"op": comparison, "value": value}}}


def _method(name: str) -> dict[str, Any]:
    return {"name": ":method", "string_match": {"exact": name}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _refusal(status: int, kind: str, message: str) -> dict[str, Any]:
    """What a route answers by itself, in the API's format."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return {
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body) + "\n"}},
        "response_headers_to_add": [_header("content-type", "application/json")],
        "typed_per_filter_config": _without(_KEY_FILTER, _POLICY_FILTER),
    }
