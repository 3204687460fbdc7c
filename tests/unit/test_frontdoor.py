"""The front door's tables, and what Envoy is told of them."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from whaleflux import frontdoor
from whaleflux.errors import InvalidArgument
from whaleflux.frontdoor import http_paths
from whaleflux.frontdoor.headers import HTTP_PASSED, everything_but
from whaleflux.frontdoor.http_paths import ANY_ENGINE, HTTP_PATHS, MALFORMED_KEY, NO_KEY, TO_ENGINES
from whaleflux.manifests import model_fields

CONFIG = json.loads(frontdoor.render(frontdoor.deployed()))
LISTENERS = {one["name"]: one for one in CONFIG["static_resources"]["listeners"]}


REFUSING = {NO_KEY, MALFORMED_KEY}


def manager(name):
    (found,) = (
        f["typed_config"] for f in LISTENERS[name]["filter_chains"][0]["filters"] if "http_connection" in f["name"]
    )
    return found


def routes():
    return manager("http")["route_config"]["virtual_hosts"][0]["routes"]


def test_every_row_of_the_table_is_a_route_and_there_is_no_other():
    *known, last = routes()
    known = [route for route in known if route["name"] not in REFUSING]
    assert [route["name"] for route in known] == [f"{row.method} {row.path}" for row in HTTP_PATHS]
    assert (last["match"], last["direct_response"]["status"]) == ({"prefix": "/"}, 404)
    for row, route in zip(HTTP_PATHS, known, strict=True):
        assert route["match"]["path_separated_prefix" if row.below else "path"] == row.path, "whole paths, no prefixes"
        assert route["match"]["headers"][0]["string_match"]["exact"] == row.method
        assert row.who in {"app", "anyone"}
        assert row.whose in {"fleet", "model", "leaves out"}


def test_who_has_no_key_reaches_only_what_is_anyones():
    """A route asks both filters, or is answered by the policy that asks for the key itself, or is open to all."""
    refused = [route for route in routes() if route["name"] in REFUSING]
    assert routes()[: len(refused)] == refused, "they come first"
    assert Counter(
        route["match"]["headers"][0]["string_match"]["exact"]
        + " "
        + (route["match"].get("path") or route["match"]["path_separated_prefix"])
        for route in refused
    ) == {f"{row.method} {row.path}": 2 for row in HTTP_PATHS if row.who == "app"}
    assert {route["direct_response"]["status"] for route in refused} == {401}
    for row, route in zip(HTTP_PATHS, routes()[len(refused) :], strict=False):
        asks = "typed_per_filter_config" not in route
        if row.who == "anyone":
            assert "direct_response" in route
        elif row.engines:
            assert asks
            assert route["route"]["cluster"] == "replicas"
            assert {"authorization", "x-forwarded-for"} <= set(route["request_headers_to_remove"])
        else:
            assert route["route"]["cluster"] == "policy"


def test_where_no_key_is_asked_for_nobody_is_refused_for_having_none():
    layers = [
        json.loads(frontdoor.render(replace(frontdoor.deployed(), open_access=open_access)))
        for open_access in (False, True)
    ]
    needed = [one["layered_runtime"]["layers"][0]["static_layer"]["whaleflux.key_needed"] for one in layers]
    assert needed == [100, 0]
    assert {r["match"]["runtime_fraction"]["runtime_key"] for r in routes() if r["name"] in REFUSING} == {
        "whaleflux.key_needed"
    }


def test_the_key_is_asked_for_before_any_body_is_kept():
    names = [one["name"] for one in manager("http")["http_filters"]]
    assert names.index("whaleflux.key") < names.index("envoy.filters.http.ext_authz")
    key, body = (
        one["typed_config"] for one in manager("http")["http_filters"] if "ExtAuthz" in one["typed_config"]["@type"]
    )
    assert "with_request_body" not in key
    assert body["with_request_body"]["max_request_bytes"] == frontdoor.MAX_BODY_BYTES
    assert key["http_service"]["path_prefix"] == frontdoor.KEY_PREFIX
    assert LISTENERS["http"]["per_connection_buffer_limit_bytes"] <= 64 << 10, "what comes before the key is known"


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_each_listener_is_bounded_before_anything_is_known_of_the_caller(name):
    limits, told = frontdoor.FrontDoorLimits(), manager(name)
    assert LISTENERS[name]["filter_chains"][0]["filters"][0]["typed_config"]["max_connections"] > 0
    assert told["request_headers_timeout"] == f"{limits.headers_s:g}s"
    assert told["max_request_headers_kb"] == limits.header_kib
    assert told["common_http_protocol_options"]["max_headers_count"] == limits.header_count
    assert told["use_remote_address"] is True
    assert told["xff_num_trusted_hops"] == 0
    assert told["http2_protocol_options"]["max_concurrent_streams"] > 0
    assert told["http_filters"][0]["name"] == "envoy.filters.http.header_mutation"


def test_the_heap_is_bounded_below_what_deployments_give():
    (heap,) = (m for m in CONFIG["overload_manager"]["resource_monitors"] if "fixed_heap" in m["name"])
    assert heap["typed_config"]["max_heap_size_bytes"] < 512 << 20


@pytest.mark.parametrize(
    "path", ["load_lora_adapter", "unload_lora_adapter", "metrics", "chat/completions/../metrics", "models/a/b", ""]
)
def test_an_engines_own_switches_are_no_paths(path):
    assert http_paths.find("POST", f"/v1/{path}") is None
    assert http_paths.find("GET", f"/v1/{path}") is None


def test_paths_are_found_by_their_method():
    assert http_paths.find("POST", "/v1/chat/completions") is TO_ENGINES["/v1/chat/completions"]
    assert http_paths.find("GET", "/v1/chat/completions") is None
    assert http_paths.find("GET", "/v1/models/m") is http_paths.find("GET", "/v1/models")
    assert http_paths.find("GET", "/v1/modelsx") is None


def test_engines_of_the_table_are_those_of_model_files():
    assert frozenset(model_fields.ENGINES) == ANY_ENGINE
    assert all(row.engines <= ANY_ENGINE for row in HTTP_PATHS)
    assert all("/v1/chat/completions" in http_paths.engine_paths(kind) for kind in ANY_ENGINE)


def test_all_headers_but_the_listed_ones_match_the_pattern_of_what_is_stripped():
    stripped = re.compile(everything_but(HTTP_PASSED))
    assert [name for name in HTTP_PASSED if stripped.fullmatch(name)] == []
    for name in HTTP_PASSED:
        for other in (name[:-1], f"{name}x", f"x-{name}", name[1:], name.replace("-", "_", 1)):
            assert (other in HTTP_PASSED) or stripped.fullmatch(other), other
    for name in ("x-data-parallel-rank", "x-forwarded-for", "x-envoy-max-retries", "cookie", "x-wf-decision-id"):
        assert stripped.fullmatch(name)


def test_limits_come_from_variables_and_what_is_none_is_refused():
    told = {"WHALEFLUX_FRONTDOOR_TRUSTED_HOPS": "2", "WHALEFLUX_FRONTDOOR_UPLOAD_S": "1.5", "PATH": "/bin"}
    limits = frontdoor.limits_from(told)
    assert (limits.trusted_hops, limits.upload_s) == (2, 1.5)
    assert limits.heap_bytes == frontdoor.FrontDoorLimits().heap_bytes
    front = replace(frontdoor.deployed(), limits=limits)
    assert '"xff_num_trusted_hops": 2' in frontdoor.render(front)
    for name, value in (("HEAP", "1"), ("HEAP_BYTES", "much"), ("HEAP_BYTES", "0"), ("UPLOAD_S", "nan")):
        with pytest.raises(InvalidArgument, match=f"WHALEFLUX_FRONTDOOR_{name}"):
            frontdoor.limits_from({f"WHALEFLUX_FRONTDOOR_{name}": value})
