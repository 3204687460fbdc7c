"""Which headers of a client go on: those listed here. Everything else is stripped.

So a header that some engine or proxy heeds (`x-data-parallel-rank`, `x-envoy-*`, a forged `x-forwarded-for`) is not there to be heeded.
Envoy removes headers that match a pattern, and its patterns (RE2) cannot say "none of these": the pattern of everything else is made from
the list, letter by letter.
"""

from __future__ import annotations

import re
from typing import Any

from whaleflux.frontdoor.parts import TYPE, URL
from whaleflux.rpc.auth import CERTIFICATE_END, CLIENT_ADDRESS

__all__ = ["CLIENT_ADDRESS", "GRPC_STRIPPED", "HTTP_PASSED", "everything_but", "grpc_headers", "http_headers"]
# What a client says of its request and of the answer that it wants.
HTTP_PASSED = (
    "accept", "accept-encoding", "accept-language", "authorization", "content-encoding", "content-length", "content-type", "te",
    "transfer-encoding", "user-agent", "traceparent", "tracestate", "idempotency-key", "openai-beta", "anthropic-version", "anthropic-beta",
    # made anew by Envoy before this filter, whatever the client sent
    "x-request-id", "x-forwarded-proto",
    ":method", ":path", ":authority", ":scheme",
)  # fmt: skip
GRPC_STRIPPED = ("x-envoy-", "x-wf-", "x-forwarded-for", "forwarded", "x-real-ip", "x-request-id")


def http_headers() -> dict[str, Any]:
    """The filter of the inference API: an allow list."""
    rest = {"safe_regex": {"regex": everything_but(HTTP_PASSED)}}
    return _mutation([{"remove_on_match": {"key_matcher": rest}}, _address()])


def grpc_headers() -> dict[str, Any]:
    """The filter of the gRPC door. Metadata is the contract's, and bounded; what Envoy would heed is stripped."""
    gone = [{"remove_on_match": {"key_matcher": {"prefix": name, "ignore_case": True}}} for name in GRPC_STRIPPED]
    return _mutation([*gone, _address(), _set(CERTIFICATE_END, "%DOWNSTREAM_PEER_CERT_V_END(%s)%")])


def everything_but(names: tuple[str, ...]) -> str:
    """A pattern that matches, as a whole, every text but these."""
    return _other_than(set(names))


def _other_than(names: set[str]) -> str:
    """Of what may follow a common beginning: another letter and anything behind it, one of the letters and not its rest, or nothing."""
    letters = sorted({name[0] for name in names if name})
    ways = [f"[^{re.escape(''.join(letters))}].*"] if letters else [".+"]
    for letter in letters:
        rest = _other_than({name[1:] for name in names if name[:1] == letter})
        ways.append(re.escape(letter) + rest)
    if "" not in names:
        ways.append("")
    return f"(?:{'|'.join(ways)})"


def _address() -> dict[str, Any]:
    return _set(CLIENT_ADDRESS, "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%")


def _set(key: str, value: str) -> dict[str, Any]:
    return {"append": {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}


def _mutation(mutations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": {
            TYPE: URL + "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            "mutations": {"request_mutations": mutations},
        },
    }
