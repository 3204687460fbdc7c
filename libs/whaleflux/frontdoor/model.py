"""What the front door is made from: services by path, limits, addresses, certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from whaleflux import hostport, ports
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.ports import Party
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.services import FRONTDOOR_GRPC_PORT, FRONTDOOR_HTTP_PORT, GRPC_PORT, POLICY_HOST, SERVICES

NO_REPLICA_STATUS = 424  # the policy's word for 503: Envoy takes a 5xx of the policy for its failure and drops the body
KEY_PATTERN = "wf-[A-Za-z0-9_-]{43}"  # of every key that the router makes; what is none is refused without asking it
KEY_ADVICE = "this API needs a key: Authorization: Bearer <key>; make one with: whaleflux keys create"
KEY_NEEDED = "whaleflux.key_needed"  # percent of requests; 0 where the router has open_access
KEY_PREFIX = "/key"  # before the path, where the policy is asked about the key alone
MAX_BODY_BYTES = 16 << 20  # of an inference request; more is answered with 413


@dataclass(frozen=True, slots=True)
class FrontDoorLimits:
    """Bounds of the front door, most of them before anything is known of who calls."""

    heap_bytes: int = (
        384 << 20
    )  # of Envoy; close to it requests are refused and the largest ended. Below deploy's limit of 512 MiB
    http_connections: int = 4096  # to the inference API
    grpc_connections: int = 20_000  # agents hold three each
    http_streams: int = 128  # requests at a time on one HTTP/2 connection
    grpc_streams: int = 1024
    header_kib: int = 16
    header_count: int = 64
    headers_s: float = 10.0  # for a TLS handshake, and for the headers of a request
    upload_s: float = 300.0  # for a whole request: 16 MiB at 56 KB/s
    idle_connection_s: float = 300.0  # without a request, at the inference API
    connection_s: float = 3600.0  # then it ends after the answers under way, at the inference API
    connection_buffer_bytes: int = (
        32 << 10
    )  # of one direction of one connection, beside a body whose key was found good
    trusted_hops: int = 0  # load balancers in front that append to x-forwarded-for


LIMIT_PREFIX = "WHALEFLUX_FRONTDOOR_"


def limits_from(environ: Mapping[str, str]) -> FrontDoorLimits:
    """The limits with those that variables set, as WHALEFLUX_FRONTDOOR_TRUSTED_HOPS=1. Raises InvalidArgument for what is no limit."""
    defaults = asdict(FrontDoorLimits())
    chosen = dict(defaults)
    for variable in (name for name in environ if name.startswith(LIMIT_PREFIX)):
        limit = variable.removeprefix(LIMIT_PREFIX).lower()
        if limit not in defaults:
            known = ", ".join(LIMIT_PREFIX + name.upper() for name in defaults)
            raise InvalidArgument(FieldViolation(variable, f"is no limit of the front door; those are {known}"))
        kind, least = type(defaults[limit]), 0 if limit == "trusted_hops" else 1
        try:
            chosen[limit] = kind(environ[variable])
        except ValueError:
            chosen[limit] = -1
        if not least <= chosen[limit] < 2**40:
            raise InvalidArgument(
                FieldViolation(variable, f"{environ[variable][:40]!r} is not a number of {least} or more")
            )
    return FrontDoorLimits(**chosen)


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
    drains: bool = False  # its admin port takes the order to drain; only where its loopback is nobody else's
    limits: FrontDoorLimits = field(default_factory=FrontDoorLimits)
    secrets: str = ""  # file with `render_secrets`: Envoy takes up renewed certificates; "": read once, at the start
    public: TlsFiles | None = None  # what the inference API shows; None: it is plain, which is for loopback alone
    open_access: bool = False  # as the router's setting: who shows no key is put before the policy, not refused here
    public_secrets: str = ""  # file with `render_public_secrets`, as `secrets`

    def __post_init__(self) -> None:
        if self.public is None and not hostport.is_loopback(self.listen_host):
            raise InvalidArgument(
                FieldViolation(
                    "listen_host", f"{self.listen_host} is not loopback: the inference API needs a certificate"
                )
            )


def deployed() -> FrontDoor:
    """As in deploy/: every service under its own host name, certificates where a volume or a Secret puts them."""
    return FrontDoor(
        grpc_port=FRONTDOOR_GRPC_PORT,
        http_port=FRONTDOOR_HTTP_PORT,
        admin_port=ports.number(Party.FRONTDOOR, "admin"),
        tls=TlsFiles.under(Path("/identity"), "service"),
        upstreams={service.role: f"{service.host}:{GRPC_PORT}" for service in SERVICES},
        policy=next(f"{POLICY_HOST}:{s.http['policy_listen']}" for s in SERVICES if "policy_listen" in s.http),
        listen_host="0.0.0.0",
        drains=True,
        secrets="/etc/envoy/secrets.yaml",
        # Another folder, so that an operator can put a certificate there that clients know without our authority.
        public=TlsFiles.under(Path("/public"), "service"),
        public_secrets="/etc/envoy/public.yaml",
    )
