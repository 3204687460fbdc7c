"""Envoy as the one front door: its configuration, its command line, and how to tell that it is ready.

Two listeners. The gRPC one speaks TLS, verifies a client's certificate when one is shown, and forwards its identity
(x-forwarded-client-cert, sanitised and set) to the service that the path names. The HTTP one serves the OpenAI API: each
request is put before the router's policy, its headers first and then its whole body (ext_authz), which answers with the ranked addresses of
replicas; `override_host` tries them in that order until one has begun to answer. Replicas arrive by EDS from the router
and stay when it is away. How each request ended goes back to the router as access-log records.

Envoy 1.40. `make generate` writes the files that deploy/ uses.
"""

from whaleflux.frontdoor.config import render, render_public_secrets, render_secrets
from whaleflux.frontdoor.model import (
    KEY_ADVICE,
    KEY_PATTERN,
    KEY_PREFIX,
    MAX_BODY_BYTES,
    NO_REPLICA_STATUS,
    FrontDoor,
    FrontDoorLimits,
    deployed,
    limits_from,
)
from whaleflux.frontdoor.process import command, program, wait_ready

__all__ = [
    "KEY_ADVICE",
    "KEY_PATTERN",
    "KEY_PREFIX",
    "MAX_BODY_BYTES",
    "NO_REPLICA_STATUS",
    "FrontDoor",
    "FrontDoorLimits",
    "command",
    "deployed",
    "limits_from",
    "program",
    "render",
    "render_public_secrets",
    "render_secrets",
    "wait_ready",
]
